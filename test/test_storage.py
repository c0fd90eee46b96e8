"""Atomic writing: interrupted writes leave the old file or folder; JSON and digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worlds.files import file_size_limit

from semantic_anomaly import storage
from semantic_anomaly.errors import ArtefactError
from semantic_anomaly.storage import (
    atomic_folder,
    atomic_write_bytes,
    canonical_json,
    forbid_writing_by_all,
    refuse_unwritable,
    sha256_bytes,
    sha256_file,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


def write_folder(path: Path, name: str) -> Path:
    """Write a folder with one empty file of the given name."""
    with atomic_folder(path) as temporary:
        (temporary / name).write_bytes(b"")
    return path


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5]}'


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_canonical_json_refuses_values_that_json_lacks(value: object) -> None:
    with pytest.raises(ArtefactError, match="JSON"):
        canonical_json({"value": value})


def test_digests_agree_with_hashlib(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest() == sha256_bytes(data)


def test_file_is_written_and_replaced_and_parents_are_created(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    atomic_write_bytes(path, b"one")
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["a", "b.json"]


def test_files_have_the_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    atomic_write_bytes(tmp_path / "ours", b"")
    write_folder(tmp_path / "our_folder", "file")
    for plain, ours in (("plain", "ours"), ("folder", "our_folder")):
        assert (tmp_path / plain).stat().st_mode == (tmp_path / ours).stat().st_mode


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    with file_size_limit(1000), pytest.raises(ArtefactError, match=r"cannot write '.*file'"):
        atomic_write_bytes(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_file_in_place_of_a_parent_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtefactError, match="file/x"):
        atomic_write_bytes(tmp_path / "file" / "x", b"")


def test_folder_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "index"
    with atomic_folder(path) as temporary:
        (temporary / "frames").mkdir()
        (temporary / "frames" / "x").write_bytes(b"1")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert (path / "frames" / "x").read_bytes() == b"1"
    assert names(tmp_path / "deep") == ["frames", "index", "x"]


@pytest.mark.parametrize("exchange", [True, False], ids=["swapped", "moved_aside"])
def test_folder_is_replaced_as_a_whole(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    for name in ("one", "two"):
        write_folder(tmp_path / "index", name)
    assert names(tmp_path) == ["index", "two"]


def test_failed_second_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_folder(tmp_path / "index", "one")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if (self / "two").exists():
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(storage, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtefactError, match="Input/output"):
        write_folder(path, "two")
    assert names(tmp_path) == ["index", "one"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "full")])
def test_any_exception_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    path = write_folder(tmp_path / "index", "one")
    expected = ArtefactError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), atomic_folder(path) as temporary:
        (temporary / "two").write_bytes(b"")
        raise error
    assert names(tmp_path) == ["index", "one"]


def test_links_and_files_are_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_bytes(b"keep")
    for name in ("link", "file"):
        with (
            pytest.raises(ArtefactError, match="expected a folder"),
            atomic_folder(tmp_path / name),
        ):
            raise AssertionError("the block must not run")
    assert (tmp_path / "file").read_bytes() == b"keep"
    assert (tmp_path / "link").is_symlink()


_KILLED = """
import os, signal, sys
from pathlib import Path
from semantic_anomaly.storage import atomic_folder
with atomic_folder(Path(sys.argv[1])) as temporary:
    (temporary / "two").write_bytes(bytes(100))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_the_old_folder(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "index", "one")
    root = str(Path(storage.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(path)],
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert names(path) == ["one"]
    temporary = [p for p in tmp_path.iterdir() if p != path]
    assert all(p.name.startswith(".index.") for p in temporary)


def test_available_memory_is_less_than_all_of_it() -> None:
    available = storage.available_memory_bytes()
    assert available is not None
    assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ["new", "a/b/new", "folder", "file"])
def test_what_can_be_written_passes_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"content")
    before = names(tmp_path)
    refuse_unwritable(tmp_path / name, needed_bytes=1)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/proc", "'/proc': it is a mount point"),
        ("/", "'/': it is a mount point"),
        ("/proc/self/nothing/report", "No such file"),
        ("file/report", "Not a directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_refused_before(tmp_path: Path, path: str, found: str) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with pytest.raises(ArtefactError, match=found):
        refuse_unwritable(tmp_path / path)
    assert names(tmp_path) == ["file"]


def test_a_folder_that_is_mounted_from_the_same_disk_is_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "my data"
    escaped = str(target).replace(" ", "\\040")
    (tmp_path / "mounts").write_text(f"36 35 98:0 /host {escaped} rw - ext4 /dev/sda rw\nbad\n")
    monkeypatch.setattr(storage, "_MOUNTS", tmp_path / "mounts")
    with pytest.raises(ArtefactError, match=r"choose a path inside it, such as '.*/my data/out'"):
        refuse_unwritable(target)
    refuse_unwritable(target / "out")


def test_a_disk_that_is_nearly_full_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=5_000_000)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: free)
    refuse_unwritable(tmp_path / "new", 5_000_000)
    with pytest.raises(ArtefactError, match=r"about 7 MB of free disk space .*, found 5 MB"):
        refuse_unwritable(tmp_path / "new", 7_000_000)


def test_the_folder_of_another_user_is_refused_where_only_owners_may_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    (tmp_path / "report").mkdir()
    refuse_unwritable(tmp_path / "report")
    monkeypatch.setattr(storage.os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ArtefactError, match="belongs to another user"):
        refuse_unwritable(tmp_path / "report")
    refuse_unwritable(tmp_path / "new")


@pytest.mark.parametrize(("umask", "mode"), [(0o000, 0o775), (0o022, 0o755), (0o077, 0o700)])
def test_nothing_is_made_that_all_users_may_write(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        forbid_writing_by_all()
        atomic_write_bytes(tmp_path / "parent/file", b"content")
        write_folder(tmp_path / "folder", "file")
    finally:
        os.umask(before)
    for name in ("parent", "folder", "parent/file", "folder/file"):
        expected = mode if (tmp_path / name).is_dir() else mode & 0o666
        assert (tmp_path / name).stat().st_mode & 0o777 == expected, name


def test_only_regular_files_of_a_bounded_size_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MAX_FILE_BYTES", 10)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to(path)
    assert storage.read_file(path) == storage.read_file(tmp_path / "link") == b"0123456789"
    path.write_bytes(b"0123456789a")
    with pytest.raises(OSError, match="at most 10 bytes, found 11"):
        storage.read_file(path)
    # Either would never end.
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(OSError, match="expected a regular file, found a pipe or device"):
            storage.read_file(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        storage.read_file(tmp_path)


@pytest.mark.parametrize("depth", [70, 900, 200_000])
def test_deep_json_is_refused_whatever_the_limit_of_python(depth: int) -> None:
    for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth):
        with pytest.raises(ValueError, match=r"nest too deep|Expecting"):
            storage.parse_json(text)
    assert storage.parse_json("[" * 60 + "]" * 60)


def test_yaml_does_not_expand_without_a_limit() -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60)]
    with pytest.raises(ValueError, match="expected no merge key, found '<<' in line"):
        storage.parse_yaml("\n".join(lines))
    lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    assert storage.parse_yaml("\n".join(lines))["a59"]
    with pytest.raises(ValueError, match="nest too deep"):
        storage.parse_yaml("a: &a [*a]")
