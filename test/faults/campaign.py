"""The fault campaign: a table of faults, one oracle that looks from outside, a runner and a report.

A module of faults has `cases(seed)`, which returns its part of the table, and `laboratory(folder)`,
a context manager that makes what the cases are tried on. Cases of a group run in one child process,
which is started again if a case kills it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

# Imported where the cases run: the parent process loads neither torch nor rclpy.
MODULES = {
    "files": "faults.file_faults",
    "messages": "faults.message_faults",
    "lifecycle": "faults.lifecycle_faults",
    "processes": "faults.process_faults",
}

# What a case may come to. Which of these are allowed is said by each case.
REFUSED = "refused"  # one line of an error of the package; exit code 2, or still unconfigured
HARMLESS = "harmless"  # the same answers as without the fault
UNKNOWN = "unknown"  # the decision is unknown, with its reason
KEPT = "kept"  # what was in force before goes on answering
DROPPED = "dropped"  # no answer, and counted as such
INCOMPLETE = "incomplete"  # finished with losses, which are named; exit code 3
INTERRUPTED = "interrupted"  # ended early as told; nothing half-written
FAILED = "failed"  # one line of an error that is not the user's; exit code 1
DETECTED = "detected"  # answered otherwise than without the fault, and never as nominal
# Never allowed, whatever the case says.
CRASHED = "crashed"
HUNG = "hung"
RAISED = "raised"  # an exception that is not one of the package
ALTERED = "altered"  # other answers without a word
# The machine cannot have the fault, for the reason in the text.
SKIPPED = "skipped"

LOG = "log.txt"
TIMEOUT_S = 60.0
# Growth of the child that a case, or all cases after the first quarter, may leave or reach.
PEAK_MB, GROWTH_MB = 600.0, 100.0
_ROOM_MB = 4000.0
_SETTLE_S = 1.0
MB = 1e6


@dataclass(frozen=True)
class Outcome:
    """What was seen from outside.

    Attributes:
        kind: one of the outcomes above.
        text: error or reason that the user sees, or what differs.
        violations: objections of the oracle, whatever the kind.
    """

    kind: str
    text: str = ""
    violations: tuple[str, ...] = ()

    def objecting(self, *violations: str) -> Outcome:
        """Return a copy with further objections; empty ones are left out."""
        return replace(self, violations=self.violations + tuple(filter(None, violations)))


@dataclass(frozen=True)
class Case:
    """A fault, where and when it is injected, and what may come of it.

    Attributes:
        group: one of `MODULES`.
        fault_class: what is wrong, such as 'truncated'.
        point: where it is injected, such as 'embeddings.npy by load'.
        state: of the life cycle, such as 'active'; 'offline' without a node.
        seed: of the details.
        allowed: outcomes that may come of it.
        run: injects the fault into the laboratory and returns what came of it.
        names: what an error has to name, one of these; empty: nothing.
        timeout_s: after which the case counts as hung.
    """

    group: str
    fault_class: str
    point: str
    state: str
    seed: int
    allowed: frozenset[str]
    run: Callable[[Any], Outcome]
    names: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S

    @property
    def name(self) -> str:
        """Return what identifies the case."""
        return f"{self.group}/{self.fault_class}/{self.point}/{self.state}/{self.seed}"


class FaultModule(Protocol):
    """What a module of faults offers."""

    def cases(self, seed: int) -> Iterable[Case]: ...

    def laboratory(self, folder: Path) -> AbstractContextManager[Any]: ...


@dataclass(frozen=True)
class Verdict:
    """A case with its outcome, and whether the oracle has nothing against it."""

    group: str
    fault_class: str
    point: str
    state: str
    seed: int
    kind: str
    text: str
    violations: tuple[str, ...]
    seconds: float

    @property
    def is_allowed(self) -> bool:
        """Return whether the oracle has nothing against the outcome."""
        return not self.violations


def groups() -> list[str]:
    """Return the groups whose modules are there."""
    return [group for group, module in MODULES.items() if importlib.util.find_spec(module)]


def cases_of(group: str, seed: int = 0) -> list[Case]:
    """Return all cases of a group.

    Raises:
        ValueError: two cases of one name, or a case of another group.
    """
    module: FaultModule = importlib.import_module(MODULES[group])
    cases = list(module.cases(seed))
    names = Counter(case.name for case in cases)
    repeated = [name for name, count in names.items() if count > 1]
    foreign = [case.name for case in cases if case.group != group]
    if repeated or foreign:
        raise ValueError(f"cases of '{group}' that are repeated or of other groups: {repeated[:3]}")
    return cases


def sample(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """Return a seeded selection that takes one case of each class before a second of any."""
    rng = random.Random(seed)
    by_class: dict[str, list[Case]] = defaultdict(list)
    for case in rng.sample(list(cases), len(cases)):
        by_class[case.fault_class].append(case)
    ranked = [(rank, case) for same in by_class.values() for rank, case in enumerate(same)]
    rng.shuffle(ranked)
    chosen = {case.name for _, case in sorted(ranked, key=lambda item: item[0])[:count]}
    return [case for case in cases if case.name in chosen]


def text_problem(text: str, names: Sequence[str] = ()) -> str:
    """Return what an error text lacks, empty if nothing: one line that names the thing and why."""
    if not text.strip():
        return "the error has no text"
    if len(text.strip().splitlines()) > 1 or "Traceback" in text:
        return f"the error is not one line: {text[:200]!r}"
    if len(text) > 1500:
        return f"the error has {len(text)} characters"
    if names and not any(name in text for name in names):
        return f"the error names none of {', '.join(names)}: {text[:300]!r}"
    return ""


def judged(case: Case, outcome: Outcome) -> Outcome:
    """Return the outcome with all objections against it."""
    if outcome.kind == SKIPPED:
        return outcome
    if outcome.kind not in case.allowed or outcome.kind in (CRASHED, HUNG, RAISED, ALTERED):
        expected = " or ".join(sorted(case.allowed))
        outcome = outcome.objecting(f"expected {expected}, found {outcome.kind}: {outcome.text}")
    if outcome.kind == REFUSED:
        outcome = outcome.objecting(text_problem(outcome.text, case.names))
    return outcome


@dataclass(frozen=True)
class Resources:
    """What a process holds: Python threads, child processes, open files, and memory in MB."""

    threads: int
    children: int
    files: int
    rss_mb: float

    @classmethod
    def now(cls) -> Resources:
        """Return what this process holds."""
        return cls(
            threading.active_count(),
            len(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()),
            sum(1 for _ in Path("/proc/self/fd").iterdir()),
            _status_mb("VmRSS"),
        )

    def leaks_since(self, before: Resources) -> list[str]:
        """Return what is held now and was not before, in words."""
        return [
            f"{name}: {getattr(before, name)} before, {getattr(self, name)} after"
            for name in ("threads", "children", "files")
            if getattr(self, name) > getattr(before, name)
        ]


def settled(before: Resources) -> Resources:
    """Return what this process holds after a moment in which it may let go of things."""
    end = time.monotonic() + _SETTLE_S
    gc.collect()
    while (now := Resources.now()).leaks_since(before) and time.monotonic() < end:
        time.sleep(0.02)
    return now


def observed(case: Case, laboratory: Any) -> Outcome:
    """Run a case and return its outcome with all objections.

    What is held after the first run and not after a second one was initialised once: no leak.
    """
    outcome = Outcome(HARMLESS)
    for _ in range(2):
        before = Resources.now()
        _reset_peak()
        try:
            outcome = case.run(laboratory)
        except Exception as error:
            trace = "".join(traceback.format_exception(error)[-3:])
            outcome = Outcome(RAISED, f"{type(error).__name__}: {error}\n{trace}")
        peak_mb = _status_mb("VmHWM") - before.rss_mb
        leaks = settled(before).leaks_since(before)
        if not leaks:
            break
    if peak_mb > PEAK_MB:
        leaks.append(f"memory: {peak_mb:.0f} MB more at its peak")
    return judged(case, outcome.objecting(*leaks))


class Runner:
    """Runs cases of one group in a child process and watches it.

    Args:
        group: one of `groups()`.
        folder: of the laboratory and of the log; created.
        seed: of the cases.
    """

    def __init__(self, group: str, folder: Path, seed: int = 0) -> None:
        self._group, self._folder, self._seed = group, folder, seed
        self._starts = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._child: Any = None
        self._pipe: Any = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, cases: Iterable[Case]) -> Iterator[Verdict]:
        """Yield the verdict of each case, and at last one on the memory of the child."""
        rss_mb: list[float] = []
        last = None
        for case in cases:
            begin_s = time.monotonic()
            outcome, child_mb = self._outcome(case)
            if child_mb is None:
                rss_mb.clear()
            else:
                rss_mb.append(child_mb)
            last = self._verdict(case, outcome, time.monotonic() - begin_s)
            yield last
        if last is not None and len(rss_mb) >= 40:
            # Nodes start in the course of a group.
            start, end = max(rss_mb[: 2 * len(rss_mb) // 3]), min(rss_mb[-5:])
            grown = f"memory of all cases: {start:.0f} MB after two thirds, {end:.0f} at the end"
            against = (grown,) if end - start > GROWTH_MB else ()
            yield replace(
                last,
                fault_class="memory of all cases",
                point="the whole group",
                kind=HARMLESS,
                text=grown,
                violations=against,
                seconds=0.0,
            )

    @staticmethod
    def _verdict(case: Case, outcome: Outcome, seconds: float) -> Verdict:
        return Verdict(
            *(case.group, case.fault_class, case.point, case.state, case.seed),
            *(outcome.kind, outcome.text[:1500], outcome.violations, round(seconds, 3)),
        )

    def _outcome(self, case: Case) -> tuple[Outcome, float | None]:
        if self._child is None:
            self._start()
        try:
            self._pipe.send(case.name)
            if not self._pipe.poll(case.timeout_s):
                self._child.kill()
                self._stop()
                return judged(case, Outcome(HUNG, f"no end within {case.timeout_s:g} s")), None
            values, rss_mb = self._pipe.recv()
            return Outcome(values["kind"], values["text"], tuple(values["violations"])), rss_mb
        except (EOFError, ConnectionError):
            self._child.join()
            code = self._child.exitcode
            self._stop()
            ended = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            return judged(case, Outcome(CRASHED, f"the process ended by {ended}")), None

    def _start(self) -> None:
        # Of a process that died, a laboratory may be left.
        self._starts += 1
        place = self._folder / f"laboratory_{self._starts}"
        place.mkdir()
        arguments = self._group, MODULES[self._group], place, self._seed
        # Not forked: torch and rclpy have threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._child = context.Process(target=_serve, args=(other, *arguments), daemon=False)
        self._child.start()
        other.close()
        # The laboratory is being made.
        ready = self._pipe.poll(600) and self._received()
        if ready is not True:
            self._stop()
            raise RuntimeError(
                f"the laboratory of '{self._group}' failed:\n"
                f"{(place / LOG).read_text(errors='replace')[-3000:]}"
            )

    def _received(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            return None

    def _stop(self) -> None:
        if self._child is None:
            return
        with suppress(OSError):
            self._pipe.send(None)
        self._pipe.close()
        self._child.join(10)
        if self._child.is_alive():
            self._child.kill()
            self._child.join()
        self._child = None


def _serve(pipe: Any, group: str, module_name: str, folder: Path, seed: int) -> None:
    """Run cases by name until None is received. What libraries print goes to the log."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    prepare_environment()
    # A test may have registered a module of its own in the parent process.
    MODULES[group] = module_name
    module: FaultModule = importlib.import_module(module_name)
    cases = {case.name: case for case in cases_of(group, seed)}
    with module.laboratory(folder) as laboratory:
        # What is there now is not collected: the cases make little garbage.
        gc.collect()
        gc.freeze()
        limit_memory()
        pipe.send(True)
        while (name := _next_name(pipe)) is not None:
            print(f"== {name}", flush=True)
            outcome = observed(cases[name], laboratory)
            sys.stdout.flush()
            pipe.send((asdict(outcome), _status_mb("VmRSS")))
    pipe.close()


def _next_name(pipe: Any) -> str | None:
    # Without its parent a child has nothing to do.
    with suppress(EOFError, ConnectionError):
        return pipe.recv()
    return None


def prepare_environment() -> None:
    """Set what the tests set: nothing from a network, checked messages, images of any size."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")
    os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "LARGE_DATA")


def limit_memory() -> None:
    """Refuse all memory to what asks for it, before the machine has none."""
    room = round((_status_mb("VmSize") + _ROOM_MB) * MB)
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))


def compute_as_in_tests() -> None:
    """Compute in float32 by one thread of torch, as the tests do; called by laboratories."""
    import torch

    from semantic_anomaly.embedding import precision

    torch.set_num_threads(1)
    precision._FAST_MS = float("inf")


def run_group(
    group: str,
    folder: Path,
    *,
    seed: int = 0,
    count: int = 0,
    only: str = "",
    progress: bool = True,
) -> list[Verdict]:
    """Return the verdicts on the cases of a group.

    Args:
        group: one of `groups()`.
        folder: for the laboratory.
        seed: of the cases and of the selection.
        count: of cases to select; 0: all.
        only: regular expression that the names of the cases contain.
        progress: show a progress bar.
    """
    chosen = [case for case in cases_of(group, seed) if re.search(only, case.name)]
    if count:
        chosen = sample(chosen, count, seed)
    with Runner(group, folder, seed) as runner, contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=len(chosen), desc=group, unit="fault", disable=None if progress else True)
        )
        verdicts = []
        for verdict in runner.run(chosen):
            verdicts.append(verdict)
            bar.update(len(verdicts) <= len(chosen))
            if not verdict.is_allowed:
                bar.write(f"{_name(verdict)}: {'; '.join(verdict.violations)[:600]}")
        return verdicts


def _name(verdict: Verdict) -> str:
    return "/".join(
        str(getattr(verdict, part)) for part in ("group", "fault_class", "point", "state", "seed")
    )


def write_report(verdicts: Sequence[Verdict], out: Path, *, seed: int) -> None:
    """Write faults.json and faults.md by class, and verdicts.json by case."""
    out.mkdir(parents=True, exist_ok=True)
    values = {
        "seed": seed,
        "cases": len(verdicts),
        "not_allowed": sum(not verdict.is_allowed for verdict in verdicts),
        "seconds": round(sum(verdict.seconds for verdict in verdicts), 1),
        "classes": class_rows(verdicts),
    }
    rows = [asdict(verdict) for verdict in verdicts]
    (out / "verdicts.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "faults.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (out / "faults.md").write_text(markdown(verdicts, seed=seed), encoding="utf-8")


def class_rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return one row for each class of faults, in the order of the cases."""
    by_class: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_class[verdict.group, verdict.fault_class].append(verdict)
    return [
        {
            "group": group,
            "fault_class": fault_class,
            "points": len({verdict.point for verdict in same}),
            "states": sorted({verdict.state for verdict in same}),
            "cases": len(same),
            "outcomes": dict(Counter(verdict.kind for verdict in same).most_common()),
            "not_allowed": sum(not verdict.is_allowed for verdict in same),
        }
        for (group, fault_class), same in by_class.items()
    ]


def markdown(verdicts: Sequence[Verdict], *, seed: int) -> str:
    """Return the report as Markdown."""
    wrong = [verdict for verdict in verdicts if not verdict.is_allowed]
    lines = [
        "# Fault campaign",
        "",
        f"{len(verdicts)} injected faults, seed {seed}: {len(wrong)} outcomes that are not "
        "allowed. A fault is one class at one point of injection in one state.",
        "",
        "| group | faults | classes | outcomes | not allowed |",
        "|---|---|---|---|---|",
    ]
    for group in dict.fromkeys(verdict.group for verdict in verdicts):
        same = [verdict for verdict in verdicts if verdict.group == group]
        bad = sum(not verdict.is_allowed for verdict in same)
        classes = len({verdict.fault_class for verdict in same})
        outcomes = _listed(Counter(verdict.kind for verdict in same))
        lines.append(f"| {group} | {len(same)} | {classes} | {outcomes} | {bad} |")
    lines += ["", "## Classes", ""]
    lines += [
        "| group | class | points | states | faults | outcomes |",
        "|---|---|---|---|---|---|",
    ]
    for row in class_rows(verdicts):
        states, outcomes = ", ".join(row["states"]), _listed(Counter(row["outcomes"]))
        cells = row["group"], row["fault_class"], row["points"], states, row["cases"], outcomes
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if wrong:
        lines += ["", "## Not allowed", ""]
        lines += [f"- `{_name(v)}`: {' '.join('; '.join(v.violations).split())}" for v in wrong]
    skipped = [verdict for verdict in verdicts if verdict.kind == SKIPPED]
    if skipped:
        lines += ["", "## Skipped", ""]
        reasons = Counter((v.fault_class, v.text) for v in skipped)
        lines += [f"- {name}, {count}: {text}" for (name, text), count in reasons.items()]
    return "\n".join(lines) + "\n"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.most_common())


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / MB
    return 0.0


def _reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
