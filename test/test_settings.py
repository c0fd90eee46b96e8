"""The settings table: what it takes, and how it refuses."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from semantic_anomaly.errors import SettingsError, UnknownNameError
from semantic_anomaly.settings import (
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
        assert type(spec.default) in (bool, int, float, str, tuple), name


def test_defaults_survive_the_way_through_parameters() -> None:
    parameters = Settings().to_parameters()
    assert Settings.from_parameters(parameters) == Settings()
    assert not any(isinstance(value, tuple) for value in parameters.values())


@pytest.mark.parametrize(
    ("name", "value", "expected", "reason"),
    [
        ("tail_percent", 2, 2.0, "an integer where a float is meant"),
        ("threshold", 0, 0.0, "lower bound"),
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
        ("search", "fast", "one of auto, exact, graph, found 'fast'"),
        ("layers", 3, "expected a list, found 3"),
        ("layers", {3, 6}, "expected a list"),
        ("layers", [3, 6.0], "expected int, found 6.0"),
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
    assert settings.for_camera("rear").threshold == 0.0
    assert settings.for_camera("rear").confirm_count == 2
    assert Settings.from_parameters(settings.to_parameters()) == settings
    with pytest.raises(SettingsError, match=r"'front\.threshold': expected at most 2"):
        Settings.from_parameters({"cameras": ["front"], "front.threshold": 3.0})
    with pytest.raises(UnknownNameError, match="unknown camera 'left'"):
        settings.for_camera("left")


def test_unset_settings_take_the_defaults_of_a_new_index() -> None:
    complete = Settings(input_size=320).with_build_defaults()
    assert (complete.backbone, complete.input_size) == ("street_small", 320)
    assert (complete.variant, complete.segmenter, complete.place_weight) == ("grid", "tokens", 0.2)


def test_cameras_have_their_own_settings_and_the_common_index() -> None:
    settings = Settings.from_parameters(
        {"cameras": ["front", "rear"], "index": "common", "rear.index": "own"}
    )
    assert settings.index_of("front") == "common"
    assert settings.index_of("rear") == "own"
    assert settings.camera_settings["front"].image_topic == "/camera/image_raw"


def test_live_settings_are_those_that_need_no_new_model_or_topic() -> None:
    assert " ".join(sorted(name for name, spec in setting_specs().items() if spec.live)) == (
        "confirm_count confirm_s max_age_s max_area max_aspect min_area_px overlay_alpha silence_s "
        "target_episode_rate target_false_alarm_rate threshold"
    )
    assert not any(spec.live for spec in camera_setting_specs().values())


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
