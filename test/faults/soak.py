"""A long run: the node with two cameras at 10 Hz, and faults of streams and services at random.

The node is a process of its own and is watched from outside. Every score that it publishes has to
equal the offline score of the frame with that stamp, every frame without an answer has to be
accounted for by the counters, and memory, threads and descriptors have to stay flat.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")
os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "LARGE_DATA")

import cv2
import numpy as np
import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import Float32
from std_srvs.srv import Trigger
from tqdm import tqdm
from worlds.backbones import save_backbone
from worlds.ros import (
    HW,
    build_monitor,
    nominal_image,
    odd_image,
    offline_detector,
    parameters,
    two_cameras,
    values_of,
)

from faults.campaign import MB, compute_as_in_tests
from faults.faulty_images import image_faults, raw
from semantic_anomaly.structures import Frame

S = 1_000_000_000
CAMERAS = ("front", "rear")
PERIOD_S, BURST_PERIOD_S = 0.1, 0.01
MAX_AGE_S, SILENT_AFTER_S, FROZEN_AFTER_S = 2.0, 2.0, 1.0
POOL = 60
# A status follows a frame, or the silence, within this time; the machine may be busy.
_ANSWER_S = 3.0
_GROWTH_MB, _GROWTH_COUNT = 30.0, 3
_NODE = "/semantic_anomaly"
_STOP_S = 20.0
_DOMAIN = "101"
Task = Generator[None, None, Any]


@dataclass
class Sent:
    """A frame that was sent.

    Attributes:
        kind: 'good', or the fault.
        expected: decision and score of the offline run, None if it has none.
        reasons: of the decision unknown, one of which may be given instead.
        sent_s: by the steady clock.
        activation: number of the activation of the node, 0 while it is not active.
    """

    kind: str
    expected: tuple[str, float] | None
    reasons: tuple[str, ...]
    sent_s: float
    activation: int
    is_answered: bool = False


@dataclass
class Log:
    """What was sent to a camera and came from it."""

    sent: dict[int, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    outcomes: Counter[str] = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)
    status_scores: list[float] = field(default_factory=list)
    # Of the present activation, by the statuses.
    tally: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    received: int = 0
    sent_active: int = 0
    last_status_s: float = 0.0
    longest_gap_s: float = 0.0
    largest_latency_ms: float = 0.0

    @property
    def answered(self) -> int:
        """Return how many frames have a status that fits."""
        return sum(sent.is_answered for same in self.sent.values() for sent in same)

    @property
    def dropped(self) -> int:
        """Return how many frames were received, not replaced, and have no status."""
        return self.received - self.replaced - self.answered


_KINDS = {
    "stale": "frames_dropped_stale",
    "clock mismatch": "frames_dropped_stale",
    "bad image": "frames_bad",
    "blind": "frames_blind",
    "model error": "frames_failed",
}
_COUNTED = ("frames_processed", *dict.fromkeys(_KINDS.values()))


class Soak:
    """The driver: sends frames, injects faults, and compares what comes back."""

    def __init__(self, folder: Path, minutes: float, seed: int) -> None:
        self._rng = random.Random(seed)
        self._minutes, self._seed = minutes, seed
        backbone = save_backbone(folder / "backbone")
        self.index = build_monitor(folder / "monitor", backbone)
        self._values = {
            **two_cameras(parameters(self.index, backbone), *CAMERAS),
            "max_age_s": MAX_AGE_S,
            "silent_after_s": SILENT_AFTER_S,
            "frozen_after_s": FROZEN_AFTER_S,
        }
        path = folder / "node.yaml"
        path.write_text(yaml.safe_dump({"semantic_anomaly": {"ros__parameters": self._values}}))
        self._log_file = (folder / "node.log").open("wb")
        self.violations: list[str] = []
        self.violation_count = 0
        self.faults: Counter[str] = Counter()
        self.services: Counter[str] = Counter()
        self.logs = {camera: Log() for camera in CAMERAS}
        self.unanswered: Counter[str] = Counter()
        self.resources: list[dict[str, float]] = []
        self._activation, self._activations = 0, 0
        self._transition_s = 0.0
        self._bad = [f for f in image_faults() if f.is_bad and not f.compressed]
        self._images = [
            nominal_image(i) if i % 3 else odd_image(i) for i in range(1000, 1000 + POOL)
        ]
        self._expected = self._offline_run()
        self._modes = dict.fromkeys(CAMERAS, "good")
        self._due_s = dict.fromkeys(CAMERAS, 0.0)
        self._number = dict.fromkeys(CAMERAS, 0)
        self._last_ns = 0
        self._held: dict[str, list[int]] = {camera: [] for camera in CAMERAS}
        self._start_node(path)

    def _offline_run(self) -> list[tuple[str, float]]:
        """Return decision and score of each image of the pool."""
        detector = offline_detector(self._values, CAMERAS[0])
        results = []
        for number, image in enumerate(self._images):
            detector.reset()
            result = detector.detect(Frame(image, number * S))
            results.append((result.decision.value, float(result.score)))
        return results

    def _start_node(self, path: Path) -> None:
        command = [sys.executable, "-c", _MAIN, "--ros-args", "--params-file", str(path)]
        self._process = subprocess.Popen(
            command, stdout=self._log_file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        rclpy.init()
        self._helper = rclpy.create_node("soak")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._helper)
        deep = QoSProfile(depth=1000)
        self._outputs = []
        for camera in CAMERAS:
            for kind, name, take in (
                (DiagnosticArray, "status", self._on_status),
                (Float32, "score", self._on_score),
            ):
                self._outputs.append(
                    self._helper.create_subscription(
                        kind,
                        f"{_NODE}/{camera}/{name}",
                        lambda message, camera=camera, take=take: take(camera, message),
                        deep,
                    )
                )
        self.heartbeats: list[float] = []
        self._helper.create_subscription(
            DiagnosticArray,
            f"{_NODE}/heartbeat",
            lambda _: self.heartbeats.append(time.monotonic()),
            deep,
        )
        self._images_to = {
            camera: self._helper.create_publisher(Image, f"/{camera}/image", 1)
            for camera in CAMERAS
        }
        self._change = self._helper.create_client(ChangeState, f"{_NODE}/change_state")
        self._set = self._helper.create_client(SetParameters, f"{_NODE}/set_parameters")
        self._triggers = {
            name: self._helper.create_client(Trigger, f"{_NODE}/{name}")
            for name in ("reset", "reload_index", "add_nominal", "self_test")
        }

    def object(self, text: str) -> None:
        """Note an objection."""
        self.violation_count += 1
        if len(self.violations) < 100:
            self.violations.append(f"{time.monotonic() - self._begin_s:.1f} s: {text}")

    # Frames.

    def _send(self, camera: str, now_s: float) -> None:
        mode = self._modes[camera]
        if mode == "silence":
            return
        number = self._number[camera] = self._number[camera] + 1
        # Image 0 is the frozen one.
        choice = 1 + (number * 7 + CAMERAS.index(camera) * 11) % (POOL - 1)
        if mode == "frozen":
            choice = 0
        image, expected, reasons = self._images[choice], self._expected[choice], ("stale",)
        stamp_ns = self._now_ns()
        message = raw("rgb8", image)
        if mode == "bad image":
            fault = self._rng.choice(self._bad)
            message = fault.make(np.random.default_rng(number), image).message
            expected, reasons = None, ("bad image",)
        elif mode == "other sides":
            message = raw("rgb8", np.ascontiguousarray(image.transpose(1, 0, 2)))
            expected, reasons = None, ("bad image",)
        elif mode == "covered":
            noise = np.random.default_rng(number).integers(0, 4, image.shape, np.uint8)
            message, expected, reasons = raw("rgb8", noise), None, ("blind: image without",)
        elif mode == "frozen":
            reasons = ("blind: frozen", "stale")
        elif mode == "other size":
            # Half of the frames; their offline score is computed when it is needed.
            image = cv2.resize(image, (HW[1] // 2 * 3, HW[0] // 2 * 3))
            message, expected = raw("rgb8", image), self._resized(choice, image)
        elif mode == "other encoding":
            message = raw("bgr8", np.ascontiguousarray(image[..., ::-1]))
        elif mode == "other frame":
            message.header.frame_id = f"frame {number}"
        elif mode == "stamp zero":
            stamp_ns, expected, reasons = 0, None, ("stale",)
        elif mode == "stamp old":
            stamp_ns, expected, reasons = stamp_ns - 9 * S, None, ("stale",)
        elif mode == "stamp ahead":
            stamp_ns, expected, reasons = stamp_ns + 9 * S, None, ("clock mismatch",)
        elif mode == "stamp late":
            stamp_ns -= round(0.3 * S) * (number % 2)
        elif mode == "stamp jumps back":
            stamp_ns -= round(1.3 * S) * (number % 2)
        elif mode == "stamp repeated":
            self._held[camera] = self._held[camera] or [stamp_ns]
            if number % 4:
                stamp_ns = self._held[camera][0]
            else:
                self._held[camera] = [stamp_ns]
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, S)
        log = self.logs[camera]
        # Of a transition that is under way it is not known which side a frame is on.
        activation = self._activation
        if activation:
            log.sent_active += 1
        log.sent[stamp_ns].append(Sent(mode, expected, reasons, now_s, activation))
        self._images_to[camera].publish(message)

    def _resized(self, choice: int, image: np.ndarray) -> tuple[str, float]:
        if not hasattr(self, "_resized_expected"):
            self._resized_expected: dict[int, tuple[str, float]] = {}
            self._detector = offline_detector(self._values, CAMERAS[0])
        if choice not in self._resized_expected:
            self._detector.reset()
            result = self._detector.detect(Frame(image, choice * S))
            self._resized_expected[choice] = result.decision.value, float(result.score)
        return self._resized_expected[choice]

    def _now_ns(self) -> int:
        # Stamps identify frames.
        self._last_ns = max(self._helper.get_clock().now().nanoseconds, self._last_ns + 1000)
        return self._last_ns

    def _on_score(self, camera: str, message: Float32) -> None:
        self.logs[camera].scores.append(message.data)

    def _on_status(self, camera: str, array: DiagnosticArray) -> None:
        now_s, log, values = time.monotonic(), self.logs[camera], values_of(array.status[0])
        if log.last_status_s and self._activation:
            log.longest_gap_s = max(log.longest_gap_s, now_s - log.last_status_s)
        log.last_status_s = now_s
        decision, reason = values["decision"], values.get("reason", "")
        counts = {key: int(value) for key, value in values.items() if key.startswith("frames_")}
        if counts["frames_received"] < log.counts.get("frames_received", 0):
            self._end_counts(log)
        log.counts = counts
        if decision == "unknown" and (not reason or "score" in values):
            self.object(f"{camera}: unknown, reason {reason!r}, score {values.get('score')}")
        if reason.startswith(("no frames for", "frames arrive, but", "topic ")):
            log.outcomes[reason.split(" ")[0] + " ..."] += 1
            if decision != "unknown":
                self.object(f"{camera}: {decision} without a frame")
            return
        stamp_ns = array.header.stamp.sec * S + array.header.stamp.nanosec
        kind = next(
            (c for text, c in _KINDS.items() if reason.startswith(text)), "frames_processed"
        )
        log.tally[kind] += 1
        log.outcomes[decision if kind == "frames_processed" else kind] += 1
        self._compare(camera, stamp_ns, values, now_s)
        for name in _COUNTED:
            if log.tally[name] != counts[name]:
                self.object(f"{camera}: {name} is {counts[name]}, statuses say {log.tally[name]}")
                log.tally[name] = counts[name]
        under_way = counts["frames_received"] - counts["frames_replaced"]
        under_way -= sum(counts[name] for name in _COUNTED)
        if not 0 <= under_way <= 2:
            self.object(f"{camera}: {under_way} frames are not accounted for: {counts}")

    def _compare(self, camera: str, stamp_ns: int, values: dict[str, str], now_s: float) -> None:
        log, decision, reason = self.logs[camera], values["decision"], values.get("reason", "")
        waiting = [sent for sent in log.sent[stamp_ns] if not sent.is_answered]
        if "score" in values:
            log.status_scores.append(float(values["score"]))
            log.largest_latency_ms = max(log.largest_latency_ms, float(values["latency_ms"]))
        # Of equal stamps the answers come in the order of the frames, some of which are replaced.
        for sent in waiting:
            if decision == "unknown":
                fits = reason.startswith(sent.reasons)
                if reason.startswith("stale") and sent.expected is not None:
                    fits = now_s - sent.sent_s > MAX_AGE_S / 4 or sent.kind == "stamp jumps back"
            else:
                fits = (decision, float(values["score"])) == sent.expected
            if fits:
                sent.is_answered = True
                return
        expected = [(sent.kind, sent.expected, sent.reasons) for sent in waiting]
        self.object(
            f"{camera}: {decision} ({reason}), score {values.get('score')}, stamp {stamp_ns}; "
            f"expected {expected}"
        )

    def _end_counts(self, log: Log) -> None:
        """Start counting anew: the node was activated."""
        log.received += log.counts.get("frames_received", 0)
        log.replaced += log.counts.get("frames_replaced", 0)
        log.counts = {}
        log.tally.clear()

    # Faults. Each is a task that yields while it waits.

    def _wait(self, seconds: float) -> Task:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            yield

    def _call(self, client: Any, request: Any) -> Task:
        begin = time.monotonic()
        while not client.service_is_ready():
            yield
        future = client.call_async(request)
        while not future.done():
            if time.monotonic() - begin > 120:
                self.object(f"no response of {client.srv_name} within 120 s")
                return None
            yield
        return future.result()

    def _stream_fault(self, camera: str) -> Task:
        mode = self._rng.choice(_MODES)
        self.faults[mode] += 1
        self._modes[camera] = mode
        begin, silent_before = time.monotonic(), self.logs[camera].outcomes["no ..."]
        lasts_s = 4.5 if mode in ("silence", "frozen") else self._rng.uniform(0.5, 2.5)
        activation = self._activation
        yield from self._wait(1.0 if mode == "burst" else lasts_s)
        self._modes[camera] = "good"
        is_active = activation and activation == self._activation
        silences = self.logs[camera].outcomes["no ..."] - silent_before
        if mode == "silence" and is_active and not silences:
            self.object(f"{camera}: no status in {time.monotonic() - begin:.1f} s of silence")
        self._held[camera] = []

    def _second_publisher(self, camera: str) -> Task:
        self.faults["second publisher"] += 1
        qos = QoSProfile(depth=1, reliability=self._rng.choice(list(ReliabilityPolicy)[1:3]))
        first = self._images_to[camera]
        second = self._helper.create_publisher(Image, f"/{camera}/image", qos)
        yield from self._wait(1.0)
        # The frames come from both in turn.
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            self._images_to[camera] = second if time.monotonic() * 5 % 2 < 1 else first
            yield
        self._images_to[camera] = first
        yield from self._wait(0.5)
        self._helper.destroy_publisher(second)

    def _trigger(self, name: str, succeeds: bool | None) -> Task:
        self.faults[name] += 1
        response = yield from self._call(self._triggers[name], Trigger.Request())
        if response is None:
            return
        self.services[f"{name}: {'success' if response.success else 'refused'}"] += 1
        if succeeds is not None and response.success != succeeds:
            self.object(f"{name}: success is {response.success}: {response.message}")

    def _reload_bad(self) -> Task:
        name = self._rng.choice(
            [path.name for path in self.index.iterdir() if path.name.endswith((".npy", ".json"))]
        )
        kind = self._rng.choice(("damaged", "cut", "missing"))
        self.faults[f"reload of an index {kind}"] += 1
        path = self.index / name
        good = path.read_bytes()
        at = self._rng.randrange(len(good))
        changed = {
            "damaged": good[:at] + bytes([good[at] ^ 0x40]) + good[at + 1 :],
            "cut": good[: len(good) // 2],
        }
        # Replaced as a whole: a running index may be mapped from the file.
        aside = self.index.parent / "aside"
        path.replace(aside)
        if kind != "missing":
            path.write_bytes(changed[kind])
        yield from self._trigger("reload_index", False)
        aside.replace(path)

    def _set_parameters(self) -> Task:
        name, value, succeeds = self._rng.choice(_PARAMETERS)
        self.faults["live parameter" if succeeds else "wrong parameter"] += 1
        request = SetParameters.Request(
            parameters=[Parameter(name, value=value).to_parameter_msg()]
        )
        response = yield from self._call(self._set, request)
        if response is not None and response.results[0].successful != succeeds:
            self.object(f"parameter {name} = {value!r}: {response.results[0]}")

    def _to(self, transition: int) -> Task:
        request = ChangeState.Request(transition=Transition(id=transition))
        response = yield from self._call(self._change, request)
        if response is None or not response.success:
            self.object(f"transition {transition} failed")

    def _configure(self) -> Task:
        yield from self._to(Transition.TRANSITION_CONFIGURE)
        begin = time.monotonic()
        while not all(output.get_publisher_count() for output in self._outputs):
            if time.monotonic() - begin > 30:
                self.object("the outputs were not found within 30 s")
                return
            yield
        yield from self._wait(0.5)

    def _activate(self) -> Task:
        yield from self._to(Transition.TRANSITION_ACTIVATE)
        # Frames that are sent until the subscriptions are connected do not arrive.
        while not all(p.get_subscription_count() for p in self._images_to.values()):
            yield
        yield from self._wait(0.2)
        self._activations += 1
        self._activation = self._activations
        for log in self.logs.values():
            log.last_status_s = 0.0

    def _deactivate(self) -> Task:
        self._activation = 0
        yield from self._to(Transition.TRANSITION_DEACTIVATE)

    def _cycle(self, through_cleanup: bool) -> Task:
        self.faults["deactivate" if not through_cleanup else "cleanup"] += 1
        yield from self._deactivate()
        if through_cleanup:
            yield from self._to(Transition.TRANSITION_CLEANUP)
            yield from self._configure()
        yield from self._wait(self._rng.uniform(0.0, 0.5))
        yield from self._activate()

    def _node_fault(self) -> Task:
        choices: list[tuple[Callable[[], Task], int]] = [
            (lambda: self._trigger("reset", True), 2),
            (lambda: self._trigger("reload_index", True), 2),
            (lambda: self._trigger("self_test", True), 2),
            (lambda: self._trigger("add_nominal", False), 1),
            (self._reload_bad, 3),
            (self._set_parameters, 3),
            (lambda: self._cycle(False), 1),
            (lambda: self._cycle(True), 1),
        ]
        [made] = self._rng.choices([c for c, _ in choices], [weight for _, weight in choices])
        yield from made()

    def _schedule(self, make: Callable[[], Task], shortest_s: float, longest_s: float) -> Task:
        while True:
            yield from self._wait(self._rng.uniform(shortest_s, longest_s))
            if time.monotonic() > self._end_s:
                return
            yield from make()

    def _camera_fault(self, camera: str) -> Task:
        if self._rng.random() < 0.08:
            yield from self._second_publisher(camera)
        else:
            yield from self._stream_fault(camera)

    # The run.

    def run(self) -> dict[str, Any]:
        """Run to the end and return the figures."""
        self._begin_s = time.monotonic()
        self._end_s = float("inf")
        self._run_tasks([self._start()])
        begin_s = self._begin_s = time.monotonic()
        self._end_s = begin_s + self._minutes * 60
        tasks = [self._schedule(lambda c=c: self._camera_fault(c), 0.5, 3.0) for c in CAMERAS]
        tasks += [self._schedule(self._node_fault, 1.0, 6.0), self._watch(), self._progress()]
        self._run_tasks(tasks)
        # What is under way comes in.
        self._activation_at_end = self._activation
        self._run_tasks([self._quiet()])
        self._finish()
        return self._figures(time.monotonic() - begin_s)

    def _start(self) -> Task:
        yield from self._configure()
        yield from self._activate()
        yield from self._wait(1.0)

    def _quiet(self) -> Task:
        for camera in CAMERAS:
            self._modes[camera] = "silence"
        yield from self._wait(1.5)

    def _watch(self) -> Task:
        while time.monotonic() < self._end_s:
            self._note_resources()
            if self._process.poll() is not None:
                self.object(f"the node ended with {self._process.returncode}")
                self._end_s = 0.0
                return
            yield from self._wait(2.0)

    def _progress(self) -> Task:
        total_s = round(self._end_s - self._begin_s)
        with tqdm(total=total_s, desc="soak", unit="s") as bar:
            while time.monotonic() < self._end_s:
                bar.set_postfix(violations=self.violation_count)
                bar.update(min(total_s, int(time.monotonic() - self._begin_s)) - bar.n)
                yield from self._wait(1.0)
            bar.update(total_s - bar.n)

    def _run_tasks(self, tasks: list[Task]) -> None:
        while tasks:
            for task in list(tasks):
                try:
                    next(task)
                except StopIteration:
                    tasks.remove(task)
            now_s = time.monotonic()
            for camera in CAMERAS:
                if now_s >= self._due_s[camera]:
                    burst = self._modes[camera] == "burst"
                    period_s = BURST_PERIOD_S if burst else PERIOD_S
                    # No frames to make up for a delay of this process.
                    self._due_s[camera] = max(self._due_s[camera] + period_s, now_s)
                    self._send(camera, now_s)
            pause_s = min(self._due_s.values()) - time.monotonic()
            self._executor.spin_once(timeout_sec=min(0.005, max(0.0, pause_s)))
            # Callbacks that wait behind the first one.
            for _ in range(20):
                self._executor.spin_once(timeout_sec=0.0)

    def _note_resources(self) -> None:
        folder = Path(f"/proc/{self._process.pid}")
        try:
            status = dict(
                line.split(":", 1) for line in (folder / "status").read_text().splitlines()
            )
            self.resources.append(
                {
                    "at_s": round(time.monotonic() - self._begin_s, 1),
                    "rss_mb": int(status["VmRSS"].split()[0]) * 1024 / MB,
                    "threads": int(status["Threads"]),
                    "files": sum(1 for _ in (folder / "fd").iterdir()),
                    "is_active": bool(self._activation),
                }
            )
        except (OSError, KeyError):
            # The process has ended, which is noted by its exit code.
            return

    def _finish(self) -> None:
        for camera, log in self.logs.items():
            self._end_counts(log)
            for sent in (s for same in log.sent.values() for s in same):
                if not sent.is_answered:
                    kind = "burst" if sent.kind == "burst" else "calm"
                    self.unanswered[kind if sent.activation else "not active"] += 1
            if [np.float32(s) for s in log.status_scores] != [np.float32(s) for s in log.scores]:
                self.object(
                    f"{camera}: {len(log.status_scores)} scores in statuses, {len(log.scores)} on "
                    "the topic, or they differ"
                )
            # Of each activation, a frame that is computed and one that waits.
            if not 0 <= log.dropped <= 2 * self._activations:
                self.object(f"{camera}: {log.dropped} frames received have no status")
            if log.longest_gap_s > SILENT_AFTER_S + _ANSWER_S:
                self.object(f"{camera}: no status for {log.longest_gap_s:.1f} s")
            if log.largest_latency_ms > 1000 * (MAX_AGE_S + 1.0):
                self.object(f"{camera}: a score was {log.largest_latency_ms:.0f} ms old")
        self._check_flat()
        begin = time.monotonic()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code != 0:
            self.object(f"exit code {code} after {time.monotonic() - begin:.1f} s")
        self._log_file.close()
        self._executor.shutdown()
        self._helper.destroy_node()
        rclpy.try_shutdown()

    def _check_flat(self) -> None:
        """Compare the last quarter with the second one: the first fills caches."""
        active = [r for r in self.resources if r["is_active"]]
        quarter = len(active) // 4
        if not quarter:
            return
        for name, most in (
            ("rss_mb", _GROWTH_MB),
            ("threads", _GROWTH_COUNT),
            ("files", _GROWTH_COUNT),
        ):
            before, after = (
                median(r[name] for r in part)
                for part in (active[quarter : 2 * quarter], active[-quarter:])
            )
            if after - before > most:
                self.object(f"{name}: {before:.0f} in the second quarter, {after:.0f} in the last")

    def _figures(self, seconds: float) -> dict[str, Any]:
        first, last = (self.resources[0], self.resources[-1]) if self.resources else ({}, {})
        beats = np.diff(self.heartbeats)
        cameras = {}
        for camera, log in self.logs.items():
            sent = Counter(s.kind for same in log.sent.values() for s in same)
            cameras[camera] = {
                "sent": sent.total(),
                "sent_while_active": log.sent_active,
                "received": log.received,
                "replaced": log.replaced,
                "answered": log.answered,
                "dropped_by_deactivate": log.dropped,
                "scored": len(log.status_scores),
                "outcomes": dict(log.outcomes),
                "longest_gap_s": round(log.longest_gap_s, 2),
                "largest_latency_ms": round(log.largest_latency_ms, 1),
                "sent_by_kind": dict(sent),
            }
        return {
            "minutes": self._minutes,
            "seed": self._seed,
            "seconds": round(seconds, 1),
            "violations": self.violation_count,
            "first_violations": self.violations,
            "faults": dict(self.faults),
            "fault_count": self.faults.total(),
            "services": dict(self.services),
            "activations": self._activations,
            "unanswered": dict(self.unanswered),
            "cameras": cameras,
            "largest_gap_of_heartbeat_s": round(float(beats.max()), 2) if len(beats) else None,
            "resources_first": first,
            "resources_last": last,
            "rss_mb_largest": max((r["rss_mb"] for r in self.resources), default=0.0),
            "resources": self.resources,
        }


# The node in the precision of the tests, as the offline run.
_MAIN = """
import sys
from faults.campaign import compute_as_in_tests
compute_as_in_tests()
from semantic_anomaly.ros.node import main
sys.exit(main(sys.argv))
"""
_MODES = (
    *("bad image", "other sides", "covered", "frozen", "other size", "other encoding"),
    *("other frame", "stamp zero", "stamp old", "stamp ahead", "stamp late", "stamp jumps back"),
    *("stamp repeated", "silence", "burst"),
)
_PARAMETERS: Sequence[tuple[str, Any, bool]] = (
    ("overlay_alpha", 0.25, True),
    ("overlay_alpha", 0.5, True),
    ("front.marker_range_m", 5.0, False),
    ("overlay_alpha", 1.5, False),
    ("overlay_alpha", "half", False),
    ("max_age_s", float("nan"), False),
    ("max_age_s", 0.0, False),
    ("index", "/nowhere", False),
    ("cameras", ["other"], False),
    ("confirm_count", 0, False),
    ("threshold", "high", False),
)


def main() -> int:
    """Run the soak and write soak.json; 1 if there are objections."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    compute_as_in_tests()
    # Not one of the domains of tests, which may run beside it.
    os.environ["ROS_DOMAIN_ID"] = _DOMAIN
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        try:
            figures = Soak(Path(folder), args.minutes, args.seed).run()
        finally:
            log = Path(folder) / "node.log"
            if log.exists():
                (args.out / "node.log").write_bytes(log.read_bytes())
    (args.out / "soak.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    count, objections = figures["fault_count"], figures["violations"]
    print(f"{count} faults in {args.minutes:g} min, {objections} objections")
    return 1 if figures["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
