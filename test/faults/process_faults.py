"""Faults of processes and of the machine: signals, full disks, clocks, memory, threads, cut bags.

Commands run in a fork of the laboratory, which has imported everything; some run as users run them.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from faults.campaign import (
    FAILED,
    HARMLESS,
    INCOMPLETE,
    INTERRUPTED,
    REFUSED,
    SKIPPED,
    Case,
    Outcome,
    compute_as_in_tests,
)

OFFLINE = "offline"
SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
# Signals that a command notices: it cleans up and says so by its exit code.
STOPPED_CODES = {130, 143}
VERBS = ("build-index", "build-index --force", "calibrate", "evaluate", "add-nominal", "replay")
NOBODY = 65534
_FORK_S = 45.0


class Laboratory:
    """Drives, a labelled drive, bags, a backbone and a calibrated index."""

    def __init__(self, folder: Path) -> None:
        from worlds.backbones import save_backbone
        from worlds.ros import build_monitor, nominal_image, odd_image, parameters

        from semantic_anomaly.cli import VERBS as MODULES
        from semantic_anomaly.cli import module_of
        from semantic_anomaly.evaluation import extras
        from semantic_anomaly.io.images import write_image

        compute_as_in_tests()
        for parent in (folder, *folder.parents[:3]):
            if parent.stat().st_uid == os.geteuid() and parent != parent.parent:
                parent.chmod(parent.stat().st_mode | 0o055)
        self.folder = folder.resolve()
        self._count = 0
        backbone = save_backbone(self.folder / "backbone")
        self.index = build_monitor(self.folder / "monitor", backbone)
        self.drives = sorted((self.folder / "monitor").glob("drive_*"))
        self.more = self.folder / "more"
        self.labelled = self.folder / "labelled"
        for number in range(6):
            write_image(self.more / f"{number:03d}.png", nominal_image(50 + number))
            is_odd = number >= 4
            image = odd_image(60 + number) if is_odd else nominal_image(60 + number)
            write_image(self.labelled / "images" / f"{number:03d}.png", image)
            mask = (image[..., 0] * 0 + is_odd).astype("uint8")
            write_image(self.labelled / "masks" / f"{number:03d}.png", mask)
        self.values = parameters(self.index, backbone)
        self.options = ["--backbone", str(backbone), "--set", "input_size=140"]
        self.options += ["--set", "device=cpu", "--set", "dtype=float32"]
        # OpenVINO does not run in a fork.
        self.options += ["--set", "execution=torch"]
        # Its thread does not live on in a fork.
        tqdm.monitor_interval = 0
        # Forks find everything imported.
        extras.require("matplotlib.figure", "jinja2", "sklearn.metrics")
        for verb in MODULES:
            module_of(verb)

    def place(self) -> Path:
        """Return a folder with a copy of the index, `out` beside it, that is removed later."""
        self._count += 1
        place = self.folder / f"case_{self._count}"
        place.mkdir()
        shutil.copytree(self.index, place / "index")
        return place

    def arguments(self, verb: str, place: Path) -> list[str]:
        """Return a command that writes into the place."""
        index, detector = str(place / "index"), ["--set", "device=cpu", "--set", "execution=torch"]
        drives = [str(drive) for drive in self.drives]
        return {
            "build-index": ["build-index", *drives, "--out", str(place / "out"), *self.options],
            "build-index --force elsewhere": [
                *("build-index", *drives, "--out", str(place / "out"), "--force", *self.options)
            ],
            "build-index --force": [
                *("build-index", *drives, "--out", index, "--force", *self.options)
            ],
            "calibrate": ["calibrate", index, *drives[1:], *detector],
            "evaluate": [
                *("evaluate", str(self.labelled), "--index", index),
                *("--out", str(place / "out"), *detector),
            ],
            "add-nominal": ["add-nominal", index, str(self.more), *detector],
            "replay": [
                *("replay", str(self.more), "--index", index),
                *("--out", str(place / "out"), *detector),
            ],
        }[verb]

    def leftovers(self, place: Path, *, hidden: bool) -> list[str]:
        """Return what is not whole in a place: index, calibration, output folders.

        Args:
            hidden: whether temporary files with a dot may remain: the process could not clean up.
        """
        from semantic_anomaly.errors import SemanticAnomalyError
        from semantic_anomaly.index.nominal_index import NominalIndex
        from semantic_anomaly.offline.edit_index import calibrations_of

        against = []
        # A report goes on from its checkpoint.
        names = {path.name for path in place.iterdir()} - {"index", "out", ".out.unfinished"}
        if surplus := sorted(n for n in names if not (hidden and n.startswith("."))):
            against.append(f"left behind: {surplus}")
        for folder in (place / "index", place / "out"):
            if not (folder / "manifest.json").exists() and folder.name == "out":
                continue
            try:
                index = NominalIndex.load(folder)
                index.configure_search("graph", 10)
                calibrations_of(folder, index.fingerprint)
            except SemanticAnomalyError as error:
                against.append(f"not whole: {error}")
        return against


@contextmanager
def laboratory(folder: Path) -> Iterator[Laboratory]:
    yield Laboratory(folder)


def forked(
    work: Callable[[], int | None], after_start: Callable[[int], None] = lambda pid: None
) -> tuple[int, str]:
    """Run work in a fork; return its exit code, negative for a signal, and what it wrote to stderr.

    Args:
        work: returns its exit code.
        after_start: is called with the process.

    Raises:
        TimeoutError: it does not end.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(reading)
            os.dup2(writing, 2)
            os.close(writing)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = work() or 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    text: list[bytes] = []

    def read() -> None:
        with os.fdopen(reading, "rb") as stream:
            text.append(stream.read())

    reader = threading.Thread(target=read)
    reader.start()
    after_start(pid)
    end = time.monotonic() + _FORK_S
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            reader.join()
            raise TimeoutError(f"no end within {_FORK_S:g} s: {text[0][-500:]!r}")
        time.sleep(0.005)
    reader.join()
    return os.waitstatus_to_exitcode(ended[1]), text[0].decode(errors="replace")


def run_command(arguments: list[str]) -> int:
    """Run a command in this process."""
    from semantic_anomaly.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        return main(arguments)


def outcome_of(code: int, errors: str) -> Outcome:
    """Return the outcome of a command from outside."""
    lines = [s for s in errors.splitlines() if s.startswith("semantic-anomaly: error:")]
    if "Traceback" in errors:
        return Outcome("traceback", errors[-800:])
    kinds = {0: HARMLESS, 1: FAILED, 2: REFUSED, 3: INCOMPLETE}
    if code in kinds:
        against = "" if code in (0, 3) or len(lines) == 1 else f"{len(lines)} lines of errors"
        return Outcome(kinds[code], "\n".join(lines)).objecting(against)
    if code in STOPPED_CODES or code == -signal.SIGKILL:
        return Outcome(INTERRUPTED, errors[-300:])
    return Outcome(f"exit code {code}", errors[-500:])


# ---------------------------------------------------------------------------------------------


def cases(seed: int) -> Iterator[Case]:
    yield from _signals(seed)
    yield from _disks(seed)
    yield from _bags(seed)
    yield from _node(seed)


def _case(
    fault_class: str,
    point: str,
    run: Callable[[Laboratory], Outcome],
    allowed: tuple[str, ...],
    *,
    seed: int = 0,
    state: str = OFFLINE,
    names: tuple[str, ...] = (),
) -> Case:
    return Case("processes", fault_class, point, state, seed, frozenset(allowed), run, names)


def _signals(seed: int) -> Iterator[Case]:
    for verb in VERBS:
        for name, number in SIGNALS.items():
            for moment in ("frames", "files", "rename"):

                def run(
                    lab: Laboratory, verb: str = verb, number: int = number, moment: str = moment
                ) -> Outcome:
                    return _stopped(lab, verb, number, moment)

                # The last step may be behind it.
                allowed = (INTERRUPTED, HARMLESS) if moment == "rename" else (INTERRUPTED,)
                yield _case(name, f"{verb} while it handles {moment}", run, allowed)
            for shift in range(2):

                def run_at_random(
                    lab: Laboratory, verb: str = verb, number: int = number, shift: int = shift
                ) -> Outcome:
                    rng = random.Random(f"{verb} {number} {seed + shift}")
                    return _stopped(lab, verb, number, rng.uniform(0.0, 0.8))

                point, allowed = f"{verb} at a random moment", (INTERRUPTED, HARMLESS)
                yield _case(name, point, run_at_random, allowed, seed=seed + shift)
    for name, number in SIGNALS.items():

        def run_as_users(lab: Laboratory, number: int = number) -> Outcome:
            return _stopped_command(lab, number)

        yield _case(name, "build-index as users run it", run_as_users, (INTERRUPTED,))


def _stopped(lab: Laboratory, verb: str, number: int, moment: str | float) -> Outcome:
    """Send a signal to a command; afterwards the same command works."""
    place = lab.place()
    try:
        begun, begins = os.pipe()

        def work() -> int:
            if isinstance(moment, str):
                _stop_at(moment, number)
            os.write(begins, b"1")
            return run_command(lab.arguments(verb, place))

        def stop(pid: int) -> None:
            # A fork takes its time on a busy machine.
            os.read(begun, 1)
            os.close(begun)
            os.close(begins)
            if isinstance(moment, float):
                time.sleep(moment)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        code, errors = forked(work, stop)
        outcome = outcome_of(code, errors)
        is_killed = number == signal.SIGKILL
        against = lab.leftovers(place, hidden=is_killed)
        if verb in ("evaluate", "replay") and outcome.kind == INTERRUPTED:
            out = place / "out"
            # What is there is a checkpoint, from which the next run goes on; no result.
            results = [n for n in ("results.json", "summary.json") if (out / n).exists()]
            against += [f"an interrupted run left {name}" for name in results]
        code, errors = forked(lambda: run_command(_again(lab.arguments(verb, place), place)))
        again = outcome_of(code, errors)
        if again.kind != HARMLESS:
            against.append(f"the same command afterwards: {again.kind} {again.text}")
        return outcome.objecting(*against)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _again(arguments: list[str], place: Path) -> list[str]:
    """Return the command for another try: an index or an edit may be there already."""
    if arguments[0] == "build-index" and "--force" not in arguments and (place / "out").exists():
        return [*arguments, "--force"]
    if arguments[0] == "add-nominal":
        return ["inspect-index", arguments[1]]
    return arguments


def _stop_at(moment: str, number: int) -> None:
    """Send this process a signal when it embeds, syncs its first file, or renames."""
    from semantic_anomaly import storage
    from semantic_anomaly.segmentation.embedder import RunningEmbedder

    calls = {"left": {"frames": 2, "files": 1, "rename": 1}[moment]}

    def stopping(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls["left"] -= 1
            if not calls["left"]:
                os.kill(os.getpid(), number)
            return function(*arguments, **options)

        return wrapped

    if moment == "frames":
        RunningEmbedder.embed = stopping(RunningEmbedder.embed)  # type: ignore[method-assign]
    elif moment == "files":
        storage._fsync = stopping(storage._fsync)
    else:
        storage._exchange = stopping(storage._exchange)
        Path.rename = stopping(Path.rename)  # type: ignore[method-assign]
        Path.replace = stopping(Path.replace)  # type: ignore[method-assign]


def _stopped_command(lab: Laboratory, number: int) -> Outcome:
    place = lab.place()
    try:
        arguments = lab.arguments("build-index", place)
        with (place / ".log").open("w+b") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "semantic_anomaly", *arguments],
                stderr=log,
                stdout=subprocess.DEVNULL,
            )
            # The command has begun when it says how large the index may become.
            end = time.monotonic() + _FORK_S
            while b"predicted size" not in (place / ".log").read_bytes():
                if process.poll() is not None or time.monotonic() > end:
                    process.kill()
                    return Outcome("not started", (place / ".log").read_text()[-500:])
                time.sleep(0.01)
            process.send_signal(number)
            code = process.wait(_FORK_S)
        outcome = outcome_of(code, (place / ".log").read_text())
        (place / ".log").unlink()
        return outcome.objecting(*lab.leftovers(place, hidden=number == signal.SIGKILL))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _disks(seed: int) -> Iterator[Case]:
    def limited(lab: Laboratory, verb: str, size: int) -> Outcome:
        def limit(place: Path) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        return _on_disk(lab, verb, limit)

    def no_space(lab: Laboratory, verb: str, calls: int) -> Outcome:
        def fail(place: Path) -> None:
            from semantic_anomaly import storage

            sync = storage._fsync
            left = [calls]

            def failing(path: Path) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(28, "No space left on device")
                sync(path)

            storage._fsync = failing

        return _on_disk(lab, verb, fail)

    def small(lab: Laboratory, verb: str, size: str) -> Outcome:
        place = lab.place()
        try:
            kept = shutil.copytree(place / "index", place / "kept")
            shutil.rmtree(place / "index")
            options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
            if os.geteuid() or subprocess.run(["mount", *options], check=False).returncode:
                return Outcome(SKIPPED, "no right to mount a small file system")
            try:
                # Hidden by the mount.
                shutil.copytree(lab.index, place / "index")
                code, errors = forked(lambda: run_command(lab.arguments(verb, place)))
                del kept
                return outcome_of(code, errors).objecting(*lab.leftovers(place, hidden=False))
            finally:
                subprocess.run(["umount", str(place)], check=True)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def read_only(lab: Laboratory, verb: str) -> Outcome:
        def lock(place: Path) -> None:
            for path in (place, place / "index", *(place / "index").rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
            if not os.geteuid():
                os.setuid(NOBODY)

        return _on_disk(lab, verb, lock)

    def blocked(lab: Laboratory, verb: str, kind: str) -> Outcome:
        def block(place: Path) -> None:
            out = place / "out"
            if kind == "a file":
                out.write_bytes(b"kept")
            elif kind == "a link":
                out.symlink_to("/nonexistent")
            else:
                out.mkdir()
                (out / "other.txt").write_text("kept")

        return _on_disk(lab, verb, block, foreign=True)

    # Free disk space is estimated before the work; a limit of the process is found at the end.
    for verb in VERBS:
        # Smaller than the first, a later and no file of an index.
        for size in (100, 5_000, 40_000):

            def run(lab: Laboratory, verb: str = verb, size: int = size) -> Outcome:
                return limited(lab, verb, size)

            yield _case(
                *("file size limit", f"{verb}, {size} bytes", run), (REFUSED, FAILED, HARMLESS)
            )
        for calls in (0, 4):

            def run_full(lab: Laboratory, verb: str = verb, calls: int = calls) -> Outcome:
                return no_space(lab, verb, calls)

            allowed = (REFUSED, FAILED, HARMLESS)
            yield _case("disk full at sync", f"{verb}, after {calls} files", run_full, allowed)

        def run_small(lab: Laboratory, verb: str = verb) -> Outcome:
            return small(lab, verb, "420k")

        yield _case("disk full", verb, run_small, (REFUSED, FAILED, HARMLESS))

        def run_locked(lab: Laboratory, verb: str = verb) -> Outcome:
            return read_only(lab, verb)

        yield _case("read-only folder", verb, run_locked, (REFUSED,))
    for verb in ("build-index", "build-index --force elsewhere", "evaluate", "replay"):
        for kind in ("a file", "a link", "a folder of others"):

            def run_blocked(lab: Laboratory, verb: str = verb, kind: str = kind) -> Outcome:
                return blocked(lab, verb, kind)

            # Reports add their files to a folder that has others.
            of_others = kind == "a folder of others" and not verb.startswith("build-index")
            allowed = (REFUSED, HARMLESS) if of_others else (REFUSED,)
            yield _case("output in the way", f"{verb}, {kind}", run_blocked, allowed)


def _on_disk(
    lab: Laboratory, verb: str, prepare: Callable[[Path], None], *, foreign: bool = False
) -> Outcome:
    """Run a command after something was done to its process and folder."""
    place = lab.place()
    try:
        before = _contents(place / "index")

        def work() -> int:
            prepare(place)
            return run_command(lab.arguments(verb, place))

        code, errors = forked(work)
        outcome = outcome_of(code, errors)
        for path in (place, *place.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        against = lab.leftovers(place, hidden=False)
        if outcome.kind != HARMLESS and _contents(place / "index") != before:
            against.append("a failed command changed the index")
        out = place / "out"
        if outcome.kind != HARMLESS and not foreign and out.exists():
            against += [
                f"a failed command left {name}"
                for name in ("manifest.json", "results.json", "summary.json")
                if (out / name).exists()
            ]
        if foreign:
            kept = (out / "other.txt").exists() or out.is_symlink() or out.is_file()
            against.append("" if kept else "what was there is gone")
        return outcome.objecting(*against)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _bags(seed: int) -> Iterator[Case]:
    from faults import bag_faults

    yield from bag_faults.cases(seed, _case)


def _node(seed: int) -> Iterator[Case]:
    from faults import machine_faults

    yield from machine_faults.cases(seed, _case)
