"""The nouns that every room speaks: frozen, and checked when made.

Grids are (rows, cols), images (height, width), boxes xyxy in pixels. A *distance* is the cosine
distance of one embedding to the nominal ones, a *score* is what aggregation makes of distances,
a *decision* is a score against a calibrated threshold.
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
    """What the monitor says of a frame; `unknown` whenever it could not compute or compare."""

    NOMINAL = "nominal"
    ANOMALY = "anomaly"
    UNKNOWN = "unknown"


class ComponentState(str, Enum):
    """Whether a component has been seen often enough."""

    CANDIDATE = "candidate"
    CONFIRMED = "confirmed"


@dataclass(frozen=True, eq=False)
class Frame:
    """One camera image with the stamp and frame id that its outputs will carry.

    Attributes:
        image: (height, width, 3) uint8, RGB.
        stamp_ns: nanoseconds of the camera's stamp.
        frame_id: name of the optical frame, may be empty.
        name: how people find the frame again: file name, or bag and number.

    Raises:
        ImageError: another shape or dtype, or an empty image.
    """

    image: np.ndarray
    stamp_ns: int = 0
    frame_id: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        shape, dtype = self.image.shape, self.image.dtype
        if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
            raise ImageError(
                f"frame '{self.name}': expected a non-empty (height, width, 3) uint8 RGB image, "
                f"found shape {shape}, {dtype}"
            )

    @property
    def image_hw(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """The patch embeddings of one image; the grid covers the whole image by one ratio a side.

    Attributes:
        features: (rows, cols, dim) float32, unit norm.
        global_feature: (dim,) float32, unit norm: class token, or mean of the patches.
        image_hw: (height, width) in pixels of the image before any resize.
        instances: (n, rows, cols) float32 in [0, 1], the share of each patch that each instance
            covers; None where nothing was segmented.

    Raises:
        ModelOutputError: wrong shape or dtype, not finite, not of unit norm, or an instance that
            covers nothing.
    """

    features: np.ndarray
    global_feature: np.ndarray
    image_hw: tuple[int, int]
    instances: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape, dtype = self.features.shape, self.features.dtype
        if len(shape) != 3 or 0 in shape or dtype != np.float32:
            raise ModelOutputError(
                "patch features: expected non-empty (rows, cols, dim) float32, "
                f"found shape {shape}, {dtype}"
            )
        squares = np.einsum("rcd,rcd->rc", self.features, self.features)
        # NaN compares false, so the test is written to fail on it.
        if not np.all(np.abs(squares - 1.0) <= 2 * UNIT_NORM_TOLERANCE):
            raise ModelOutputError(
                "patch features: expected finite unit vectors, found squared norms from "
                f"{squares.min():.4g} to {squares.max():.4g}"
            )
        if self.global_feature.ndim != 1 or not np.all(np.isfinite(self.global_feature)):
            raise ModelOutputError(
                f"global feature: expected finite (dim,), found shape {self.global_feature.shape}"
            )
        if min(self.image_hw) < 1:
            raise ModelOutputError(f"image size: expected positive, found {self.image_hw}")
        shares = self.instances
        if shares is not None:
            if shares.ndim != 3 or shares.shape[1:] != shape[:2] or shares.dtype != np.float32:
                raise ModelOutputError(
                    f"instances: expected (n, {shape[0]}, {shape[1]}) float32, "
                    f"found shape {shares.shape}, {shares.dtype}"
                )
            if not (np.all((shares >= 0.0) & (shares <= 1.0)) and shares.any(axis=(1, 2)).all()):
                raise ModelOutputError("instances: expected shares in [0, 1], some in each")

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Return (rows, cols)."""
        return self.features.shape[0], self.features.shape[1]

    @property
    def dim(self) -> int:
        """Return the length of an embedding."""
        return int(self.features.shape[2])


@dataclass(frozen=True, eq=False)
class Regions:
    """The pieces of an image that are compared: patches, or instances pooled over masks.

    Attributes:
        embeddings: (n, dim) float32, unit norm.
        label_map: (h, w) int32, the row of `embeddings` that holds at each place, -1 for none.

    Raises:
        ModelOutputError: wrong shapes, or a label without an embedding.
    """

    embeddings: np.ndarray
    label_map: np.ndarray

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or self.label_map.ndim != 2:
            raise ModelOutputError(
                "regions: expected embeddings (n, dim) and label map (h, w), found shapes "
                f"{self.embeddings.shape} and {self.label_map.shape}"
            )
        low, high = int(self.label_map.min()), int(self.label_map.max())
        if low < -1 or high >= len(self.embeddings):
            raise ModelOutputError(
                f"regions: expected labels from -1 to {len(self.embeddings) - 1}, "
                f"found {low} to {high}"
            )

    def paint(self, values: np.ndarray, outside: float = 0.0) -> np.ndarray:
        """Return (h, w) float32: each place takes its region's value, `outside` where none.

        Args:
            values: (n,) one value a region.
            outside: value of places that belong to no region.
        """
        table = np.append(np.asarray(values, np.float32), np.float32(outside))
        return table[self.label_map]


@dataclass(frozen=True)
class NominalExample:
    """The stored nominal place that an embedding is nearest to.

    Attributes:
        frame: name of the nominal frame.
        row, col: its place in that frame's grid.
        grid_hw: (rows, cols) of that grid.
        distance: cosine distance in [0, 2].
    """

    frame: str
    row: int
    col: int
    grid_hw: tuple[int, int]
    distance: float


@dataclass(frozen=True)
class Localization:
    """A component: one connected region whose distances exceed the calibrated threshold.

    Attributes:
        box_xyxy: left, top, right, bottom in pixels; right and bottom exclusive.
        centroid_xy: in pixels.
        area_px: number of pixels above the threshold.
        score: largest patch distance inside.
        nearest: the nominal example nearest to the worst patch.
        label: id of the region in `AnomalyResult.label_map`, from 1.
        state: whether it was found often enough, over time, to be an anomaly.
        track: number by which it is known from frame to frame, 0 without.
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
    """The fixed scale that heatmaps are drawn on, taken from nominal calibration frames.

    Attributes:
        low: distance drawn as 0, the median nominal patch distance.
        high: distance drawn as 1, the threshold.
        source: what the scale comes from, for titles.
    """

    low: float
    high: float
    source: str = "calibration"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ModelOutputError(f"heatmap scale: expected low < high, found {self}")

    def normalise(self, distances: np.ndarray) -> np.ndarray:
        """Return float32 of the same shape: 0 typical nominal, 1 the threshold, no upper limit."""
        scaled = (distances - np.float32(self.low)) * np.float32(1.0 / (self.high - self.low))
        return np.maximum(scaled, 0.0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class AnomalyResult:
    """What the detector states of one frame.

    Attributes:
        score: mean of the largest patch distances, in [0, 2]; higher is more anomalous.
        decision: `unknown` without a threshold.
        p_value: how often nominal frames score at least so high, in (0, 1]; None uncalibrated.
        threshold: score above which a frame is anomalous, calibrated or set by hand; else None.
        heatmap: (height, width) float32, patch distance at every pixel, raw units; 0 outside
            the region of interest.
        scale: scale on which the heatmap is drawn.
        label_map: (height, width) uint16 ids of the localizations, 0 elsewhere.
        localizations: largest score first; empty unless the score exceeds the threshold. One that
            is confirmed makes the decision `anomaly`.
        stage_ms: milliseconds by stage.
        reason: why the decision is `unknown`, empty otherwise.
        parts: score of each branch, in deviations from what is usual; empty where there is but
            one, or no calibration.
        note: what else is to be said, such as that there were no instances; may be empty.

    Raises:
        ModelOutputError: a score that is not finite, or a decision without a threshold.
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
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise ModelOutputError(f"score: expected a finite number, found {self.score}")
        if self.decision is not Decision.UNKNOWN and self.threshold is None:
            raise ModelOutputError(f"decision '{self.decision.value}' needs a threshold")
        if self.decision is Decision.UNKNOWN and not self.reason:
            raise ModelOutputError("decision 'unknown' needs a reason")
