"""Data types shared by all sub-packages: frozen, validated on construction.

A *distance* is the cosine distance of an embedding to the nearest nominal entries. A *score*
aggregates standardised distances: it counts deviations of nominal distances. A *decision* compares
a score with a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from semantic_anomaly.errors import ImageError, ModelOutputError

UNIT_NORM_TOLERANCE = 1e-3


class Decision(str, Enum):
    """State of a frame; `unknown` if it was not computed or there is no threshold."""

    NOMINAL = "nominal"
    ANOMALY = "anomaly"
    UNKNOWN = "unknown"


class ComponentState(str, Enum):
    """Whether a component was seen in enough frames to count as an anomaly."""

    CANDIDATE = "candidate"
    CONFIRMED = "confirmed"


def check_rgb(image: np.ndarray, name: str) -> None:
    """Raise ImageError unless an image is non-empty (height, width, 3) uint8; `name` is shown."""
    shape, dtype = image.shape, image.dtype
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
        raise ImageError(
            f"{name}: expected a non-empty (height, width, 3) uint8 RGB image, "
            f"found shape {shape}, {dtype}"
        )


@dataclass(frozen=True, eq=False)
class Frame:
    """One camera image with the stamp and frame id of its outputs.

    Attributes:
        image: (height, width, 3) uint8, RGB.
        stamp_ns: stamp of the camera in nanoseconds.
        frame_id: name of the optical frame, may be empty.
        name: identifies the frame for people: file name, or bag and message number.
        decode_ms: milliseconds that decoding the image took, 0 if it was there.
        recording: name of the recording that it is a part of; empty if unknown.

    Raises:
        ImageError: wrong shape or dtype, or an empty image.
    """

    image: np.ndarray
    stamp_ns: int = 0
    frame_id: str = ""
    name: str = ""
    decode_ms: float = 0.0
    recording: str = ""

    def __post_init__(self) -> None:
        check_rgb(self.image, f"frame '{self.name}'")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """Patch embeddings of one image; the grid covers the whole image, with one scale per axis.

    It is the grid of the first stage, and holds those of the further stages.

    Attributes:
        features: (rows, cols, dim) float32, unit norm.
        image_hw: (height, width) in pixels of the image before it was resized.
        instances: (n, rows, cols) float32 in [0, 1], share of each patch covered by each instance;
            None for a stage of patches, or if the image was not segmented.
        further: grids of the further stages of the image.

    Raises:
        ModelOutputError: wrong shape or dtype, not finite, not of unit norm, an instance without
            any patch, or a further grid of another image size.
    """

    features: np.ndarray
    image_hw: tuple[int, int]
    instances: np.ndarray | None = None
    further: tuple[PatchGrid, ...] = ()

    def __post_init__(self) -> None:
        shape, dtype = self.features.shape, self.features.dtype
        if len(shape) != 3 or 0 in shape or dtype != np.float32:
            raise ModelOutputError(
                "patch features: expected non-empty (rows, cols, dim) float32, "
                f"found shape {shape}, {dtype}"
            )
        squares = np.einsum("rcd,rcd->rc", self.features, self.features)  # (rows, cols)
        # NaN fails the comparison.
        if not np.all(np.abs(squares - 1.0) <= 2 * UNIT_NORM_TOLERANCE):
            raise ModelOutputError(
                "patch features: expected finite unit vectors, found squared norms from "
                f"{squares.min():.4g} to {squares.max():.4g}"
            )
        if min(self.image_hw) < 1:
            raise ModelOutputError(f"image size: expected positive, found {self.image_hw}")
        if any(grid.image_hw != self.image_hw or grid.further for grid in self.further):
            raise ModelOutputError(
                f"further stages: expected grids of an image of {self.image_hw}, found "
                f"{[grid.image_hw for grid in self.further]}"
            )
        shares = self.instances
        if shares is not None:
            if shares.ndim != 3 or shares.shape[1:] != shape[:2] or shares.dtype != np.float32:
                raise ModelOutputError(
                    f"instances: expected (n, {shape[0]}, {shape[1]}) float32, "
                    f"found shape {shares.shape}, {shares.dtype}"
                )
            if not (np.all((shares >= 0.0) & (shares <= 1.0)) and shares.any(axis=(1, 2)).all()):
                raise ModelOutputError("instances: expected shares in [0, 1], some above 0")

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Return (rows, cols)."""
        return self.features.shape[0], self.features.shape[1]

    @property
    def stages(self) -> tuple[PatchGrid, ...]:
        """Return the grids of all stages, in order."""
        return self, *self.further

    @property
    def dim(self) -> int:
        """Return the dimension of the embeddings."""
        return int(self.features.shape[2])


@dataclass(frozen=True)
class NominalExample:
    """Origin of the index entry nearest to an embedding.

    Attributes:
        frame: name of the nominal frame.
        row, col: patch in the grid of that frame.
        grid_hw: (rows, cols) of that grid.
        distance: cosine distance in [0, 2].
        stage: number of the stage that has the entry, from 0.
    """

    frame: str
    row: int
    col: int
    grid_hw: tuple[int, int]
    distance: float
    stage: int = 0


@dataclass(frozen=True)
class Localization:
    """One connected component of the anomaly map above the threshold.

    Attributes:
        box_xyxy: left, top, right, bottom in pixels; right and bottom exclusive.
        centroid_xy: in pixels.
        area_px: number of pixels above the threshold.
        score: largest value of the anomaly map inside.
        nearest: nominal example nearest to the patch with that value, in the stage that adds most
            to it.
        label: label of the component in `AnomalyResult.label_map`, from 1.
        state: whether its track was seen in enough frames.
        track: track number, constant over frames; 0 without a track.

    Raises:
        ModelOutputError: an empty box, or a score that is not finite.
    """

    box_xyxy: tuple[float, float, float, float]
    centroid_xy: tuple[float, float]
    area_px: int
    score: float
    nearest: NominalExample
    label: int
    state: ComponentState = ComponentState.CONFIRMED
    track: int = 0

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.box_xyxy
        if not (x0 < x1 and y0 < y1 and math.isfinite(self.score)):
            raise ModelOutputError(
                f"localization: expected a non-empty box and a finite score, found "
                f"{self.box_xyxy} and {self.score}"
            )


@dataclass(frozen=True)
class HeatmapScale:
    """Scale of drawn heatmaps, the same for all frames.

    Attributes:
        low: value drawn as 0, typical of nominal patches.
        high: value drawn as 1, the threshold if there is one.
        source: origin of the scale, shown in titles.

    Raises:
        ModelOutputError: not finite, or not low < high.
    """

    low: float
    high: float
    source: str = "calibration"

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ModelOutputError(f"heatmap scale: expected low < high, found {self}")

    @classmethod
    def from_typical(cls, typical: float, high: float, source: str = "calibration") -> HeatmapScale:
        """Return the scale from a typical value to `high`, a threshold or the like.

        A threshold set by hand may be at the typical value or below it: the scale then begins one
        deviation below the threshold.
        """
        return cls(typical if typical < high else high - 1.0, high, source)

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """Return max(0, (values - low) / (high - low)), float32 of the same shape."""
        scaled = (values - np.float32(self.low)) * np.float32(1.0 / (self.high - self.low))
        return np.maximum(scaled, 0.0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class AnomalyResult:
    """Result of one frame.

    Attributes:
        score: anomaly score, mean of the largest values of the anomaly map.
        decision: `unknown` without a threshold, or of a blind camera.
        p_value: least false-alarm rate whose threshold the score exceeds, in [0, 1]; None without a
            calibration.
        threshold: score above which a frame is anomalous, calibrated or set; None without.
        heatmap: (height, width) float32, anomaly map at every pixel; the low end of the scale
            outside the region of interest.
        scale: scale on which the heatmap is drawn.
        label_map: (height, width) uint16 labels of the localizations, 0 elsewhere.
        localizations: largest score first; empty unless the score exceeds the threshold. A
            confirmed one makes the decision `anomaly`.
        stage_ms: milliseconds by processing stage: decode, prepare, forward, segment (if there are
            stages of instances), search, score, localize; and their total.
        reason: why the decision is `unknown`, empty otherwise.
        coarse: whether localizations and heatmap come from upper bounds of distances, because
            more than 5 % of the patches exceed the threshold; score and decision are exact.
        drift: whether the scores of the last frames are unlike those of the calibration.
        blind: whether the camera sees nothing: a frozen or covered one.
        stage_scores: score of each stage by its name, in deviations of nominal distances; empty
            for one stage.

    Raises:
        ModelOutputError: a score that is not finite, a decision without a threshold, or `unknown`
            without a reason.
    """

    score: float
    decision: Decision
    p_value: float | None
    threshold: float | None
    heatmap: np.ndarray
    scale: HeatmapScale
    label_map: np.ndarray
    localizations: tuple[Localization, ...] = ()
    stage_ms: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    stage_scores: Mapping[str, float] = field(default_factory=dict)
    coarse: bool = False
    drift: bool = False
    blind: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise ModelOutputError(f"score: expected a finite number, found {self.score}")
        if self.decision is not Decision.UNKNOWN and self.threshold is None:
            raise ModelOutputError(f"decision '{self.decision.value}' needs a threshold")
        if self.decision is Decision.UNKNOWN and not self.reason:
            raise ModelOutputError("decision 'unknown' needs a reason")
