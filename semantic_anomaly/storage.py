"""Atomic writing of files and folders, canonical JSON and digests.

A reader finds the old file or folder or the new one, never a part of either.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import ArtefactError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOUNTS = Path("/proc/self/mountinfo")


def available_memory_bytes() -> int | None:
    """Return the memory that this process may still take, None where the system does not tell.

    It is the smaller one of the memory of the machine and of the limit of the container.
    """
    known = []
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                known.append(1024 * int(line.split()[1]))
    # Without a limit the file is absent or says "max".
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, taken = (
            int((group / name).read_text(encoding="ascii"))
            for name in ("memory.max", "memory.current")
        )
        known.append(max(0, limit - taken))
    return min(known, default=None)


def canonical_json(value: Any) -> str:
    """Return the JSON text of a value with sorted keys, without spaces, in ASCII.

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
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file to a temporary sibling, fsync and rename it; parent folders are created.

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
            _fsync(temporary)
            temporary.replace(path)
            _fsync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that replaces `path` when the block ends without an error.

    Its content is fsynced before the rename. An exception removes the temporary folder and leaves
    `path` unchanged. Parent folders are created.

    Raises:
        ArtefactError: `path` is a link or no folder, or the folder cannot be written.
    """
    path = _absolute(path)
    temporary = _sibling(path)
    try:
        with _os_errors_as_artefact_errors(path):
            _refuse_non_folder(path)
            temporary.mkdir(parents=True)
            yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(folder: Path, path: Path) -> None:
    """Replace `path` in one step by a finished folder beside it, after its content is fsynced.

    Raises:
        ArtefactError: as `atomic_folder`.
    """
    path = _absolute(path)
    with _os_errors_as_artefact_errors(path):
        for entry in folder.rglob("*"):
            _fsync(entry)
        _fsync(folder)
        _refuse_non_folder(path)
        if not path.exists():
            folder.rename(path)
        elif not _exchange(folder, path):
            aside = _sibling(path)
            path.rename(aside)
            try:
                folder.rename(path)
            except OSError:
                aside.rename(path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        _fsync(path.parent)
    # After an exchange of names this is the old folder.
    shutil.rmtree(folder, ignore_errors=True)


def forbid_writing_by_all() -> None:
    """Keep what this process creates from being writable by every user, whatever its umask was."""
    os.umask(os.umask(0o777) | stat.S_IWOTH)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def refuse_unwritable(path: Path, needed_bytes: int = 0) -> None:
    """Check before the work that a file or folder can be written and replaced.

    Nothing is left on the disk. Parent folders are created later.

    Args:
        path: of the file or folder to be.
        needed_bytes: estimate of what will be written.

    Raises:
        ArtefactError: it is a mount point, cannot be replaced or created, or the disk has less free
            space than needed.
    """
    path = _absolute(path)
    if os.path.ismount(path) or str(path.resolve()) in _mount_points():
        raise ArtefactError(
            f"cannot write '{path}': it is a mount point, which cannot be replaced as a whole; "
            f"choose a path inside it, such as '{path / 'out'}'"
        )
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    with _os_errors_as_artefact_errors(path):
        # By trying: access rights do not tell of read-only disks and of limits of names.
        probe = _sibling(folder / path.name)
        probe.mkdir()
        probe.rmdir()
        is_sticky = folder.stat().st_mode & stat.S_ISVTX
        if is_sticky and os.path.lexists(path):
            owners = {0, folder.stat().st_uid, path.lstat().st_uid}
            if os.geteuid() not in owners:
                raise ArtefactError(
                    f"cannot write '{path}': it belongs to another user, and '{folder}' lets only "
                    "the owner replace it"
                )
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ArtefactError(
            f"cannot write '{path}': expected about {needed_bytes / 1e6:.0f} MB of free disk space "
            f"(an estimate), found {free_bytes / 1e6:.0f} MB"
        )


def _mount_points() -> frozenset[str]:
    """Return the mount points of Linux, also of folders mounted from the same disk."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    # Spaces and the like are written as octal numbers.
    paths = (line.split(" ")[4] for line in lines if line.count(" ") > 4)
    return frozenset(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), path) for path in paths)


@contextmanager
def _os_errors_as_artefact_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"cannot write '{path}': {error.strerror or error}") from error


def _refuse_non_folder(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ArtefactError(f"cannot write '{path}': expected a folder or no file there")


def _exchange(one: Path, other: Path) -> bool:
    # Between two renames neither folder has the name; Linux can exchange names in one step.
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    return renameat2(*arguments) == 0


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
