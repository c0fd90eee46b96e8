"""Faults of the life cycle: transitions, configurations, live parameters and services at bad times.

After each of them the node is activated again, where it has to answer good frames as offline.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")

import numpy as np
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from std_srvs.srv import Trigger
from tqdm import tqdm
from worlds.backbones import save_backbone
from worlds.ros import (
    FAILURE,
    SUCCESS,
    build_monitor,
    nominal_image,
    odd_image,
    offline_detector,
    parameters,
)

from faults.campaign import (
    HARMLESS,
    KEPT,
    REFUSED,
    Case,
    Outcome,
    Resources,
    compute_as_in_tests,
    settled,
    text_problem,
)
from faults.faulty_images import raw
from faults.message_faults import held_worker
from faults.node_session import NodeSession, node_session
from semantic_anomaly.ros import camera as camera_module
from semantic_anomaly.ros import models as models_module
from semantic_anomaly.settings import setting_specs

GROUP = "lifecycle"
CAMERA = "camera"
CYCLES = 500
# Growth of memory that so many cycles may leave: arenas of the allocator and caches.
_GROWTH_MB = 60.0
_HELD_S = 0.3
_TIMEOUT_S = 120.0
UNCONFIGURED, INACTIVE, ACTIVE, FINALIZED = "unconfigured", "inactive", "active", "finalized"
_STATES = UNCONFIGURED, INACTIVE, ACTIVE
# Result of each transition by the state that it begins in; all others are refused.
_TARGETS = {
    (UNCONFIGURED, "configure"): INACTIVE,
    (INACTIVE, "activate"): ACTIVE,
    (INACTIVE, "cleanup"): UNCONFIGURED,
    (ACTIVE, "deactivate"): INACTIVE,
    **{(state, "shutdown"): FINALIZED for state in _STATES},
}
_IDS = {
    "configure": Transition.TRANSITION_CONFIGURE,
    "activate": Transition.TRANSITION_ACTIVATE,
    "deactivate": Transition.TRANSITION_DEACTIVATE,
    "cleanup": Transition.TRANSITION_CLEANUP,
}
_SHUTDOWN_IDS = {
    UNCONFIGURED: Transition.TRANSITION_UNCONFIGURED_SHUTDOWN,
    INACTIVE: Transition.TRANSITION_INACTIVE_SHUTDOWN,
    ACTIVE: Transition.TRANSITION_ACTIVE_SHUTDOWN,
}
_TRANSITIONS = tuple(_IDS)


class Laboratory:
    """A node, its index, a copy of the index, and another index of the same backbone."""

    def __init__(self, folder: Path) -> None:
        backbone = save_backbone(folder / "backbone")
        self.index = build_monitor(folder / "monitor", backbone)
        self.other = build_monitor(folder / "other", backbone, input_size=112)
        self.good_index = folder / "good"
        shutil.copytree(self.index, self.good_index)
        self.values = parameters(self.index, backbone)
        self._stack = ExitStack()
        self._session: NodeSession | None = None
        self._count = 100

    def session(self, state: str = ACTIVE) -> NodeSession:
        """Return the observed node in a state."""
        if self._session is not None and self._session.state == FINALIZED:
            self.close()
        if self._session is None:
            self._session = self._stack.enter_context(node_session(self.values))
        session, node = self._session, self._session.bench.node
        if state == ACTIVE:
            if session.state == UNCONFIGURED:
                assert node.trigger_configure() == SUCCESS
            if session.state == INACTIVE:
                # Statuses of the activation before come in.
                session.spin_for(0.1)
                session.activate()
            return session
        if session.state == ACTIVE:
            session.deactivate()
        if state == UNCONFIGURED and session.state == INACTIVE:
            assert node.trigger_cleanup() == SUCCESS
        if state == INACTIVE and session.state == UNCONFIGURED:
            assert node.trigger_configure() == SUCCESS
        return session

    def frame(self, session: NodeSession, *, odd: bool = False) -> Any:
        """Return a stamped message of an image that was not sent before."""
        self._count += 1
        return session.stamp(raw("rgb8", (odd_image if odd else nominal_image)(self._count)))

    def flow(self, session: NodeSession) -> list[str]:
        """Send a nominal and an odd frame to the active node and return all objections."""
        answers = [session.ask(self.frame(session, odd=odd), CAMERA) for odd in (False, True)]
        decisions = [answer.decision for answer in answers]
        found = [] if decisions == ["nominal", "anomaly"] else [f"decisions {decisions}"]
        return found + session.violations()

    def proved(self, outcome: Outcome) -> Outcome:
        """Activate the node anew, with the offline run, and return the outcome with objections."""
        session = self.session(INACTIVE)
        session.offline[CAMERA] = offline_detector(self.values)
        return outcome.objecting(*self.flow(self.session(ACTIVE)))

    def restore_index(self) -> None:
        """Put the good index back in its place."""
        if self.index.is_dir() and not self.index.is_symlink():
            shutil.rmtree(self.index)
        else:
            self.index.unlink(missing_ok=True)
        shutil.copytree(self.good_index, self.index)

    def call(self, kind: Any, name: str, request: Any) -> Any:
        """Call a service of the node and return its response."""
        session = self._session
        assert session is not None
        helper = session.bench.helper
        client = helper.create_client(kind, f"/semantic_anomaly/{name}")
        try:
            session.wait(client.service_is_ready, f"service {name}")
            future = client.call_async(request)
            session.wait(future.done, f"a response of {name}", 60.0)
            return future.result()
        finally:
            helper.destroy_client(client)

    def transition(self, name: str, state: str) -> bool:
        """Ask for a transition by the service; return whether it succeeded."""
        chosen = _IDS.get(name) or _SHUTDOWN_IDS[state]
        return self._change(Transition(id=chosen))

    def _change(self, transition: Transition) -> bool:
        request = ChangeState.Request(transition=transition)
        return bool(self.call(ChangeState, "change_state", request).success)

    def trigger(self, name: str) -> Trigger.Response:
        """Call a service without arguments."""
        return self.call(Trigger, name, Trigger.Request())

    def close(self) -> None:
        """Stop the node."""
        self._session = None
        self._stack.close()


@contextmanager
def laboratory(folder: Path) -> Iterator[Laboratory]:
    """Make the indexes; the node is started by the cases."""
    compute_as_in_tests()
    with closing(Laboratory(folder)) as made:
        yield made


def cases(seed: int) -> Iterator[Case]:
    """Return the cases."""
    yield from _transition_cases(seed)
    yield from _inference_cases(seed)
    yield from _reload_time_cases(seed)
    yield from _configure_cases(seed)
    yield from _parameter_cases(seed)
    yield from _bad_reload_cases(seed)
    yield from _service_cases(seed)
    yield _case("cycles", "5 cycles, scored in each", ACTIVE, seed, {HARMLESS}, _few_cycles)


def _case(
    fault_class: str,
    point: str,
    state: str,
    seed: int,
    allowed: set[str],
    run: Callable[[Laboratory], Outcome],
    names: Sequence[str] = (),
) -> Case:
    return Case(
        *(GROUP, fault_class, point, state, seed),
        *(frozenset(allowed), run, tuple(names), _TIMEOUT_S),
    )


# Transitions.


def _transition_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, state: str, names: Sequence[str]) -> Outcome:
        session = lab.session(state)
        violations = []
        for name in names:
            target = _TARGETS.get((state, name))
            if lab.transition(name, state) is not (target is not None):
                violations.append(f"{name} while {state}: success is {target is None}")
            state = target or state
            if session.state != state:
                violations.append(f"after {name}: expected state {state}, found {session.state}")
                break
            if state == ACTIVE:
                session.bench.publisher(session.topic(CAMERA)).publish(lab.frame(session))
        return lab.proved(Outcome(HARMLESS).objecting(*violations))

    for state in _STATES:
        for names in itertools.product(_TRANSITIONS, repeat=2):
            fault_class = "transition repeated" if names[0] == names[1] else "transitions in order"
            yield _case(
                fault_class,
                " then ".join(names),
                state,
                seed,
                {HARMLESS},
                lambda lab, s=state, n=names: run(lab, s, n),
            )
        yield _case(
            "shutdown",
            "then a new node",
            state,
            seed,
            {HARMLESS},
            lambda lab, s=state: run(lab, s, ["shutdown"]),
        )
    rng = random.Random(seed)
    for number in range(8):
        names = rng.choices(_TRANSITIONS, k=8)
        yield _case(
            "transitions at random",
            f"walk {number}",
            UNCONFIGURED,
            seed,
            {HARMLESS},
            lambda lab, n=names: run(lab, UNCONFIGURED, n),
        )

    def unknown(lab: Laboratory, state: str, transition: Transition) -> Outcome:
        session = lab.session(state)
        succeeded = lab._change(transition)
        problem = "a transition that does not exist succeeded" if succeeded else ""
        if session.state != state:
            problem += f" state {session.state}"
        return lab.proved(Outcome(HARMLESS).objecting(problem.strip()))

    for state in _STATES:
        for name, transition in (
            ("create", Transition(id=Transition.TRANSITION_CREATE)),
            ("success of configure", Transition(id=Transition.TRANSITION_ON_CONFIGURE_SUCCESS)),
            ("error", Transition(id=Transition.TRANSITION_ON_ERROR_ERROR)),
            ("number 255", Transition(id=255)),
            ("label unknown", Transition(label="restart")),
        ):
            yield _case(
                "transition unknown",
                name,
                state,
                seed,
                {HARMLESS},
                lambda lab, s=state, t=transition: unknown(lab, s, t),
            )


# During inference and during a reload.


def _inference_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, act: Callable[[Laboratory], str], waiting: bool) -> Outcome:
        session = lab.session()
        counts = session.bench.node._cameras[CAMERA].counts
        with held_worker(session) as held:
            session.send(lab.frame(session), CAMERA)
            session.wait(held.entered.is_set, "the worker at work")
            if waiting:
                received = counts.frames_received
                session.send(lab.frame(session, odd=True), CAMERA)
                session.wait(lambda: counts.frames_received > received, "the frame to arrive")
            timer = threading.Timer(_HELD_S, held.opened.set)
            timer.start()
            problem = act(lab)
            timer.join()
        # A frame that waits is dropped by deactivate, and counts begin anew.
        cameras = session.bench.node._cameras
        if session.state == ACTIVE and cameras[CAMERA].counts is counts:
            session.wait(lambda: not session.unanswered(CAMERA), "answers to the frames")
            problem += "; ".join(session.violations())
        return lab.proved(Outcome(HARMLESS).objecting(problem))

    for name, act in _ACTS.items():
        for waiting in (False, True):
            yield _case(
                "during inference",
                f"{name}{', a frame waits' if waiting else ''}",
                ACTIVE,
                seed,
                {HARMLESS},
                lambda lab, a=act, w=waiting: run(lab, a, w),
            )


def _transition_act(*names: str) -> Callable[[Laboratory], str]:
    def act(lab: Laboratory) -> str:
        state = ACTIVE
        for name in names:
            if not lab.transition(name, state):
                return f"{name} failed while {state}"
            state = _TARGETS[state, name]
        return ""

    return act


def _service_act(name: str, succeeds: bool) -> Callable[[Laboratory], str]:
    def act(lab: Laboratory) -> str:
        response = lab.trigger(name)
        if response.success is succeeds:
            return "" if succeeds else text_problem(response.message)
        return f"{name}: success is {response.success}: {response.message}"

    return act


def _parameter_act(lab: Laboratory) -> str:
    result = _set_by_service(lab, "overlay_alpha", 0.25)
    _set_by_service(lab, "overlay_alpha", 0.5)
    return "" if result.successful else result.reason


_ACTS: dict[str, Callable[[Laboratory], str]] = {
    "deactivate": _transition_act("deactivate"),
    "deactivate and activate": _transition_act("deactivate", "activate"),
    "cleanup": _transition_act("deactivate", "cleanup"),
    "configure again": _transition_act("deactivate", "cleanup", "configure"),
    "shutdown": _transition_act("shutdown"),
    "reset": _service_act("reset", True),
    "reload_index": _service_act("reload_index", True),
    "add_nominal": _service_act("add_nominal", False),
    "self_test": _service_act("self_test", True),
    "live parameter": _parameter_act,
}


def _reload_time_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, act: Callable[[Laboratory], str], service: str) -> Outcome:
        session = lab.session()
        helper = session.bench.helper
        client = helper.create_client(Trigger, f"/semantic_anomaly/{service}")
        load, entered, opened = models_module.load_detectors, threading.Event(), threading.Event()

        def held(*args: Any, **named: Any) -> Any:
            # A transition of the executor's thread waits for the reload; configure loads too.
            if threading.current_thread().name == "index_reload":
                entered.set()
                opened.wait(20.0)
            return load(*args, **named)

        try:
            session.wait(client.service_is_ready, "the service")
            with patch.object(models_module, "load_detectors", held):
                future = client.call_async(Trigger.Request())
                session.wait(entered.is_set, "the reload to begin")
                # The old index answers meanwhile.
                violations = lab.flow(session)
                timer = threading.Timer(_HELD_S, opened.set)
                timer.start()
                violations.append(act(lab))
                timer.join()
                if session.state != FINALIZED:
                    session.wait(future.done, "a response of the reload")
                    response = future.result()
                    if not response.success:
                        violations.append(text_problem(response.message))
        finally:
            opened.set()
            if session.state != FINALIZED:
                helper.destroy_client(client)
        return lab.proved(Outcome(HARMLESS).objecting(*violations))

    for name, act in _ACTS.items():
        yield _case(
            "during reload",
            name,
            ACTIVE,
            seed,
            {HARMLESS},
            lambda lab, a=act: run(lab, a, "reload_index"),
        )


# Configurations that fail, then a good one.


# A parameter that cannot be configured, by what is wrong.
_WRONG: dict[str, tuple[str, Callable[[Laboratory], Any]]] = {
    "index that does not exist": ("index", lambda _: "/nowhere"),
    "index empty": ("index", lambda _: ""),
    "index that is a file": ("index", lambda lab: str(lab.index / "manifest.json")),
    "index that is another folder": ("index", lambda lab: str(lab.index.parent)),
    "index of another size of input": ("index", lambda lab: str(lab.other)),
    "backbone that does not exist": ("backbone", lambda _: "/nowhere"),
    "backbone that is an index": ("backbone", lambda lab: str(lab.index)),
    "input size": ("input_size", lambda _: 70),
    "layers": ("layers", lambda _: [97]),
    "device unknown": ("device", lambda _: "abacus"),
    "device absent": ("device", lambda _: "cuda:7"),
    "precision unknown": ("dtype", lambda _: "float8"),
    "no cameras": ("cameras", lambda _: []),
    "camera twice": ("cameras", lambda _: [CAMERA, CAMERA]),
    "camera with a space": ("cameras", lambda _: ["a b"]),
    "topic malformed": ("camera.image_topic", lambda _: "no topic!"),
    "topic empty": ("camera.image_topic", lambda _: ""),
    "transport unknown": ("camera.transport", lambda _: "pigeon"),
    "QoS unknown": ("qos_reliability", lambda _: "perhaps"),
    "region outside the image": ("camera.region_of_interest", lambda _: [0.0, 0.0, 2.0, 2.0]),
    "mask that does not exist": ("camera.ego_mask", lambda _: "/nowhere.png"),
    "type": ("max_age_s", lambda _: "soon"),
    "not a number": ("max_age_s", lambda _: math.nan),
}


def _configure_cases(seed: int) -> Iterator[Case]:
    def failing(lab: Laboratory, session: NodeSession) -> Outcome:
        """Configure twice, which has to fail with one line each time."""
        log, node = session.bench.log, session.bench.node
        log.clear()
        results = [node.trigger_configure() for _ in range(2)]
        violations = []
        if results != [FAILURE] * 2 or session.state != UNCONFIGURED:
            violations.append(f"configure: {results}, state {session.state}")
            if session.state == UNCONFIGURED:
                return Outcome(REFUSED, "x").objecting(*violations)
        else:
            with suppress(TimeoutError):
                session.wait(lambda: any("cannot configure" in t for t in log), "a log line", 5.0)
        lines = [line for line in log if line.startswith("cannot configure: ")]
        text = lines[0].removeprefix("cannot configure: ") if lines else ""
        return Outcome(REFUSED, text).objecting(*violations)

    def with_value(lab: Laboratory, kind: str) -> Outcome:
        session = lab.session(UNCONFIGURED)
        node = session.bench.node
        name, value = _WRONG[kind][0], _WRONG[kind][1](lab)
        before = node.get_parameter(name)
        result = node.set_parameters([Parameter(name, value=value)])[0]
        if not result.successful:
            return lab.proved(Outcome(REFUSED, result.reason))
        try:
            outcome = failing(lab, session)
        finally:
            # The parameters of a camera may be gone with it.
            restored = node.set_parameters([before])[0]
        problem = "" if restored.successful else f"not restored: {restored.reason}"
        return lab.proved(outcome.objecting(problem))

    for kind in _WRONG:
        yield _case(
            "failing configure",
            kind,
            UNCONFIGURED,
            seed,
            {REFUSED},
            lambda lab, k=kind: with_value(lab, k),
        )

    def with_index(lab: Laboratory, damage: Callable[[Laboratory], None]) -> Outcome:
        session = lab.session(UNCONFIGURED)
        try:
            damage(lab)
            outcome = failing(lab, session)
        finally:
            lab.restore_index()
        return lab.proved(outcome)

    for kind, damage in _damages(seed).items():
        # The other size is one of the wrong values. Without a calibration decisions are unknown.
        if kind in ("index of another size of input", f"{_CALIBRATION} missing"):
            continue
        yield _case(
            "failing configure, bad index",
            kind,
            UNCONFIGURED,
            seed,
            {REFUSED},
            lambda lab, d=damage: with_index(lab, d),
        )

    def with_exception(lab: Laboratory, where: str, error: BaseException) -> Outcome:
        session = lab.session(UNCONFIGURED)
        node = session.bench.node
        threads = threading.active_count()
        publishers = len(list(node.publishers))
        owner, name = {
            "load": (models_module, "load_detectors"),
            "self-test": (models_module.Models, "self_test"),
            "outputs": (camera_module, "CameraOutputs"),
        }[where]
        with patch.object(owner, name, side_effect=error):
            result = node.trigger_configure()
        found = [] if session.state == UNCONFIGURED else [f"{result}, state {session.state}"]
        if len(list(node.publishers)) != publishers or threading.active_count() > threads:
            found.append("publishers or threads are left")
        return lab.proved(Outcome(HARMLESS).objecting(*found))

    for where, error in itertools.product(
        ("load", "self-test", "outputs"), (RuntimeError("x"), MemoryError(), OSError(28, "full"))
    ):
        yield _case(
            "exception in configure",
            f"{type(error).__name__} of {where}",
            UNCONFIGURED,
            seed,
            {HARMLESS},
            lambda lab, w=where, e=error: with_exception(lab, w, e),
        )


# Live parameters.


def _set_by_service(lab: Laboratory, name: str, value: Any) -> Any:
    kind = Parameter.Type.NOT_SET if value is None else None
    made = Parameter(name, kind, None) if kind is not None else Parameter(name, value=value)
    request = SetParameters.Request(parameters=[made.to_parameter_msg()])
    return lab.call(SetParameters, "set_parameters", request).results[0]


def _parameter_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, name: str, value: Any, state: str) -> Outcome:
        session = lab.session(state)
        before = session.bench.node.get_parameter_or(name).value
        result = _set_by_service(lab, name, value)
        after = session.bench.node.get_parameter_or(name).value
        outcome = Outcome(REFUSED, result.reason)
        if result.successful:
            outcome = Outcome(HARMLESS, f"{name} is {after!r}")
        elif repr(before) != repr(after):
            outcome = outcome.objecting(f"refused, but {after!r} in place of {before!r}")
        if state == ACTIVE:
            outcome = outcome.objecting(*lab.flow(session))
        return lab.proved(outcome)

    def kinds(spec: Any) -> dict[str, Any]:
        wrong: dict[str, Any] = {
            "text": "high",
            "a list": [1.0, 2.0],
            "bytes": [b"a", b"b"],
            "true": True,
            "not a number": math.nan,
            "infinite": math.inf,
        }
        if spec.minimum is not None:
            wrong["below the minimum"] = spec.element(spec.minimum - 1)
        if spec.maximum is not None:
            wrong["above the maximum"] = spec.element(spec.maximum + 1)
        return wrong

    specs = {name: spec for name, spec in setting_specs().items() if spec.live}
    for number, (name, spec) in enumerate(specs.items()):
        for place, (kind, value) in enumerate(kinds(spec).items()):
            # Each kind for a third of the settings, and each setting with several kinds.
            if (number + place) % 3:
                continue
            of_camera = f"{CAMERA}.{name}" if (number + place) % 2 else name
            yield _case(
                f"live parameter {kind}",
                of_camera,
                ACTIVE,
                seed,
                {REFUSED},
                lambda lab, n=of_camera, v=value: run(lab, n, v, ACTIVE),
                (name,),
            )
    for name, value in (
        ("index", "/nowhere"),
        ("cameras", ["other"]),
        ("device", "cuda"),
        ("camera.image_topic", "/other"),
        ("qos_reliability", "reliable"),
        ("allow_add_nominal", True),
        ("silent_after_s", 1.0),
    ):
        for state in (INACTIVE, ACTIVE):
            yield _case(
                "read-only parameter",
                name,
                state,
                seed,
                {REFUSED},
                lambda lab, n=name, v=value, s=state: run(lab, n, v, s),
                (name,),
            )


# Bad indexes for a reload.


def _damages(seed: int) -> dict[str, Callable[[Laboratory], None]]:
    """Return what makes an index bad, by name."""

    def in_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Laboratory], None]:
        def damage(lab: Laboratory) -> None:
            path = lab.index / name
            content = change(path.read_bytes())
            # Replaced, not written: the old index may be mapped from the file.
            path.unlink()
            if content is not None:
                path.write_bytes(content)

        return damage

    def flipped(content: bytes) -> bytes:
        at = int(np.random.default_rng(seed).integers(len(content)))
        return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]

    changes: dict[str, Callable[[bytes], bytes | None]] = {
        "cut": lambda content: content[: len(content) // 2],
        "with a bit flipped": flipped,
        "empty": lambda _: b"",
        "missing": lambda _: None,
    }

    def as_folder(lab: Laboratory) -> None:
        (lab.index / "manifest.json").unlink()
        (lab.index / "manifest.json").mkdir()

    def gone(lab: Laboratory) -> None:
        shutil.rmtree(lab.index)

    def as_file(lab: Laboratory) -> None:
        shutil.rmtree(lab.index)
        lab.index.write_bytes(b"index")

    def emptied(lab: Laboratory) -> None:
        shutil.rmtree(lab.index)
        lab.index.mkdir()

    def other(lab: Laboratory) -> None:
        shutil.rmtree(lab.index)
        shutil.copytree(lab.other, lab.index)

    def foreign_calibration(lab: Laboratory) -> None:
        shutil.copyfile(lab.other / _CALIBRATION, lab.index / _CALIBRATION)

    made = {
        f"{name} {kind}": in_file(name, change)
        for name in ("manifest.json", "embeddings.npy", _CALIBRATION)
        for kind, change in changes.items()
    }
    return {
        **made,
        "manifest.json a folder": as_folder,
        "index gone": gone,
        "index a file": as_file,
        "index an empty folder": emptied,
        "index of another size of input": other,
        "calibration of another index": foreign_calibration,
    }


_CALIBRATION = "calibration.json"


def _bad_reload_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, damage: Callable[[Laboratory], None], service: str) -> Outcome:
        session = lab.session()
        models = session.bench.node.models
        try:
            damage(lab)
            response = lab.trigger(service)
            # The old one answers, by the index in memory.
            violations = lab.flow(session)
            again = lab.trigger(service)
        finally:
            lab.restore_index()
        if response.success or again.success:
            violations.append(f"success: {response.message}, {again.message}")
        if session.bench.node.models is not models:
            violations.append("the models were replaced")
        violations.append(text_problem(response.message, ("the old one is kept",)))
        good = lab.trigger(service)
        if not good.success:
            violations.append(f"the good index: {good.message}")
        violations += lab.flow(session)
        return lab.proved(Outcome(KEPT, response.message).objecting(*violations))

    for kind, damage in _damages(seed).items():
        yield _case(
            "reload of a bad index",
            kind,
            ACTIVE,
            seed,
            {KEPT},
            lambda lab, d=damage: run(lab, d, "reload_index"),
        )


# Services in each state.


def _service_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, name: str, state: str, times: int) -> Outcome:
        session = lab.session(state)
        violations = []
        for _ in range(times):
            response = lab.trigger(name)
            succeeds = name != "add_nominal" and state != UNCONFIGURED
            if response.success is not succeeds:
                violations.append(f"success is {response.success}: {response.message}")
            violations.append(text_problem(response.message))
        if session.state != state:
            violations.append(f"state {session.state}")
        if state == ACTIVE:
            violations += lab.flow(session)
        return lab.proved(Outcome(HARMLESS).objecting(*violations))

    for name in ("reset", "reload_index", "add_nominal", "self_test"):
        for state in _STATES:
            for times in (1, 5):
                yield _case(
                    "service at a bad time",
                    f"{name}{' five times' if times > 1 else ''}",
                    state,
                    seed,
                    {HARMLESS},
                    lambda lab, n=name, s=state, t=times: run(lab, n, s, t),
                )


# Cycles.


def cycle(lab: Laboratory) -> list[str]:
    """Go through all states once, with two frames, and return the objections."""
    lab.session(UNCONFIGURED)
    return lab.flow(lab.session(ACTIVE))


def _few_cycles(lab: Laboratory) -> Outcome:
    return Outcome(HARMLESS).objecting(*[text for _ in range(5) for text in cycle(lab)])


def many_cycles(lab: Laboratory, count: int) -> tuple[list[str], Resources, Resources]:
    """Return the objections to many cycles, and what is held after a tenth and after all."""
    violations: list[str] = []
    before = Resources.now()
    for number in tqdm(range(count), desc="cycles", unit="cycle"):
        violations += cycle(lab)
        if number == count // 10:
            before = settled(Resources.now())
    after = settled(before)
    violations += after.leaks_since(before)
    if after.rss_mb - before.rss_mb > _GROWTH_MB:
        violations.append(f"memory: {before.rss_mb:.0f} MB before, {after.rss_mb:.0f} MB after")
    return violations, before, after


def main() -> int:
    """Run many cycles; 1 if anything grows or an answer is wrong."""
    parser = argparse.ArgumentParser(prog="lifecycle_faults", description=__doc__)
    parser.add_argument("--cycles", type=int, default=CYCLES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cycles_") as folder, laboratory(Path(folder)) as lab:
        violations, before, after = many_cycles(lab, args.cycles)
    print(f"{args.cycles} cycles: {before}, {after}, {len(violations)} objections")
    for text in violations[:20]:
        print(text)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
