"""Long runs that go on where they were stopped: what is done lies beside the report to be."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import ArtefactError, InputError, SemanticAnomalyError
from semantic_anomaly.evaluation.reports import refuse_other_content
from semantic_anomaly.storage import canonical_json, publish_folder, sha256_bytes

FILE = "journal.jsonl"

_log = logging.getLogger(__name__)


class Journal:
    """The frames that a run has done, one line each, in the folder that becomes the report.

    Attributes:
        folder: whatever is written there for a frame must be complete before `record`.
        rows: of the frames done so far, in order.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._path = folder, folder / FILE
        self._scratch: set[Path] = set()
        self.rows: list[dict[str, Any]] = []
        kept = self._read(key)
        if not kept:
            _clear(folder)
            kept = canonical_json({"key": key}).encode() + b"\n"
        self._path.write_bytes(kept)
        self._file = self._path.open("ab")

    def record(self, row: Mapping[str, Any]) -> None:
        """Take the row of the next frame; it is done from now on."""
        self._file.write(canonical_json(row).encode() + b"\n")
        self._file.flush()
        self.rows.append(dict(row))

    def scratch(self, name: str) -> Path:
        """Return a folder that is needed until the report is whole, and then removed."""
        path = self.folder / name
        path.mkdir(exist_ok=True)
        self._scratch.add(path)
        return path

    def keep(self, name: str) -> None:
        """Make a scratch folder part of the report."""
        self._scratch.discard(self.folder / name)

    def finish(self) -> None:
        """Remove the journal and, after it, what the report does not hold.

        In this order: rows without their scratch could not be gone on with.
        """
        self.close()
        self._path.unlink()
        for path in self._scratch:
            shutil.rmtree(path)

    def close(self) -> None:
        """Write nothing more."""
        self._file.close()

    def _read(self, key: str) -> bytes:
        """Take the rows of an earlier run of the same key, and return their lines, if any."""
        if not self._path.is_file():
            return b""
        # A line that was cut off is of a frame that is not done.
        lines = self._path.read_bytes().split(b"\n")[:-1]
        try:
            first, *rows = [json.loads(line) for line in lines]
        except ValueError:
            return b""
        if first != {"key": key}:
            _log.warning("'%s': discarded, it was begun with other settings or data", self.folder)
            return b""
        self.rows = rows
        return b"".join(line + b"\n" for line in lines)


@contextmanager
def resumable_report(
    out: Path, summary: str, written: frozenset[str], key: Mapping[str, Any]
) -> Iterator[Journal]:
    """Yield a journal whose folder becomes `out` when the block ends without an error.

    A run that is stopped or killed leaves its folder beside `out`, and the next one with the same
    key goes on from there. An error of this package's own would come again: it leaves nothing.

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
        journal = Journal(folder, sha256_bytes(canonical_json(key).encode()))
        if journal.rows:
            _log.info("goes on after the %d frames of an earlier run", len(journal.rows))
        try:
            yield journal
            journal.finish()
            publish_folder(folder, out, replace=True)
        except SemanticAnomalyError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException as error:
            _log.warning(
                "stopped after %d frames, kept in '%s': the same command goes on from there",
                *(len(journal.rows), folder),
            )
            if isinstance(error, OSError):
                raise ArtefactError(f"cannot write '{out}': {error.strerror}") from error
            raise
        finally:
            journal.close()
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
