"""All settings: type, default, description, bounds, and whether a setting may change at run time.

The node declares its ROS parameters from this table. The commands read the parameter file of the
node through it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import SettingsError, UnknownNameError
from semantic_anomaly.settings_schema import (
    SettingSpec,
    check_fields,
    read_parameters_yaml,
    resolve_paths,
    setting,
    specs_of,
)
from semantic_anomaly.stages import GRID, INSTANCES, StageSpec

INSTANCE, COMBINED = "instance", "combined"
TOKENS = "tokens"
TORCH, OPENVINO = "torch", "openvino"
EXECUTIONS = (TORCH, OPENVINO)
SEGMENTER_FAMILIES = ("detector", "promptless", TOKENS, "universal")
# Values of settings that an index fixes, used when an index is built without them.
BUILD_DEFAULTS: Mapping[str, Any] = {
    "stages": (
        "mobilenet_v1 layer=21 size=800 weight=2",
        "efficientnet_lite2 layer=15 size=640",
        "efficientnet_lite2 layer=20 size=640",
    ),
    "segmenter": TOKENS,
    "place_weight": 0.2,
}
# Settings that name one backbone's stages instead of `stages`.
SHORTHAND = ("backbone", "layers", "input_size", "variant")
_DEFAULT_INPUT_SIZE = 960
DEFAULT_FALSE_ALARM_RATE = 0.01


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
        bounds=(0.0, 100.0),
    )
    index: str = setting("", "Index folder of this camera; empty: the common 'index'.", path=True)
    region_of_interest: tuple[float, ...] = setting(
        (),
        "Polygon x0, y0, x1, y1, ... in relative image coordinates [0, 1]; empty: that of the "
        "calibration, or else of the index.",
        bounds=(0.0, 1.0),
    )
    ego_mask: str = setting(
        "",
        "PNG image whose non-zero pixels show the ego vehicle; they are ignored. Empty: none.",
        path=True,
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
class Settings:
    """The settings of the detector and the node.

    Settings that an index or a calibration fixes may be left unset (`UNSET`): they are then taken
    from there, and from `BUILD_DEFAULTS` when an index is built.

    Attributes:
        camera_settings: settings of each camera by its name, complete.
        camera_overrides: for each camera, values of live settings that differ from the common ones.

    Raises:
        SettingsError: a value of the wrong type or out of bounds.
        UnknownNameError: settings of a camera that is not in `cameras`.
    """

    index: str = setting("", "Folder of the nominal index.", path=True)
    stages: tuple[str, ...] = setting(
        (),
        "Stages of the index, each 'BACKBONE layer=L size=PX average=N kind=KIND weight=W' with "
        "the kind grid or instances; all but the backbone may be left out. The anomaly map is the "
        "weighted mean of their maps. Empty: those of the index, or the recommended ones for a new "
        "index.",
    )
    backbone: str = setting(
        "",
        "Shorthand for stages of one backbone: a shipped name, a local Hugging Face folder, or a "
        "hub id already downloaded. Empty: as 'stages'.",
    )
    layers: tuple[int, ...] = setting(
        (), "Shorthand: one stage for each hidden state of 'backbone'. Empty: its default one."
    )
    input_size: int = setting(
        0,
        "Shorthand: long side in pixels to which images are resized; both sides are rounded to a "
        "multiple of the patch size. 0: as 'stages', or 960 with 'backbone'.",
        bounds=(0, 8192),
    )
    place_weight: float = setting(
        -1.0,
        "Weight of the position in the image in the distance of two embeddings. -1: that of the "
        "index, or 0.2 for a new index.",
        bounds=(-1.0, 0.99),
    )
    variant: str = setting(
        "",
        "Shorthand: grid, stages of patches; instance, one stage of instances pooled over masks; "
        "combined, both. Empty: as 'stages', or grid with 'backbone'.",
        choices=("", GRID, INSTANCE, COMBINED),
    )
    segmenter: str = setting(
        "",
        "Segmenter of the instances: tokens groups the patches; universal, promptless and detector "
        "are networks. Empty: that of the index, or tokens for a new index.",
        choices=("", *SEGMENTER_FAMILIES),
    )
    segmenter_model: str = setting(
        "",
        "Network of the segmenter: a local Hugging Face folder, or a hub id already downloaded. "
        "Empty for tokens.",
    )
    device: str = setting("auto", "Device of the networks: auto, cpu, cuda or cuda:N.")
    dtype: str = setting(
        "auto",
        "Precision of the networks: float32, bfloat16 or float16. auto: that of the calibration, "
        "or else of the index; a new index measures which is fastest.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    execution: str = setting(
        "auto",
        "What runs the backbones: torch, or openvino on a CPU (extra [cpu]). auto: as 'dtype'.",
        choices=("auto", *EXECUTIONS),
    )
    threads: int = setting(
        0,
        "CPU threads of networks and search. 0: one for each core. With fewer, decoding and "
        "middleware disturb them less where cores are few.",
        bounds=(0, 1024),
    )
    dedup_distance: float = setting(
        -1.0,
        "While an index is built, embeddings closer than this cosine distance to an entry are "
        "counted but not stored. 0: all are stored; -1: measured on the first frames.",
        bounds=(-1.0, 2.0),
    )
    max_entries: int = setting(
        500000, "Largest number of entries of an index.", bounds=(1, 50000000)
    )
    search: str = setting(
        "auto",
        "Nearest-neighbour search: exact; lists or graph (hnswlib), which give bounds, and patches "
        "that matter are searched exactly; or auto: exact for small indexes and on a GPU, lists "
        "for others.",
        choices=("auto", "exact", "lists", "graph"),
    )
    search_ef: int = setting(
        16,
        "Breadth of the graph search; larger is slower and more accurate.",
        bounds=(1, 10000),
    )
    neighbours: int = setting(
        1,
        "Number of nearest entries averaged into the distance of a patch.",
        bounds=(1, 100),
    )
    smoothing: float = setting(
        0.5,
        "Standard deviation in patches of the Gaussian that smooths the anomaly map. 0: none.",
        bounds=(0.0, 10.0),
    )
    tail_percent: float = setting(
        2.0,
        "Share of the anomaly map in percent, largest values first, whose mean is the anomaly "
        "score.",
        bounds=(0.001, 100.0),
    )
    target_false_alarm_rate: float = setting(
        0.0,
        "Share of nominal frames that may be called anomalous. 0: the rate of the calibration.",
        bounds=(0.0, 0.5),
        live=True,
    )
    confidence: float = setting(
        0.0,
        "Probability, over new drives, that the target rates hold. 0: that of the calibration; a "
        "new one takes 0.9, or as much as its number of drives D allows: D / (D + 1).",
        bounds=(0.0, 0.999),
        live=True,
    )
    recording_pattern: str = setting(
        "",
        "Regular expression with one group: names the recording that a drive is a part of, where "
        "its name cannot show it. '(.+)_part' takes run_part1 and run_part2 for one recording. "
        "Parts of one recording count as one drive.",
    )
    target_episode_rate: float = setting(
        0.0,
        "Share of nominal episodes that may raise an alarm. 0: the rate of the calibration, if it "
        "has one.",
        bounds=(0.0, 0.5),
        live=True,
    )
    drift_window: int = setting(
        600,
        "Frames of a window of the drift check: three windows in a row with more frames above the "
        "calibration's 90th percentile than any calibration drive had are drift.",
        bounds=(10, 1_000_000),
    )
    episode_s: float = setting(10.0, "Length of an episode in seconds.", bounds=(0.1, 86400.0))
    threshold: float | None = setting(
        None,
        "Anomaly score above which a frame is anomalous, instead of the calibrated threshold. "
        "Unset: the calibrated one.",
        live=True,
    )
    confirm_count: int = setting(
        1,
        "Number of frames within confirm_s in which a component must be detected before it is "
        "confirmed and the decision is anomaly.",
        bounds=(1, 1000),
        live=True,
    )
    confirm_s: float = setting(
        1.0,
        "Time window of the confirmation in seconds.",
        bounds=(0.001, 3600.0),
        live=True,
    )
    silence_s: float = setting(
        1.0,
        "A component that is not detected for this time in seconds ends.",
        bounds=(0.001, 3600.0),
        live=True,
    )
    min_area_px: int = setting(
        0,
        "Components with fewer pixels are ignored.",
        bounds=(0, 100000000),
        live=True,
    )
    max_area: float = setting(
        1.0,
        "Components that cover a larger share of the image are ignored.",
        bounds=(0.0, 1.0),
        live=True,
    )
    max_aspect: float = setting(
        0.0,
        "Components whose box has a larger ratio of its long to its short side are ignored, unless "
        "the image border cuts them. 0: no limit.",
        bounds=(0.0, 1000.0),
        live=True,
    )
    cameras: tuple[str, ...] = setting(
        ("camera",), "Names of the cameras; the settings of each are under its name."
    )
    max_age_s: float = setting(
        1.0,
        "Images older than this, when their turn comes or their result is ready, are unknown and "
        "counted. A missing result is reported within this time.",
        bounds=(0.01, 60.0),
        live=True,
    )
    silent_after_s: float = setting(
        2.0,
        "A camera without images for this time is reported and its status becomes unknown.",
        bounds=(0.1, 60.0),
    )
    frozen_after_s: float = setting(
        2.0,
        "Equal images over more than this time in seconds are those of a frozen camera: the "
        "decision is unknown. 0: no check, for simulations that stand still.",
        bounds=(0.0, 3600.0),
        live=True,
    )
    least_contrast: float = setting(
        10.0,
        "Images with a smaller range of brightness, in grey levels, are those of a covered camera: "
        "the decision is unknown. 0: no check.",
        bounds=(0.0, 255.0),
        live=True,
    )
    qos_reliability: str = setting(
        "best_effort",
        "Reliability of the image subscriptions.",
        choices=("best_effort", "reliable"),
    )
    allow_add_nominal: bool = setting(
        False,
        "Whether the service ~/add_nominal may add the last frame above the threshold of each "
        "camera to the index.",
    )
    marker_range_m: float = setting(
        10.0,
        "Range in metres at which markers are drawn where it is neither measured nor computed "
        "from the ground plane.",
        bounds=(0.1, 1000.0),
    )
    overlay_alpha: float = setting(
        0.5, "Opacity of the heatmap in the overlay.", bounds=(0.0, 1.0), live=True
    )
    camera_settings: Mapping[str, CameraSettings] = dataclasses.field(default_factory=dict)
    camera_overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise SettingsError(
                f"setting 'cameras': expected distinct names, found {list(self.cameras)}"
            )
        for camera in self.cameras:
            # Topics are named after cameras, and ROS refuses repeated underscores in them.
            valid = camera.isascii() and camera.isidentifier() and "__" not in camera
            if not valid or camera in _SPECS:
                raise SettingsError(
                    "setting 'cameras': expected names of letters, digits and single underscores "
                    f"that are not names of settings, found '{camera}'"
                )
        for camera in (*self.camera_settings, *self.camera_overrides):
            if camera not in self.cameras:
                raise UnknownNameError("camera", camera, self.cameras)
        _check_recording_pattern(self.recording_pattern)
        specs = self.stage_specs
        if self.stages and (set_too := [n for n in SHORTHAND if getattr(self, n) != UNSET[n]]):
            raise SettingsError(
                f"setting 'stages': expected either stages or '{set_too[0]}', found both"
            )
        paths = [dataclasses.replace(spec, weight=1.0) for spec in specs]
        for spec, path in zip(specs, paths, strict=True):
            if paths.count(path) > 1:
                raise SettingsError(
                    "setting 'stages': expected stages that differ in more than the weight, found "
                    f"'{spec}' and another like it; one stage with the sum of the weights is equal"
                )
        if not sum(spec.weight for spec in specs):
            raise SettingsError("setting 'stages': expected weights above 0, found a sum of 0")
        complete = {name: self.camera_settings.get(name, CameraSettings()) for name in self.cameras}
        object.__setattr__(self, "camera_settings", complete)
        overrides = {name: dict(values) for name, values in self.camera_overrides.items() if values}
        object.__setattr__(self, "camera_overrides", overrides)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Settings:
        """Make settings from flat ROS parameter names ('neighbours', 'front.image_topic').

        Live settings may be overridden for one camera ('front.threshold'); None overrides nothing.

        Raises:
            UnknownNameError: a name is neither a setting nor a setting of a camera.
            SettingsError: a value of the wrong type or out of bounds.
        """
        cameras = _SPECS["cameras"].check(parameters.get("cameras", _SPECS["cameras"].default))
        common: dict[str, Any] = {}
        by_camera: dict[str, dict[str, Any]] = {}
        overrides: dict[str, dict[str, Any]] = {}
        for name, value in parameters.items():
            camera, _, key = name.partition(".")
            if name in _SPECS:
                common[name] = _SPECS[name].check(value)
            elif camera in cameras and key in _CAMERA_SPECS:
                by_camera.setdefault(camera, {})[key] = _CAMERA_SPECS[key].check(value, name)
            elif camera in cameras and key in _LIVE_SPECS:
                if value is not None:
                    overrides.setdefault(camera, {})[key] = _LIVE_SPECS[key].check(value, name)
            else:
                keys = (*_CAMERA_SPECS, *_LIVE_SPECS)
                of_cameras = (f"{camera}.{key}" for camera in cameras for key in keys)
                raise UnknownNameError("setting", name, (*_SPECS, *of_cameras))
        camera_settings = {name: CameraSettings(**values) for name, values in by_camera.items()}
        return cls(**common, camera_settings=camera_settings, camera_overrides=overrides)

    def to_parameters(self) -> dict[str, Any]:
        """Return flat ROS parameter names and values, lists for tuples."""
        flat: dict[str, Any] = {name: getattr(self, name) for name in _SPECS}
        for camera, settings in self.camera_settings.items():
            flat.update({f"{camera}.{key}": getattr(settings, key) for key in _CAMERA_SPECS})
        for camera, values in self.camera_overrides.items():
            flat.update({f"{camera}.{key}": value for key, value in values.items()})
        return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}

    def replace(self, **changes: Any) -> Settings:
        """Return a checked copy with some settings changed."""
        return dataclasses.replace(self, **changes)

    def with_build_defaults(self) -> Settings:
        """Return a copy with `stages` in place of its shorthand, and the rest of an index set."""
        stages = tuple(map(str, self.stage_specs))
        values = {
            name: value
            for name, value in BUILD_DEFAULTS.items()
            if getattr(self, name) == UNSET[name]
        }
        shorthand = {name: UNSET[name] for name in SHORTHAND}
        return self.replace(**{**values, **shorthand, "stages": stages})

    def for_camera(self, camera: str) -> Settings:
        """Return a copy in which the overrides of a camera are in force.

        Raises:
            UnknownNameError: no such camera.
        """
        if camera not in self.cameras:
            raise UnknownNameError("camera", camera, self.cameras)
        return self.replace(**self.camera_overrides.get(camera, {}))

    @property
    def stage_specs(self) -> tuple[StageSpec, ...]:
        """Return the stages: those of `stages`, or of its shorthand and the defaults."""
        if self.stages:
            return tuple(map(StageSpec.parse, self.stages))
        grids = tuple(map(StageSpec.parse, BUILD_DEFAULTS["stages"]))
        if self.backbone or self.layers:
            backbone = self.backbone or grids[0].backbone
            layers: tuple[int | None, ...] = self.layers or (None,)
            grids = tuple(StageSpec(backbone, layer, _DEFAULT_INPUT_SIZE) for layer in layers)
        if self.input_size:
            grids = tuple(dataclasses.replace(grid, size=self.input_size) for grid in grids)
        instances = (dataclasses.replace(grids[0], kind=INSTANCES),)
        return {INSTANCE: instances, COMBINED: grids + instances}.get(self.variant, grids)

    @property
    def segments(self) -> bool:
        """Return whether instances are needed."""
        return any(spec.kind == INSTANCES for spec in self.stage_specs)

    @property
    def scoring(self) -> dict[str, Any]:
        """Return the settings that shape a score; a calibration holds for equal ones only."""
        names = ("neighbours", "smoothing", "tail_percent")
        return {name: getattr(self, name) for name in names}

    def index_of(self, camera: str) -> str:
        """Return the index folder of a camera: its own, else the common one, else ''."""
        return self.camera_settings[camera].index or self.index


def read_settings_file(path: Path, node: str = "") -> dict[str, Any]:
    """Return flat parameters of a parameter file; relative paths are relative to its folder.

    Args:
        path, node: as of `read_parameters_yaml`.

    Raises:
        SettingsError: as `read_parameters_yaml`.
    """
    specs = {**_SPECS, **_CAMERA_SPECS}
    return resolve_paths(read_parameters_yaml(path, node), specs, path.parent)


def setting_specs() -> dict[str, SettingSpec]:
    """Return the rows of the common settings by name."""
    return dict(_SPECS)


def camera_setting_specs() -> dict[str, SettingSpec]:
    """Return the rows of the settings of a camera by name."""
    return dict(_CAMERA_SPECS)


def camera_override_specs() -> dict[str, SettingSpec]:
    """Return the rows of the live settings, which may be overridden for one camera, by name."""
    return dict(_LIVE_SPECS)


_SPECS = specs_of(Settings)
_CAMERA_SPECS = specs_of(CameraSettings)
_LIVE_SPECS = {name: spec for name, spec in _SPECS.items() if spec.live}


def _check_recording_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise SettingsError(
            f"setting 'recording_pattern': expected a regular expression, found '{pattern}': "
            f"{error}"
        ) from error
    if pattern and groups != 1:
        raise SettingsError(
            f"setting 'recording_pattern': expected one group, found {groups} in '{pattern}'"
        )


# "Not given": the value of the index, or of the calibration, is used.
UNSET: Mapping[str, Any] = {
    name: _SPECS[name].default
    for name in (*BUILD_DEFAULTS, *SHORTHAND, "segmenter_model", "target_false_alarm_rate")
}
