"""Faults that the tests of the campaign's core try it on: each does what its class says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.campaign import ALTERED, HARMLESS, REFUSED, Case, Outcome

KEPT_OPEN: list[Any] = []
LINE = "index '/x': expected 3, found 4"


def cases(seed: int) -> Iterator[Case]:
    def case(name: str, run: Callable[[Any], Outcome], **more: Any) -> Case:
        allowed = frozenset({REFUSED, HARMLESS})
        return Case("sample", name, "here", "offline", seed, allowed, run, **more)

    yield case("refuses", lambda _: Outcome(REFUSED, LINE), names=("/x",))
    yield case("names nothing", lambda _: Outcome(REFUSED, LINE), names=("/y",))
    yield case("says nothing", lambda _: Outcome(REFUSED))
    yield case("alters", lambda _: Outcome(ALTERED, "1.0 in place of 2.0"))
    yield case("raises", lambda _: [][0])
    yield case("kills", lambda _: os.kill(os.getpid(), signal.SIGSEGV))
    yield case("hangs", lambda _: time.sleep(600), timeout_s=1.0)
    yield case(
        "leaks a file",
        lambda _: KEPT_OPEN.append(os.open("/dev/null", os.O_RDONLY)) or Outcome(HARMLESS),
    )
    yield case("leaks a thread", _leak_thread)
    yield case("takes memory", lambda _: Outcome(HARMLESS, str(len(bytearray(800_000_000)))))
    yield case("initialises once", _initialise)
    yield case("is harmless", lambda laboratory: Outcome(HARMLESS, laboratory))


@contextmanager
def laboratory(folder: Path) -> Iterator[str]:
    yield folder.name


def _leak_file(_: Any) -> Outcome:
    KEPT_OPEN.append(os.open("/dev/null", os.O_RDONLY))
    return Outcome(HARMLESS)


def _leak_thread(_: Any) -> Outcome:
    threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
    return Outcome(HARMLESS)


def _initialise(_: Any) -> Outcome:
    if not any(name == "once" for name in KEPT_OPEN):
        KEPT_OPEN.extend(("once", os.open("/dev/null", os.O_RDONLY)))
    return Outcome(HARMLESS)
