"""The folder of finished work that all nodes share: what is there does not run again.

Everything in it is named by a digest of what it depends on, and written atomically.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semantic_anomaly import __version__
from semantic_anomaly.errors import ArtefactError, InputError
from semantic_anomaly.storage import (
    atomic_write_bytes,
    canonical_json,
    parse_json,
    read_file,
    sha256_bytes,
)

_DIGITS = 24


class Shards:
    """The shards of a run.

    Args:
        folder: on storage that all nodes share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        """Return where something of a kind is written that depends on a key of JSON values."""
        described = canonical_json({"kind": kind, "version": __version__, **key})
        return self.folder / f"{kind}-{sha256_bytes(described.encode())[:_DIGITS]}"


@contextmanager
def open_shards(folder: Path) -> Iterator[Shards]:
    """Yield the shards of a folder, which is made if needed; leftovers of killed tasks are removed.

    Raises:
        InputError: another run uses the folder.
        ArtefactError: it cannot be written, or holds something else.
    """
    folder = folder.expanduser().absolute()
    lock_file = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ArtefactError(f"cannot write shards '{folder}': {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--shards '{folder}': another run is using it") from None
        for leftover in folder.glob(".*.tmp"):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        yield Shards(folder)
    finally:
        os.close(lock)


def write_values(path: Path, values: Mapping[str, Any]) -> None:
    """Write a mapping of JSON values atomically.

    Raises:
        ArtefactError: it cannot be written.
    """
    atomic_write_bytes(path, canonical_json(values).encode())


def read_values(path: Path) -> dict[str, Any] | None:
    """Return what `write_values` has written, None if there is nothing.

    Raises:
        ArtefactError: the file is damaged.
    """
    try:
        values = parse_json(read_file(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"'{path}': expected a JSON object; remove it") from error
    if not isinstance(values, dict):
        raise ArtefactError(f"'{path}': expected a JSON object; remove it")
    return values
