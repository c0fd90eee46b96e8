"""The command itself: help, exit codes, messages, and what is loaded when."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from semantic_anomaly import __version__
from semantic_anomaly.cli import VERBS, inspect_index, main, options, tables
from semantic_anomaly.errors import ModelOutputError, SettingsError, UnknownNameError


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_with_an_example(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"example: semantic-anomaly {verb} " in " ".join(text.split())
    assert "--debug" in text


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("demo",)])
def test_examples_are_understood(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the help shows as an example parses, and is what runs."""
    import importlib
    import shlex

    module = importlib.import_module(f"semantic_anomaly.cli.{VERBS[verb].module}")
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(module, "run", lambda args: seen.append(args) or 0)
    assert main(shlex.split(VERBS[verb].example)[1:]) == 0
    assert len(seen) == 1 and seen[0].verb == verb


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["semantic-anomaly", __version__]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such-verb"],
        ["evaluate"],  # without what it needs
        ["evaluate", "x", "--index", "i", "--out", "o", "--every", "-1"],
        ["build-index", "x", "--out", "o", "--stride", "0"],
        ["build-index", "x", "--out", "o", "--no-such-option"],
        ["build-index", "x", "--ou", "o"],  # no abbreviations
    ],
)
def test_a_wrong_command_line_is_bad_input(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert "usage: semantic-anomaly" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SettingsError("a value\n  that cannot be"), 2),
        (ModelOutputError("not finite"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(inspect_index, "run", fail)
    assert main(["inspect-index", "x"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("semantic-anomaly: ")
    assert "  that" not in lines[0]


@pytest.mark.parametrize(
    "argv", [["--debug", "inspect-index", "x"], ["inspect-index", "x", "--debug"]]
)
def test_debug_shows_where(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text and "semantic-anomaly: error: " in text


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(inspect_index, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["inspect-index", "x"])


def test_messages_of_the_package_are_shown_while_a_verb_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("semantic_anomaly.anything")

    def speak(args: argparse.Namespace) -> int:
        log.info("so many bytes")
        log.warning("one drive only")
        return 0

    before = list(logging.getLogger("semantic_anomaly").handlers)
    monkeypatch.setattr(inspect_index, "run", speak)
    assert main(["inspect-index", "x"]) == 0
    assert capsys.readouterr().err.splitlines() == ["so many bytes", "warning: one drive only"]
    assert logging.getLogger("semantic_anomaly").handlers == before


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "semantic_anomaly", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[-1]) == (0, __version__)


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_detector_options(parser)
    return parser.parse_args(argv)


def test_options_make_settings(tmp_path: Path) -> None:
    path = tmp_path / "node.yaml"
    path.write_text(
        "/**:\n  ros__parameters:\n    neighbours: 3\n    tail_percent: 2.0\n    index: a\n"
        "    front: {index: b, ego_mask: mask.png}\n    cameras: [front]\n"
    )
    given = arguments(
        *("--settings", str(path), "--set", "tail_percent=5e-1", "--set", "layers=[3, 6]"),
        *("--backbone", "mine", "--set", "front.ego_mask=", "--set", "search=exact"),
    )
    settings, camera = options.settings_of(given, Path("c"), target_false_alarm_rate=0.2)
    assert camera == "front"
    assert (settings.neighbours, settings.tail_percent, settings.layers) == (3, 0.5, (3, 6))
    assert (settings.backbone, settings.search) == ("mine", "exact")
    assert settings.camera_settings["front"].ego_mask == ""
    assert settings.index_of("front") == "c", "what the command names wins over both"
    assert settings.target_false_alarm_rate == 0.2
    of_file, _ = options.settings_of(given, target_false_alarm_rate=None)
    assert of_file.index_of("front") == str(tmp_path / "b"), "relative to the file"


@pytest.mark.parametrize(
    ("argv", "error", "named"),
    [
        (["--set", "neighbours"], SettingsError, "NAME=VALUE"),
        (["--set", "=3"], SettingsError, "NAME=VALUE"),
        (["--set", "neighbours=[1"], SettingsError, "not a YAML value"),
        (["--set", "neighbours=x"], SettingsError, "expected int"),
        (["--set", "neighbours=0"], SettingsError, "at least 1"),
        (["--set", "neighbors=2"], UnknownNameError, "did you mean 'neighbours'"),
        (["--camera", "front"], UnknownNameError, "camera"),
        (["--set", "cameras=[a, b]"], SettingsError, "--camera: a, b"),
        (["--settings", "absent.yaml"], SettingsError, "absent.yaml"),
    ],
)
def test_bad_options(argv: list[str], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        options.settings_of(arguments(*argv))


def test_one_of_several_cameras() -> None:
    argv = ["--set", "cameras=[a, b]", "--camera", "b"]
    assert options.settings_of(arguments(*argv))[1] == "b"


def test_tables_align_numbers_to_the_right() -> None:
    text = tables.table([("cow", "3", "0.5"), ("sofa", "12", "-")], ("kind", "frames", "AUROC"))
    assert text.splitlines() == [
        "kind  frames  AUROC",
        "----  ------  -----",
        "cow        3    0.5",
        "sofa      12      -",
    ]
    assert tables.table([("a", "bc"), ("def", "g")]) == "a    bc\ndef  g"
    assert tables.table([]) == ""


@pytest.mark.parametrize(("count", "text"), [(999, "1.0 kB"), (5_000_000, "5.0 MB")])
def test_sizes(count: int, text: str) -> None:
    assert tables.megabytes(count) == text


def test_a_reader_that_leaves_ends_a_command_quietly(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "semantic_anomaly", "synth", str(tmp_path / "drive")]
    command += ["--drives", "1", "--frames", "1", "--size", "72x128"]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_long_lists_of_drives_are_cut() -> None:
    assert tables.drives_listed([("a", 3), ("b", 4)]) == "a (3), b (4)"
    many = tables.drives_listed((f"d{n}", n) for n in range(12))
    assert many.startswith("d0 (0), d1 (1)") and many.endswith("d9 (9) and 2 more")
