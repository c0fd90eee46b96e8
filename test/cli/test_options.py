"""Options that several commands share, and the settings they make."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from semantic_anomaly.cli import options
from semantic_anomaly.errors import SettingsError, UnknownNameError


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_detector_options(parser)
    options.add_components_option(parser)
    return parser.parse_args(argv)


def test_options_make_settings(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text(
        "/**:\n  ros__parameters:\n    neighbours: 3\n    tail_percent: 2.0\n    index: a\n"
        "    front: {index: b, ego_mask: mask.png}\n    cameras: [front]\n"
    )
    args = arguments(
        *("--settings", str(path), "--set", "tail_percent=5e-1", "--set", "layers=[3, 6]"),
        *("--backbone", "mine", "--set", "front.ego_mask=", "--set", "search=exact"),
    )
    settings, camera = options.settings_of(args, Path("c"), target_false_alarm_rate=0.2)
    assert camera == "front"
    assert (settings.neighbours, settings.tail_percent, settings.layers) == (3, 0.5, (3, 6))
    assert (settings.backbone, settings.search) == ("mine", "exact")
    assert settings.camera_settings["front"].ego_mask == ""
    assert settings.index_of("front") == "c", "what the command names wins over both"
    assert settings.target_false_alarm_rate == 0.2
    of_file, _ = options.settings_of(args, target_false_alarm_rate=None)
    assert of_file.index_of("front") == str(tmp_path / "b"), "relative to the file"


@pytest.mark.parametrize(
    ("argv", "error", "pattern"),
    [
        (["--set", "neighbours"], SettingsError, "NAME=VALUE"),
        (["--set", "=3"], SettingsError, "NAME=VALUE"),
        (["--set", "neighbours=[1"], SettingsError, "not a YAML value"),
        (["--set", "neighbours=x"], SettingsError, "expected int"),
        (["--set", "neighbors=2"], UnknownNameError, "did you mean 'neighbours'"),
        (["--camera", "front"], UnknownNameError, "camera"),
        (["--set", "cameras=[a, b]"], SettingsError, "--camera: a, b"),
        (["--settings", "absent.yaml"], SettingsError, "absent.yaml"),
    ],
)
def test_bad_options(argv: list[str], error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        options.settings_of(arguments(*argv))


def test_one_of_several_cameras() -> None:
    args = arguments("--set", "cameras=[a, b]", "--camera", "b")
    assert options.settings_of(args)[1] == "b"


def test_limits_of_components(capsys: pytest.CaptureFixture[str]) -> None:
    for text, expected in (("obstacle-track", (50, 10)), ("20,5", (20, 5))):
        limits = arguments("--components", text).components
        assert (limits.predicted_px, limits.truth_px) == expected
    with pytest.raises(SystemExit):
        arguments("--components", "5")
    assert "expected anomaly-track, obstacle-track or PREDICTED,ANOMALY" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "text"), [(options.count, "-1"), (options.positive, "0")])
def test_small_numbers_are_refused(kind: type, text: str) -> None:
    assert kind("1") == 1
    with pytest.raises(argparse.ArgumentTypeError, match=rf"expected at least \d, found {text}"):
        kind(text)
