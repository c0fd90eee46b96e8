"""A running node under observation: what it publishes is compared with an offline run.

The offline detector assesses the frames that the node answered, in the order of the answers. Every
status has to agree with it, every score needs a status, and the counters have to agree with the
statuses.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float32
from worlds.ros import SUCCESS, Bench, bench, offline_detector, values_of

from faults.campaign import text_problem
from semantic_anomaly.detection.detector import embed_timed
from semantic_anomaly.errors import ImageError, IndexMismatchError
from semantic_anomaly.ros import messages
from semantic_anomaly.ros.inputs import SILENCE

WAIT_S = 20.0
S = 1_000_000_000
# A frame may be answered so much later than it was sent.
_LATENCY_S = 3.0
_COUNTS = {
    "scored": "frames_processed",
    "stale": "frames_dropped_stale",
    "bad": "frames_bad",
    "blind": "frames_blind",
    "failed": "frames_failed",
}
_REASONS = {
    "stale": "stale",
    "clock mismatch": "stale",
    "bad image": "bad",
    "blind": "blind",
    "model error": "failed",
}
# Reasons of a status without an image.
WITHOUT_IMAGE = (SILENCE, "frames arrive, but", "topic ")


@dataclass
class Answer:
    """A status with the message that it answers; None: it answers none."""

    camera: str
    values: dict[str, str]
    message: Any | None
    sent_ns: int
    received_s: float

    @property
    def decision(self) -> str:
        return self.values["decision"]

    @property
    def reason(self) -> str:
        return self.values.get("reason", "")


@dataclass
class _CameraLog:
    """What was sent to a camera and came from it since activation."""

    sent: int = 0
    unanswered: list[tuple[Any, int]] = field(default_factory=list)  # with the time of sending
    answers: list[Answer] = field(default_factory=list)
    judged: int = 0
    replaced: int = 0
    late: int = 0
    newest_ns: int | None = None
    tally: Counter[str] = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)


class NodeSession:
    """An active node, publishers of images, and the oracle.

    Args:
        b: a bench whose node is not configured.
        values: parameters of the node.
        cameras: their names.
    """

    def __init__(self, b: Bench, values: dict[str, Any], cameras: Sequence[str]) -> None:
        self.bench, self.values, self.cameras = b, values, tuple(cameras)
        self.image_type = CompressedImage if "compressed" in values.values() else Image
        self.offline = {camera: offline_detector(values, camera) for camera in cameras}
        self.diagnostics: list[DiagnosticArray] = []
        self._logs = {camera: _CameraLog() for camera in cameras}
        self._last_ns = 0
        deep = QoSProfile(depth=1000)
        b.helper.create_subscription(DiagnosticArray, "/diagnostics", self.diagnostics.append, deep)
        for camera in cameras:
            b.helper.create_subscription(
                DiagnosticArray,
                f"/semantic_anomaly/{camera}/status",
                lambda array, camera=camera: self._on_status(camera, array),
                deep,
            )
            b.helper.create_subscription(
                Float32,
                f"/semantic_anomaly/{camera}/score",
                lambda score, camera=camera: self._logs[camera].scores.append(score.data),
                deep,
            )
        assert b.node.trigger_configure() == SUCCESS
        self.activate()

    def activate(self) -> None:
        """Activate the node and wait for the connections; counters and tracks start anew."""
        for camera in self.cameras:
            self._logs[camera] = _CameraLog()
            self.offline[camera].reset()
        assert self.bench.node.trigger_activate() == SUCCESS
        for camera in self.cameras:
            self.bench.publisher(self.topic(camera), self.image_type)
        self.wait(self._connected, "connections to the outputs")

    def _connected(self) -> bool:
        publishers = {p.topic_name: p for p in self.bench.node.publishers}
        names = [f"/semantic_anomaly/{c}/{t}" for c in self.cameras for t in ("score", "status")]
        return all(
            name in publishers and publishers[name].get_subscription_count() for name in names
        )

    def deactivate(self) -> None:
        """Deactivate the node, once the scores of all statuses are here."""
        for camera in self.cameras:
            self._wait_for_scores(self._logs[camera])
        assert self.bench.node.trigger_deactivate() == SUCCESS

    @property
    def state(self) -> str:
        """Return the label of the lifecycle state."""
        return str(self.bench.node._state_machine.current_state[1])

    def topic(self, camera: str) -> str:
        """Return the image topic of a camera."""
        return str(self.values.get(f"{camera}.image_topic", "/camera/image_raw"))

    def wait(self, done: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> None:
        """Spin until done() returns true.

        Raises:
            TimeoutError: it did not.
        """
        end = time.monotonic() + wait_s
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"expected {what} within {wait_s:g} s")
            self.bench.executor.spin_once(timeout_sec=0.02)

    def spin_for(self, seconds: float) -> None:
        """Spin for a time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.bench.executor.spin_once(timeout_sec=0.02)

    def stamp(self, message: Any, stamp_ns: int | None = None, frame_id: str = "optical") -> Any:
        """Stamp a message with a time of its own: now, unless another is given."""
        if stamp_ns is None:
            # Two stamps of one clock reading would be one.
            stamp_ns = self._last_ns = max(self.now_ns(), self._last_ns + 1000)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        message.header.frame_id = frame_id
        return message

    def now_ns(self) -> int:
        """Return the time of the helper's clock in nanoseconds."""
        return int(self.bench.helper.get_clock().now().nanoseconds)

    def send(self, message: Any, camera: str, *, over_dds: bool = True, by: Any = None) -> None:
        """Publish a stamped message, also by another publisher, or give it to the inputs."""
        log = self._logs[camera]
        log.sent += 1
        log.unanswered.append((message, self.now_ns()))
        if over_dds:
            by = by or self.bench.publisher(self.topic(camera), self.image_type)
            by.publish(message)
        else:
            self.bench.node._cameras[camera].inputs._store_image(message)

    def ask(self, message: Any, camera: str, *, over_dds: bool = True, by: Any = None) -> Answer:
        """Send a stamped message as `send` does, and return its answer.

        Raises:
            TimeoutError: there was none.
        """
        log = self._logs[camera]
        before = len(log.answers)
        self.send(message, camera, over_dds=over_dds, by=by)

        def answers() -> list[Answer]:
            return [answer for answer in log.answers[before:] if answer.message is message]

        self.wait(answers, "a status for the frame")
        return answers()[0]

    def unanswered(self, camera: str) -> int:
        """Return how many messages have no answer yet."""
        return len(self._logs[camera].unanswered)

    def answers(self, camera: str) -> list[Answer]:
        """Return the answers of a camera since activation."""
        return self._logs[camera].answers

    def counts(self, camera: str) -> dict[str, int]:
        """Return the counters of the last status of a camera, empty before the first."""
        answers = self._logs[camera].answers
        values = answers[-1].values if answers else {}
        return {key: int(value) for key, value in values.items() if key.startswith("frames_")}

    def note_replaced(self, camera: str, messages_: Sequence[Any]) -> None:
        """Expect no answer to some of the messages sent: newer ones replaced them."""
        log = self._logs[camera]
        log.replaced += len(messages_)
        replaced = {id(message) for message in messages_}
        log.unanswered = [item for item in log.unanswered if id(item[0]) not in replaced]

    def _on_status(self, camera: str, array: DiagnosticArray) -> None:
        log = self._logs[camera]
        values = values_of(array.status[0])
        message, sent_ns = None, 0
        if not values.get("reason", "").startswith(WITHOUT_IMAGE):
            # Of equal headers the first that was sent.
            for number, (sent, at_ns) in enumerate(log.unanswered):
                if sent.header == array.header:
                    message, sent_ns = sent, at_ns
                    del log.unanswered[number]
                    break
        log.answers.append(Answer(camera, values, message, sent_ns, time.monotonic()))

    def violations(self, *, lost: bool = False) -> list[str]:
        """Return the objections to everything published since the last call.

        Args:
            lost: messages may be lost or replaced: some have no answer.
        """
        found = [] if self.state == "active" else [f"expected state active, found {self.state}"]
        for camera in self.cameras:
            found += [
                f"camera '{camera}': {text}" for text in self._camera_violations(camera, lost)
            ]
        return found

    def _wait_for_scores(self, log: _CameraLog) -> int:
        """Return how many statuses have a score, when as many scores are here or time is up."""
        scored = sum("score" in answer.values for answer in log.answers)
        with suppress(TimeoutError):
            self.wait(lambda: len(log.scores) >= scored, "scores", 3.0)
        return scored

    def _camera_violations(self, camera: str, lost: bool) -> Iterator[str]:
        log = self._logs[camera]
        scored = self._wait_for_scores(log)
        with_scores = [a for a in log.answers[log.judged :] if "score" in a.values]
        for answer, score in zip(
            with_scores, log.scores[scored - len(with_scores) :], strict=False
        ):
            if np.float32(answer.values["score"]) != np.float32(score):
                yield f"the topic has the score {score}, the status {answer.values['score']}"
        if len(log.scores) != scored:
            yield f"{len(log.scores)} scores for {scored} statuses with one"
        for answer in log.answers[log.judged :]:
            # First, so that an exception does not come again in each later case.
            log.judged += 1
            yield from self._answer_violations(answer)
            # Its pixels are not needed any more.
            answer.message = None
        counts = self.counts(camera)
        if not counts:
            return
        for kind, name in _COUNTS.items():
            if counts[name] != log.tally[kind]:
                yield f"{name} is {counts[name]}, statuses say {log.tally[kind]}"
        if counts["frames_late"] != log.late:
            yield f"frames_late is {counts['frames_late']}, by the stamps {log.late}"
        accounted = sum(counts[name] for name in _COUNTS.values()) + counts["frames_replaced"]
        if counts["frames_received"] != accounted:
            yield f"frames_received is {counts['frames_received']}, accounted for are {accounted}"
        if counts["frames_received"] > log.sent:
            yield f"frames_received is {counts['frames_received']}, sent were {log.sent}"
        if not lost:
            if counts["frames_received"] != log.sent:
                yield f"frames_received is {counts['frames_received']}, sent were {log.sent}"
            if counts["frames_replaced"] != log.replaced:
                yield f"frames_replaced is {counts['frames_replaced']}, expected {log.replaced}"
            if log.unanswered:
                yield f"{len(log.unanswered)} frames have no status"

    def _answer_violations(self, answer: Answer) -> Iterator[str]:
        log = self._logs[answer.camera]
        decision, reason, values = answer.decision, answer.reason, answer.values
        if decision not in ("nominal", "anomaly", "unknown"):
            yield f"decision {decision!r}"
        if decision == "unknown":
            if problem := text_problem(reason):
                yield f"unknown: {problem}"
            if "score" in values:
                yield f"unknown ({reason}), but with a score"
        elif reason or "score" not in values or "threshold" not in values:
            yield f"{decision} with reason {reason!r}, score {values.get('score')}"
        if answer.message is None:
            if decision != "unknown" or not reason.startswith(WITHOUT_IMAGE):
                yield f"{decision} ({reason}) for a frame that was not sent"
            return
        kind = next((k for text, k in _REASONS.items() if reason.startswith(text)), "scored")
        log.tally[kind] += 1
        stamp_ns = messages.stamp_ns(answer.message.header)
        age_s, most_s = (answer.sent_ns - stamp_ns) / 1e9, self.values["max_age_s"]
        if kind == "stale":
            if -most_s <= age_s <= most_s - _LATENCY_S:
                yield f"{reason}: the frame was {age_s:.3f} s old when it was sent"
            return
        newest_ns = log.newest_ns if log.newest_ns is not None else stamp_ns
        if 0 < newest_ns - stamp_ns <= S:
            log.late += 1
        log.newest_ns = max(newest_ns, stamp_ns) if newest_ns - stamp_ns <= S else stamp_ns
        if not -most_s - _LATENCY_S <= age_s <= most_s:
            yield f"{decision} ({reason}) for a frame of {age_s:.3f} s"
        if kind != "failed":
            expected = self.expected(answer.camera, answer.message)
            found = decision, values.get("score"), reason
            if found != expected:
                yield f"expected {expected} as offline, found {found}"

    def expected(self, camera: str, message: Any) -> tuple[str, str | None, str]:
        """Return decision, score and reason that the offline detector gives to the next frame."""
        detector = self.offline[camera]
        try:
            frame = messages.frame_of(message)
            [grid], _ = embed_timed(detector.embedder, [frame.image])
            result = detector.assess(frame, grid)
        except (ImageError, IndexMismatchError) as error:
            return "unknown", None, f"bad image: {error}"
        score = None if result.blind else repr(float(result.score))
        return result.decision.value, score, result.reason

    def diagnostics_violations(self) -> list[str]:
        """Wait for the next diagnostics and compare their counters with the statuses."""
        before = len(self.diagnostics)
        # One may have been published before the last status.
        self.wait(lambda: len(self.diagnostics) > before + 1, "/diagnostics at 1 Hz", 5.0)
        found = []
        statuses = {status.name: status for status in self.diagnostics[-1].status}
        for camera in self.cameras:
            values = values_of(statuses[f"semantic_anomaly: {camera} camera"])
            log = self._logs[camera]
            for kind, name in _COUNTS.items():
                if int(values[name]) != log.tally[kind]:
                    found.append(f"{name} is {values[name]}, statuses say {log.tally[kind]}")
            accounted = sum(log.tally.values()) + int(values["frames_replaced"])
            if int(values["frames_received"]) != accounted:
                found.append(
                    f"/diagnostics: frames_received is {values['frames_received']}, "
                    f"accounted for are {accounted}"
                )
            if log.answers and values.get("last_decision") != log.answers[-1].decision:
                found.append(f"last_decision is {values.get('last_decision')}")
        return found


@contextmanager
def node_session(
    values: dict[str, Any], cameras: Sequence[str] = ("camera",)
) -> Iterator[NodeSession]:
    """Run a node, and observe it."""
    with bench(values, cameras) as b:
        yield NodeSession(b, values, cameras)
