"""The settings table: what it takes, and how it refuses."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from semantic_anomaly.errors import SettingsError, UnknownNameError
from semantic_anomaly.settings import (
    BUILD_DEFAULTS,
    SHORTHAND,
    UNSET,
    CameraSettings,
    Settings,
    camera_setting_specs,
    read_settings_file,
    setting_specs,
)

ROI = "camera.region_of_interest"


def test_defaults_satisfy_their_own_table() -> None:
    for name, spec in {**setting_specs(), **camera_setting_specs()}.items():
        assert spec.check(spec.default) == spec.default, name
        assert spec.description.endswith("."), name
        assert type(spec.default) in (bool, int, float, str, tuple, type(None)), name


def test_defaults_survive_the_way_through_parameters() -> None:
    parameters = Settings().to_parameters()
    assert Settings.from_parameters(parameters) == Settings()
    assert not any(isinstance(value, tuple) for value in parameters.values())


@pytest.mark.parametrize(
    ("name", "value", "expected", "reason"),
    [
        ("tail_percent", 2, 2.0, "an integer where a float is meant"),
        ("threshold", 0, 0.0, "zero is a score, not unset"),
        ("threshold", -3, -3.0, "scores may be negative"),
        ("threshold", None, None, "unset"),
        ("smoothing", 0, 0.0, "lower bound"),
        ("stages", ["a layer=3", "b"], ("a layer=3", "b"), "list of texts"),
        ("layers", [3, 6], (3, 6), "list"),
        ("layers", (), (), "empty"),
        ("search", "graph", "graph", "choice"),
        (ROI, array("d", [0, 0, 1, 0, 1, 1]), (0.0, 0.0, 1.0, 0.0, 1.0, 1.0), "a camera's own"),
        (ROI, [0, 0, 1, 0, 0.5, 1], (0.0, 0.0, 1.0, 0.0, 0.5, 1.0), "numbers mixed in a list"),
    ],
)
def test_takes(name: str, value: Any, expected: Any, reason: str) -> None:
    taken = Settings.from_parameters({name: value}).to_parameters()[name]
    expected = list(expected) if isinstance(expected, tuple) else expected
    assert taken == expected and type(taken) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("neighbours", 0, "at least 1, found 0"),
        ("neighbours", 101, "at most 100, found 101"),
        ("neighbours", True, "expected int, found True"),
        ("neighbours", "1", "expected int, found '1'"),
        ("tail_percent", float("nan"), "finite"),
        ("tail_percent", 10**400, "finite"),
        ("tail_percent", 0.0, "at least 0.001"),
        ("tail_percent", False, "expected float, found False"),
        ("search", "fast", "one of auto, exact, lists, graph, found 'fast'"),
        ("layers", 3, "expected a list, found 3"),
        ("layers", {3, 6}, "expected a list"),
        ("layers", [3, 6.0], "expected int, found 6.0"),
        ("threshold", float("inf"), "finite"),
        ("overlay_alpha", 1.5, "at most 1.0, found 1.5"),
        ("cameras", [], "distinct names"),
        ("cameras", ["front", "front"], "distinct names"),
        ("cameras", ["front left"], "letters, digits and single underscores"),
        ("cameras", ["front__left"], "single underscores"),
        ("cameras", ["vörne"], "letters, digits"),
        ("cameras", ["index"], "not names of settings"),
        (ROI, [0.0, 0.0, 1.0, 0.0], "at least 3 pairs"),
        (ROI, [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.5], "at least 3 pairs"),
        (ROI, [0.0, 0.0, 1.2, 0.0, 1.0, 1.0], "at most 1.0, found 1.2"),
        ("camera.transport", "theora", "one of raw, compressed"),
    ],
)
def test_refuses_with_the_name_and_what_was_found(name: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.from_parameters({name: value})
    assert f"setting '{name.rpartition('.')[2]}'" in str(caught.value) or name in str(caught.value)


def test_settings_made_in_code_are_checked_alike() -> None:
    with pytest.raises(SettingsError, match="at most 100"):
        Settings(neighbours=101)
    with pytest.raises(SettingsError, match="at least 3 pairs"):
        CameraSettings(region_of_interest=(0.0, 0.0))
    with pytest.raises(SettingsError, match="at least 1"):
        Settings().replace(neighbours=0)
    with pytest.raises(UnknownNameError, match="unknown camera 'back'"):
        Settings(camera_settings={"back": CameraSettings()})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("neighbors", "did you mean 'neighbours'"),
        ("camera.image_topics", "did you mean 'camera.image_topic'"),
        ("front.image_topic", "unknown setting 'front.image_topic'"),
        ("camera.neighbours", "unknown setting"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        Settings.from_parameters({name: 1})


def test_live_settings_may_be_overridden_for_one_camera() -> None:
    settings = Settings.from_parameters(
        {
            **{"cameras": ["front", "rear"], "confirm_count": 2},
            **{"front.threshold": 1, "front.confirm_count": 3, "rear.threshold": None},
        }
    )
    assert settings.for_camera("front").threshold == 1.0
    assert settings.for_camera("front").confirm_count == 3
    assert settings.for_camera("rear").threshold is None
    assert settings.for_camera("rear").confirm_count == 2
    assert Settings.from_parameters(settings.to_parameters()) == settings
    with pytest.raises(SettingsError, match=r"'front\.max_area': expected at most 1"):
        Settings.from_parameters({"cameras": ["front"], "front.max_area": 3.0})
    with pytest.raises(UnknownNameError, match="unknown camera 'left'"):
        settings.for_camera("left")


def test_unset_settings_take_the_defaults_of_a_new_index() -> None:
    complete = Settings().with_build_defaults()
    assert complete.stages == BUILD_DEFAULTS["stages"]
    assert (complete.segmenter, complete.place_weight) == ("tokens", 0.2)
    given = Settings(stages=("a layer=3",), place_weight=0.1, segmenter="universal")
    assert given.with_build_defaults() == given


@pytest.mark.parametrize(
    ("shorthand", "stages"),
    [
        ({"backbone": "a"}, ["a"]),
        ({"backbone": "a", "layers": (3, -1)}, ["a layer=3", "a layer=-1"]),
        ({"backbone": "a", "input_size": 320}, ["a size=320"]),
        ({"backbone": "a", "variant": "grid"}, ["a"]),
        ({"backbone": "a", "layers": (3, 6), "variant": "instance"}, ["a layer=3 kind=instances"]),
        (
            {"backbone": "a", "layers": (3, 6), "variant": "combined"},
            ["a layer=3", "a layer=6", "a layer=3 kind=instances"],
        ),
    ],
)
def test_the_shorthand_names_stages_of_one_backbone(
    shorthand: dict[str, Any], stages: list[str]
) -> None:
    complete = Settings(**shorthand).with_build_defaults()
    assert complete.stages == tuple(stages)
    assert all(getattr(complete, name) == UNSET[name] for name in SHORTHAND)
    assert complete.segments == any("instances" in stage for stage in stages)


def test_the_shorthand_without_a_backbone_changes_the_default_stages() -> None:
    defaults = Settings().stage_specs
    resized = Settings(input_size=320).stage_specs
    assert resized == tuple(replace(spec, size=320) for spec in defaults)
    [instances] = Settings(variant="instance").stage_specs
    assert instances == replace(defaults[0], kind="instances")
    assert Settings(variant="combined").stage_specs == (*defaults, instances)
    assert [spec.backbone for spec in Settings(layers=(1, 2)).stage_specs] == (
        [defaults[0].backbone] * 2
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": ["a depth=3"]}, "stage 'a depth=3': expected .* found 'depth=3'"),
        ({"stages": ["a layer=x"]}, "stage 'a layer=x': layer: expected int, found 'x'"),
        ({"stages": ["a layer=1 layer=2"]}, "at most once"),
        ({"stages": ["a average=2"]}, "average: expected an odd number from 1 to 15, found 2"),
        ({"stages": ["a kind=patches"]}, "kind: expected grid or instances, found 'patches'"),
        ({"stages": ["a weight=-1"]}, "weight: expected a number >= 0, found -1"),
        ({"stages": ["a weight=nan"]}, "weight: expected a number >= 0, found nan"),
        ({"stages": ["a size=0"]}, "size: expected 1 to 8192 pixels, found 0"),
        ({"stages": ["layer=3"]}, "backbone: expected a name or folder"),
        ({"stages": [""]}, "backbone: expected a name or folder"),
        ({"backbone": "a b=3"}, "backbone: expected a name or folder, found 'a b=3'"),
        ({"stages": ["a", "b", "a weight=0.5"]}, "more than the weight, found 'a' and another"),
        ({"stages": ["a size=800", "a size=800 layer=-1", "a size=800"]}, "'a size=800' and"),
        ({"backbone": "a", "layers": [3, 6, 3]}, "more than the weight, found 'a layer=3' and"),
        ({"stages": ["a weight=0", "b weight=0"]}, "'stages': expected weights above 0.* sum of 0"),
        *(
            ({"stages": ["a"], name: value}, f"either stages or '{name}', found both")
            for name, value in (
                *(("backbone", "b"), ("layers", [3])),
                *(("input_size", 320), ("variant", "combined")),
            )
        ),
    ],
)
def test_stages_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Settings.from_parameters(values)


def test_one_weight_above_zero_is_enough() -> None:
    weights = [spec.weight for spec in Settings(stages=("a weight=0", "b weight=0.5")).stage_specs]
    assert weights == [0.0, 0.5]


def test_settings_that_shape_a_score() -> None:
    names = {"neighbours": 2, "smoothing": 1.5, "tail_percent": 3.0}
    assert Settings(**names, threshold=-1.0).scoring == names


def test_cameras_have_their_own_settings_and_the_common_index() -> None:
    settings = Settings.from_parameters(
        {"cameras": ["front", "rear"], "index": "common", "rear.index": "own"}
    )
    assert settings.index_of("front") == "common"
    assert settings.index_of("rear") == "own"
    assert settings.camera_settings["front"].image_topic == "/camera/image_raw"


def test_live_settings_are_those_that_need_no_new_model_or_topic() -> None:
    assert " ".join(sorted(name for name, spec in setting_specs().items() if spec.live)) == (
        "confidence confirm_count confirm_s frozen_after_s least_contrast max_age_s max_area "
        "max_aspect min_area_px overlay_alpha silence_s target_episode_rate "
        "target_false_alarm_rate threshold"
    )
    assert not any(spec.live for spec in camera_setting_specs().values())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(run", "expected a regular expression, found '\\(run'"),
        ("run", "expected one group, found 0 in 'run'"),
        ("(a)(b)", "expected one group, found 2"),
    ],
)
def test_a_recording_pattern_has_one_group(pattern: str, message: str) -> None:
    assert Settings(recording_pattern="(?:x|y)(.+)_part").recording_pattern
    with pytest.raises(SettingsError, match=f"'recording_pattern': {message}"):
        Settings(recording_pattern=pattern)


def test_relative_paths_of_a_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "index: data/index\nbackbone: ../models/dino\nsegmenter_model: owner/name\n"
        "cameras: [front, rear]\nfront: {index: /absolute, ego_mask: masks/ego.png}\n",
    )
    settings = Settings.from_parameters(read_settings_file(path))
    assert settings.index == str(tmp_path / "data" / "index")
    assert settings.backbone == str(tmp_path.parent / "models" / "dino")
    assert settings.segmenter_model == "owner/name"
    assert settings.index_of("front") == "/absolute"
    assert settings.camera_settings["front"].ego_mask == str(tmp_path / "masks" / "ego.png")
    assert settings.index_of("rear") == settings.index
