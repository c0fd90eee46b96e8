"""The structure of an hnswlib 0.8 graph file, checked before hnswlib reads it.

hnswlib follows whatever offsets, counts and ids a file names, out of its own memory if need be,
and stores neither dimension nor space. A file that passes here leads it nowhere else.

A graph of hnswlib that grows while an index is built.
"""

from __future__ import annotations

import struct
from pathlib import Path

import hnswlib
import numpy as np

from semantic_anomaly.errors import IndexFormatError
from semantic_anomaly.index.build import GRAPH_SEED

_HEADER = struct.Struct("<QQQQQQiIQQQdQ")
_LABEL_BYTES = 8
# Levels fall off by a factor of m >= 2; more than this never comes of drawing them.
_MOST_LEVELS = 64


def predicted_graph_bytes(count: int, dim: int, m: int) -> int:
    """Return about how many bytes a graph of `count` vectors takes in file and memory."""
    upper_levels = 1.0 / (m - 1)
    return _HEADER.size + round(count * (_element_bytes(dim, m) + 4 + upper_levels * _upper(m)))


def check_graph_file(path: Path, embeddings: np.ndarray, m: int) -> None:
    """Check that a file is the graph of exactly these vectors, labelled by their row.

    Args:
        path: file that hnswlib wrote in space 'ip'.
        embeddings: (count, dim) float32.
        m: links per entry the graph was made with.

    Raises:
        IndexFormatError: another length, layout, count, link or vector; says which.
    """
    count, dim = embeddings.shape
    data = np.fromfile(path, np.uint8)
    size = _element_bytes(dim, m)
    if len(data) < _HEADER.size + count * (size + 4):
        raise _wrong(f"at least {_HEADER.size + count * (size + 4)} bytes", len(data))
    header = _HEADER.unpack(data[: _HEADER.size].tobytes())
    links_bytes = 2 * m * 4 + 4
    found = (*header[:6], *header[8:11])
    expected = (0, count, count, size, links_bytes + dim * 4, links_bytes, m, 2 * m, m)
    if found != expected:
        raise _wrong(f"header {expected}", found)
    elements = data[_HEADER.size : _HEADER.size + count * size].reshape(count, size)
    _check_elements(elements, embeddings, m)
    _check_upper_levels(data[_HEADER.size + count * size :], count, m, header[6], header[7])


def _element_bytes(dim: int, m: int) -> int:
    return 2 * m * 4 + 4 + dim * 4 + _LABEL_BYTES


def _upper(m: int) -> int:
    return m * 4 + 4


def _check_elements(elements: np.ndarray, embeddings: np.ndarray, m: int) -> None:
    count = len(embeddings)
    vectors = elements[:, 2 * m * 4 + 4 : -_LABEL_BYTES]
    # By pieces, for a view of bytes at odd offsets is copied before it can be compared.
    for start in range(0, count, 65536):
        part = slice(start, start + 65536)
        stored = np.ascontiguousarray(vectors[part]).view("<f4")
        if not np.array_equal(stored, embeddings[part]):
            raise _wrong("the vectors of embeddings.npy", "others")
        labels = np.ascontiguousarray(elements[part, -_LABEL_BYTES:]).view("<u8")[:, 0]
        if not np.array_equal(labels, np.arange(start, start + len(labels))):
            raise _wrong("labels in row order", "others")
        links = np.ascontiguousarray(elements[part, : 2 * m * 4 + 4]).view("<u4")
        _check_links(links, count, 2 * m)


def _check_links(links: np.ndarray, count: int, most: int) -> None:
    # The number is 16 bits wide; the byte after it is the mark of deleted entries.
    numbers = links[:, 0]
    if numbers.max() > most:
        raise _wrong(f"at most {most} links an entry and none deleted", int(numbers.max()))
    used = np.arange(most) < numbers[:, None]
    ids = links[:, 1:][used]
    if len(ids) and ids.max() >= count:
        raise _wrong(f"links to entries below {count}", int(ids.max()))


def _check_upper_levels(tail: np.ndarray, count: int, m: int, top: int, entry: int) -> None:
    data = tail.tobytes()
    step, offset = _upper(m), 0
    levels = np.zeros(count, np.int32)
    starts: list[tuple[int, int]] = []
    for element in range(count):
        if offset + 4 > len(data):
            raise _wrong(f"upper levels of {count} entries", f"those of {element}")
        (size,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if size:
            if size % step or size // step > _MOST_LEVELS or offset + size > len(data):
                raise _wrong(f"upper levels of {step} bytes each", f"{size} bytes")
            levels[element] = size // step
            starts.extend((offset + i * step, i + 1) for i in range(size // step))
            offset += size
    if offset != len(data):
        raise _wrong("nothing after the upper levels", f"{len(data) - offset} bytes more")
    if entry >= count or levels[entry] != top or levels.max() != top:
        raise _wrong(f"an entry point on the top level {levels.max()}", f"{entry} on {top}")
    if not starts:
        return
    where, level = (np.array(v) for v in zip(*starts, strict=True))
    links = np.ascontiguousarray(tail[where[:, None] + np.arange(step)]).view("<u4")
    _check_links(links, count, m)
    # A link on a level leads only to entries that have that level.
    used = np.arange(m) < links[:, :1]
    reach = levels[np.where(used, links[:, 1:], 0)]
    if (used & (reach < level[:, None])).any():
        raise _wrong("links to entries of the same level", "links to lower ones")


def _wrong(expected: str, found: object) -> IndexFormatError:
    return IndexFormatError(f"graph.hnsw: expected {expected}, found {found}")


_BUILD_EF = 64


class GrowingGraph:
    """A graph in space 'ip' that takes unit vectors in order; one thread, so always the same.

    Args:
        dim: length of a vector.
        m, ef_construction: links an entry, and breadth of the search while it grows.
    """

    def __init__(self, dim: int, m: int, ef_construction: int) -> None:
        self.index = hnswlib.Index("ip", dim)
        self.index.init_index(0, M=m, ef_construction=ef_construction, random_seed=GRAPH_SEED)
        self.index.set_ef(_BUILD_EF)

    def add(self, embeddings: np.ndarray) -> None:
        """Add (n, dim) float32 under the next labels."""
        count = self.index.get_current_count()
        labels = np.arange(count, count + len(embeddings))
        if count + len(embeddings) > self.index.get_max_elements():
            self.index.resize_index(max(count + len(embeddings), 2 * count))
        self.index.add_items(embeddings, labels, num_threads=1)

    def similarities(self, embeddings: np.ndarray) -> np.ndarray:
        """Return (n,) float32: inner product with the nearest that the graph finds."""
        _, distances = self.index.knn_query(embeddings, 1)
        return np.asarray(1.0 - distances[:, 0])

    def finished(self) -> hnswlib.Index:
        """Return the graph without room for more."""
        # A saved file says how many entries there is room for, and readers insist on none more.
        self.index.resize_index(self.index.get_current_count())
        return self.index
