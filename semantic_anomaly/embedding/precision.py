"""Choose precision and execution of the backbones by measurement, once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from semantic_anomaly.embedding.backbone import PatchEmbedder
from semantic_anomaly.embedding.execution import REFERENCE, Pair, candidates
from semantic_anomaly.embedding.pretrained import choose_device
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import PatchGrid

# Largest shift as a share of the median nominal distance: far below what separates patches.
_ALLOWED_SHARE = 0.1
_ROUNDS = 5
# Below this there is nothing to gain, and what is not faster by this share is not worth a change.
_FAST_MS = 5.0
_GAIN = 0.1
# An emulated precision may take a hundred times as long.
_HOPELESS = 3.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Trial:
    """A pair that was run on the images.

    Attributes:
        ms: median time of a frame.
        shift: largest ratio over the stages of the shift to the shift allowed.
    """

    pair: Pair
    ms: float
    shift: float

    def __str__(self) -> str:
        text = f"{self.pair[0]} by {self.pair[1]} {self.ms:.1f} ms"
        return text if self.shift <= 1 else f"{text} (shifts {self.shift:.1f} times too much)"


def choose_precision(
    settings: Settings,
    images: Sequence[np.ndarray],
    nominal_distances: Callable[[Sequence[PatchGrid]], Sequence[float]],
    preferred: Pair | None = None,
) -> Settings:
    """Return settings with the fastest precision and execution whose embeddings are the same.

    All candidates run in turn on the same images, so that a busy machine slows all of them. Allowed
    are shifts, in cosine distance to float32 by torch and for 95 % of the patches, up to a tenth of
    the median nominal distance of a stage. What was chosen, and why, is logged in one line.

    Args:
        settings: `dtype` and `execution` limit the choice unless they are auto; both given: nothing
            is measured.
        images: nominal frames, (height, width, 3) uint8 RGB; the size of the first is timed.
        nominal_distances: returns the median nominal distance of each stage, from the patch grids
            of the images.
        preferred: taken if it is allowed and nothing is faster by 10 %; None: the reference.

    Raises:
        BackboneError: a backbone cannot be loaded.
        ModelOutputError: a network failed.
    """
    if "auto" not in (settings.dtype, settings.execution):
        return settings
    pairs = [
        pair
        for pair in candidates(choose_device(settings.device))
        if settings.dtype in ("auto", pair[0]) and settings.execution in ("auto", pair[1])
    ]
    images = [image for image in images if image.shape == images[0].shape]
    if not pairs or not images:
        # Loading then says what is missing.
        return settings
    trials = []
    if len(pairs) > 1:
        trials = _trials(settings, pairs, images, nominal_distances)
    allowed = [trial for trial in trials if trial.shift <= 1]
    if not allowed:
        dtype, execution = pairs[0]
        return settings.replace(dtype=dtype, execution=execution)
    by_pair = {trial.pair: trial for trial in allowed}
    chosen = by_pair.get(preferred or REFERENCE, allowed[0])
    best = min(allowed, key=lambda trial: trial.ms)
    if chosen.ms > _FAST_MS and best.ms < (1 - _GAIN) * chosen.ms:
        chosen = best
    _LOG.info(
        "backbones run in %s, of %s for a frame of %d x %d pixels",
        f"{chosen.pair[0]} by {chosen.pair[1]}",
        ", ".join(map(str, trials)),
        *images[0].shape[1::-1],
    )
    return settings.replace(dtype=chosen.pair[0], execution=chosen.pair[1])


def _trials(
    settings: Settings,
    pairs: Sequence[Pair],
    images: Sequence[np.ndarray],
    nominal_distances: Callable[[Sequence[PatchGrid]], Sequence[float]],
) -> list[_Trial]:
    """Return the trials of the pairs that are not hopelessly slow."""
    with ExitStack() as stack:

        def load(pair: Pair) -> PatchEmbedder:
            chosen = settings.replace(dtype=pair[0], execution=pair[1])
            return stack.enter_context(closing(PatchEmbedder.from_settings(chosen)))

        reference = load(REFERENCE)
        expected = [reference.embed([image])[0] for image in images]
        limits = [_ALLOWED_SHARE * distance for distance in nominal_distances(expected)]
        shifts: dict[Pair, float] = {}
        embedders: dict[Pair, PatchEmbedder] = {}
        slowest_ms = _HOPELESS * _timed_ms(reference, images[0])
        for pair in pairs:
            embedder = reference if pair == REFERENCE else load(pair)
            # The first run of a size prepares it.
            embedder.embed(images[:1])
            if _timed_ms(embedder, images[0]) > slowest_ms:
                continue
            grids = [embedder.embed([image])[0] for image in images]
            shifts[pair] = 0.0 if pair == REFERENCE else _shift(grids, expected, limits)
            embedders[pair] = embedder
        times_ms = [
            [_timed_ms(embedder, images[0]) for embedder in embedders.values()]
            for _ in range(_ROUNDS)
        ]
        medians_ms = np.median(np.array(times_ms).reshape(_ROUNDS, -1), axis=0)
        return [
            _Trial(pair, float(ms), shifts[pair])
            for pair, ms in zip(embedders, medians_ms, strict=True)
        ]


def _timed_ms(embedder: PatchEmbedder, image: np.ndarray) -> float:
    begin = time.perf_counter()
    embedder.embed([image])
    return (time.perf_counter() - begin) * 1e3


def _shift(
    grids: Sequence[PatchGrid], expected: Sequence[PatchGrid], limits: Sequence[float]
) -> float:
    """Return the largest ratio over the stages of the shift to its limit."""
    ratios = []
    for number, limit in enumerate(limits):
        shifts = [
            1 - np.einsum("rcd,rcd->rc", g.stages[number].features, e.stages[number].features)
            for g, e in zip(grids, expected, strict=True)
        ]
        # Rounding leaves shifts below 0.
        shift = max(0.0, float(np.quantile(np.concatenate(shifts, axis=None), 0.95)))
        ratios.append(shift / limit if limit > 0 else np.inf)
    return max(ratios)
