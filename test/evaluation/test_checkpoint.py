"""Report folders and interrupted runs: a resumed run gives the report of an uninterrupted one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds.colours import ColourEmbedder, make_detector
from worlds.labelled_drive import make_dataset

from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import ArtefactError, InputError
from semantic_anomaly.evaluation import report
from semantic_anomaly.evaluation.checkpoint import (
    FILE,
    refuse_other_content,
    report_folder,
    resumable_report,
    write_json,
)
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.protocols import SelfNominal
from semantic_anomaly.evaluation.replay import replay
from semantic_anomaly.io.open import open_source
from semantic_anomaly.settings import Settings

DRIVE = "..oo..oo.o.."
WRITTEN = frozenset({"results.json", "overlays", "curve.png"})
Run = Callable[[Path, AnomalyDetector], dict[str, Any]]
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(params=["evaluate", "replay"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Return a function that evaluates or replays a drive of `DRIVE` into a folder."""
    root = make_dataset(tmp_path / "drive", DRIVE)
    if request.param == "evaluate":
        return lambda out, detector: evaluate(detector, root, out=out, every=3).results
    return lambda out, detector: replay(detector, open_source(root), out, every=3)


only_evaluate = pytest.mark.parametrize("run", ["evaluate"], indirect=True)


def stop_after(detector: AnomalyDetector, calls: int, error: type[BaseException]) -> list[str]:
    """Make a detector fail after `calls` frames, and return the list of names it detects."""
    names: list[str] = []
    detect = detector.detect

    def detect_or_stop(frame: Any) -> Any:
        names.append(frame.name)
        if len(names) > calls:
            raise error
        return detect(frame)

    detector.detect = detect_or_stop  # type: ignore[method-assign]
    return names


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in ("ms", "latency_ms")}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def files(folder: Path) -> dict[str, bytes]:
    """Return what does not hold times: pictures and scores."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in (".json", ".html")
    }


def test_an_interrupted_run_is_resumed(tmp_path: Path, run: Run) -> None:
    # One frame cannot be decoded, and another drive begins in the middle of an anomaly.
    (tmp_path / "drive/images/00001.png").write_bytes(b"")
    labels = json.loads((tmp_path / "drive/labels.json").read_text())
    for number, row in enumerate(labels.values()):
        row["drive"] = "one" if number < 7 else "two"
    (tmp_path / "drive/labels.json").write_text(json.dumps(labels))
    settings = {"threshold": 0.1, "confirm_count": 2, "confirm_s": 0.25}
    expected = run(tmp_path / "whole", make_detector(**settings))
    stopped = make_detector(**settings)
    # The first frame is detected twice, and the bad one not at all.
    stop_after(stopped, 7, MemoryError)
    with pytest.raises(MemoryError):
        run(tmp_path / "out", stopped)
    assert not (tmp_path / "out").exists()
    unfinished = tmp_path / ".out.unfinished"
    assert len((unfinished / FILE).read_bytes().splitlines()) == 1 + 7
    # The frame of a line that was cut off is not done.
    with (unfinished / FILE).open("ab") as file:
        file.write(b'{"name": "drive/0000')
    resumed = make_detector(**settings)
    names = stop_after(resumed, 99, MemoryError)
    results = run(tmp_path / "out", resumed)
    assert len(set(names)) == len(DRIVE) - 7
    assert untimed(results) == untimed(expected)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drive", "out", "whole"]


def test_a_run_interrupted_while_the_camera_is_frozen_is_resumed(tmp_path: Path, run: Run) -> None:
    images = tmp_path / "drive/images"
    for number in range(3, 10):
        (images / f"{number:05d}.png").write_bytes((images / "00002.png").read_bytes())
    settings = {"threshold": 0.1, "frozen_after_s": 0.45}
    expected = run(tmp_path / "whole", make_detector(**settings))
    assert expected["frames_blind"] > 2
    stopped = make_detector(**settings)
    # One frame is detected twice.
    stop_after(stopped, 7, MemoryError)
    with pytest.raises(MemoryError):
        run(tmp_path / "out", stopped)
    assert untimed(run(tmp_path / "out", make_detector(**settings))) == untimed(expected)


def test_a_run_interrupted_while_its_report_is_written_is_resumed(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        for writer in ("write_html", "write_drive_html"):
            patched.setattr(report, writer, stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", make_detector(threshold=0.1))
    resumed = make_detector(threshold=0.1)
    stop_after(resumed, 0, AssertionError)
    results = run(tmp_path / "out", resumed)
    assert untimed(results) == untimed(run(tmp_path / "whole", make_detector(threshold=0.1)))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_protocols_are_resumed(tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "drive", "..oo.o"))
    settings = Settings(dedup_distance=0.0, neighbours=1)

    def run(out: Path, embedder: ColourEmbedder) -> dict[str, Any]:
        protocol = SelfNominal(settings, "camera", dataset, embedder, folds=3)
        return evaluate(protocol, dataset, out=out, every=0).results

    whole = run(tmp_path / "whole", ColourEmbedder())
    embedder = ColourEmbedder()
    embed, left = embedder.embed, [13]

    def embed_or_stop(images: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return embed(images)

    embedder.embed = embed_or_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", embedder)
    assert (tmp_path / ".out.unfinished" / FILE).exists()
    assert untimed(run(tmp_path / "out", ColourEmbedder())) == untimed(whole)


@only_evaluate
def test_other_settings_or_data_start_again(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = make_detector()
    stop_after(stopped, 5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stopped)
    assert "stopped after 4 frames" in caplog.text
    stopped = make_detector(tail_percent=7.0, calibrated=False)
    stop_after(stopped, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stopped)
    assert "discarded, its settings or data differ" in caplog.text
    assert len((tmp_path / ".out.unfinished" / FILE).read_bytes().splitlines()) == 1 + 2
    (tmp_path / "drive/images/00003.png").touch()
    detector = make_detector(tail_percent=7.0, calibrated=False)
    names = stop_after(detector, 99, KeyboardInterrupt)
    run(tmp_path / "out", detector)
    assert len(set(names)) == len(DRIVE)


@pytest.mark.parametrize("content", [b"", b"no json\n", b'[1]\n{"name": 1}\n', b"{}"])
def test_a_damaged_checkpoint_starts_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / FILE).write_bytes(content)
    (tmp_path / ".out.unfinished/left").mkdir()
    with resumable_report(tmp_path / "out", "results.json", WRITTEN, {"a": 1}) as checkpoint:
        assert checkpoint.rows == []
        (checkpoint.folder / "results.json").write_text("{}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_two_runs_do_not_write_the_same_report(tmp_path: Path) -> None:
    def run() -> Any:
        return resumable_report(tmp_path / "out", "results.json", WRITTEN, {})

    with run() as checkpoint:
        with pytest.raises(InputError, match="another run is writing it"), run():
            pass
        checkpoint.record({"frame": 1})
        (checkpoint.folder / "results.json").write_text(json.dumps(checkpoint.rows))
    assert json.loads((tmp_path / "out/results.json").read_text()) == [{"frame": 1}]
    with run() as checkpoint:
        (checkpoint.folder / "results.json").write_text("[]")
    assert json.loads((tmp_path / "out/results.json").read_text()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "kept"), [(InputError("bad"), False), (OSError(28, "No space left"), True)]
)
def test_only_errors_of_the_package_leave_nothing(
    tmp_path: Path, error: Exception, kept: bool
) -> None:
    expected, text = (ArtefactError, "No space left") if kept else (InputError, "bad")
    with (
        pytest.raises(expected, match=text),
        resumable_report(tmp_path / "out", "results.json", WRITTEN, {}) as checkpoint,
    ):
        checkpoint.record({"frame": 1})
        raise error
    assert (tmp_path / ".out.unfinished").exists() is kept
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("before", [None, (), ("results.json", "curve.png")])
def test_a_report_replaces_its_like_as_a_whole(tmp_path: Path, before: tuple | None) -> None:
    out = tmp_path / "out"
    if before is not None:
        out.mkdir()
        for name in before:
            (out / name).write_text("old")
    with report_folder(out, "results.json", WRITTEN) as folder:
        write_json(folder / "results.json", {"new": 1})
    assert contents(tmp_path) == ["out", "out/results.json"]
    assert json.loads((out / "results.json").read_text()) == {"new": 1}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("results.json", "thesis.tex"), "thesis.tex"),
        (("curve.png",), "curve.png"),
    ],
)
def test_other_content_is_never_replaced(tmp_path: Path, names: tuple, message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("precious")
    with (
        pytest.raises(InputError, match=f"found {message}"),
        report_folder(tmp_path, "results.json", WRITTEN),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(InputError, match="found a file"):
        refuse_other_content(tmp_path / names[0], "results.json", WRITTEN)
    assert contents(tmp_path) == sorted(names)


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"auroc": math.nan})
