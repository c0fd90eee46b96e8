"""The index folder: writing it, and all checks before anything in it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.embedding.identity import (
    EmbedderIdentity,
    SegmenterIdentity,
    StageIdentity,
)
from semantic_anomaly.errors import (
    ArtefactError,
    IndexFormatError,
    SettingsError,
    first_line,
)
from semantic_anomaly.index.build import BuildReport, FrameRecord
from semantic_anomaly.index.content import (
    FORMAT,
    FORMAT_VERSION,
    Edit,
    FailedSource,
    IndexContent,
    IndexPart,
    RecordedSource,
    Retracted,
    Support,
)
from semantic_anomaly.index.hnsw import HnswGraph, check_graph_file, graph_parameters
from semantic_anomaly.index.partition import Partition
from semantic_anomaly.index.search import are_unit_vectors
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.stages import GRID, INSTANCES, StageSpec
from semantic_anomaly.storage import (
    available_memory_bytes,
    canonical_json,
    parse_json,
    read_file,
    sha256_bytes,
    sha256_file,
)

MANIFEST = "manifest.json"
GRAPH = "graph.hnsw"
EMBEDDINGS = "embeddings.npy"
ENTRIES = "entries.npy"
CENTROIDS, LISTS = "centroids.npy", "lists.npy"
SUPPORT, RADII = "support.npy", "radii.npy"
FRAMES = "frames"
RETRACTED = ("retracted_embeddings.npy", "retracted_entries.npy")
_ARRAYS = frozenset({EMBEDDINGS, ENTRIES, CENTROIDS, LISTS, SUPPORT, RADII})
_OWN_NAMES = frozenset({MANIFEST, GRAPH, FRAMES, *_ARRAYS, *RETRACTED})
_STAGE_FOLDER = re.compile(r"stage_[1-9]\d?")
_FRAME_FILE = re.compile(rf"{FRAMES}/\d{{6,}}\.jpg")
_CALIBRATION_FILE = re.compile(r"calibration(\.[A-Za-z_][A-Za-z0-9_]*)?\.json")
_BAD_MANIFEST = AttributeError, KeyError, OverflowError, SettingsError, TypeError, ValueError
_KEYS = {"format", "format_version", "fingerprint", "content", "written", "files", "sha256"}


def is_calibration_file(name: str) -> bool:
    """Return whether a file of an index folder is a calibration by its name."""
    return _CALIBRATION_FILE.fullmatch(name) is not None


def stage_folder(number: int) -> str:
    """Return the folder of a further stage inside that of the index."""
    return f"stage_{number}"


def write_content(folder: Path, content: IndexContent, graph: HnswGraph) -> None:
    """Write one stage of an index into an empty folder.

    Raises:
        OSError: it cannot be written.
    """
    graph.save(folder / GRAPH)
    np.save(folder / EMBEDDINGS, content.embeddings)
    np.save(folder / ENTRIES, content.entries)
    np.save(folder / CENTROIDS, content.partition.centroids)
    np.save(folder / LISTS, content.partition.lists)
    np.save(folder / SUPPORT, content.support.rows)
    np.save(folder / RADII, content.radii)
    (folder / FRAMES).mkdir()
    for number, frame in enumerate(content.frames):
        (folder / _frame_file(number)).write_bytes(frame.thumbnail)
    names = [GRAPH, *sorted(_ARRAYS), *map(_frame_file, range(len(content.frames)))]
    if content.retracted is not None:
        np.save(folder / RETRACTED[0], content.retracted.embeddings)
        np.save(folder / RETRACTED[1], content.retracted.entries)
        names += RETRACTED
    files = {
        n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_file(folder / n)} for n in names
    }
    manifest = {**content.manifest(), "files": files}
    manifest["sha256"] = sha256_bytes(canonical_json(manifest).encode())
    (folder / MANIFEST).write_bytes(_manifest_bytes(manifest))


def read_content(folder: Path) -> tuple[IndexContent, dict[str, Any]]:
    """Return content and manifest of an index folder after every check but that of the graph.

    Raises:
        IndexFormatError: missing, incomplete, damaged, tampered with, of another version, or larger
            than the memory available.
    """
    with _readable(folder):
        try:
            manifest = _read_manifest(folder)
            _check_files(folder, manifest["files"], manifest["content"])
            _check_memory(folder, manifest["files"])
            return _read_content(folder, manifest), manifest
        # A manifest of other types and numbers may raise any of these.
        except _BAD_MANIFEST as error:
            found = f"{type(error).__name__}: {first_line(error)}"
            raise _wrong(folder, "a complete manifest", found) from error


def read_graph(folder: Path, content: IndexContent, manifest: Mapping[str, Any]) -> HnswGraph:
    """Return the graph of an index folder after checking its file.

    Raises:
        IndexFormatError: changed since the folder was read, or not the graph of its embeddings.
    """
    with _checked_graph(folder, manifest) as path:
        return HnswGraph.load(path, content.embeddings)


def check_graph(folder: Path, content: IndexContent, manifest: Mapping[str, Any]) -> None:
    """Check the file of the graph of an index folder in little memory; raises as `read_graph`."""
    with _checked_graph(folder, manifest) as path:
        check_graph_file(path, content.embeddings)


@contextmanager
def _checked_graph(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    with _readable(folder):
        _check_file(folder, GRAPH, manifest["files"][GRAPH])
        with _named(folder):
            yield folder / GRAPH


def fingerprint_of(folder: Path) -> str:
    """Return the fingerprint that the manifest of an index folder names.

    Raises:
        IndexFormatError: there is no whole manifest.
    """
    with _readable(folder):
        return str(_read_manifest(folder)["fingerprint"])


def manifests_of(folder: Path) -> list[dict[str, Any]]:
    """Return the manifests of all stages of an index folder, without a look at other files.

    Raises:
        IndexFormatError: a manifest is missing, damaged or of another version.
    """
    with _readable(folder):
        try:
            first = _read_manifest(folder)
            further = range(1, 1 + len(first["content"].get("further", ())))
            return [first, *(_read_manifest(folder / stage_folder(number)) for number in further)]
        except _BAD_MANIFEST as error:
            found = f"{type(error).__name__}: {error}"
            raise _wrong(folder, "a complete manifest", found) from error


def refuse_existing(folder: Path, force: bool) -> None:
    """Raise ArtefactError for a folder that is not an index, or for an index without `force`."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArtefactError(
            f"cannot write index '{folder}': expected a folder or nothing there, found another file"
        )
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(
        name
        for name in names - _OWN_NAMES
        if not (name.startswith(".") or is_calibration_file(name) or _STAGE_FOLDER.fullmatch(name))
    )
    if foreign or (names and MANIFEST not in names):
        found = ", ".join(foreign[:3]) or "no manifest.json"
        raise ArtefactError(
            f"cannot write index '{folder}': the folder exists and is not an index: {found}"
        )
    if names and not force:
        raise ArtefactError(
            f"index '{folder}' exists {_inventory(folder)}; pass --force to replace it"
        )


def _inventory(folder: Path) -> str:
    """Return in words what would be lost with an index."""
    try:
        content = _read_manifest(folder)["content"]
        entries, frames = content["count"], len(content["frames"])
        edits = len(content.get("edits", []))
    except (OSError, IndexFormatError, AttributeError, KeyError, TypeError):
        return "and cannot be read"
    calibrations = sum(is_calibration_file(path.name) for path in folder.iterdir())
    return (
        f"with {entries} entries of {frames} frames, "
        f"{calibrations} calibration{'s' * (calibrations != 1)} and "
        f"{edits} edit{'s' * (edits != 1)}"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise _wrong(folder, "an index folder", "no folder")
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise _wrong(folder, "manifest.json", "no such file: not an index")
    raw = read_file(path)
    try:
        manifest = parse_json(raw)
    except ValueError as error:
        raise _wrong(folder, "manifest.json as JSON", str(error)) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _wrong(folder, f"manifest.json of format {FORMAT}", "another")
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise _wrong(folder, f"format version {FORMAT_VERSION}", f"{version!r}; build it again")
    if set(manifest) != _KEYS:
        raise _wrong(folder, f"manifest.json with {sorted(_KEYS)}", sorted(manifest))
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    intact = _manifest_bytes(manifest) == raw
    if not intact or sha256_bytes(canonical_json(rest).encode()) != manifest["sha256"]:
        raise _wrong(folder, "manifest.json as it was written", "an edited or damaged one")
    return manifest


def _check_files(folder: Path, files: Any, described: Mapping[str, Any]) -> None:
    needed = {GRAPH, *_ARRAYS, *(RETRACTED if "retracted" in described else ())}
    foreign = [n for n in files if n not in needed and not _FRAME_FILE.fullmatch(n)]
    if foreign or not needed <= set(files):
        raise _wrong(folder, f"a manifest that lists {sorted(needed)}", sorted(files)[:5])
    folders = {stage_folder(n + 1) for n in range(len(described.get("further", ())))}
    if any((folder / name).is_symlink() for name in folders):
        raise _wrong(folder, "folders of further stages", "a link")
    # The files of further stages are checked against manifests of their own.
    relative = (path.relative_to(folder) for path in folder.rglob("*"))
    present = {path.as_posix() for path in relative if path.parts[0] not in folders}
    # An interrupted write of a calibration may leave hidden files.
    extra = sorted(
        n
        for n in present - set(files) - {MANIFEST, FRAMES}
        if not (n.startswith(".") or is_calibration_file(n))
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


def _check_memory(folder: Path, files: Mapping[str, Any]) -> None:
    """Refuse an index that does not fit into memory, before anything of it is read."""
    # The graph is read where it is asked, and takes as much memory as on disk.
    needed = sum(entry["bytes"] for name, entry in files.items() if name != GRAPH)
    # Projections of the embeddings for the search, as numbers of 32 bits and of 8 bits.
    needed += files[EMBEDDINGS]["bytes"] * 5 // 8
    available = available_memory_bytes()
    if available is not None and needed > available:
        raise _wrong(
            folder,
            f"{needed} bytes of memory for entries and search",
            f"{available} bytes available; build it with a larger dedup_distance, fewer "
            "max_entries, or smaller stages",
        )


def _read_content(folder: Path, manifest: Mapping[str, Any]) -> IndexContent:
    described, written = manifest["content"], manifest["written"]
    dim, count = described["dim"], described["count"]
    with _named(folder):
        identity = EmbedderIdentity.from_dict(described["identity"])
    segmenter = None
    if "segmenter" in described:
        with _named(folder):
            segmenter = SegmenterIdentity.from_dict(described["segmenter"])
    spec = StageSpec(
        backbone=str(written["backbone"]),
        layer=identity.layer,
        size=identity.input_size,
        average=identity.average,
        kind=GRID if segmenter is None else INSTANCES,
        weight=float(described["weight"]),
    )
    if described["graph"] != graph_parameters():
        raise _wrong(
            folder, f"a graph of {graph_parameters()}", f"{described['graph']}; build it again"
        )
    total = count + (described["retracted"]["count"] if "retracted" in described else 0)
    content = IndexContent(
        stage=StageIdentity(spec, identity, segmenter),
        roi=_read_roi(folder, described["roi"]),
        camera=str(described["camera"]),
        sources=tuple(map(read_source, written["sources"])),
        stride=int(written["stride"]),
        segmenter_model=str(written["segmenter_model"]),
        embeddings=_read_array(folder, EMBEDDINGS, (count, dim), np.float32),
        entries=_read_array(folder, ENTRIES, (count, 3), np.int32),
        frames=tuple(
            FrameRecord(
                str(name),
                int(rows),
                int(cols),
                (folder / _frame_file(n)).read_bytes(),
                str(recording),
            )
            for n, (name, rows, cols, recording) in enumerate(described["frames"])
        ),
        report=BuildReport(**{f.name: described["build"][f.name] for f in fields(BuildReport)}),
        search_ef=int(described["search_ef"]),
        limits=described["limits"],
        partition=Partition(
            _read_array(folder, CENTROIDS, (described["lists"], dim), np.float32),
            _read_array(folder, LISTS, (count,), np.int32),
        ),
        edits=_read_edits(folder, manifest),
        retracted=_read_retracted(folder, described, dim),
        further=tuple(map(str, described.get("further", ()))),
        support=Support(
            tuple(map(str, described["recordings"])),
            _read_array(folder, SUPPORT, (described["support"], 3), np.int32),
        ),
        radii=_read_array(folder, RADII, (total,), np.float32),
        parts=tuple(map(_read_part, written["parts"])),
        failed=tuple(FailedSource(str(f["name"]), str(f["reason"])) for f in written["failed"]),
    )
    if content.search_ef < 1:
        raise _wrong(folder, "search_ef of at least 1", content.search_ef)
    frame_files = sum(_FRAME_FILE.fullmatch(name) is not None for name in manifest["files"])
    if identity.dim != dim or len(content.frames) != frame_files:
        raise _wrong(folder, "a manifest that agrees with itself", f"dim {dim}")
    _check_arrays(folder, content)
    if not content.edits_agree():
        raise _wrong(folder, "edits that agree with the retracted entries", "others")
    if content.manifest()["fingerprint"] != manifest["fingerprint"]:
        raise _wrong(folder, f"content of fingerprint {manifest['fingerprint']}", "another")
    return content


def read_source(values: Mapping[str, Any]) -> RecordedSource:
    """Return a source from its values in a manifest."""
    opened = values["opened"]
    return RecordedSource(
        name=str(values["name"]),
        opened=tuple(map(str, opened)) if isinstance(opened, list) else str(opened),
        topic=str(values["topic"]),
        recordings={str(k): str(v) for k, v in dict(values["recordings"]).items()},
    )


def _read_part(values: Mapping[str, Any]) -> IndexPart:
    return IndexPart(
        fingerprint=str(values["fingerprint"]),
        created=str(values["created"]),
        package_version=str(values["package_version"]),
        entries=int(values["entries"]),
        sources=tuple(map(str, values["sources"])),
    )


def _read_roi(folder: Path, roi: Any) -> Mapping[str, Any]:
    try:
        return RegionOfInterest.checked_description(roi)
    except SettingsError as error:
        raise _wrong(folder, "a region of interest", str(error)) from error


def _read_edits(folder: Path, manifest: Mapping[str, Any]) -> tuple[Edit, ...]:
    described = manifest["content"].get("edits", [])
    edits = []
    for facts, texts in zip(described, manifest["written"]["edits"], strict=True):
        edit = Edit(*facts, **texts)
        types = [type(getattr(edit, f.name)) for f in fields(Edit)]
        if len(facts) != 4 or types != [int, str, int, int, str, str, str]:
            raise _wrong(folder, "edits of numbers and texts", "others")
        edits.append(edit)
    return tuple(edits)


def _read_retracted(folder: Path, described: Mapping[str, Any], dim: int) -> Retracted | None:
    if "retracted" not in described:
        return None
    count = described["retracted"]["count"]
    return Retracted(
        _read_array(folder, RETRACTED[0], (count, dim), np.float32),
        _read_array(folder, RETRACTED[1], (count, 5), np.int32),
    )


def _read_array(folder: Path, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    try:
        # Mapped first: a header that claims more than the file holds allocates nothing.
        mapped: np.memmap[Any, Any] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    # numpy parses the header as Python text, which raises nearly anything if it is another one.
    except Exception as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise _wrong(folder, f"{name} as an array", found) from error
    if mapped.shape != shape or mapped.dtype != dtype or not mapped.flags.c_contiguous:
        expected = f"{name} {shape} {np.dtype(dtype).name}"
        raise _wrong(folder, expected, f"{mapped.shape} {mapped.dtype}")
    # Read rather than copied: pages that are mapped count as memory of the process.
    array = np.fromfile(folder / name, dtype, mapped.size, offset=mapped.offset)
    if array.size != mapped.size:
        raise _wrong(folder, f"{name} of {mapped.size} values", array.size)
    return array.reshape(shape)


def _check_arrays(folder: Path, content: IndexContent) -> None:
    if not len(content.embeddings):
        raise _wrong(folder, "entries", "none")
    partition = content.partition
    if not len(partition.centroids) or not are_unit_vectors(partition.centroids):
        raise _wrong(folder, "centroids of unit norm", "none or others")
    if not ((partition.lists >= 0) & (partition.lists < len(partition.centroids))).all():
        raise _wrong(folder, f"lists below {len(partition.centroids)}", "others")
    total = len(content.embeddings)
    if content.retracted is not None:
        total += len(content.retracted.entries)
    limits = total, len(content.support.recordings), np.iinfo(np.int32).max
    rows = content.support.rows
    if not ((rows >= 0) & (rows < np.array(limits))).all():
        raise _wrong(folder, "support of its entries by its recordings", "others")
    if not ((content.radii >= 0) & (content.radii <= 2)).all():
        raise _wrong(folder, "radii of entries in [0, 2]", "others")
    arrays = [(content.embeddings, content.entries)]
    if content.retracted is not None:
        arrays.append((content.retracted.embeddings, content.retracted.entries[:, :3]))
    grids_hw = np.array([(f.rows, f.cols) for f in content.frames], np.int64).reshape(-1, 2)
    for embeddings, entries in arrays:
        if not are_unit_vectors(embeddings):
            raise _wrong(folder, "finite embeddings of unit norm", "others")
        frame, cells = entries[:, 0], entries[:, 1:]
        inside = (frame >= 0).all() and (frame < len(grids_hw)).all() and (cells >= 0).all()
        if not inside or not (cells < grids_hw[frame]).all():
            raise _wrong(folder, "entries that point into their frames", "others")


def _frame_file(number: int) -> str:
    return f"{FRAMES}/{number:06d}.jpg"


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _wrong(folder: Path, expected: str, found: object) -> IndexFormatError:
    return IndexFormatError(f"index '{folder}': expected {expected}, found {found}")


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Add the folder to errors of those who do not know it."""
    try:
        yield
    except IndexFormatError as error:
        raise IndexFormatError(f"index '{folder}': {error}") from error


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
        raise _wrong(folder, "readable files", found) from error
