"""Faults of the machine that runs the node: memory, threads, clocks, signals.

Every case has a process and a node of its own, so that nothing of it is left.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from faults.campaign import (
    ALTERED,
    DROPPED,
    HARMLESS,
    INTERRUPTED,
    REFUSED,
    UNKNOWN,
    Case,
    Outcome,
)

_ANSWER_S = 20.0
_MARK = "outcome: "


def cases(seed: int, case: Callable[..., Case]) -> Iterator[Case]:
    """Yield the faults of the node's machine."""
    for name in ("OutOfMemoryError", "MemoryError", "RuntimeError"):
        for times in (1, 2, 1000):
            # Out of memory is tried once more.
            allowed = (HARMLESS,) if times == 1 and name != "RuntimeError" else (UNKNOWN,)
            run = _in_node(_failing_embedder(name, times))
            point = f"{name} of the network, {times if times < 1000 else 'all'} times"
            yield case("out of memory", point, run, allowed, state="active")
        run = _in_node(_failing_configure(name), configured=False)
        yield case("out of memory", f"{name} in configure", run, (REFUSED,), state="unconfigured")
    for name, fault in {
        "the search": _failing_search,
        "NaN of the network": _nan_embedder,
        "the pictures": _failing_pictures,
    }.items():
        allowed = (HARMLESS,) if name == "the pictures" else (UNKNOWN,)
        yield case("failing computation", name, _in_node(fault), allowed, state="active")
    for name, point, fault in (
        ("worker dies", "in the pipeline", _dying_worker),
        ("worker hangs", "in the network", _hanging_worker),
    ):
        yield case(name, point, _in_node(fault), (UNKNOWN,), state="active")
    for name, jump_s in {"forward": 900.0, "backward": -950.0, "a little back": -0.2}.items():
        run = _in_node(_jumping_clock(jump_s), sim_time=True)
        yield case("clock jumps", name, run, (HARMLESS,), state="active")
    for name, offset_s in {"old frames after a jump forward": 900.0}.items():
        run = _in_node(_jumping_clock(offset_s, old_stamps=True), sim_time=True)
        yield case("clock jumps", name, run, (UNKNOWN,), state="active")
    run = _in_node(_stopped_clock, sim_time=True)
    yield case("clock stops", "for frames with its time", run, (HARMLESS,), state="active")
    for name, number in (
        *(("SIGINT", signal.SIGINT), ("SIGTERM", signal.SIGTERM), ("SIGKILL", signal.SIGKILL)),
    ):
        for state in ("unconfigured", "inactive", "active", "active, busy"):
            yield case(name, "the node", _stopped_node(number, state), (INTERRUPTED,), state=state)


def _in_node(
    fault: Callable[[Any, Any], Outcome], *, configured: bool = True, sim_time: bool = False
) -> Callable[[Any], Outcome]:
    """Return what runs a fault in a process with a node of its own."""

    def run(lab: Any) -> Outcome:
        from faults.process_faults import forked

        def work() -> int:
            os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
            from worlds.ros import SUCCESS, bench

            values = {**lab.values, "max_age_s": 2.0}
            args = ["-p", "use_sim_time:=true"] if sim_time else []
            with bench(values, args=args) as b:
                clock = _Clock(b) if sim_time else None
                if configured:
                    b.start("status", "score")
                outcome = fault(b, clock or lab)
                if configured:
                    deactivated = b.node.trigger_deactivate()
                    if deactivated != SUCCESS or b.node.trigger_cleanup() != SUCCESS:
                        outcome = outcome.objecting("deactivate or cleanup fails afterwards")
            threads = [t.name for t in threading.enumerate() if t.name.startswith("anomaly")]
            outcome = outcome.objecting(f"threads remain: {threads}" if threads else "")
            text = json.dumps([outcome.kind, outcome.text, list(outcome.violations)])
            print(_MARK + text, file=sys.stderr, flush=True)
            return 0

        code, errors = forked(work)
        lines = [line for line in errors.splitlines() if line.startswith(_MARK)]
        if code or not lines:
            return Outcome(f"exit code {code}", errors[-1500:])
        kind, text, violations = json.loads(lines[-1].removeprefix(_MARK))
        return Outcome(kind, text, tuple(violations))

    return run


def _reaction(b: Any, seed: int = 200, *, of_frame: bool = True, **stamp: Any) -> Outcome:
    """Send an anomalous frame; return what is said about it, or what is said next."""
    from worlds.ros import frame, odd_image, offline_detector, values_of

    image = odd_image(seed)
    message = b.send(image, **stamp)
    statuses = b.got["camera"]["status"]
    end = time.monotonic() + _ANSWER_S
    while time.monotonic() < end:
        b.executor.spin_once(timeout_sec=0.05)
        for status in statuses:
            if of_frame and status.header != message.header:
                continue
            values = values_of(status.status[0])
            if values["decision"] == "unknown":
                return Outcome(UNKNOWN, values["reason"])
            parameters = b.node.settings.to_parameters()
            expected = offline_detector(parameters).detect(frame(image, message))
            same = abs(float(values["score"]) - expected.score) < 1e-3 * abs(expected.score)
            if not same or values["decision"] != expected.decision.value:
                return Outcome(ALTERED, f"{values['decision']} {values['score']}")
            return Outcome(HARMLESS)
    return Outcome(DROPPED, "no answer")


def _recovers(b: Any, outcome: Outcome) -> Outcome:
    """Object if the next frame is not answered as always."""
    after = _reaction(b, 210)
    against = "" if after.kind == HARMLESS else f"the next frame: {after.kind} {after.text}"
    return outcome.objecting(against)


def _error(name: str) -> Exception:
    import torch

    errors: dict[str, type[Exception]] = {
        "OutOfMemoryError": torch.OutOfMemoryError,
        "MemoryError": MemoryError,
        "RuntimeError": RuntimeError,
    }
    return errors[name](f"{name}: the device has no memory")


def _failing_embedder(name: str, times: int) -> Callable[[Any, Any], Outcome]:
    def fault(b: Any, lab: Any) -> Outcome:
        embedder = b.node.models.embedder
        embed, left = embedder.embed, [times]

        def failing(images: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                raise _error(name)
            return embed(images)

        embedder.embed = failing
        outcome = _reaction(b)
        left[0] = 0
        return _recovers(b, outcome)

    return fault


def _failing_configure(name: str) -> Callable[[Any, Any], Outcome]:
    def fault(b: Any, lab: Any) -> Outcome:
        from worlds.ros import SUCCESS

        from semantic_anomaly.segmentation.embedder import RunningEmbedder

        embed = RunningEmbedder.embed

        def failing(self: Any, images: Any) -> Any:
            raise _error(name)

        RunningEmbedder.embed = failing  # type: ignore[method-assign]
        result = b.node.trigger_configure()
        RunningEmbedder.embed = embed  # type: ignore[method-assign]
        b.spin_until(lambda: any("configure" in line for line in b.log), 20)
        line = next(line for line in b.log if "configure" in line)
        state = b.node._state_machine.current_state[1]
        after = b.node.trigger_configure()
        return Outcome(
            "configured" if result == SUCCESS else REFUSED, line.splitlines()[0]
        ).objecting(
            "" if state == "unconfigured" else f"the state is {state}",
            "" if name in line else f"the log does not name {name}",
            "" if after == SUCCESS else f"configuring afterwards: {after}",
        )

    return fault


def _patched(b: Any, owner: Any, name: str, function: Any) -> Outcome:
    original = getattr(owner, name)
    setattr(owner, name, function)
    outcome = _reaction(b)
    setattr(owner, name, original)
    return _recovers(b, outcome)


def _failing_search(b: Any, lab: Any) -> Outcome:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the search failed")

    index = b.node.models.detectors["camera"].index
    return _patched(b, index, "exact_distances", failing)


def _nan_embedder(b: Any, lab: Any) -> Outcome:
    import torch

    network = b.node.models.embedder
    del network
    from torch import nn

    forward = nn.LayerNorm.forward

    def failing(self: Any, values: Any) -> Any:
        return forward(self, values) * torch.nan

    outcome = _patched(b, nn.LayerNorm, "forward", failing)
    named = "patch features" in outcome.text
    return outcome.objecting("" if named else f"the reason is not the network: {outcome.text}")


def _failing_pictures(b: Any, lab: Any) -> Outcome:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the pictures failed")

    return _patched(b, b.node._cameras["camera"].outputs, "publish_pictures", failing)


def _dying_worker(b: Any, lab: Any) -> Outcome:
    from semantic_anomaly.ros.pipeline import Pipeline

    def dying(*_: Any) -> None:
        raise SystemExit

    process = Pipeline._accept
    Pipeline._accept = dying  # type: ignore[method-assign,assignment]
    outcome = _reaction(b)
    Pipeline._accept = process  # type: ignore[method-assign]
    return outcome


def _hanging_worker(b: Any, lab: Any) -> Outcome:
    embedder = b.node.models.embedder
    embed, opened = embedder.embed, threading.Event()

    def hanging(images: Any) -> Any:
        opened.wait(60)
        return embed(images)

    embedder.embed = hanging
    # What is said while it hangs.
    global _ANSWER_S
    kept, _ANSWER_S = _ANSWER_S, 5.0
    # The watchdog speaks of the camera, not of this frame.
    outcome = _reaction(b, of_frame=False)
    _ANSWER_S = kept
    embedder.embed = embed
    opened.set()
    # Its result comes late, as an answer to its own frame.
    b.spin_until(lambda: b.got["camera"]["status"], 20)
    return _recovers(b, outcome)


class _Clock:
    """Publishes simulated time, and stamps frames with it."""

    def __init__(self, b: Any) -> None:
        from rosgraph_msgs.msg import Clock

        self.now_s = 1000.0
        self._bench, self._type = b, Clock
        self._publisher = b.helper.create_publisher(Clock, "/clock", 10)
        b.spin_until(lambda: self._publisher.get_subscription_count() > 0, 20)
        self.tick(self.now_s)

    def tick(self, now_s: float) -> None:
        """Set the time, and wait until the node has it."""
        self.now_s = now_s
        message = self._type()
        message.clock.sec, message.clock.nanosec = divmod(round(now_s * 1e9), 10**9)

        def arrived() -> bool:
            self._publisher.publish(message)
            now_ns = self._bench.node.get_clock().now().nanoseconds
            return abs(now_ns / 1e9 - now_s) < 1e-3

        self._bench.spin_until(arrived, 20)


def _jumping_clock(jump_s: float, *, old_stamps: bool = False) -> Callable[[Any, Any], Outcome]:
    def fault(b: Any, clock: _Clock) -> Outcome:
        before = _reaction(b, stamp_ns=round(clock.now_s * 1e9))
        against = "" if before.kind == HARMLESS else f"before the jump: {before.text}"
        old_s = clock.now_s
        clock.tick(clock.now_s + jump_s)
        stamp_s = old_s + 0.01 if old_stamps else clock.now_s
        return _reaction(b, 205, stamp_ns=round(stamp_s * 1e9)).objecting(against)

    return fault


def _stopped_clock(b: Any, clock: _Clock) -> Outcome:
    outcomes = [
        _reaction(b, 200 + number, stamp_ns=round(clock.now_s * 1e9) + number)
        for number in range(3)
    ]
    wrong = [outcome.text for outcome in outcomes if outcome.kind != HARMLESS]
    return Outcome(HARMLESS).objecting(*wrong)


def _stopped_node(number: int, state: str) -> Callable[[Any], Outcome]:
    """Return what runs the node's main function, and sends it a signal in a state."""

    def run(lab: Any) -> Outcome:
        from faults.process_faults import forked

        def work() -> int:
            os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
            from worlds.ros import SUCCESS, image_message, nominal_image

            from semantic_anomaly.ros import node as node_module

            made: list[Any] = []

            class Node(node_module.AnomalyNode):
                def __init__(self, **options: Any) -> None:
                    super().__init__(**options)
                    made.append(self)

            spins = [0]
            spin_once = node_module.SingleThreadedExecutor.spin_once

            def scripted(executor: Any, timeout_sec: float) -> None:
                spins[0] += 1
                node = made[0]
                if spins[0] == 2 and state != "unconfigured":
                    assert node.trigger_configure() == SUCCESS
                if spins[0] == 4 and state.startswith("active"):
                    assert node.trigger_activate() == SUCCESS
                if spins[0] == 6:
                    if state == "active, busy":
                        message = image_message(nominal_image(1), "rgb8")
                        now = node.get_clock().now().to_msg()
                        message.header.stamp = now
                        node._cameras["camera"].inputs._store_image(message)
                    os.kill(os.getpid(), number)
                spin_once(executor, timeout_sec=timeout_sec)

            node_module.AnomalyNode = Node  # type: ignore[misc]
            node_module.SingleThreadedExecutor.spin_once = scripted  # type: ignore[method-assign]
            arguments = ["anomaly_node", "--ros-args"]
            for name, value in lab.values.items():
                arguments += ["-p", f"{name}:={json.dumps(value)}"]
            code = node_module.main(arguments)
            # As at the end of a process, with all that destructors may do.
            sys.stderr.flush()
            return code

        code, errors = forked(work)
        expected = -signal.SIGKILL if number == signal.SIGKILL else 0
        if code != expected or "Traceback" in errors:
            return Outcome(f"exit code {code}", errors[-800:])
        return Outcome(INTERRUPTED)

    return run
