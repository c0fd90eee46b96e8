"""Logging that cannot flood, and callbacks that cannot end the process.

An exception in a callback ends rclpy's spin, so every callback of the node is guarded. Any
thread may log.
"""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

REPEAT_AFTER_S = 5.0


class ThrottledLog:
    """Says the same thing about the same subject at most every `REPEAT_AFTER_S` seconds."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._last: dict[str, float] = {}

    def error(self, subject: str, text: str) -> None:
        """Log an error unless one about the subject was logged just now."""
        if self._due(subject):
            self._logger.error(text)

    def warning(self, subject: str, text: str) -> None:
        """Log a warning unless one about the subject was logged just now."""
        if self._due(subject):
            self._logger.warning(text)

    def _due(self, subject: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(subject, float("-inf")) < REPEAT_AFTER_S:
            return False
        self._last[subject] = now
        return True

    def guarded(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Return a callback that logs what the given one raises and goes on."""

        @functools.wraps(callback)
        def guard(*args: Any) -> Any:
            try:
                return callback(*args)
            except Exception:
                name = getattr(callback, "__name__", "callback")
                self.error(f"callback {name}", f"{name} failed:\n{traceback.format_exc()}")
                return None

        return guard


class RosLogHandler(logging.Handler):
    """Hands what the package logs to the node's logger, so that it reaches /rosout."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.INFO)
        self._ros_logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record at its own severity."""
        text = record.getMessage()
        # rclpy ties a severity to the calling line, so each has a line of its own.
        if record.levelno >= logging.ERROR:
            self._ros_logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._ros_logger.warning(text)
        else:
            self._ros_logger.info(text)
