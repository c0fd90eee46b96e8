"""The folder of a report: written whole or not at all, resumed after an interruption."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.detection.blindness import BlindnessCheck
from semantic_anomaly.errors import ArtefactError, InputError, SemanticAnomalyError
from semantic_anomaly.storage import (
    atomic_folder,
    canonical_json,
    publish_folder,
    refuse_unwritable,
    sha256_bytes,
)
from semantic_anomaly.structures import AnomalyResult, Decision, Frame

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector
    from semantic_anomaly.io.sources import BadFrame, FrameSource

FILE = "checkpoint.jsonl"
# Estimates of what a report takes: figures and page, a row of a frame, a pixel of a picture.
_REPORT_BYTES, _ROW_BYTES, _PICTURE_PIXEL_BYTES = 10_000_000, 2_000, 1

_log = logging.getLogger(__name__)


class Checkpoint:
    """Rows of the frames done so far, one line each, in the folder that becomes the report.

    Attributes:
        folder: files of a frame must be complete there before `record`.
        rows: rows of the frames done so far, in order.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._path = folder, folder / FILE
        self._scratch: list[Path] = []
        self.rows: list[dict[str, Any]] = []
        content = self._read(key)
        if not content:
            # The folder itself stays: it is locked.
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            content = canonical_json({"key": key}).encode() + b"\n"
        self._path.write_bytes(content)
        self._file = self._path.open("ab")

    def record(self, row: Mapping[str, Any]) -> None:
        """Append the row of a frame; from now on the frame is done."""
        self._file.write(canonical_json(row).encode() + b"\n")
        self._file.flush()
        self.rows.append(dict(row))

    def scratch(self, name: str, *, keep: bool = False) -> Path:
        """Return a folder that is removed when the report is finished, unless it is kept."""
        path = self.folder / name
        path.mkdir(exist_ok=True)
        if not keep:
            self._scratch.append(path)
        return path

    def finish(self) -> None:
        """Remove the checkpoint file, then the scratch folders.

        In this order: without their scratch files the rows could not be resumed from.
        """
        self.close()
        self._path.unlink()
        for path in self._scratch:
            shutil.rmtree(path)

    def close(self) -> None:
        """Close the checkpoint file."""
        self._file.close()

    def _read(self, key: str) -> bytes:
        """Load the rows of an earlier run with the same key and return their lines."""
        if not self._path.is_file():
            return b""
        # A frame whose line was cut off is not done.
        lines = self._path.read_bytes().split(b"\n")[:-1]
        try:
            first, *rows = [json.loads(line) for line in lines]
        except ValueError:
            return b""
        if first != {"key": key}:
            _log.warning("'%s': discarded, its settings or data differ", self.folder)
            return b""
        self.rows = rows
        return b"".join(line + b"\n" for line in lines)


@contextmanager
def resumable_report(
    out: Path, summary: str, written: frozenset[str], key: Mapping[str, Any]
) -> Iterator[Checkpoint]:
    """Yield a checkpoint whose folder becomes `out` when the block ends without an error.

    An interrupted run leaves its folder beside `out`, and the next run with the same key resumes
    there. After an error of this package nothing is left: the next run would fail in the same way.

    Args:
        out, summary, written: as in `refuse_other_content`.
        key: everything that the rows depend on.

    Raises:
        InputError: `out` holds something else than an earlier report, or another run writes it.
        ArtefactError: something cannot be written.
    """
    refuse_other_content(out, summary, written)
    out = out.expanduser().absolute()
    folder = out.with_name(f".{out.name}.unfinished")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ArtefactError(f"cannot write '{folder}': {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--out '{out}': another run is writing it") from None
        checkpoint = Checkpoint(folder, sha256_bytes(canonical_json(key).encode()))
        if checkpoint.rows:
            _log.info("resuming after %d frames of an earlier run", len(checkpoint.rows))
        try:
            yield checkpoint
            checkpoint.finish()
            publish_folder(folder, out)
        except SemanticAnomalyError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException as error:
            _log.warning(
                "stopped after %d frames, kept in '%s': run the same command to resume",
                *(len(checkpoint.rows), folder),
            )
            if isinstance(error, OSError):
                raise ArtefactError(f"cannot write '{out}': {error.strerror}") from error
            raise
        finally:
            checkpoint.close()
    finally:
        os.close(lock)


@contextmanager
def temporary_checkpoint() -> Iterator[Checkpoint]:
    """Yield a checkpoint in a temporary folder, for runs that write no report."""
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Checkpoint(Path(folder), "")) as checkpoint,
    ):
        yield checkpoint


def report_folder(out: Path, summary: str, written: frozenset[str]) -> AbstractContextManager[Path]:
    """Return a context with a temporary folder that becomes `out` when it ends without an error.

    Args:
        out, summary, written: as in `refuse_other_content`.

    Raises:
        InputError: `out` holds something else than an earlier report.
    """
    refuse_other_content(out, summary, written)
    return atomic_folder(out)


def refuse_other_content(out: Path, summary: str, written: frozenset[str]) -> None:
    """Refuse a folder that holds anything but an earlier report, or that cannot be written.

    Args:
        out: folder of the new report.
        summary: file that identifies an earlier report.
        written: names of everything that a report may hold.

    Raises:
        InputError: `out` is a file, or holds something else.
        ArtefactError: it cannot be created or replaced, or the disk is nearly full.
    """
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"--out '{out}': expected a folder or nothing there, found a file")
    names = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in names if name not in written]
    if foreign or (names and summary not in names):
        raise InputError(
            f"--out '{out}': expected nothing there, an empty folder or an earlier report (with "
            f"{summary} and nothing else), found {', '.join((foreign or names)[:5])}"
        )
    refuse_unwritable(out, _REPORT_BYTES)


def refuse_full_disk(
    folder: Path, image_hw: tuple[int, int], frames: int, every: int, maps: bool = False
) -> None:
    """Refuse to go on if the disk has too little free space for the rest of a report.

    Args:
        folder: in which it is made.
        image_hw: size of the frames.
        frames: that are left.
        every: every n-th frame gets two pictures; 0: none.
        maps: whether every frame gets an anomaly map, (height, width) float32.

    Raises:
        ArtefactError: the disk has less free space than the estimate.
    """
    pixels = image_hw[0] * image_hw[1]
    pictures = 2 * frames // every if every else 0
    needed_bytes = _REPORT_BYTES + frames * _ROW_BYTES + pictures * pixels * _PICTURE_PIXEL_BYTES
    refuse_unwritable(folder, needed_bytes + 4 * pixels * frames * maps)


def result_row(frame: Frame, result: AnomalyResult) -> dict[str, Any]:
    """Return the fields of a row that a frame's result gives; `restore_tracks` reads them.

    A blind frame has no score, as in the node: no measure may take it for a nominal one.
    """
    return {
        "stamp_ns": frame.stamp_ns,
        "score": None if result.blind else result.score,
        "p_value": None if result.blind else result.p_value,
        "boxes": [list(component.box_xyxy) for component in result.localizations],
        "decision": result.decision.value,
        "coarse": result.coarse,
        "drift": result.drift,
        "blind": result.blind,
        "reason": result.reason,
    }


def score_text(result: AnomalyResult) -> str:
    """Return the score of a result for captions, or why the camera is blind."""
    return result.reason if result.blind else f"score {result.score:.3f}"


def bad_row(bad: BadFrame) -> dict[str, Any]:
    """Return the fields of a row of a frame that cannot be decoded."""
    return {
        "stamp_ns": bad.stamp_ns,
        "score": None,
        "p_value": None,
        "boxes": [],
        "decision": Decision.UNKNOWN.value,
        "coarse": False,
        "drift": False,
        "blind": False,
        "reason": bad.reason,
        "ms": {},
        "sha256": sha256_bytes(bad.reason.encode()),
    }


def losses_of(sources: Iterable[FrameSource], rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return which frames could not be assessed, for results.json or summary.json.

    Args:
        sources: that were read.
        rows: of all their frames.
    """
    sources = list(sources)
    missing = [source.shortfall for source in sources]
    return {
        "bad_frames": [asdict(bad) for source in sources for bad in source.bad_frames],
        "frames_blind": sum(row["blind"] for row in rows),
        # None: some, but not known how many.
        "frames_missing": None if None in missing else sum(filter(None, missing)),
    }


class SkippedFrames:
    """What the frames of an earlier run leave behind, besides their rows: the last image."""

    def __init__(self) -> None:
        self._sequence: str | None = None
        self.blindness = BlindnessCheck()

    def add(self, frame: Frame | BadFrame, sequence: str) -> None:
        """Add the next frame; what is known of a drive ends with it."""
        if sequence != self._sequence:
            self.blindness.clear()
        self._sequence = sequence
        if isinstance(frame, Frame):
            self.blindness.reason(frame, 0.0, 0.0)


def restore(
    detector: AnomalyDetector,
    frame: Frame,
    rows: Iterable[Mapping[str, Any]],
    skipped: SkippedFrames,
) -> None:
    """Warm a detector up with its next frame, and restore its state after earlier frames.

    Args:
        detector: to be restored.
        frame: the next one.
        rows: of earlier frames, of one drive after the other, which is named under `sequence`;
            tracks end with a drive.
        skipped: earlier frames that this run has not passed to the detector.
    """
    detector.reset()
    # The first call allocates and compiles; its time would be an outlier.
    detector.detect(frame)
    detector.reset(drift=True)
    before: str | None = None
    for row in rows:
        if row["sequence"] != before:
            detector.reset()
        before = row["sequence"]
        if row["score"] is not None:
            detector.recall(row["stamp_ns"], row["boxes"], row["score"])
    detector.continue_blindness(skipped.blindness)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON; raise ValueError for NaN."""
    text = json.dumps(values, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
