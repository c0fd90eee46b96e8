"""The index folder: what is written, and everything that is checked before it is believed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.calibration.format import is_calibration
from semantic_anomaly.embedding.identity import EmbedderIdentity
from semantic_anomaly.errors import ArtefactError, IndexFormatError
from semantic_anomaly.index.build import BuildReport, FrameRecord
from semantic_anomaly.index.content import (
    FORMAT,
    FORMAT_VERSION,
    Edit,
    IndexContent,
    Retracted,
    edits_agree,
)
from semantic_anomaly.index.hnsw import check_graph_file
from semantic_anomaly.storage import canonical_json, sha256_bytes, sha256_file
from semantic_anomaly.structures import UNIT_NORM_TOLERANCE

MANIFEST = "manifest.json"
GRAPH = "graph.hnsw"
EMBEDDINGS = "embeddings.npy"
ENTRIES = "entries.npy"
FRAMES = "frames"
RETRACTED = ("retracted_embeddings.npy", "retracted_entries.npy")
# Version 1 is version 2 without edits and parts.
_READABLE = (1, FORMAT_VERSION)
_OWN_NAMES = frozenset({MANIFEST, GRAPH, EMBEDDINGS, ENTRIES, FRAMES, *RETRACTED})
_FRAME_FILE = re.compile(rf"{FRAMES}/\d{{6,}}\.jpg")
_KEYS = {"format", "format_version", "fingerprint", "content", "written", "files", "sha256"}
_PIECE = 65536


def write_content(folder: Path, content: IndexContent, manifest: Mapping[str, Any]) -> None:
    """Write everything but the graph, which must be there already, into an empty folder.

    Raises:
        OSError: it cannot be written.
    """
    np.save(folder / EMBEDDINGS, content.embeddings)
    np.save(folder / ENTRIES, content.entries)
    (folder / FRAMES).mkdir()
    for number, frame in enumerate(content.frames):
        (folder / _frame_file(number)).write_bytes(frame.thumbnail)
    names = [GRAPH, EMBEDDINGS, ENTRIES, *map(_frame_file, range(len(content.frames)))]
    if content.retracted is not None:
        np.save(folder / RETRACTED[0], content.retracted.embeddings)
        np.save(folder / RETRACTED[1], content.retracted.entries)
        names += RETRACTED
    files = {
        n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_file(folder / n)} for n in names
    }
    whole = {**manifest, "files": files}
    whole["sha256"] = sha256_bytes(canonical_json(whole).encode())
    (folder / MANIFEST).write_bytes(_manifest_bytes(whole))


def read_content(folder: Path) -> tuple[IndexContent, dict[str, Any]]:
    """Return content and manifest of an index folder after every check but that of the graph.

    Raises:
        IndexFormatError: missing, incomplete, damaged, tampered with, or of another version.
    """
    try:
        manifest = _read_manifest(folder)
        _check_files(folder, manifest["files"], manifest["content"])
        return _read_content(folder, manifest), manifest
    except OSError as error:
        raise _wrong(folder, "readable files", f"{error.filename}: {error.strerror}") from error
    # What a manifest of other types and numbers may raise on the way.
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise _wrong(folder, "a complete manifest", f"{type(error).__name__}: {error}") from error


def fingerprint_of(folder: Path) -> str:
    """Return the fingerprint that the manifest of an index folder names.

    Raises:
        IndexFormatError: there is no whole manifest.
    """
    try:
        return str(_read_manifest(folder)["fingerprint"])
    except OSError as error:
        raise _wrong(folder, "readable files", f"{error.filename}: {error.strerror}") from error


def check_graph(folder: Path, content: IndexContent, manifest: Mapping[str, Any]) -> None:
    """Check the graph file again, right before hnswlib reads it.

    Raises:
        IndexFormatError: changed since the folder was read, or not the graph of its embeddings.
    """
    try:
        _check_file(folder, GRAPH, manifest["files"][GRAPH])
        check_graph_file(folder / GRAPH, content.embeddings, content.graph["m"])
    except OSError as error:
        raise _wrong(folder, "readable files", f"{error.filename}: {error.strerror}") from error


def refuse_other_folder(folder: Path) -> None:
    """Raise ArtefactError where a folder holds anything besides an index."""
    inside = list(folder.iterdir()) if folder.is_dir() else []
    names = {p.name for p in inside if not _is_index(p)}
    foreign = sorted(n for n in _not_own(names) if not n.startswith("."))
    if foreign or (names and MANIFEST not in names):
        found = ", ".join(foreign[:3]) or "no manifest.json"
        raise ArtefactError(
            f"cannot write index '{folder}': the folder exists and is not an index: {found}"
        )


def _is_index(folder: Path) -> bool:
    if not folder.is_dir() or folder.is_symlink():
        return False
    names = {p.name for p in folder.iterdir()}
    return MANIFEST in names and not _not_own(names)


def _not_own(names: Iterable[str]) -> set[str]:
    return {name for name in names if name not in _OWN_NAMES and not is_calibration(name)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise _wrong(folder, "an index folder", "none there")
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise _wrong(folder, "manifest.json", "none: not an index")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _wrong(folder, "manifest.json as JSON", str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _wrong(folder, f"manifest.json of format {FORMAT}", "another")
    found = manifest.get("format_version")
    if type(found) is not int or found not in _READABLE:
        raise _wrong(folder, f"format version 1 or {FORMAT_VERSION}", f"{found!r}; build it again")
    if set(manifest) != _KEYS:
        raise _wrong(folder, f"manifest.json with {sorted(_KEYS)}", sorted(manifest))
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    intact = _manifest_bytes(manifest) == raw
    if not intact or sha256_bytes(canonical_json(rest).encode()) != manifest["sha256"]:
        raise _wrong(folder, "manifest.json as it was written", "an edited or damaged one")
    return manifest


def _check_files(folder: Path, files: Any, described: Mapping[str, Any]) -> None:
    needed = {GRAPH, EMBEDDINGS, ENTRIES, *(RETRACTED if "retracted" in described else ())}
    odd = [n for n in files if n not in needed and not _FRAME_FILE.fullmatch(n)]
    if odd or not needed <= set(files):
        raise _wrong(folder, f"a manifest that lists {sorted(needed)}", sorted(files)[:5])
    parts = set(described.get("parts", {}))
    if linked := sorted(name for name in parts if (folder / name).is_symlink()):
        raise _wrong(folder, f"a folder '{linked[0]}'", "a link")
    # The parts' own files are checked by the same reader, against manifests of their own.
    relative = (p.relative_to(folder) for p in folder.rglob("*"))
    present = {p.as_posix() for p in relative if p.parts[0] not in parts}
    # Hidden names are what an interrupted write of a calibration may leave.
    extra = sorted(
        n
        for n in present - set(files) - {MANIFEST, FRAMES}
        if not (n.startswith(".") or is_calibration(n))
    )
    if extra:
        raise _wrong(folder, "only files of the manifest", extra[0])
    for name, facts in files.items():
        _check_file(folder, name, facts)


def _check_file(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.is_file() or path.is_symlink():
        raise _wrong(folder, name, "no such file")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise _wrong(folder, f"{name} of {facts['bytes']} bytes", size)
    if sha256_file(path) != facts["sha256"]:
        raise _wrong(folder, f"{name} with sha256 {facts['sha256']}", "another content")


def _read_content(folder: Path, manifest: Mapping[str, Any]) -> IndexContent:
    described = manifest["content"]
    dim, count = described["dim"], described["count"]
    identity = EmbedderIdentity.from_dict(described["identity"])
    frames = tuple(
        FrameRecord(str(name), int(rows), int(cols), (folder / _frame_file(n)).read_bytes())
        for n, (name, rows, cols) in enumerate(described["frames"])
    )
    content = IndexContent(
        identity=identity,
        region=described["region"],
        camera=str(described["camera"]),
        source=tuple(map(str, manifest["written"]["source"])),
        embeddings=_read_array(folder, EMBEDDINGS, (count, dim), np.float32),
        entries=_read_array(folder, ENTRIES, (count, 3), np.int32),
        frames=frames,
        report=BuildReport(**{f.name: described["build"][f.name] for f in fields(BuildReport)}),
        graph={key: int(described["graph"][key]) for key in ("m", "ef_construction", "seed")},
        search_ef=int(described["search_ef"]),
        limits=described["limits"],
        edits=_read_edits(folder, manifest),
        retracted=_read_retracted(folder, described, dim),
        parts={str(name): str(value) for name, value in described.get("parts", {}).items()},
        made=described.get("made", {}),
    )
    if min(content.search_ef, content.graph["m"]) < 1:
        raise _wrong(folder, "search_ef and m of at least 1", "less")
    if identity.dim != dim or len(frames) != sum(
        _FRAME_FILE.fullmatch(name) is not None for name in manifest["files"]
    ):
        raise _wrong(folder, "a manifest that agrees with itself", f"dim {dim}")
    _check_arrays(folder, content)
    if not edits_agree(content):
        raise _wrong(folder, "edits that agree with what they took out", "others")
    if content.manifest()["fingerprint"] != manifest["fingerprint"]:
        raise _wrong(folder, f"content of fingerprint {manifest['fingerprint']}", "another")
    return content


def _read_edits(folder: Path, manifest: Mapping[str, Any]) -> tuple[Edit, ...]:
    described = manifest["content"].get("edits", [])
    written = manifest["written"].get("edits", [])
    edits = []
    for facts, rest in zip(described, written, strict=True):
        number, kind, entries, frames = facts
        texts = rest["when"], rest["note"], rest["source"]
        plain = [type(v) for v in (number, entries, frames)] == [int] * 3
        if not plain or not all(type(text) is str for text in texts) or len(rest) != 3:
            raise _wrong(folder, "edits of numbers and texts", "others")
        edits.append(Edit(number, kind, entries, frames, *texts))
    return tuple(edits)


def _read_retracted(folder: Path, described: Mapping[str, Any], dim: int) -> Retracted | None:
    if "retracted" not in described:
        return None
    count = described["retracted"]["count"]
    return Retracted(
        _read_array(folder, RETRACTED[0], (count, dim), np.float32),
        _read_array(folder, RETRACTED[1], (count, 5), np.int32),
    )


def _read_array(folder: Path, name: str, shape: tuple[int, int], dtype: Any) -> np.ndarray:
    # Mapped first: a header that claims more than the file holds allocates nothing.
    mapped: np.ndarray = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    if mapped.shape != shape or mapped.dtype != dtype or not mapped.flags.c_contiguous:
        expected = f"{name} {shape} {np.dtype(dtype).name}"
        raise _wrong(folder, expected, f"{mapped.shape} {mapped.dtype}")
    return np.array(mapped)


def _check_arrays(folder: Path, content: IndexContent) -> None:
    if not len(content.embeddings):
        raise _wrong(folder, "entries", "none")
    held = [(content.embeddings, content.entries)]
    if content.retracted is not None:
        held.append((content.retracted.embeddings, content.retracted.entries[:, :3]))
    grids = np.array([(f.rows, f.cols) for f in content.frames], np.int64).reshape(-1, 2)
    for embeddings, entries in held:
        for start in range(0, len(embeddings), _PIECE):
            part = embeddings[start : start + _PIECE]
            squares = np.einsum("nd,nd->n", part, part)
            # NaN compares false, so the test is written to fail on it.
            if not np.all(np.abs(squares - 1.0) <= 2 * UNIT_NORM_TOLERANCE):
                raise _wrong(folder, "finite embeddings of unit norm", "others")
        frame, places = entries[:, 0], entries[:, 1:]
        inside = (frame >= 0).all() and (frame < len(grids)).all() and (places >= 0).all()
        if not inside or not (places < grids[frame]).all():
            raise _wrong(folder, "entries that point into their frames", "others")


def _frame_file(number: int) -> str:
    return f"{FRAMES}/{number:06d}.jpg"


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _wrong(folder: Path, expected: str, found: object) -> IndexFormatError:
    return IndexFormatError(f"index '{folder}': expected {expected}, found {found}")
