"""The command itself: help, exit codes, messages, and what is loaded when."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worlds.cli import World

from semantic_anomaly import __version__
from semantic_anomaly.cli import VERBS, inspect_index, main, module_of
from semantic_anomaly.errors import ModelOutputError, SettingsError


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["semantic-anomaly", __version__]


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_with_an_example(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"example: semantic-anomaly {verb} {VERBS[verb].example}"[:60] in " ".join(text.split())
    assert "--debug" in text


@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_understood(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(module_of(verb), "run", lambda args: seen.append(args) or 0)
    assert main([verb, *shlex.split(VERBS[verb].example)]) == 0
    assert len(seen) == 1 and seen[0].verb == verb


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


def test_termination_is_handled_as_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def wait(args: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)
        return 0

    monkeypatch.setattr(inspect_index, "run", wait)
    assert main(["inspect-index", "x"]) == 143
    assert cleaned and capsys.readouterr().err == "semantic-anomaly: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interruption_while_the_arguments_are_read_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(parser: argparse.ArgumentParser) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_index, "add_arguments", interrupt)
    assert main(["inspect-index", "x"]) == 130
    assert capsys.readouterr().err == "semantic-anomaly: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_command_begins_is_no_traceback(
    number: signal.Signals,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(handler: logging.Handler) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(logging.getLogger("semantic_anomaly"), "addHandler", stop)
    assert main(["inspect-index", "x"]) == code
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert capsys.readouterr().err == f"semantic-anomaly: {word}\n"


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


def test_a_reader_that_leaves_ends_a_command_quietly(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"dataset": "d", "frame_auroc": 0.75}')
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "semantic_anomaly", "compare", str(tmp_path), str(tmp_path)]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


WRITING = [
    ["build-index", "{nominal}", "--out", "{out}"],
    ["build-index", "{nominal}", "--out", "{out}", "--calibrate"],
    ["evaluate", "{labelled}", "--index", "{index}", "--out", "{out}"],
    ["replay", "{bag}", "--index", "{index}", "--out", "{out}"],
    ["sensitivity", "{index}", "{nominal}", "--out", "{out}"],
    ["score-maps", "{nominal}", "{labelled}", "--out", "{out}"],
    ["explain", "{index}", "{nominal}[0:1]", "--box", "0", "0", "9", "9", "--out", "{out}.jpg"],
    ["synth", "{out}"],
    ["synth", "{out}", "--format", "mcap"],
    ["demo", "--out", "{out}"],
    ["accept", "{nominal}", "--requirements", "{nominal}", "--junit", "{out}/junit.xml"],
]


@pytest.mark.parametrize("argv", WRITING, ids=lambda argv: " ".join(argv[:1] + argv[4:]))
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    world: World,
    tmp_path: Path,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def worked(*args: object, **options: object) -> None:
        pytest.fail("the work began")

    for name in (
        "semantic_anomaly.segmentation.embedder.RunningEmbedder.from_settings",
        "semantic_anomaly.synthetic.drive.StreetDrive.frame",
        "semantic_anomaly.evaluation.exports.score_maps",
        "semantic_anomaly.evaluation.acceptance.read_requirements",
    ):
        monkeypatch.setattr(name, worked)
    (tmp_path / "file").write_text("in the way")
    names = {"nominal": "calibration_11", "labelled": "labelled", "bag": "bag", "index": "index"}
    places = {name: world.at(part) for name, part in names.items()}
    options = [part.format(**places, out=tmp_path / "file/out") for part in argv]
    assert main(options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot write" in error and "Not a directory" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("verb", ["add-nominal", "retract", "undo-edit"])
def test_an_edit_of_a_mounted_index_is_refused(
    world: World,
    tmp_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = world.copy("index", tmp_path / "index")
    (tmp_path / "mounts").write_text(f"36 35 98:0 /host {index} rw - ext4 /dev/sda rw\n")
    monkeypatch.setattr("semantic_anomaly.storage._MOUNTS", tmp_path / "mounts")
    more = {"add-nominal": [world.at("calibration_11")], "retract": ["--entries", "1"]}
    assert main([verb, str(index), *more.get(verb, [])]) == 2
    assert "it is a mount point" in capsys.readouterr().err
