"""Atomic writing of files and folders, canonical JSON and digests.

A reader finds the old file or folder or the new one, never a part of either.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import ArtefactError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces, ASCII, one line.

    Raises:
        ArtefactError: JSON cannot represent the value, such as NaN.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"not representable as JSON: {error}") from error


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's content as 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file to a temporary sibling, fsync and rename it; parent folders are created.

    Args:
        path: replaced if it exists.
        data: content of the file.

    Raises:
        ArtefactError: the file cannot be written; an existing one is left unchanged.
    """
    path = _absolute(path)
    temporary = _sibling(path)
    with _os_errors_as_artefact_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _fsync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, replace: bool) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` when the block ends without an error.

    Its content is fsynced before the rename. An exception removes the temporary folder and leaves
    `path` unchanged.

    Args:
        path: the final folder; parent folders are created.
        replace: whether an existing folder may be replaced as a whole.

    Raises:
        ArtefactError: `path` exists and may not be replaced, or the folder cannot be written.
    """
    path = _absolute(path)
    temporary = _sibling(path)
    try:
        with _os_errors_as_artefact_errors(path):
            _refuse_existing(path, replace)
            temporary.mkdir(parents=True)
            yield temporary
        publish_folder(temporary, path, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(folder: Path, path: Path, replace: bool) -> None:
    """Rename a finished folder in one step, after its content is fsynced.

    Args:
        folder: a folder beside `path`.
        path: the final folder.
        replace: whether an existing folder may be replaced as a whole.

    Raises:
        ArtefactError: `path` exists and may not be replaced, or the folder cannot be written.
    """
    path = _absolute(path)
    with _os_errors_as_artefact_errors(path):
        for entry in folder.rglob("*"):
            _fsync(entry)
        _fsync(folder)
        _refuse_existing(path, replace)
        _put_in_place(folder, path)
        _fsync(path.parent)
    # After an exchange of names this is the old folder.
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _os_errors_as_artefact_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"cannot write '{path}': {error.strerror or error}") from error


def _refuse_existing(path: Path, replace: bool) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ArtefactError(f"cannot write '{path}': expected a folder or no file there")
    if path.exists() and not replace:
        raise ArtefactError(f"cannot write '{path}': it already exists")


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        aside = _sibling(path)
        path.rename(aside)
        try:
            temporary.rename(path)
        except OSError:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    # Between two renames neither folder has the name; Linux can exchange names in one step.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _absolute(path: Path) -> Path:
    # '..' is not resolved: it may follow a symbolic link.
    return Path(path).expanduser().absolute()


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
