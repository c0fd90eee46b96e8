"""The one rule for stamps that do not rise, for tracks, alarms, episodes, events and recorders.

A frame whose stamp is up to `LATE_S` before the newest one is *late*: drivers swap stamps, and two
publishers share a topic. It counts like any other frame, and the newest stamp stays in force. A
stamp further back is a *jump*: the clock changed, or a bag or simulation began again. Only a jump
clears state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LATE_S = 1.0
LATE_NS = round(LATE_S * 1e9)


def jumps_back(stamp_ns: int, newest_ns: int | None) -> bool:
    """Return whether a stamp is more than `LATE_S` before the newest one; None: there is none."""
    return newest_ns is not None and newest_ns - stamp_ns > LATE_NS


def first_jump(stamps_ns: Sequence[int] | np.ndarray) -> int | None:
    """Return the number of the first stamp that is a jump back, None without one."""
    stamps = np.asarray(stamps_ns, np.int64)
    jumps = np.flatnonzero(np.maximum.accumulate(stamps) - stamps > LATE_NS)
    return int(jumps[0]) if len(jumps) else None


def order_of(stamps_ns: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return (n,) int64: the numbers of the frames by stamp, equal stamps in their order."""
    return np.argsort(np.asarray(stamps_ns, np.int64), kind="stable")
