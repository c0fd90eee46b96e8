"""The worker: the newest image of each camera is decoded, embedded, assessed and published.

The executor's thread puts messages into the `Worker`, whose thread takes all new ones at once and
gives them to the `Pipeline`. The models are read once for each batch, so a reload takes effect
between two batches. With a GPU a second thread assesses and publishes a batch while the next one is
decoded and embedded. The executor's thread watches both: a thread that ended is started again, and
one that hangs is reported by `Camera.check` and abandoned when the node is deactivated.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.clock import Clock
from std_msgs.msg import Header

from semantic_anomaly.detection.blindness import BLIND
from semantic_anomaly.detection.detector import embed_timed
from semantic_anomaly.detection.geometry import place_box
from semantic_anomaly.errors import ImageError, IndexMismatchError, SemanticAnomalyError
from semantic_anomaly.ros import messages
from semantic_anomaly.ros.camera import LATENCY, Camera
from semantic_anomaly.ros.logs import ThrottledLog
from semantic_anomaly.ros.models import Models
from semantic_anomaly.settings import Settings
from semantic_anomaly.stamps import jumps_back
from semantic_anomaly.structures import AnomalyResult, Frame, PatchGrid
from semantic_anomaly.timing import PUBLISH, elapsed_ms

# An age above this is not a delay: the clocks are unrelated.
OTHER_CLOCK_S = 60.0
# A thread that needs longer than this to end, after it was told to, hangs.
STOP_S = 10.0


class Worker:
    """A running thread that gives the newest messages to a function until it is stopped.

    `process` takes {camera: message}, `report` the traceback of an exception of `process`. Other
    exceptions, such as SystemExit, end the thread; `revive` starts it again.
    """

    def __init__(
        self, process: Callable[[dict[str, Any]], None], report: Callable[[str], None]
    ) -> None:
        self._process = process
        self._report = report
        self._changed = threading.Condition()
        self._newest: dict[str, Any] = {}
        self._present: dict[str, Any] = {}
        self._stopped = False
        self._start()

    def _start(self) -> None:
        self._end = ""
        self._thread = threading.Thread(target=self._run, name="anomaly_worker")
        self._thread.start()

    def put(self, camera: str, message: Any) -> bool:
        """Store a message; return whether it replaced one that was not taken."""
        with self._changed:
            replaced = camera in self._newest
            self._newest[camera] = message
            self._changed.notify()
            return replaced

    def revive(self) -> tuple[dict[str, Any], str]:
        """Start the thread again if it has ended by itself.

        Returns:
            The messages that it was processing, and why it ended; both empty if it runs.
        """
        if self._stopped or self._thread.is_alive():
            return {}, ""
        (lost, self._present), end = (self._present, {}), self._end
        self._start()
        return lost, end

    def stop(self) -> bool:
        """Drop waiting messages and end the thread after its present batch.

        Returns:
            Whether it ended within `STOP_S`; otherwise it hangs and is abandoned.
        """
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(STOP_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._process_batches()
        except BaseException as error:
            self._report(traceback.format_exc())
            self._end = f"{type(error).__name__}: {error}"

    def _process_batches(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest or self._stopped)
                if self._stopped:
                    return
                self._present, self._newest = self._newest, {}
            try:
                self._process(self._present)
            except Exception:
                self._report(traceback.format_exc())
            self._present = {}


def age_problem(now_ns: int, stamp_ns: int, max_age_s: float) -> str:
    """Return why the age of an image is not acceptable, or an empty string.

    Args:
        now_ns: time of the node's clock; 0 before simulated time starts, when no age is known.
        stamp_ns: stamp of the image.
        max_age_s: largest age; a stamp may be ahead by as much, since clocks are not exact.
    """
    if now_ns == 0:
        return ""
    age_s = (now_ns - stamp_ns) / 1e9
    if -max_age_s <= age_s <= max_age_s:
        return ""
    if age_s < 0:
        return (
            f"clock mismatch: the stamp of the image is {-age_s:.3f} s ahead of this node's clock; "
            "are the clocks synchronised, and is use_sim_time the same everywhere?"
        )
    hint = ""
    if age_s > OTHER_CLOCK_S:
        hint = "; does the driver stamp its images, and is use_sim_time set when a bag is played?"
    return f"stale: image is {age_s:.3f} s old, expected at most {max_age_s:g} s{hint}"


@dataclass(frozen=True, eq=False)
class _Job:
    camera: Camera
    header: Header
    frame: Frame


# Job, patch grid, and the milliseconds by stage that embedding the whole batch took.
_Embedded = tuple[_Job, PatchGrid, Mapping[str, float]]


class Pipeline:
    """Publishes the results of batches of messages; `models` returns the models in force."""

    def __init__(
        self,
        models: Callable[[], Models],
        cameras: Mapping[str, Camera],
        clock: Clock,
        log: ThrottledLog,
    ) -> None:
        self._models = models
        self._cameras = cameras
        self._clock = clock
        self._log = log
        self._last_stamp_ns: dict[str, int] = {}
        self._is_closed = False
        # Its thread starts with the first batch that it gets.
        self._assessor = ThreadPoolExecutor(1, "anomaly_assessor")
        self._assessment: Future[None] | None = None

    def close(self) -> bool:
        """Wait for the batch that is being assessed, and end the thread.

        From now on nothing is published, even by a thread that hangs now.

        Returns:
            Whether the thread ended within `STOP_S`; otherwise it hangs and is abandoned.
        """
        self._is_closed = True
        pending = () if self._assessment is None else (self._assessment,)
        ended = not wait(pending, STOP_S).not_done
        self._assessor.shutdown(wait=ended)
        return ended

    def process(self, batch: Mapping[str, Any]) -> None:
        """Process the newest message of each camera that has one."""
        models = self._models()
        accepted = [self._try_accept(models, self._cameras[name], batch[name]) for name in batch]
        jobs = [job for job in accepted if job is not None]
        if not jobs:
            return
        # On a CPU a batch gains nothing, and the first camera would wait for the others.
        on_cpu = models.embedder.device == "cpu"
        for batch_jobs in [[job] for job in jobs] if on_cpu else [jobs]:
            embedded = self._embed(models, batch_jobs)
            self._wait_for_assessment()
            if on_cpu:
                self._assess_all(models, embedded)
            else:
                self._assessment = self._assessor.submit(self._assess_all, models, embedded)

    def _wait_for_assessment(self) -> None:
        """Wait for the batch before: what is published keeps the order of the messages."""
        if self._assessment is not None:
            assessment, self._assessment = self._assessment, None
            assessment.result()

    def _assess_all(self, models: Models, embedded: Sequence[_Embedded]) -> None:
        for job, grid, stage_ms in embedded:
            try:
                self._assess(models, job, grid, stage_ms)
            except Exception as error:
                self._fail(job.camera, job.header, error)

    def _try_accept(self, models: Models, camera: Camera, message: Any) -> _Job | None:
        # A failure concerns neither the other cameras of the batch nor the next frame.
        try:
            return self._accept(models, camera, message)
        except Exception as error:
            self._wait_for_assessment()
            self._fail(camera, message.header, error)
            return None

    def _accept(self, models: Models, camera: Camera, message: Any) -> _Job | None:
        header, settings = message.header, models.detectors[camera.name].settings
        stamp_ns = messages.stamp_ns(header)
        reason = age_problem(self._clock.now().nanoseconds, stamp_ns, settings.max_age_s)
        if reason:
            self._wait_for_assessment()
            camera.counts.frames_dropped_stale += 1
            camera.publish_unknown(header, DiagnosticStatus.STALE, "stale", reason)
            return None
        newest_ns = self._last_stamp_ns.get(camera.name, stamp_ns)
        if jumps_back(stamp_ns, newest_ns):
            newest_ns, jump_s = stamp_ns, (newest_ns - stamp_ns) / 1e9
            self._wait_for_assessment()
            models.detectors[camera.name].reset()
            self._log.warning(
                f"{camera.name} backward",
                f"camera '{camera.name}': stamps went back by {jump_s:.3f} s; "
                "its tracks are cleared",
            )
        elif stamp_ns < newest_ns:
            camera.counts.frames_late += 1
            self._log.warning(
                f"{camera.name} late",
                f"camera '{camera.name}': a frame is {(newest_ns - stamp_ns) / 1e9:.3f} s older "
                "than one before it; does the driver swap stamps, or do two publishers share the "
                "topic? It is processed, and the tracks stay",
            )
        self._last_stamp_ns[camera.name] = max(newest_ns, stamp_ns)
        frame = messages.frame_of(message, f"{camera.name}/{stamp_ns}")
        messages.remark(message, camera.remarks)
        return _Job(camera, header, frame)

    def _embed(self, models: Models, jobs: Sequence[_Job]) -> list[_Embedded]:
        images = [job.frame.image for job in jobs]
        try:
            grids, stage_ms = embed_timed(models.embedder, images)
            return [(job, grid, stage_ms) for job, grid in zip(jobs, grids, strict=True)]
        except Exception as error:
            if _is_out_of_memory(error):
                self._log.warning("memory", f"out of memory, trying once more: {error}")
            elif len(jobs) == 1:
                self._wait_for_assessment()
                self._fail(jobs[0].camera, jobs[0].header, error)
                return []
        # Single images take less memory, and the failure of one camera does not affect the others.
        embedded: list[_Embedded] = []
        for job in jobs:
            try:
                [grid], stage_ms = embed_timed(models.embedder, [job.frame.image])
                embedded.append((job, grid, stage_ms))
            except Exception as error:
                self._wait_for_assessment()
                self._fail(job.camera, job.header, error)
        return embedded

    def _assess(
        self, models: Models, job: _Job, grid: PatchGrid, stage_ms: Mapping[str, float]
    ) -> None:
        camera, detector = job.camera, models.detectors[job.camera.name]
        settings = detector.settings
        # It may have waited for a forward pass that hung: such a frame changes no track.
        if self._is_closed or self._is_too_old(job, settings):
            return
        result = detector.assess(job.frame, grid, stage_ms)
        if self._is_closed or self._is_too_old(job, settings):
            return
        if result.blind:
            camera.counts.frames_blind += 1
            camera.publish_unknown(job.header, DiagnosticStatus.ERROR, BLIND, result.reason)
            return
        if result.threshold is not None and result.score > result.threshold:
            camera.exceeding = job.frame, grid
        camera.counts.frames_processed += 1
        now_ns = self._clock.now().nanoseconds
        latency_ms = (now_ns - job.frame.stamp_ns) / 1e6 if now_ns else None
        begin_s = time.perf_counter()
        # The decision first: pictures take longer, and control does not depend on them.
        values: dict[str, Any] = {"latency_ms": latency_ms, **asdict(camera.counts)}
        if not detector.is_drift_known:
            # False would hide the drift of the frames before a restart.
            values["drift"] = None
        if detector.calibration is not None:
            values["promise"] = detector.promise
            values["calibration_age_days"] = detector.calibration.age_days
        camera.outputs.publish_result(job.header, result, values)
        camera.note_published(result.decision, result.reason)
        camera.alarms.update(job.frame.stamp_ns, result, settings.silence_s)
        try:
            if camera.outputs.wants_markers:
                self._publish_markers(job, result, settings)
            camera.outputs.publish_pictures(
                job.header, job.frame, result, detector.roi, settings.overlay_alpha
            )
        except Exception:
            # The decision is published and stands.
            trace = traceback.format_exc()
            self._log.error(f"{camera.name} pictures", f"camera '{camera.name}': {trace}")
        camera.times.add({**result.stage_ms, PUBLISH: elapsed_ms(begin_s), LATENCY: latency_ms})

    def _is_too_old(self, job: _Job, settings: Settings) -> bool:
        """Return whether an image has become too old while it was computed; publish that."""
        now_ns, stamp_ns = self._clock.now().nanoseconds, job.frame.stamp_ns
        reason = age_problem(now_ns, stamp_ns, settings.max_age_s)
        if reason:
            job.camera.counts.frames_dropped_stale += 1
            job.camera.publish_unknown(job.header, DiagnosticStatus.STALE, "stale", reason)
        return bool(reason)

    def _publish_markers(self, job: _Job, result: AnomalyResult, settings: Settings) -> None:
        inputs, boxes = job.camera.inputs, []
        if result.localizations and inputs is not None:
            intrinsics = inputs.intrinsics(job.frame.image_hw)
            depth = inputs.depth_at(job.frame.stamp_ns)
            height_m = settings.camera_settings[job.camera.name].camera_height_m
            view = result.label_map, intrinsics, depth, height_m, settings.marker_range_m
            boxes = [
                (localization, place_box(localization, *view))
                for localization in result.localizations
            ]
        job.camera.outputs.markers.publish(messages.marker_array(job.header, boxes))

    def _fail(self, camera: Camera, header: Header, error: Exception) -> None:
        if self._is_closed:
            return
        text = str(error)
        if isinstance(error, (ImageError, IndexMismatchError)):
            camera.counts.frames_bad += 1
            kind = "bad image"
        else:
            camera.counts.frames_failed += 1
            kind = "model error"
        if not isinstance(error, SemanticAnomalyError):
            # Some libraries write several lines.
            text = f"{type(error).__name__}: {' '.join(text.split())}"
            trace = "".join(traceback.format_exception(error))
            self._log.error(f"{camera.name} model", f"camera '{camera.name}': {trace}")
        camera.publish_unknown(header, DiagnosticStatus.ERROR, kind, f"{kind}: {text}")


def _is_out_of_memory(error: Exception) -> bool:
    # By name: this module does not import torch, and every device has a class of its own.
    names = {error_class.__name__ for error_class in type(error).__mro__}
    return any("OutOfMemory" in name for name in names) or isinstance(error, MemoryError)
