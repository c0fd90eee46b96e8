"""The newest image of each camera, and the one thread that works on them.

Callbacks of the executor's thread put messages into slots; the worker takes all that are fresh
at once. Counters have one writer each: `received` and `replaced` the executor's thread, the
others the worker.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class CameraCounts:
    """What became of a camera's images since activation."""

    received: int = 0
    replaced: int = 0
    processed: int = 0
    dropped_stale: int = 0
    bad_images: int = 0
    failed: int = 0
    last_latency_ms: float | None = None


class FrameSlots:
    """Holds the newest message of each camera until the worker takes it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._newest: dict[str, Any] = {}
        self._closed = False

    def put(self, camera: str, message: Any) -> bool:
        """Store a message; return whether it replaced one that nobody took."""
        with self._changed:
            replaced = camera in self._newest
            self._newest[camera] = message
            self._changed.notify()
            return replaced

    def take(self) -> dict[str, Any] | None:
        """Wait for messages and return the newest of every camera that has one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._closed)
            if self._closed:
                return None
            batch, self._newest = self._newest, {}
            return batch

    def close(self) -> None:
        """Drop what is left and wake the worker for its end."""
        with self._changed:
            self._closed = True
            self._newest = {}
            self._changed.notify_all()


class Worker:
    """A thread that gives batches of messages to a function until it is stopped.

    Args:
        process: takes {camera: message}; what it raises is given to `report`.
        report: takes a traceback.
    """

    def __init__(
        self, process: Callable[[dict[str, Any]], None], report: Callable[[str], None]
    ) -> None:
        self.slots = FrameSlots()
        self._process = process
        self._report = report
        self._thread = threading.Thread(target=self._run, name="anomaly_worker")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the batch that it works on."""
        self.slots.close()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while (batch := self.slots.take()) is not None:
            try:
                self._process(batch)
            except Exception:
                self._report(traceback.format_exc())


class RateMeter:
    """Frequency of a counter over the time between two readings."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def rate_hz(self, count: int) -> float:
        """Return the counter's increments a second since the last call, 0 at first."""
        now = time.monotonic()
        last, self._last = self._last, (now, count)
        if last is None or now <= last[0] or count < last[1]:
            return 0.0
        return (count - last[1]) / (now - last[0])
