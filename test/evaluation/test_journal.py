"""Runs that are stopped and go on: the report is that of a run without a stop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds.colours import ColourEmbedder, make_detector
from worlds.labelled_drive import make_dataset

from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import ArtefactError, InputError
from semantic_anomaly.evaluation import html
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.evaluation.journal import FILE, resumable_report
from semantic_anomaly.evaluation.labelled import evaluate
from semantic_anomaly.evaluation.protocols import SelfNominal
from semantic_anomaly.evaluation.replay import replay
from semantic_anomaly.io.open import open_source
from semantic_anomaly.settings import Settings

DRIVE = "..oo..oo.o.."
WRITTEN = frozenset({"results.json"})
Run = Callable[[Path, AnomalyDetector], dict[str, Any]]


def by_evaluate(root: Path) -> Run:
    def run(out: Path, detector: AnomalyDetector) -> dict[str, Any]:
        return evaluate(LabelledFolder(root), detector, out, every=3, progress=False)

    return run


def by_replay(root: Path) -> Run:
    def run(out: Path, detector: AnomalyDetector) -> dict[str, Any]:
        return replay(open_source(root), detector, out, every=3, progress=False)

    return run


def stop_after(detector: AnomalyDetector, calls: int, error: type[BaseException]) -> list[str]:
    """Make a detector fail at its so manieth frame, and return the names that it sees."""
    seen: list[str] = []
    detect = detector.detect

    def detect_or_stop(frame: Any) -> Any:
        seen.append(frame.name)
        if len(seen) > calls:
            raise error
        return detect(frame)

    detector.detect = detect_or_stop  # type: ignore[method-assign]
    return seen


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in ("ms", "latency_ms")}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def files(folder: Path) -> dict[str, bytes]:
    """Return what does not hold times: pictures and scores."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in found
        if file.suffix not in (".json", ".html")
    }


@pytest.mark.parametrize("how", [by_evaluate, by_replay])
@pytest.mark.parametrize("settings", [{}, {"confirm_count": 2, "confirm_s": 0.25}])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_stopped_run_goes_on(
    tmp_path: Path, how: Callable[[Path], Run], settings: dict[str, int], error: type[BaseException]
) -> None:
    run = how(make_dataset(tmp_path / "drive", DRIVE))
    whole = run(tmp_path / "whole", make_detector(threshold=0.1, **settings))
    stopped = make_detector(threshold=0.1, **settings)
    # The first frame is looked at once more beforehand.
    stop_after(stopped, 8, error)
    with pytest.raises(error):
        run(tmp_path / "out", stopped)
    assert not (tmp_path / "out").exists()
    unfinished = tmp_path / ".out.unfinished"
    assert len((unfinished / FILE).read_bytes().splitlines()) == 1 + 7
    # Killed while it wrote a line: that frame is not done.
    with (unfinished / FILE).open("ab") as file:
        file.write(b'{"name": "drive/0000')
    going_on = make_detector(threshold=0.1, **settings)
    seen = stop_after(going_on, 99, error)
    found = run(tmp_path / "out", going_on)
    again = settings.get("confirm_window", 1) - 1
    assert len(set(seen)) == len(DRIVE) - 7 + again
    assert untimed(found) == untimed(whole)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drive", "out", "whole"]


@pytest.mark.parametrize("how", [by_evaluate, by_replay])
def test_a_run_stopped_while_its_report_is_written_goes_on(
    tmp_path: Path, how: Callable[[Path], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = how(make_dataset(tmp_path / "drive", DRIVE))
    whole = run(tmp_path / "whole", make_detector(threshold=0.1))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        for writer in ("write_html", "write_drive_html"):
            patched.setattr(html, writer, stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", make_detector(threshold=0.1))
    going_on = make_detector(threshold=0.1)
    seen = stop_after(going_on, 0, AssertionError)
    assert untimed(run(tmp_path / "out", going_on)) == untimed(whole)
    assert seen == []
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_report_among_the_data_goes_on(tmp_path: Path) -> None:
    run = by_evaluate(make_dataset(tmp_path / "drive", DRIVE))
    stopped = make_detector()
    stop_after(stopped, 5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "drive/report", stopped)
    detector = make_detector()
    seen = stop_after(detector, 99, KeyboardInterrupt)
    run(tmp_path / "drive/report", detector)
    assert len(set(seen)) == len(DRIVE) - 4


def test_protocols_go_on(tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "drive", DRIVE))
    settings = Settings(dedup_distance=0.0, neighbours=1)

    def run(out: Path, embedder: ColourEmbedder) -> dict[str, Any]:
        protocol = SelfNominal(settings, "camera", dataset, embedder, folds=3)
        first = protocol.detector_of(dataset.truths[0])
        return evaluate(dataset, first, out, protocol=protocol, every=0, progress=False)

    whole = run(tmp_path / "whole", ColourEmbedder())
    embedder = ColourEmbedder()
    embed, left = embedder.embed, [25]

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


def test_other_settings_or_data_begin_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = by_evaluate(make_dataset(tmp_path / "drive", DRIVE))
    stopped = make_detector()
    stop_after(stopped, 5, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stopped)
    assert "stopped after 4 frames" in caplog.text
    stopped = make_detector(tail_percent=7.0, calibrated=False)
    stop_after(stopped, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stopped)
    assert "discarded, it was begun with other settings or data" in caplog.text
    assert len((tmp_path / ".out.unfinished" / FILE).read_bytes().splitlines()) == 1 + 2
    (tmp_path / "drive/images/00003.png").touch()
    detector = make_detector(tail_percent=7.0, calibrated=False)
    seen = stop_after(detector, 99, KeyboardInterrupt)
    run(tmp_path / "out", detector)
    assert len(set(seen)) == len(DRIVE)


@pytest.mark.parametrize("content", [b"", b"no json\n", b'[1]\n{"name": 1}\n', b"{}"])
def test_a_damaged_journal_begins_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / FILE).write_bytes(content)
    (tmp_path / ".out.unfinished/left").mkdir()
    with resumable_report(tmp_path / "out", "results.json", WRITTEN, {"a": 1}) as journal:
        assert journal.rows == []
        (journal.folder / "results.json").write_text("{}")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_two_runs_do_not_write_the_same_report(tmp_path: Path) -> None:
    def report() -> Any:
        return resumable_report(tmp_path / "out", "results.json", WRITTEN, {})

    with report() as journal:
        with pytest.raises(InputError, match="another run is writing it"), report():
            pass
        journal.record({"frame": 1})
        (journal.folder / "results.json").write_text(json.dumps(journal.rows))
    assert json.loads((tmp_path / "out/results.json").read_text()) == [{"frame": 1}]
    with report() as journal:
        (journal.folder / "results.json").write_text("[]")
    assert json.loads((tmp_path / "out/results.json").read_text()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "kept"), [(InputError("bad"), False), (OSError(28, "No space left"), True)]
)
def test_only_errors_that_would_come_again_leave_nothing(
    tmp_path: Path, error: Exception, kept: bool
) -> None:
    def rows() -> Iterator[None]:
        with resumable_report(tmp_path / "out", "results.json", WRITTEN, {}) as journal:
            journal.record({"frame": 1})
            yield
            raise error

    expected, text = (ArtefactError, "No space left") if kept else (InputError, "bad")
    with pytest.raises(expected, match=text):
        list(rows())
    assert (tmp_path / ".out.unfinished").exists() is kept
    assert not (tmp_path / "out").exists()
