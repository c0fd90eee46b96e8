"""The settings of what is embedded: backbone, instances, their surroundings and place.

The settings of one camera.

Every setting once: type, default, description, bounds, and whether it may change while running.

The node declares its ROS parameters from this table, the commands read the node's own YAML
through it, and a test compares README and shipped YAML with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import (
    SettingsError,
    UnknownNameError,
)
from semantic_anomaly.settings_schema import (
    SettingSpec,
    check_fields,
    read_parameters_yaml,
    setting,
    specs_of,
)

GRID, INSTANCE, COMBINED = "grid", "instance", "combined"
TOKENS = "tokens"
SEGMENTER_FAMILIES = ("detector", "promptless", TOKENS, "universal")
# What shapes a score besides plain patch distances, and the values that leave it as it is.
UNUSED = {
    "variant": GRID,
    "surroundings_weight": 0.0,
    "min_agreement": 0.0,
    "scene_frames": 0,
    "usual_kinds": 0,
    "smoothing": 0.0,
}


@dataclass(frozen=True)
class EmbeddingSettings:
    """What is embedded and compared; the other settings build on it."""

    backbone: str = setting(
        "street_small",
        "Vision backbone: a shipped name, a local Hugging Face folder, or a hub id "
        "already downloaded.",
    )
    layers: tuple[int, ...] = setting(
        (),
        "Hidden states used as patch features, concatenated on the finest grid; empty: "
        "the backbone's own choice.",
    )
    input_size: int = setting(
        960,
        "Long side in pixels to which images are resized; both sides are rounded to the "
        "patch multiple.",
        minimum=32,
        maximum=8192,
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = setting(
        "auto",
        "Precision of the backbone; auto: bfloat16 or float16 on a GPU, float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    place_weight: float = setting(
        0.2,
        "Weight of the place in the image in the distance of two embeddings; 0: none.",
        minimum=0.0,
        maximum=0.99,
    )
    variant: str = setting(
        GRID,
        "What is compared with the index: grid, the patches; instance, instances pooled over "
        "masks, and patches where there are none; combined, the mean of both.",
        choices=(GRID, INSTANCE, COMBINED),
    )
    segmenter: str = setting(
        TOKENS,
        "What finds the instances: tokens groups the patches; universal, promptless and detector "
        "are networks of their own.",
        choices=SEGMENTER_FAMILIES,
    )
    segmenter_model: str = setting(
        "",
        "Network of the segmenter: a local Hugging Face folder, or a hub id already downloaded; "
        "empty for tokens.",
    )
    surroundings_weight: float = setting(
        0.0,
        "Weight of an instance's surroundings in the distance of two; 0: instances alone.",
        minimum=0.0,
        maximum=0.99,
    )
    min_agreement: float = setting(
        0.0,
        "Share of its patches that must be unusual themselves before an instance counts, unless "
        "it is unusual together with its surroundings; 0: none.",
        minimum=0.0,
        maximum=1.0,
    )
    scene_frames: int = setting(
        0,
        "Nominal frames whose patches are compared, those that resemble the image most; 0: all.",
        minimum=0,
        maximum=1000000,
    )
    usual_kinds: int = setting(
        256,
        "Kinds of patches, told apart by their embeddings, for each of which calibration learns "
        "what distance is usual besides what is usual at its place; 0: one.",
        minimum=0,
        maximum=4096,
    )
    smoothing: float = setting(
        0.8,
        "Deviation of the Gaussian that smooths the map of distances before it is scored, in "
        "patches; 0: none.",
        minimum=0.0,
        maximum=10.0,
    )

    @property
    def segments(self) -> bool:
        """Return whether instances are needed."""
        return self.variant != GRID


@dataclass(frozen=True)
class CameraSettings:
    """The settings of one camera; in YAML under the camera's name."""

    image_topic: str = setting(
        "/camera/image_raw",
        "Image topic; compressed topics end in the transport's name, e.g. .../compressed.",
    )
    transport: str = setting(
        "raw",
        "How images arrive: sensor_msgs/Image or sensor_msgs/CompressedImage.",
        choices=("raw", "compressed"),
    )
    camera_info_topic: str = setting(
        "", "CameraInfo topic; empty: markers are drawn with an assumed 90 degree lens."
    )
    depth_topic: str = setting(
        "",
        "Depth image topic (32FC1 metres or 16UC1 millimetres) aligned with the image; "
        "empty: none.",
    )
    camera_height_m: float = setting(
        0.0,
        "Height of the camera above a flat ground, for marker ranges without depth; 0: unknown.",
        minimum=0.0,
        maximum=100.0,
    )
    index: str = setting("", "Index folder of this camera; empty: the common 'index'.")
    region_of_interest: tuple[float, ...] = setting(
        (),
        "Polygon x0, y0, x1, y1, ... in relative image coordinates [0, 1]; empty: the whole image.",
        minimum=0.0,
        maximum=1.0,
    )
    ego_mask: str = setting(
        "", "PNG whose non-zero pixels show the vehicle itself and take no part; empty: none."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        # A polygon needs three corners of two coordinates each.
        if len(self.region_of_interest) % 2 or 0 < len(self.region_of_interest) < 6:
            raise SettingsError(
                "setting 'region_of_interest': expected at least 3 pairs x, y, "
                f"found {len(self.region_of_interest)} numbers"
            )


@dataclass(frozen=True)
class Settings(EmbeddingSettings):
    """All settings of the detector and the node; checked when made.

    Raises:
        SettingsError: a value of the wrong type or out of bounds.
    """

    index: str = setting("", "Folder of the nominal index.")
    neighbours: int = setting(
        1, "Nearest nominal embeddings averaged into a patch distance.", minimum=1, maximum=100
    )
    tail_percent: float = setting(
        0.2,
        "Share of the patches, largest distances first, whose mean is the frame score, in percent.",
        minimum=0.001,
        maximum=100.0,
    )
    place_normalisation: bool = setting(
        True, "Distances are relative to what calibration found usual at their place in the image."
    )
    search: str = setting(
        "auto",
        "Nearest-neighbour search; auto: exact if small, else a graph, what looks odd exactly.",
        choices=("auto", "exact", "graph"),
    )
    search_ef: int = setting(
        16,
        "Breadth of the graph search; larger is slower and more accurate.",
        minimum=1,
        maximum=10000,
    )
    dedup_distance: float = setting(
        -1.0,
        "While building, embeddings closer than this cosine distance to a stored one are counted, "
        "not stored; 0: all are; -1: as suits the backbone, measured on the first frames.",
        minimum=-1.0,
        maximum=2.0,
    )
    max_entries: int = setting(
        500000, "Most embeddings that an index may hold.", minimum=1, maximum=50000000
    )
    graph_m: int = setting(16, "Links per entry of the hnswlib graph.", minimum=2, maximum=128)
    graph_ef_construction: int = setting(
        100, "Breadth of the search while the graph is built.", minimum=8, maximum=4096
    )
    target_false_alarm_rate: float = setting(
        0.01,
        "Share of nominal frames that may be called anomalous.",
        minimum=1e-6,
        maximum=0.5,
        live=True,
    )
    target_episode_rate: float = setting(
        0.0,
        "Share of nominal stretches of episode_s that may raise an alarm, promised besides the "
        "rate of frames; 0: no such promise.",
        minimum=0.0,
        maximum=0.5,
        live=True,
    )
    episode_s: float = setting(
        10.0, "Length of a stretch of driving, in seconds.", minimum=0.1, maximum=86400.0
    )
    threshold: float = setting(
        0.0,
        "Score threshold that replaces the calibrated one; 0: the calibrated one.",
        minimum=0.0,
        maximum=2.0,
        live=True,
    )
    confirm_count: int = setting(
        1,
        "Frames in which a component must be found within confirm_s before it is confirmed and "
        "the decision is anomaly.",
        minimum=1,
        maximum=1000,
        live=True,
    )
    confirm_s: float = setting(
        1.0, "Seconds within which those frames lie.", minimum=0.001, maximum=3600.0, live=True
    )
    silence_s: float = setting(
        1.0, "Silence that ends a component, in seconds.", minimum=0.001, maximum=3600.0, live=True
    )
    min_area_px: int = setting(
        0,
        "Components with fewer pixels are left out: they raise no alarm.",
        minimum=0,
        maximum=100000000,
        live=True,
    )
    max_area: float = setting(
        1.0,
        "Components that cover a larger share of the image are left out; 1: none.",
        minimum=0.0,
        maximum=1.0,
        live=True,
    )
    max_aspect: float = setting(
        0.0,
        "Components whose box is longer than this many times its width are left out, unless the "
        "border cuts them; 0: none.",
        minimum=0.0,
        maximum=1000.0,
        live=True,
    )
    max_border_share: float = setting(
        0.25,
        "A component is cut when more of its outline lies on the border of what takes part.",
        minimum=0.0,
        maximum=1.0,
        live=True,
    )
    cameras: tuple[str, ...] = setting(
        ("camera",), "Names of the cameras; each has its own settings under its name."
    )
    max_age_s: float = setting(
        0.5,
        "Images older than this when their turn comes are dropped and counted.",
        minimum=0.01,
        maximum=60.0,
        live=True,
    )
    silent_after_s: float = setting(
        2.0,
        "A camera without images for so long is reported by name and its status becomes unknown.",
        minimum=0.1,
        maximum=60.0,
    )
    qos_reliability: str = setting(
        "best_effort",
        "Reliability of the image subscriptions.",
        choices=("best_effort", "reliable"),
    )
    allow_add_nominal: bool = setting(
        False,
        "Whether the service ~/add_nominal may add the last frame of each camera above its "
        "threshold to the index.",
    )
    qos_depth: int = setting(
        1,
        "Queue depth of the image subscriptions; only the newest image is used.",
        minimum=1,
        maximum=100,
    )
    marker_range_m: float = setting(
        10.0,
        "Range at which markers are drawn where it is neither measured nor given by the ground.",
        minimum=0.1,
        maximum=1000.0,
    )
    overlay_alpha: float = setting(
        0.5, "Strength of the heatmap in the overlay.", minimum=0.0, maximum=1.0, live=True
    )
    camera_settings: Mapping[str, CameraSettings] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.segments:
            for name in ("surroundings_weight", "min_agreement"):
                if getattr(self, name):
                    raise SettingsError(
                        f"setting '{name}': expected 0 with variant '{self.variant}', "
                        f"found {getattr(self, name):g}"
                    )
        elif not self.place_normalisation and (
            self.scoring.keys() & {"surroundings_weight", "min_agreement"}
            or self.variant == COMBINED
        ):
            raise SettingsError(
                "setting 'place_normalisation': expected true, for branches are compared by what "
                "is usual; found false"
            )
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise SettingsError(
                f"setting 'cameras': expected distinct names, found {list(self.cameras)}"
            )
        for camera in self.cameras:
            # Topics are named after cameras, and ROS refuses repeated underscores in them.
            named = camera.isascii() and camera.isidentifier() and "__" not in camera
            if not named or camera in _SPECS:
                raise SettingsError(
                    "setting 'cameras': expected letters, digits and single underscores and not a "
                    f"setting's own name, found '{camera}'"
                )
        for camera in self.camera_settings:
            if camera not in self.cameras:
                raise UnknownNameError("camera", camera, self.cameras)
        complete = {name: self.camera_settings.get(name, CameraSettings()) for name in self.cameras}
        object.__setattr__(self, "camera_settings", complete)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Settings:
        """Make settings from flat ROS parameter names ('neighbours', 'front.image_topic').

        Raises:
            UnknownNameError: a name is neither a setting nor a camera's setting.
            SettingsError: a value cannot be taken.
        """
        cameras = _SPECS["cameras"].check(parameters.get("cameras", _SPECS["cameras"].default))
        common: dict[str, Any] = {}
        by_camera: dict[str, dict[str, Any]] = {}
        known = [*_SPECS, *(f"{c}.{s}" for c in cameras for s in _CAMERA_SPECS)]
        for name, value in parameters.items():
            camera, dot, key = name.partition(".")
            if name in _SPECS:
                common[name] = _SPECS[name].check(value)
            elif dot and camera in cameras and key in _CAMERA_SPECS:
                by_camera.setdefault(camera, {})[key] = _CAMERA_SPECS[key].check(value, name)
            else:
                raise UnknownNameError("setting", name, known)
        made = {name: CameraSettings(**values) for name, values in by_camera.items()}
        return cls(**common, camera_settings=made)

    @classmethod
    def from_yaml(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
        """Read the node's own YAML ('/**: ros__parameters: ...') or a plain mapping.

        Args:
            path: YAML file.
            overrides: flat names that win over the file.

        Raises:
            SettingsError: the file cannot be read or holds something that cannot be taken.
        """
        return cls.from_parameters({**read_parameters_yaml(path), **(overrides or {})})

    def to_parameters(self) -> dict[str, Any]:
        """Return flat ROS parameter names and values, lists for tuples."""
        flat: dict[str, Any] = {name: getattr(self, name) for name in _SPECS}
        for camera, settings in self.camera_settings.items():
            flat.update({f"{camera}.{key}": getattr(settings, key) for key in _CAMERA_SPECS})
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}

    def replace(self, **changes: Any) -> Settings:
        """Return a checked copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    @property
    def scoring(self) -> dict[str, Any]:
        """Return what shapes a score besides plain patch distances, where it is in use."""
        told = {name: getattr(self, name) for name in UNUSED}
        if not self.place_normalisation:
            told["usual_kinds"] = 0
        return {name: value for name, value in told.items() if value != UNUSED[name]}

    def index_of(self, camera: str) -> str:
        """Return the index folder of a camera: its own, else the common one, else ''."""
        return self.camera_settings[camera].index or self.index


def setting_specs() -> dict[str, SettingSpec]:
    """Return the rows of the common settings by name."""
    return dict(_SPECS)


def camera_setting_specs() -> dict[str, SettingSpec]:
    """Return the rows of a camera's settings by name."""
    return dict(_CAMERA_SPECS)


_SPECS = specs_of(Settings)
_CAMERA_SPECS = specs_of(CameraSettings)
FAMILIES = ("detector", "promptless", "tokens", "universal")
TOKENS = "tokens"
