"""Faults of messages: of single images, of stamps, of streams, and of CameraInfo and depth.

They are injected into the decoder, into the inputs of the node, and over DDS.
"""

from __future__ import annotations

import math
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")

import cv2
import numpy as np
import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, RegionOfInterest
from visualization_msgs.msg import MarkerArray
from worlds.backbones import save_backbone
from worlds.ros import HW, build_monitor, nominal_image, odd_image, parameters, two_cameras

from faults.campaign import (
    ALTERED,
    DETECTED,
    DROPPED,
    HARMLESS,
    REFUSED,
    UNKNOWN,
    Case,
    Outcome,
    text_problem,
)
from faults.faulty_images import (
    FaultyImage,
    ImageFault,
    compressed,
    encoded,
    image_faults,
    raw,
    scene,
)
from faults.node_session import WAIT_S, Answer, NodeSession, node_session
from semantic_anomaly.errors import ImageError
from semantic_anomaly.ros import messages

GROUP = "messages"
CAMERA = "camera"
S = 1_000_000_000
# Setups of the node, by the changes of its parameters.
RAW, COMPRESSED, TWO, MARKERS = "raw", "compressed", "two cameras", "markers"
RELIABLE, SILENT, FROZEN, FROZEN_COMPRESSED = "reliable", "silent", "frozen", "frozen compressed"
_CHANGES: dict[str, dict[str, Any]] = {
    RAW: {},
    COMPRESSED: {"camera.transport": "compressed", "camera.image_topic": "/camera/compressed"},
    TWO: {},
    MARKERS: {"camera.camera_info_topic": "/camera/info", "camera.depth_topic": "/camera/depth"},
    RELIABLE: {"qos_reliability": "reliable"},
    SILENT: {"silent_after_s": 0.4},
    FROZEN: {"frozen_after_s": 1.0},
    FROZEN_COMPRESSED: {
        "frozen_after_s": 1.0,
        "camera.transport": "compressed",
        "camera.image_topic": "/camera/compressed",
    },
}


class Laboratory:
    """An index, and a node that is started anew only for another setup."""

    def __init__(self, folder: Path) -> None:
        backbone = save_backbone(folder / "backbone")
        self.values = parameters(build_monitor(folder / "monitor", backbone), backbone)
        self._stack = ExitStack()
        self._setup = ""
        self._session: NodeSession | None = None
        self._count = 100

    def session(self, setup: str) -> NodeSession:
        """Return the observed node of a setup, active."""
        if setup != self._setup:
            self.close()
            values, cameras = {**self.values, **_CHANGES[setup]}, ["camera"]
            if setup == TWO:
                cameras = ["front", "rear"]
                values = two_cameras(values, *cameras)
            self._session = self._stack.enter_context(node_session(values, cameras))
            self._setup = setup
        assert self._session is not None
        return self._session

    def close(self) -> None:
        """Stop the node."""
        self._setup, self._session = "", None
        self._stack.close()

    def good(self, session: NodeSession, *, odd: bool = False) -> Any:
        """Return the message of an image that was not sent before, without a stamp."""
        self._count += 1
        image = (odd_image if odd else nominal_image)(self._count)
        if session.image_type is CompressedImage:
            return compressed(encoded(".png", image), "png")
        return raw("rgb8", image)


@contextmanager
def laboratory(folder: Path) -> Iterator[Laboratory]:
    """Make the index; nodes are started by the cases."""
    with closing(Laboratory(folder)) as made:
        yield made


def cases(seed: int) -> Iterator[Case]:
    """Return the cases, those of one setup of the node after each other."""
    yield from _decoder_cases(seed)
    yield from _info_cases(seed)
    yield from _image_cases(seed, RAW)
    yield from _stamp_cases(seed, RAW)
    yield from _stream_cases(seed, RAW)
    yield from _blind_cases(seed, RAW)
    yield from _rate_cases(seed, RAW)
    yield _case("all faults before", "/diagnostics", "active", seed, {HARMLESS}, _diagnosed(RAW))
    yield from _image_cases(seed, COMPRESSED)
    yield from _stamp_cases(seed, COMPRESSED)
    yield from _blind_cases(seed, COMPRESSED)
    yield _case(
        "all faults before",
        "/diagnostics compressed",
        "active",
        seed,
        {HARMLESS},
        _diagnosed(COMPRESSED),
    )
    yield from _two_camera_cases(seed)
    yield from _frozen_cases(seed, FROZEN)
    yield from _frozen_cases(seed, FROZEN_COMPRESSED)
    yield from _silence_cases(seed)
    yield from _qos_cases(seed)
    yield from _marker_cases(seed)


def _case(
    fault_class: str,
    point: str,
    state: str,
    seed: int,
    allowed: set[str],
    run: Callable[[Laboratory], Outcome],
    names: Sequence[str] = (),
) -> Case:
    return Case(GROUP, fault_class, point, state, seed, frozenset(allowed), run, tuple(names), 60.0)


def pixels_problem(image: np.ndarray, fault: FaultyImage) -> str:
    """Return how an image differs from what the message shows, empty if it does not."""
    if fault.pixels is None:
        return ""
    if image.shape != fault.pixels.shape or image.dtype != np.uint8:
        return f"expected {fault.pixels.shape} uint8, found {image.shape} {image.dtype}"
    difference = np.abs(image.astype(int) - fault.pixels.astype(int))
    found = difference.max() if fault.tolerance == 0 else difference.mean()
    if found > fault.tolerance:
        return f"the pixels differ by {found:.1f} grey levels"
    return ""


def _allowed(fault: ImageFault, refused: str) -> set[str]:
    return {None: {refused, HARMLESS}, True: {refused}, False: {HARMLESS}}[fault.is_bad]


def _made(fault: ImageFault, seed: int) -> FaultyImage:
    return fault.make(np.random.default_rng([seed, 7]), scene(seed))


# The decoder.


def _decoder_cases(seed: int) -> Iterator[Case]:
    for fault in image_faults():
        for own in range(seed * 10, seed * 10 + fault.seeds):

            def run(_: Laboratory, fault: ImageFault = fault, own: int = own) -> Outcome:
                return _decoded(fault, _made(fault, own))

            point = f"{fault.name} by decoder"
            allowed = _allowed(fault, REFUSED)
            yield _case(fault.fault_class, point, "offline", own, allowed, run, fault.names)


def _decoded(fault: ImageFault, made: FaultyImage) -> Outcome:
    try:
        frame = messages.frame_of(made.message)
    except ImageError as error:
        return Outcome(REFUSED, str(error))
    if problem := pixels_problem(frame.image, made):
        return Outcome(ALTERED, problem)
    return Outcome(HARMLESS)


# Single images, to the running node.


def _image_cases(seed: int, setup: str) -> Iterator[Case]:
    for number, fault in enumerate(image_faults()):
        if fault.compressed is not (setup == COMPRESSED):
            continue
        own = seed * 10 + number % 2
        allowed = _allowed(fault, UNKNOWN)
        for state, over_dds in (("active", True), ("active", False), ("first frame", True)):
            # The inputs and the first frame take one member of each class in three.
            if (not over_dds or state != "active") and number % 3:
                continue

            def run(
                lab: Laboratory,
                fault: ImageFault = fault,
                own: int = own,
                state: str = state,
                over_dds: bool = over_dds,
            ) -> Outcome:
                session = lab.session(setup)
                made = _made(fault, own)
                message = session.stamp(made.message)
                outcome = _injected(lab, session, [message], state, over_dds=over_dds)
                if fault.is_bad is False:
                    outcome = outcome.objecting(_frame_problem(made))
                return outcome.objecting(_named(outcome, fault.names))

            point = f"{fault.name} {'over DDS' if over_dds else 'into the inputs'}"
            yield _case(fault.fault_class, point, state, own, allowed, run)


def _frame_problem(made: FaultyImage) -> str:
    try:
        return pixels_problem(messages.frame_of(made.message).image, made)
    except ImageError:
        return ""


def _named(outcome: Outcome, names: Sequence[str]) -> str:
    return text_problem(outcome.text, names) if outcome.kind == UNKNOWN else ""


def _injected(
    lab: Laboratory,
    session: NodeSession,
    faulty: Sequence[Any],
    state: str = "active",
    *,
    camera: str = CAMERA,
    over_dds: bool = True,
) -> Outcome:
    """Send stamped messages amid good frames; return the outcome of the last of them.

    States: active; first frame, of the activation; busy, while another frame is computed, so that
    only the newest of the messages that follow is processed.
    """
    if state == "first frame":
        session.deactivate()
        session.activate()
    else:
        session.ask(session.stamp(lab.good(session)), camera)
    if state == "busy":
        return _injected_while_busy(lab, session, faulty, camera, over_dds=over_dds)
    answers = [session.ask(message, camera, over_dds=over_dds) for message in faulty]
    for odd in (False, True):
        session.ask(session.stamp(lab.good(session, odd=odd)), camera)
    return outcome_of(answers[-1]).objecting(*session.violations())


def _injected_while_busy(
    lab: Laboratory, session: NodeSession, faulty: Sequence[Any], camera: str, *, over_dds: bool
) -> Outcome:
    counts = session.bench.node._cameras[camera].counts
    with held_worker(session) as held:
        session.send(session.stamp(lab.good(session)), camera)
        session.wait(held.entered.is_set, "the worker at work")
        for message in faulty:
            received = counts.frames_received
            session.send(message, camera, over_dds=over_dds)
            # The queue of the subscription holds one message.
            session.wait(lambda n=received: counts.frames_received > n, "the frame to arrive")
        last = session.stamp(lab.good(session))
        session.note_replaced(camera, faulty)
        session.send(last, camera)
        session.wait(lambda: counts.frames_replaced >= len(faulty), "the frames to be replaced")
    session.wait(lambda: not session.unanswered(camera), "answers to the good frames")
    session.ask(session.stamp(lab.good(session, odd=True)), camera)
    return Outcome(DROPPED).objecting(*session.violations())


class _Held:
    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()


@contextmanager
def held_worker(session: NodeSession) -> Iterator[_Held]:
    """Hold the worker of a node in its embedder."""
    models = session.bench.node.models
    assert models is not None
    held, embedder = _Held(), models.embedder
    embed = embedder.embed

    def waiting(images: Any) -> Any:
        held.entered.set()
        held.opened.wait(WAIT_S)
        return embed(images)

    embedder.embed = waiting  # type: ignore[method-assign]
    try:
        yield held
    finally:
        held.opened.set()
        del embedder.embed


def outcome_of(answer: Answer) -> Outcome:
    """Return what came of a frame."""
    kinds = {"unknown": UNKNOWN, "nominal": HARMLESS, "anomaly": HARMLESS}
    return Outcome(kinds[answer.decision], answer.reason or answer.decision)


# Stamps.

# Ages in seconds, of frames that are scored in spite of them.
_GOOD_AGES = {
    "slightly late": 0.5,
    "late within the limit": 5.0,
    "slightly ahead": -0.5,
    "ahead within the limit": -8.0,
    "one nanosecond late": 1e-9,
}
_BAD_STAMPS: dict[str, Callable[[int], int]] = {
    "zero": lambda _: 0,
    "one nanosecond": lambda _: 1,
    "negative": lambda _: -5 * S,
    "largest": lambda _: (2**31 - 1) * S,
    "smallest": lambda _: -(2**31) * S,
    "old by more than the limit": lambda now: now - 11 * S,
    "old by a day": lambda now: now - 86_400 * S,
    "future by more than the limit": lambda now: now + 20 * S,
    "future by a year": lambda now: now + 365 * 86_400 * S,
}
_STATES = ("active", "first frame", "busy")


def _stamp_cases(seed: int, setup: str) -> Iterator[Case]:
    def run(name: str, state: str, of_now: Callable[[int], int], over_dds: bool) -> Any:
        def injected(lab: Laboratory) -> Outcome:
            session = lab.session(setup)
            message = session.stamp(lab.good(session, odd=True), of_now(session.now_ns()))
            if name == "nanoseconds of more than a second":
                message.header.stamp.sec -= 4
                message.header.stamp.nanosec += 4 * S - S
            return _injected(lab, session, [message], state, over_dds=over_dds)

        return injected

    good = {name: (lambda now, age=age: now - round(age * S)) for name, age in _GOOD_AGES.items()}
    good["nanoseconds of more than a second"] = lambda now: now
    states = _STATES if setup == RAW else ("active",)
    for stamps, scored in ((good, True), (_BAD_STAMPS, False)):
        for name, of_now in stamps.items():
            for state in states:
                allowed = {HARMLESS} if scored else {UNKNOWN}
                fault_class = "stamp shifted within the limits" if scored else "stamp out of limits"
                if state == "busy":
                    allowed = {DROPPED}
                point = f"{name} over DDS, {setup}"
                made = run(name, state, of_now, True)
                yield _case(fault_class, point, state, seed, allowed, made)
            if setup == RAW:
                allowed = {HARMLESS} if scored else {UNKNOWN}
                made = run(name, "active", of_now, False)
                point = f"{name} into the inputs, {setup}"
                yield _case(fault_class, point, "active", seed, allowed, made)


# Streams: several frames that do not go together.


def _stream_cases(seed: int, setup: str) -> Iterator[Case]:
    def stamped_at(*ages_s: float) -> Any:
        def make(lab: Laboratory, session: NodeSession) -> list[Any]:
            now = session.now_ns()
            return [
                session.stamp(lab.good(session, odd=bool(n % 2)), now - round(age * S))
                for n, age in enumerate(ages_s)
            ]

        return make

    def named(*frame_ids: str) -> Any:
        def make(lab: Laboratory, session: NodeSession) -> list[Any]:
            return [session.stamp(lab.good(session), frame_id=name) for name in frame_ids]

        return make

    def sized(*sizes_hw: tuple[int, int]) -> Any:
        def make(lab: Laboratory, session: NodeSession) -> list[Any]:
            images = [
                cv2.resize(scene(seed), hw[::-1], interpolation=cv2.INTER_AREA) for hw in sizes_hw
            ]
            return [session.stamp(raw("rgb8", image)) for image in images]

        return make

    def twice(lab: Laboratory, session: NodeSession) -> list[Any]:
        message = session.stamp(lab.good(session))
        copy = raw("rgb8", np.frombuffer(message.data, np.uint8).reshape(*HW, 3))
        copy.header = message.header
        return [message, copy]

    def encodings(lab: Laboratory, session: NodeSession) -> list[Any]:
        image = scene(seed)
        made = [("rgb8", image), ("mono8", image[..., 0]), ("bgr8", image), ("what", image)]
        return [session.stamp(raw(*item)) for item in [*made, ("rgb8", image)]]

    streams: dict[tuple[str, str], Any] = {
        ("stamps repeated", "two frames"): stamped_at(0.1, 0.1),
        ("stamps repeated", "five frames"): stamped_at(*[0.2] * 5),
        ("stamps repeated", "the same message"): twice,
        ("stamps backwards", "swapped pairs"): stamped_at(0.4, 0.5, 0.2, 0.3, 0.0, 0.1),
        ("stamps backwards", "one nanosecond"): stamped_at(0.1, 0.100000001),
        ("stamps backwards", "by small steps"): stamped_at(0.1, 0.3, 0.5, 0.7, 0.9, 1.05),
        ("stamps backwards", "by just the bound"): stamped_at(0.0, 1.0, 0.5),
        ("stamps backwards", "by more than the bound"): stamped_at(0.0, 3.0, 2.9, 2.8),
        ("stamps backwards", "all by 2 s"): stamped_at(0.0, 2.0, 4.0, 6.0),
        ("stamps of two clocks", "3 s apart"): stamped_at(0.0, 3.0, 0.0, 3.0, 0.0),
        ("stamps of two clocks", "0.5 s apart"): stamped_at(0.0, 0.5, 0.0, 0.5, 0.0),
        ("frame id changed", "to another"): named("a", "b", "a"),
        ("frame id changed", "to none"): named("a", "", ""),
        ("frame id changed", "to lines and other scripts"): named(
            "a\nb", "\u043a\u0430\u043c\u0435\u0440\u0430"
        ),
        ("frame id changed", "to 100 kB"): named("x" * 100_000),
        ("size changed", "half"): sized((42, 70)),
        ("size changed", "full HD and back"): sized((1080, 1920), HW),
        ("size changed", "upright"): sized((140, 84)),
        ("size changed", "one pixel"): sized((1, 1)),
        ("size changed", "one row"): sized((1, 140)),
        ("size changed", "one column"): sized((84, 1)),
        ("size changed", "very wide"): sized((20, 4000)),
        ("size changed", "in each frame"): sized(HW, (60, 100), (90, 140), (84, 139)),
        ("encoding changed", "in each frame"): encodings,
    }
    for (fault_class, name), make in streams.items():
        for over_dds in (True, False):

            def run(lab: Laboratory, make: Any = make, over_dds: bool = over_dds) -> Outcome:
                session = lab.session(setup)
                return _injected(lab, session, make(lab, session), over_dds=over_dds)

            allowed = {HARMLESS, UNKNOWN} if fault_class == "size changed" else {HARMLESS}
            point = f"{name} {'over DDS' if over_dds else 'into the inputs'}"
            yield _case(fault_class, point, "active", seed, allowed, run)
    yield from _publisher_cases(seed, setup)


def _publisher_cases(seed: int, setup: str) -> Iterator[Case]:
    def run(lab: Laboratory, kind: str) -> Outcome:
        session = lab.session(setup)
        helper = session.bench.helper
        reliability = ReliabilityPolicy.RELIABLE
        if kind == "best effort":
            reliability = ReliabilityPolicy.BEST_EFFORT
        second = helper.create_publisher(
            Image, session.topic(CAMERA), QoSProfile(depth=1, reliability=reliability)
        )
        try:
            session.wait(second.get_subscription_count, "a connection of the second publisher")
            for number in range(4):
                session.ask(session.stamp(lab.good(session)), CAMERA)
                message = lab.good(session, odd=bool(number % 2))
                if kind == "bad images":
                    message.step += 1
                shift_s = 0.3 if kind == "late" else 0.0
                session.stamp(message, session.now_ns() - round(shift_s * S))
                last = session.ask(message, CAMERA, by=second)
        finally:
            helper.destroy_publisher(second)
        session.ask(session.stamp(lab.good(session)), CAMERA)
        return outcome_of(last).objecting(*session.violations())

    for kind in ("alike", "late", "bad images", "best effort"):
        allowed = {UNKNOWN} if kind == "bad images" else {HARMLESS}
        yield _case(
            "two publishers",
            f"the second {kind}, over DDS",
            "active",
            seed,
            allowed,
            lambda lab, kind=kind: run(lab, kind),
        )


# Cameras that see nothing.


def _blind_images(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shape = (*HW, 3)
    y, x = np.mgrid[0 : HW[0], 0 : HW[1]]

    def noisy(level: float, deviation: float) -> np.ndarray:
        return np.clip(level + rng.normal(0, deviation, shape), 0, 255).astype(np.uint8)

    hot = np.zeros(shape, np.uint8)
    hot[rng.random(HW) < 0.005] = 255
    glow = 8 * np.exp(-((y - 40) ** 2 + (x - 70) ** 2) / 800)
    return {
        "black": np.zeros(shape, np.uint8),
        "white": np.full(shape, 255, np.uint8),
        "grey": np.full(shape, 127, np.uint8),
        "one colour": np.full(shape, (0, 0, 255), np.uint8),
        "black with noise": noisy(4, 4),
        "white with noise": noisy(252, 4),
        "grey with strong noise": noisy(127, 12),
        "black with hot pixels": hot,
        "covered, with a weak glow": np.repeat(glow[..., None], 3, 2).astype(np.uint8),
        "weak gradient": np.repeat((100 + x * 8 / HW[1])[..., None], 3, 2).astype(np.uint8),
    }


def _partly_blind_images(rng: np.random.Generator) -> dict[str, np.ndarray]:
    image = nominal_image(int(rng.integers(1000)))
    half, left, spots, leak = image.copy(), image.copy(), image.copy(), np.zeros_like(image)
    half[: HW[0] // 2] = 0
    left[:, : HW[1] // 3] = 10
    for _ in range(6):
        centre = int(rng.integers(10, HW[1] - 10)), int(rng.integers(10, HW[0] - 10))
        cv2.circle(spots, centre, 12, (40, 30, 20), -1)
    leak[:12, :20] = 230
    return {
        "upper half black": half,
        "left third black": left,
        "spots of mud": spots,
        "covered, with a leak of light": leak,
    }


def _blind_cases(seed: int, setup: str) -> Iterator[Case]:
    def run(lab: Laboratory, name: str, partly: bool, state: str) -> Outcome:
        session = lab.session(setup)
        rng = np.random.default_rng(seed)
        image = (_partly_blind_images if partly else _blind_images)(rng)[name]
        message = raw("rgb8", image)
        if setup == COMPRESSED:
            message = compressed(encoded(".jpg", image), "jpeg")
        outcome = _injected(lab, session, [session.stamp(message)], state)
        if partly and outcome.kind == HARMLESS and outcome.text == "anomaly":
            outcome = Outcome(DETECTED, "anomaly", outcome.violations)
        return outcome.objecting("" if partly else _named(outcome, ("blind",)))

    rng = np.random.default_rng(0)
    for partly, images in ((False, _blind_images(rng)), (True, _partly_blind_images(rng))):
        for name in images:
            for state in ("active", "first frame"):
                fault_class = "lens partly covered" if partly else "image without contrast"
                yield _case(
                    fault_class,
                    f"{name} over DDS, {setup}",
                    state,
                    seed,
                    {DETECTED, UNKNOWN} if partly else {UNKNOWN},
                    lambda lab, n=name, p=partly, s=state: run(lab, n, p, s),
                )


def _frozen_cases(seed: int, setup: str) -> Iterator[Case]:
    def run(lab: Laboratory, period_s: float, count: int, between: str) -> Outcome:
        session = lab.session(setup)
        frozen = lab.good(session)
        begin = session.now_ns() - round(5.0 * S)
        answers = []
        for number in range(count):
            copy = type(frozen)()
            for name in frozen.get_fields_and_field_types():
                setattr(copy, name, getattr(frozen, name))
            copy.header = type(frozen.header)()
            at = begin + round(number * period_s * S)
            if between == "late" and number % 3 == 2:
                at -= round(0.2 * S)
            answers.append(session.ask(session.stamp(copy, at), CAMERA))
            if between == "bad images" and number % 3 == 1:
                bad = lab.good(session)
                bad.data = bad.data[:50]
                session.ask(session.stamp(bad, at + 1), CAMERA)
        last = outcome_of(answers[-1])
        thawed = session.ask(session.stamp(lab.good(session)), CAMERA)
        problem = "" if thawed.decision == "nominal" else f"after the freeze: {thawed.reason}"
        return last.objecting(_named(last, ("blind: frozen",)), problem, *session.violations())

    streams = {
        "2 Hz": (0.5, 5, ""),
        "10 Hz": (0.1, 14, ""),
        "50 Hz": (0.02, 60, ""),
        "with late frames": (0.1, 17, "late"),
        "with bad images between": (0.1, 16, "bad images"),
    }
    for name, stream in streams.items():
        yield _case(
            "frozen image",
            f"{name}, {setup}",
            "active",
            seed,
            {UNKNOWN},
            lambda lab, stream=stream: run(lab, *stream),
        )
    yield _case(
        "image repeated for a moment",
        f"10 Hz, {setup}",
        "active",
        seed,
        {HARMLESS},
        lambda lab: run(lab, 0.1, 9, ""),
    )


# Rates.


def _rate_cases(seed: int, setup: str) -> Iterator[Case]:
    def run(lab: Laboratory, rate_hz: float, count: int, share_bad: float) -> Outcome:
        session = lab.session(setup)
        rng = np.random.default_rng(seed)
        begin = time.monotonic()
        for number in range(count):
            message = lab.good(session, odd=bool(number % 2))
            if rng.random() < share_bad:
                message.data = message.data[: rng.integers(1, 100)]
            session.send(session.stamp(message), CAMERA)
            session.spin_for(max(0.001, begin + (number + 1) / rate_hz - time.monotonic()))
        last = session.ask(session.stamp(lab.good(session)), CAMERA)
        violations = session.violations(lost=rate_hz > 20)
        if rate_hz > 20:
            answered = len(session.answers(CAMERA))
            counts = session.counts(CAMERA)
            text = f"{counts['frames_received']} received, {answered} answered"
            # What the middleware lost is not counted by the node.
            session.deactivate()
            session.activate()
            return Outcome(DROPPED, text).objecting(*violations)
        return outcome_of(last).objecting(*violations)

    for rate_hz, count in ((1.0, 3), (10.0, 20), (50.0, 60), (200.0, 200), (1000.0, 400)):
        for share_bad in (0.0, 0.3):
            allowed = {DROPPED} if rate_hz > 20 else {HARMLESS}
            yield _case(
                f"rate {rate_hz:g} Hz",
                f"{share_bad:.0%} bad images over DDS",
                "active",
                seed,
                allowed,
                lambda lab, r=rate_hz, c=count, b=share_bad: run(lab, r, c, b),
            )


def _diagnosed(setup: str) -> Callable[[Laboratory], Outcome]:
    def run(lab: Laboratory) -> Outcome:
        session = lab.session(setup)
        session.ask(session.stamp(lab.good(session)), CAMERA)
        violations = session.violations()
        return Outcome(HARMLESS).objecting(*violations, *session.diagnostics_violations())

    return run


# Two cameras: the faults of one do not concern the other.


def _two_camera_cases(seed: int) -> Iterator[Case]:
    chosen = [fault for fault in image_faults() if not fault.compressed]
    for number, fault in enumerate(chosen):
        if number % 4 != 1:
            continue

        def run(lab: Laboratory, fault: ImageFault = fault) -> Outcome:
            session = lab.session(TWO)
            faulty = session.stamp(_made(fault, seed).message)
            beside = session.stamp(lab.good(session, odd=True))
            # Both wait for the worker, which takes them as one batch.
            with held_worker(session) as held:
                session.send(session.stamp(lab.good(session)), "front")
                session.wait(held.entered.is_set, "the worker at work")
                for message, camera in ((faulty, "front"), (beside, "rear")):
                    counts = session.bench.node._cameras[camera].counts
                    received = counts.frames_received
                    session.send(message, camera)
                    session.wait(lambda c=counts, n=received: c.frames_received > n, "the frame")
            session.wait(
                lambda: not session.unanswered("front") and not session.unanswered("rear"),
                "answers to both cameras",
            )
            outcome = outcome_of(session.answers("front")[-1])
            other = session.answers("rear")[-1]
            problem = "" if other.decision == "anomaly" else f"the other camera: {other.decision}"
            return outcome.objecting(problem, *session.violations())

        yield _case(
            fault.fault_class,
            f"{fault.name} in one of two cameras",
            "busy",
            seed,
            _allowed(fault, UNKNOWN),
            run,
        )
    yield _case(
        "all faults before",
        "/diagnostics of two cameras",
        "active",
        seed,
        {HARMLESS},
        lambda lab: Outcome(HARMLESS).objecting(*lab.session(TWO).diagnostics_violations()),
    )


# Silence.


def _silence_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, kind: str) -> Outcome:
        with ExitStack() as stack:
            return silent(lab, kind, stack)

    def silent(lab: Laboratory, kind: str, stack: ExitStack) -> Outcome:
        session = lab.session(SILENT)
        violations, other = [], None
        if kind == "from the start":
            session.deactivate()
            session.activate()
        else:
            session.ask(session.stamp(lab.good(session)), CAMERA)
        if kind == "another type":
            other = stack.enter_context(_publisher_elsewhere(session.topic(CAMERA)))
        before = len(session.answers(CAMERA))
        end = time.monotonic() + 2.8
        while time.monotonic() < end:
            session.spin_for(0.1)
            if other is not None:
                other.publish(CompressedImage(format="jpeg"))
            if kind == "1 Hz" and len(session.answers(CAMERA)) - before in (2, 5):
                session.ask(session.stamp(lab.good(session)), CAMERA)
        silences = [
            a for a in session.answers(CAMERA)[before:] if a.reason.startswith("no frames for")
        ]
        if len(silences) < 2:
            violations.append(f"expected a status in each second of silence, found {len(silences)}")
        back = session.ask(session.stamp(lab.good(session)), CAMERA)
        if back.decision != "nominal":
            violations.append(f"after the silence: {back.decision}: {back.reason}")
        reason = silences[-1].reason if silences else ""
        names = ("expected Image, found",) if kind == "another type" else ("publishers: ",)
        outcome = Outcome(UNKNOWN, reason).objecting(text_problem(reason, names))
        return outcome.objecting(*violations, *session.violations())

    for kind in ("from the start", "in mid-stream", "1 Hz", "another type"):
        yield _case(
            "silence",
            f"{kind}, over DDS",
            "active",
            seed,
            {UNKNOWN},
            lambda lab, kind=kind: run(lab, kind),
        )


@contextmanager
def _publisher_elsewhere(topic: str) -> Iterator[Any]:
    """Return a publisher of compressed images of another participant: one has one type a topic."""
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("elsewhere", context=context)
    try:
        yield node.create_publisher(CompressedImage, topic, 1)
    finally:
        node.destroy_node()
        rclpy.shutdown(context=context)


# QoS.


def _qos_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, when: str) -> Outcome:
        session = lab.session(RELIABLE)
        helper = session.bench.helper
        session.ask(session.stamp(lab.good(session)), CAMERA)
        if when == "before activate":
            session.deactivate()
        qos = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        other = helper.create_publisher(Image, session.topic(CAMERA), qos)
        try:
            if when == "before activate":
                session.activate()

            def reasons() -> list[str]:
                answers = session.answers(CAMERA)
                return [a.reason for a in answers if "incompatible QoS" in a.reason]

            session.wait(reasons, "unknown because of the incompatible QoS")
            other.publish(session.stamp(lab.good(session)))
            session.spin_for(0.2)
            outcome = Outcome(UNKNOWN, reasons()[-1])
            outcome = outcome.objecting(text_problem(outcome.text, ("RELIABILITY",)))
        finally:
            helper.destroy_publisher(other)
        session.ask(session.stamp(lab.good(session)), CAMERA)
        return outcome.objecting(*session.violations())

    for when in ("before activate", "in mid-stream"):
        yield _case(
            "incompatible QoS",
            f"best effort to reliable, {when}",
            "active",
            seed,
            {UNKNOWN},
            lambda lab, when=when: run(lab, when),
        )


# CameraInfo and depth, which must not change the decision.


def _info(**changes: Any) -> CameraInfo:
    info = CameraInfo(height=HW[0], width=HW[1], distortion_model="plumb_bob")
    info.k = [100.0, 0.0, 70.0, 0.0, 100.0, 42.0, 0.0, 0.0, 1.0]
    info.d = [0.0] * 5
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def _k(fx: float = 100.0, cx: float = 70.0) -> list[float]:
    return [fx, 0.0, cx, 0.0, 100.0, 42.0, 0.0, 0.0, 1.0]


# True: it cannot be used, and the assumed lens is taken.
_INFOS: dict[str, tuple[dict[str, Any], bool]] = {
    "good": ({}, False),
    "zero K": ({"k": [0.0] * 9}, True),
    "NaN in K": ({"k": _k(fx=math.nan)}, True),
    "infinite centre": ({"k": _k(cx=math.inf)}, True),
    "negative focal length": ({"k": _k(fx=-100.0)}, True),
    "other size": ({"height": 42, "width": 70}, False),
    "size zero": ({"height": 0, "width": 0}, True),
    "size huge": ({"height": 2**32 - 1, "width": 2**32 - 1}, False),
    "region of interest": ({"roi": RegionOfInterest(width=10, height=10)}, True),
    "binning larger than the image": ({"binning_x": 10_000, "binning_y": 10_000}, True),
    "NaN in D": ({"d": [math.nan] * 5}, True),
    "D of three numbers": ({"d": [0.1, 0.2, 0.3]}, None),
    "D of hundred numbers": ({"d": [0.1] * 100}, None),
    "D that cannot be inverted": ({"d": [1e9, -1e9, 1e9, 1e9, 1e9]}, None),
    "fisheye with five numbers": ({"distortion_model": "equidistant"}, None),
    "fisheye with huge numbers": ({"distortion_model": "equidistant", "d": [1e9] * 4}, None),
    "unknown distortion model": ({"distortion_model": "what"}, None),
}


def _depth(values: np.ndarray, encoding: str = "32FC1", **changes: Any) -> Image:
    message = raw(encoding, values)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def _depths() -> dict[str, tuple[Callable[[], Image], bool]]:
    def metres(value: float, hw: tuple[int, int] = HW) -> np.ndarray:
        return np.full(hw, value, np.float32)

    return {
        "good": (lambda: _depth(metres(5.0)), False),
        "NaN": (lambda: _depth(metres(math.nan)), False),
        "infinite": (lambda: _depth(metres(math.inf)), False),
        "negative": (lambda: _depth(metres(-3.0)), False),
        "zero": (lambda: _depth(metres(0.0)), False),
        "largest": (lambda: _depth(metres(3e38)), False),
        "smallest": (lambda: _depth(metres(1e-40)), False),
        "half of the size": (lambda: _depth(metres(5.0, (42, 70))), False),
        "one pixel": (lambda: _depth(metres(5.0, (1, 1))), False),
        "upright": (lambda: _depth(metres(5.0, (140, 84))), False),
        "millimetres": (lambda: _depth(np.full(HW, 5000, np.uint16), "16UC1"), False),
        "big-endian": (lambda: _depth(metres(5.0).astype(">f4"), is_bigendian=1), False),
        "encoding of colours": (lambda: _depth(np.zeros((*HW, 3), np.uint8), "rgb8"), True),
        "encoding 64FC1": (lambda: _depth(np.zeros(HW, np.float64), "64FC1"), True),
        "data short": (lambda: _depth(metres(5.0), data=array("B", bytes(100))), True),
        "data empty": (lambda: _depth(metres(5.0), data=array("B")), True),
        "step too small": (lambda: _depth(metres(5.0), step=140), True),
        "size zero": (lambda: _depth(metres(5.0), height=0), True),
        "size huge": (lambda: _depth(metres(5.0), height=2**31, width=2**31), True),
    }


def _info_cases(seed: int) -> Iterator[Case]:
    def read(make: Callable[[], Any], read_message: Callable[[Any], Any]) -> Outcome:
        try:
            read_message(make())
        except ImageError as error:
            return Outcome(REFUSED, str(error))
        return Outcome(HARMLESS)

    allowed = {None: {REFUSED, HARMLESS}, True: {REFUSED}, False: {HARMLESS}}
    for name, (changes, is_bad) in _INFOS.items():
        yield _case(
            "CameraInfo",
            f"{name} by decoder",
            "offline",
            seed,
            allowed[is_bad],
            lambda _, c=changes: read(lambda: _info(**c), messages.intrinsics_of),
            ("camera info",),
        )
    for name, (make, is_bad) in _depths().items():
        yield _case(
            "depth",
            f"{name} by decoder",
            "offline",
            seed,
            allowed[is_bad],
            lambda _, make=make: read(make, messages.depth_of),
        )


def _marker_cases(seed: int) -> Iterator[Case]:
    def run(lab: Laboratory, infos: Sequence[Any], depth: Image | None, shift_s: float) -> Outcome:
        session = lab.session(MARKERS)
        helper = session.bench.helper
        markers: list[MarkerArray] = []
        listener = helper.create_subscription(
            MarkerArray, f"/semantic_anomaly/{CAMERA}/markers", markers.append, 10
        )
        try:
            return _marked(lab, session, markers, infos, depth, shift_s)
        finally:
            helper.destroy_subscription(listener)

    def infos(name: str) -> list[Any]:
        return [_info(**_INFOS[name][0])]

    for name in _INFOS:
        yield _case(
            "CameraInfo",
            f"{name} over DDS",
            "active",
            seed,
            {HARMLESS},
            lambda lab, name=name: run(lab, infos(name), None, 0.0),
        )
    yield _case(
        "CameraInfo",
        "other size in mid-stream, over DDS",
        "active",
        seed,
        {HARMLESS},
        lambda lab: run(lab, [_info(), _info(height=42, width=70), _info()], None, 0.0),
    )
    for name, (make, _) in _depths().items():
        yield _case(
            "depth",
            f"{name} over DDS",
            "active",
            seed,
            {HARMLESS},
            lambda lab, make=make: run(lab, [_info()], make(), 0.0),
        )
    for shift_s in (0.04, 0.06, 5.0, -5.0):
        yield _case(
            "depth",
            f"stamp {shift_s:g} s late over DDS",
            "active",
            seed,
            {HARMLESS},
            lambda lab, s=shift_s: run(lab, [_info()], _depths()["good"][0](), s),
        )
    yield _case(
        "CameraInfo",
        "missing, over DDS",
        "first frame",
        seed,
        {HARMLESS},
        lambda lab: run(lab, [], None, 0.0),
    )


def _marked(
    lab: Laboratory,
    session: NodeSession,
    markers: list[MarkerArray],
    infos: Sequence[Any],
    depth: Image | None,
    shift_s: float,
) -> Outcome:
    """Send CameraInfo, depth and an odd image; the markers have to be finite."""
    bench, inputs = session.bench, session.bench.node._cameras[CAMERA].inputs
    if not infos:
        session.deactivate()
        session.activate()
    publishers = {p.topic_name: p for p in bench.node.publishers}
    topic = publishers[f"/semantic_anomaly/{CAMERA}/markers"]
    session.wait(topic.get_subscription_count, "a connection to the markers")
    for info in infos:
        bench.publisher("/camera/info", CameraInfo).publish(info)
        session.wait(lambda i=info: _same_info(inputs._info, i), "the CameraInfo to arrive")
        session.ask(session.stamp(lab.good(session)), CAMERA)
    image = session.stamp(lab.good(session, odd=True))
    if depth is not None:
        session.stamp(depth, messages.stamp_ns(image.header) - round(shift_s * S))
        bench.publisher("/camera/depth", Image).publish(depth)
        session.wait(
            lambda: any(d.header == depth.header for d in inputs._depths), "the depth to arrive"
        )
    markers.clear()
    answer = session.ask(image, CAMERA)
    problem = "" if answer.decision == "anomaly" else f"decision {answer.decision}"
    session.wait(lambda: any(m.markers[0].header == image.header for m in markers), "markers")
    boxes = [m for array_ in markers for m in array_.markers if m.header == image.header]
    numbers = [
        value
        for marker in boxes
        for point in (*marker.points, marker.pose.position)
        for value in (point.x, point.y, point.z)
    ]
    if len(boxes) < 2:
        problem += f"; {len(boxes)} markers"
    if not np.isfinite(numbers).all():
        problem += "; markers that are not finite"
    session.ask(session.stamp(lab.good(session)), CAMERA)
    return outcome_of(answer).objecting(problem.strip("; "), *session.violations())


def _same_info(info: CameraInfo | None, other: CameraInfo) -> bool:
    # NaN differs from itself.
    return info is not None and repr(info) == repr(other)
