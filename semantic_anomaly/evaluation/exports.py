"""The measures of `evaluate` for exported score maps of any method: `<stem>.npy` files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation import extras, provenance
from semantic_anomaly.evaluation.checkpoint import report_folder, write_json
from semantic_anomaly.evaluation.components import SizeLimits
from semantic_anomaly.evaluation.datasets import IGNORE, FrameTruth, read_json
from semantic_anomaly.evaluation.layouts import Dataset
from semantic_anomaly.evaluation.metrics import (
    PixelGroups,
    component_measures,
    dataset_measures,
    truth_row,
)
from semantic_anomaly.scoring.anomaly_map import tail_mean

RESULTS = "results.json"
WRITTEN = frozenset({RESULTS})


class MapFolder:
    """Score maps of a dataset: `<stem>.npy`, (height, width) floats, higher is more anomalous.

    Args:
        dataset: every frame with pixel labels must have a map; others may.

    Attributes:
        sha256: digest of all maps used.
        truths: ground truth of the frames with a map.

    Raises:
        InputError: a map is missing, cannot be read, has another shape or dtype, or is not finite.
    """

    def __init__(self, path: Path, dataset: Dataset, progress: bool = False) -> None:
        self._path, self._dataset = path, dataset
        self.truths = [truth for truth in dataset.truths if self._file(truth).is_file()]
        missing = [t.file for t in dataset.truths if t.has_pixels and t not in self.truths]
        if missing or not self.truths:
            named = ", ".join(missing[:5]) or "every frame"
            raise InputError(f"maps '{path}': expected <stem>.npy for each frame, none for {named}")
        digest = hashlib.sha256()
        hide = None if progress else True
        for truth in tqdm(self.truths, "read maps", unit="map", disable=hide):
            values = self.raw(truth)
            digest.update(truth.file.encode())
            digest.update(values.tobytes())
        self.sha256 = digest.hexdigest()

    def _file(self, truth: FrameTruth) -> Path:
        return self._path / f"{truth.stem}.npy"

    def raw(self, truth: FrameTruth) -> np.ndarray:
        """Return a map with its original values, (height, width) float32."""
        file = self._file(truth)
        try:
            values = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"map '{file}' cannot be read: {error}") from error
        if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f":
            kind = f"{getattr(values, 'shape', '')} {getattr(values, 'dtype', type(values))}"
            raise InputError(f"map '{file}': expected (height, width) of floats, found {kind}")
        values = values.astype(np.float32)
        if not values.size or not np.isfinite(values).all():
            raise InputError(f"map '{file}': expected finite numbers, found others or an empty map")
        return values

    def labelled(self) -> Iterator[tuple[FrameTruth, np.ndarray, np.ndarray]]:
        """Yield truth, map and labels of every frame with a map."""
        for truth in self.truths:
            values = self.raw(truth)
            yield truth, values, self._dataset.labels(truth, values.shape)


def score_maps(
    maps: MapFolder,
    dataset: Dataset,
    out: Path,
    *,
    limits: SizeLimits,
    scores: Mapping[str, float] | None = None,
    threshold: float | None = None,
    pixel_threshold: float | None = None,
    tail_percent: float = 1.0,
    protocol: str = "",
    progress: bool = False,
) -> dict[str, Any]:
    """Compute the measures of `evaluate` for maps, write results.json, and return its content.

    Args:
        dataset: images with ground truth; pixels with 255 in the masks are not counted.
        out: folder to write; an earlier report of maps is replaced.
        scores: frame scores by file name; None: the mean of the largest `tail_percent` of a map.
        threshold: threshold of the frame scores, or None.
        pixel_threshold: threshold of the maps, for the measures named 'calibrated'.
        tail_percent: percentage of the counted pixels, in (0, 100].
        protocol: name of the protocol as in `evaluate`; empty: not stated.

    Raises:
        InputError: a map or mask cannot be used, or a frame has no score.
    """
    extras.require("sklearn.metrics")
    pixels, rows = PixelGroups(), []
    disable = None if progress else True
    bar = tqdm(maps.labelled(), "measure", len(maps.truths), unit="map", disable=disable)
    with report_folder(out, RESULTS, WRITTEN) as folder:
        for truth, values, labels in bar:
            pixels.add(truth, values, labels)
            counted = values[labels != IGNORE]
            if scores is None:
                score = float(tail_mean(counted if counted.size else values.ravel(), tail_percent))
            elif truth.file in scores:
                score = scores[truth.file]
            else:
                raise InputError(
                    f"scores: expected one for every frame, found none for '{truth.file}'"
                )
            rows.append({**truth_row(truth), "score": score})
        oracle = pixels.all().oracle_threshold()
        pairs = ((values, labels) for truth, values, labels in maps.labelled() if truth.has_pixels)
        thresholds = {"oracle": oracle, "calibrated": pixel_threshold}
        results = {
            "dataset": dataset.name,
            "protocol": protocol or None,
            **dataset_measures(rows, pixels, threshold),
            "frame_score": "given" if scores else f"mean of the largest {tail_percent:g} % pixels",
            **component_measures(pairs, limits, thresholds),
            "maps_sha256": maps.sha256,
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "frames": rows,
        }
        write_json(folder / RESULTS, results)
    return results


def read_scores(path: Path) -> dict[str, float]:
    """Return frame scores by file name, from a results.json or a JSON object.

    Raises:
        InputError: it cannot be read, or has no scores.
    """
    content = read_json(path, "scores")
    if isinstance(content, dict) and isinstance(content.get("frames"), list):
        rows = [row for row in content["frames"] if isinstance(row, dict)]
        content = {row.get("name"): row.get("score") for row in rows}
    numbers = isinstance(content, dict) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
        for v in content.values()
    )
    if not numbers or not content:
        raise InputError(f"scores '{path}': expected finite scores by file name, or a results.json")
    return {str(name): float(value) for name, value in content.items()}
