"""The graph of the approximate nearest-neighbour search (HNSW, Malkov and Yashunin 2018).

hnswlib follows whatever offsets, counts and ids a file names, out of its own memory if need be, and
stores neither dimension nor space. So a graph file is checked before hnswlib reads it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import hnswlib
import numpy as np

from semantic_anomaly.errors import IndexFormatError

# Links per entry, and breadth of the search while the graph is built.
M, EF_CONSTRUCTION = 16, 100
_SEED = 100
# Breadth of the search for near-duplicates while an index is built.
_BUILD_EF = 64
_HEADER = struct.Struct("<QQQQQQiIQQQdQ")
# Links of an entry on one upper level.
_LEVEL_BYTES = 4 + 4 * M
# Levels fall off by a factor of M >= 2; drawing them never gives more than this.
_MAX_LEVELS = 64
_PIECE = 8192


class HnswGraph:
    """A graph of unit vectors in inner-product space that grows in the order of its vectors.

    Vectors are added by one thread, so that equal vectors give equal graphs.
    """

    def __init__(self, index: hnswlib.Index) -> None:
        self._index = index

    @classmethod
    def empty(cls, dim: int) -> HnswGraph:
        """Return a graph without vectors."""
        index = hnswlib.Index("ip", dim)
        index.init_index(0, M=M, ef_construction=EF_CONSTRUCTION, random_seed=_SEED)
        return cls(index)

    @classmethod
    def build(cls, embeddings: np.ndarray) -> HnswGraph:
        """Return the graph of (n, dim) float32 unit vectors."""
        graph = cls.empty(embeddings.shape[1])
        graph.add(embeddings)
        graph.trim()
        return graph

    @classmethod
    def load(cls, path: Path, embeddings: np.ndarray) -> HnswGraph:
        """Read the graph of (n, dim) float32 unit vectors from a file.

        Raises:
            IndexFormatError: the file is not the graph of these vectors.
            OSError: the file cannot be read.
        """
        check_graph_file(path, embeddings)
        index = hnswlib.Index("ip", embeddings.shape[1])
        try:
            index.load_index(str(path), max_elements=len(embeddings))
        except RuntimeError as error:
            # hnswlib crashes at the next query of an index that it failed to load.
            raise IndexFormatError(f"{path.name}: {error}") from error
        return cls(index)

    def save(self, path: Path) -> None:
        """Write the graph. hnswlib reports neither a full disk nor a short write."""
        self._index.save_index(str(path))

    def add(self, embeddings: np.ndarray) -> None:
        """Add (n, dim) float32 unit vectors under the next labels."""
        count = self._index.get_current_count()
        total = count + len(embeddings)
        if total > self._index.get_max_elements():
            self._index.resize_index(max(total, 2 * count))
        self._index.add_items(embeddings, np.arange(count, total), num_threads=1)

    def reserve(self, count: int) -> None:
        """Make room for `count` vectors in all."""
        if count > self._index.get_max_elements():
            self._index.resize_index(count)

    def trim(self) -> None:
        """Free the room for more vectors. `load` accepts only files without such room."""
        self._index.resize_index(self._index.get_current_count())

    def nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) int64 and (n,) float32: the nearest vector found, and the inner product.

        Args:
            queries: (n, dim) float32, unit norm.
        """
        if not len(queries):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        self._index.set_ef(_BUILD_EF)
        rows, distances = self._index.knn_query(queries, 1)
        return rows[:, 0].astype(np.int64), 1.0 - distances[:, 0]

    def similarities(self, queries: np.ndarray, k: int, ef: int = _BUILD_EF) -> np.ndarray:
        """Return (n, k) float32 inner products with the k nearest vectors that the graph finds.

        Args:
            queries: (n, dim) float32, unit norm.
            k: >= 1.
            ef: breadth of the search.

        Raises:
            RuntimeError: fewer than k vectors are within reach: a graph of few links can be in
                pieces.
        """
        if not len(queries):
            return np.empty((0, k), np.float32)
        self._index.set_ef(max(ef, k))
        _, distances = self._index.knn_query(queries, k)
        similarities: np.ndarray = 1.0 - distances
        return similarities


def graph_parameters() -> dict[str, int]:
    """Return what the graph of equal vectors depends on, for the manifest."""
    return {"m": M, "ef_construction": EF_CONSTRUCTION, "seed": _SEED}


def predicted_graph_bytes(count: int, dim: int) -> int:
    """Return about how many bytes a graph of `count` vectors takes in file and memory."""
    upper_levels = 1.0 / (M - 1)
    element_bytes = _element_layout(dim).itemsize + 4 + upper_levels * _LEVEL_BYTES
    return _HEADER.size + round(count * element_bytes)


def check_graph_file(path: Path, embeddings: np.ndarray) -> None:
    """Check that a file is the graph of exactly these vectors, labelled by their row.

    Args:
        path: hnswlib 0.8 file of a graph in space 'ip' with `M` links per entry.
        embeddings: (count, dim) float32.

    Raises:
        IndexFormatError: another length, layout, count, link or vector.
        OSError: the file cannot be read.
    """
    count, dim = embeddings.shape
    layout = _element_layout(dim)
    size, length = layout.itemsize, path.stat().st_size
    end = _HEADER.size + count * size
    if length < end + 4 * count:
        raise _wrong(f"at least {end + 4 * count} bytes", length)
    links_bytes = layout["links"].itemsize
    expected = (0, count, count, size, links_bytes + dim * 4, links_bytes, M, 2 * M, M)
    with path.open("rb") as file:
        header = _HEADER.unpack(file.read(_HEADER.size))
        found = (*header[:6], *header[8:11])
        if found != expected:
            raise _wrong(f"header {expected}", found)
        # In pieces: the graph is as large as the index.
        for start in range(0, count, _PIECE):
            rows = min(_PIECE, count - start)
            piece = np.frombuffer(file.read(rows * size), layout)
            if not np.array_equal(piece["vector"], embeddings[start : start + rows]):
                raise _wrong("the vectors of embeddings.npy", "others")
            if not np.array_equal(piece["label"], np.arange(start, start + rows)):
                raise _wrong("labels in row order", "others")
            _check_links(piece["links"], count, 2 * M)
        upper_levels = np.frombuffer(file.read(), np.uint8)
    _check_upper_levels(upper_levels, count, header[6], header[7])


def _element_layout(dim: int) -> np.dtype[np.void]:
    """Return the layout of an entry; its links on the lowest level begin with their number."""
    return np.dtype([("links", "<u4", (1 + 2 * M,)), ("vector", "<f4", (dim,)), ("label", "<u8")])


def _check_links(links: np.ndarray, count: int, max_links: int) -> None:
    # The number is 16 bits wide; the byte after it marks deleted entries.
    numbers = links[:, 0]
    if numbers.max() > max_links:
        raise _wrong(f"at most {max_links} links per entry and none deleted", int(numbers.max()))
    used = np.arange(max_links) < numbers[:, None]
    ids = links[:, 1:][used]
    if len(ids) and ids.max() >= count:
        raise _wrong(f"links to entries below {count}", int(ids.max()))


def _check_upper_levels(tail: np.ndarray, count: int, top_level: int, entry_point: int) -> None:
    data = tail.tobytes()
    step, offset = _LEVEL_BYTES, 0
    levels = np.zeros(count, np.int32)
    starts: list[tuple[int, int]] = []
    for element in range(count):
        if offset + 4 > len(data):
            raise _wrong(f"upper levels of {count} entries", f"those of {element}")
        (size,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if size:
            if size % step or size // step > _MAX_LEVELS or offset + size > len(data):
                raise _wrong(f"upper levels of {step} bytes each", f"{size} bytes")
            levels[element] = size // step
            starts.extend((offset + i * step, i + 1) for i in range(size // step))
            offset += size
    if offset != len(data):
        raise _wrong("nothing after the upper levels", f"{len(data) - offset} bytes more")
    if entry_point >= count or levels[entry_point] != top_level or levels.max() != top_level:
        raise _wrong(
            f"an entry point on the top level {levels.max()}", f"{entry_point} on {top_level}"
        )
    if not starts:
        return
    offsets, level = (np.array(v) for v in zip(*starts, strict=True))
    links = np.ascontiguousarray(tail[offsets[:, None] + np.arange(step)]).view("<u4")
    _check_links(links, count, M)
    # A link on a level leads only to entries that have that level.
    used = np.arange(M) < links[:, :1]
    link_levels = levels[np.where(used, links[:, 1:], 0)]
    if (used & (link_levels < level[:, None])).any():
        raise _wrong("links to entries of the same level", "links to lower ones")


def _wrong(expected: str, found: object) -> IndexFormatError:
    return IndexFormatError(f"graph.hnsw: expected {expected}, found {found}")
