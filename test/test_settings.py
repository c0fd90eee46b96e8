"""The settings table: what it takes, and how it refuses."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from semantic_anomaly.errors import SettingsError, UnknownNameError
from semantic_anomaly.settings import (
    UNSET,
    CameraSettings,
    Settings,
    camera_setting_specs,
    read_settings_file,
    setting_specs,
)
from semantic_anomaly.settings_schema import read_parameters_yaml

NAN, INFINITY = float("nan"), float("inf")
ROI = "camera.region_of_interest"


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def from_yaml(path: Path) -> Settings:
    return Settings.from_parameters(read_parameters_yaml(path))


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
        ("neighbours", 3, 3, "integer"),
        ("tail_percent", 2, 2.0, "an integer where a float is meant"),
        ("tail_percent", 100.0, 100.0, "upper bound"),
        ("threshold", 0, 0.0, "lower bound"),
        ("layers", [3, 6], (3, 6), "list"),
        ("layers", (), (), "empty"),
        ("layers", array("q", [3, 6]), (3, 6), "ROS hands arrays over"),
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
        ("neighbours", 1.0, "expected int, found 1.0"),
        ("neighbours", True, "expected int, found True"),
        ("neighbours", "1", "expected int, found '1'"),
        ("neighbours", None, "expected int, found None"),
        ("neighbours", [1], "expected int"),
        ("neighbours", {}, "expected int"),
        ("tail_percent", NAN, "finite"),
        ("tail_percent", INFINITY, "finite"),
        ("tail_percent", 10**400, "finite"),
        ("tail_percent", 0.0, "at least 0.001"),
        ("tail_percent", False, "expected float, found False"),
        ("target_false_alarm_rate", -0.1, "at least"),
        ("target_false_alarm_rate", 0.6, "at most 0.5"),
        ("search", "fast", "one of auto, exact, graph, found 'fast'"),
        ("search", ["auto"], "expected str"),
        ("search", {"auto"}, "expected str"),
        ("layers", 3, "expected a list, found 3"),
        ("layers", "3", "expected a list, found '3'"),
        ("layers", {3: 6}, "expected a list"),
        ("layers", {3, 6}, "expected a list"),
        ("layers", [3, 6.0], "expected int, found 6.0"),
        ("layers", [[3]], "expected int"),
        ("cameras", [], "distinct names"),
        ("cameras", ["front", "front"], "distinct names"),
        ("cameras", ["front left"], "letters, digits and single underscores"),
        ("cameras", ["2nd"], "letters, digits"),
        ("cameras", ["front__left"], "single underscores"),
        ("cameras", ["vörne"], "letters, digits"),
        ("cameras", ["index"], "not names of settings"),
        ("cameras", [["front"]], "expected str"),
        (ROI, [0.0, 0.0, 1.0, 0.0], "at least 3 pairs"),
        (ROI, [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.5], "at least 3 pairs"),
        (ROI, [0.0, 0.0, 1.2, 0.0, 1.0, 1.0], "at most 1.0, found 1.2"),
        (ROI, [0.0, -0.1, 1.0, 0.0, 1.0, 1.0], "at least 0.0, found -0.1"),
        (ROI, [0.0, NAN, 1.0, 0.0, 1.0, 1.0], "finite"),
        ("camera.transport", "theora", "one of raw, compressed"),
        ("camera.camera_height_m", -1.0, "at least 0.0"),
    ],
)
def test_refuses_with_the_name_and_what_was_found(name: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Settings.from_parameters({name: value})
    assert f"setting '{name.rpartition('.')[2]}'" in str(caught.value) or name in str(caught.value)


def test_settings_made_in_code_are_checked_alike() -> None:
    with pytest.raises(SettingsError, match="at most 100"):
        Settings(neighbours=101)
    with pytest.raises(SettingsError, match="confirm_s"):
        Settings(confirm_s=0.0)
    with pytest.raises(SettingsError, match="at least 3 pairs"):
        CameraSettings(region_of_interest=(0.0, 0.0))
    assert Settings().replace(neighbours=2).neighbours == 2
    with pytest.raises(SettingsError, match="at least 1"):
        Settings().replace(neighbours=0)


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
    assert all(getattr(Settings(), name) == value for name, value in UNSET.items())


def test_settings_of_an_unknown_camera_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown camera 'back'"):
        Settings(camera_settings={"back": CameraSettings()})


def test_cameras_have_their_own_settings_and_the_common_index() -> None:
    settings = Settings.from_parameters(
        {"cameras": ["front", "rear"], "index": "common", "rear.index": "own"}
    )
    assert settings.index_of("front") == "common"
    assert settings.index_of("rear") == "own"
    assert settings.camera_settings["front"].image_topic == "/camera/image_raw"


def test_yaml_of_the_node_and_plain_yaml_say_the_same(tmp_path: Path) -> None:
    node = written(
        tmp_path,
        "/**:\n  ros__parameters:\n    use_sim_time: true\n    neighbours: 3\n"
        "    camera:\n      image_topic: /a\n    camera.index: /b\n",
    )
    from_node = from_yaml(node)
    plain = written(tmp_path, "neighbours: 3\ncamera:\n  image_topic: /a\n  index: /b\n")
    assert from_yaml(plain) == from_node
    assert from_node.neighbours == 3
    assert from_node.camera_settings["camera"].image_topic == "/a"
    assert from_node.camera_settings["camera"].index == "/b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("neighbours: .nan", "expected int, found nan"),
        ("tail_percent: .nan", "finite"),
        ("tail_percent: .inf", "finite"),
        ("neighbours: yes", "found True"),
        ("neighbours: 2001-01-01", "expected int"),
        ("layers: &x [*x]", "expected int"),
    ],
)
def test_values_of_a_file_are_checked(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_yaml(written(tmp_path, text))


def test_live_settings_are_those_that_need_no_new_model_or_topic() -> None:
    live = {name for name, spec in setting_specs().items() if spec.live}
    assert live == {
        "target_false_alarm_rate",
        "target_episode_rate",
        "threshold",
        "confirm_count",
        "confirm_s",
        "silence_s",
        "min_area_px",
        "max_area",
        "max_aspect",
        "max_age_s",
        "overlay_alpha",
    }
    assert not any(spec.live for spec in camera_setting_specs().values())


def test_relative_paths_of_a_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    path = written(
        tmp_path,
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
