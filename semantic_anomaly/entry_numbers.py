"""The entries of an index that a user names: by number, by frame, by nearness to another one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from semantic_anomaly.errors import InputError, UnknownNameError
from semantic_anomaly.exact_search import inner_products
from semantic_anomaly.index import NominalIndex
from semantic_anomaly.index_content import IndexContent


def rows_of(content: IndexContent, numbers: Sequence[int]) -> np.ndarray:
    """Return (n,) int64, the rows of the embeddings that have these numbers.

    Raises:
        InputError: no such entry, or one that is retracted.
    """
    live = content.numbers
    gone = content.retracted.entries if content.retracted is not None else np.zeros((0, 5), int)
    asked = np.asarray(list(numbers), np.int64)
    total = len(live) + len(gone)
    for number in asked[(asked < 0) | (asked >= total)][:1]:
        raise InputError(f"entry {number}: expected a number from 0 to {total - 1}")
    for number in asked[np.isin(asked, gone[:, 3])][:1]:
        edit = gone[gone[:, 3] == number, 4][0]
        raise InputError(f"entry {number}: it is taken out already, by edit {edit}")
    return np.searchsorted(live, asked)


def of_frame(index: NominalIndex, name: str) -> list[int]:
    """Return the numbers of the entries of a frame.

    Raises:
        UnknownNameError: the index has no such frame.
        InputError: several frames have the name.
    """
    places = [place for place, known in enumerate(index.frame_names) if known == name]
    if not places:
        raise UnknownNameError("frame of the index", name, index.frame_names[:20])
    if len(places) > 1:
        raise InputError(f"frame '{name}': {len(places)} frames have this name; name entries")
    content = index.content
    return [int(n) for n in content.numbers[content.entries[:, 0] == places[0]]]


def near(index: NominalIndex, number: int, within: float) -> list[int]:
    """Return the numbers of an entry and of those within a cosine distance of it.

    Args:
        index: has the entries.
        number: of the entry.
        within: in [0, 2].

    Raises:
        InputError: no such entry, or a distance that cannot be.
    """
    if not 0.0 <= within <= 2.0:
        raise InputError(f"distance: expected a number in [0, 2], found {within}")
    content = index.content
    row = int(rows_of(content, [number])[0])
    similar = inner_products(content.embeddings[row : row + 1], content.embeddings.T)[0]
    found = 1.0 - similar <= within
    found[row] = True
    return [int(n) for n in content.numbers[found]]
