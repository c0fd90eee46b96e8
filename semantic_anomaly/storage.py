"""Atomic writing of files and folders, bounded reading, canonical JSON and digests.

A reader finds the old file or folder or the new one, never a part of either.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import ArtefactError

# Of a file that is read as a whole: an image of 40 million pixels in 16 bits fits.
MAX_FILE_BYTES = 512 << 20
# Own files nest less than 10 deep; Python code that visits values nests as deep as they do.
_MAX_DEPTH = 64
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


def read_file(path: Path) -> bytes:
    """Return the content of a regular file, or of one that a link leads to.

    Raises:
        OSError: it cannot be read, has more than `MAX_FILE_BYTES`, or is a pipe, a device or a
            folder.
    """
    # Opening a pipe would wait for its other end.
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        reason = "expected a regular file, found a pipe or device"
        raise OSError(errno.EINVAL, reason, str(path))
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1) if status.st_size <= MAX_FILE_BYTES else b""
    if max(status.st_size, len(content)) > MAX_FILE_BYTES:
        reason = f"expected at most {MAX_FILE_BYTES} bytes, found {status.st_size}"
        raise OSError(errno.EFBIG, reason, str(path))
    return content


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return the value of a JSON text; `options` are those of `json.loads`.

    Raises:
        ValueError: no JSON, not UTF-8, or values that nest too deep.
    """
    try:
        value = json.loads(text, **options)
    except RecursionError as error:
        raise ValueError(f"the values nest too deep: more than {_MAX_DEPTH} levels") from error
    refuse_deep(value)
    return value


def parse_yaml(text: str | bytes, check: Callable[[Any], object] = lambda node: None) -> Any:
    """Return the value of a YAML text, of plain types only.

    Args:
        text: of one document.
        check: is given the root node, None for an empty text, before values are made of it.

    Raises:
        ValueError: no YAML, not UTF-8, values that nest too deep, or merge keys, which may expand
            without a limit and are unknown to ROS.
    """
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_merge_keys(root)
        check(root)
        value = yaml.safe_load(text)
    except ArithmeticError as error:
        raise ValueError(str(error)) from error
    # The constructors of PyYAML raise nearly anything on unusual tags and dates.
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    refuse_deep(value)
    return value


def refuse_deep(value: Any) -> None:
    """Raise ValueError for lists and mappings that nest deeper than any of this package."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        # Aliases of YAML name one object many times.
        inner: dict[int, Any] = {}
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            inner |= {id(child): child for child in children if isinstance(child, dict | list)}
        if not (level := list(inner.values())):
            return
    raise ValueError(f"the values nest too deep: more than {_MAX_DEPTH} levels")


def yaml_keys(root: Any) -> Iterator[list[Any]]:
    """Yield the nodes of the keys of each mapping in a YAML document, each mapping once.

    Args:
        root: node of the document, as `yaml.compose` returns it; None for an empty one.
    """
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        for item in node.value:
            pending.extend(item if isinstance(item, tuple) else (item,))
        yield [item[0] for item in node.value if isinstance(item, tuple)]


def _refuse_merge_keys(root: Any) -> None:
    for keys in yaml_keys(root):
        for key in keys:
            if key.tag == "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise ValueError(f"expected no merge key, found '<<' in line {line}")


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
