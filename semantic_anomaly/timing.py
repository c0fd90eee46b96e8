"""Where the time of a frame goes: milliseconds by processing stage.

The parts of the detector are timed where they are, without passing times through every call:
`timed` adds to what the `stage_times` around it collects, of the same thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

DECODE, PREPARE, FORWARD, SEGMENT = "decode", "prepare", "forward", "segment"
SEARCH, SCORE, LOCALIZE, TOTAL = "search", "score", "localize", "total"
# Of every result; SEGMENT only where instances are segmented, PUBLISH only in the node.
STAGES = DECODE, PREPARE, FORWARD, SEARCH, SCORE, LOCALIZE, TOTAL
PUBLISH = "publish"

_collected: ContextVar[dict[str, float] | None] = ContextVar("stage_times", default=None)


@contextmanager
def stage_times() -> Iterator[dict[str, float]]:
    """Collect milliseconds by stage of all that runs inside."""
    times_ms: dict[str, float] = {}
    token = _collected.set(times_ms)
    try:
        yield times_ms
    finally:
        _collected.reset(token)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Add the time of what runs inside to a stage; nothing is collected outside `stage_times`."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        times_ms = _collected.get()
        if times_ms is not None:
            times_ms[stage] = times_ms.get(stage, 0.0) + elapsed_ms(begin)


def elapsed_ms(begin_s: float) -> float:
    """Return the milliseconds since a reading of `time.perf_counter`."""
    return (time.perf_counter() - begin_s) * 1e3
