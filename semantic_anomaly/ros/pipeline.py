"""The way of a batch of messages: checked, decoded, embedded together, assessed, published.

Runs in the worker's thread. Models are read once a batch, so a reload takes effect between two.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.clock import Clock
from std_msgs.msg import Header

from semantic_anomaly.detection.geometry import place_box
from semantic_anomaly.errors import ImageError, SemanticAnomalyError
from semantic_anomaly.ros import messages
from semantic_anomaly.ros.camera import Camera
from semantic_anomaly.ros.logs import ThrottledLog
from semantic_anomaly.ros.markers import marker_array
from semantic_anomaly.ros.models import Models
from semantic_anomaly.structures import AnomalyResult, Frame, PatchGrid

# Ages above this are no delay: the clocks have nothing to do with each other.
OTHER_CLOCK_S = 60.0


def age_problem(now_ns: int, stamp_ns: int, max_age_s: float) -> str:
    """Return why an image of that stamp must not be used now, or an empty string.

    Args:
        now_ns: the node's clock; 0 while simulated time has not begun, when no age is known.
        stamp_ns: the image's.
        max_age_s: oldest that is used; as much ahead is taken for imprecise clocks.
    """
    if now_ns == 0:
        return ""
    age_s = (now_ns - stamp_ns) / 1e9
    if -max_age_s <= age_s <= max_age_s:
        return ""
    if age_s < 0:
        return (
            f"clock mismatch: image stamped {-age_s:.3f} s ahead of this node's clock; are clocks "
            "synchronised, and use_sim_time set alike?"
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


class Pipeline:
    """Turns batches of messages into published results.

    Args:
        models: gives the models in force.
        cameras: by name.
        clock: the node's.
        log: for what goes wrong.
    """

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

    def process(self, batch: Mapping[str, Any]) -> None:
        """Process the newest message of each camera that has one."""
        models = self._models()
        jobs = {}
        for name, message in batch.items():
            job = self._accept(models, self._cameras[name], message)
            if job is not None:
                jobs[name] = job
        if not jobs:
            return
        begin = time.perf_counter()
        grids = self._embed(models, jobs)
        embed_ms = (time.perf_counter() - begin) * 1e3
        for name, grid in grids.items():
            try:
                self._assess(models, jobs[name], grid, embed_ms)
            except Exception as error:
                self._fail(jobs[name], error)

    def _accept(self, models: Models, camera: Camera, message: Any) -> _Job | None:
        header, settings = message.header, models.detectors[camera.name].settings
        stamp_ns = messages.stamp_ns(header)
        reason = age_problem(self._clock.now().nanoseconds, stamp_ns, settings.max_age_s)
        if reason:
            camera.counts.dropped_stale += 1
            camera.unknown(header, DiagnosticStatus.STALE, "stale", reason)
            return None
        self._note_stamp(models, camera, stamp_ns)
        try:
            frame = messages.frame_of(message, f"{camera.name}/{stamp_ns}")
        except ImageError as error:
            camera.counts.bad_images += 1
            camera.unknown(header, DiagnosticStatus.ERROR, "bad image", f"bad image: {error}")
            return None
        return _Job(camera, header, frame)

    def _note_stamp(self, models: Models, camera: Camera, stamp_ns: int) -> None:
        last_ns = self._last_stamp_ns.get(camera.name, stamp_ns)
        self._last_stamp_ns[camera.name] = stamp_ns
        if stamp_ns < last_ns:
            models.detectors[camera.name].reset()
            self._log.warning(
                f"{camera.name} backward",
                f"camera '{camera.name}': stamps went back by {(last_ns - stamp_ns) / 1e9:.3f} s; "
                "what was remembered of earlier frames is cleared",
            )

    def _embed(self, models: Models, jobs: Mapping[str, _Job]) -> dict[str, PatchGrid]:
        images = [job.frame.image for job in jobs.values()]
        try:
            return dict(zip(jobs, models.embedder.embed(images), strict=True))
        except Exception as error:
            if _is_out_of_memory(error):
                self._log.warning("memory", f"out of memory, trying once more: {error}")
            elif len(jobs) == 1:
                self._fail(next(iter(jobs.values())), error)
                return {}
        # One by one: it takes less memory, and one camera's failure is not the others'.
        grids = {}
        for name, job in jobs.items():
            try:
                grids[name] = models.embedder.embed([job.frame.image])[0]
            except Exception as error:
                self._fail(job, error)
        return grids

    def _assess(self, models: Models, job: _Job, grid: PatchGrid, embed_ms: float) -> None:
        camera, detector = job.camera, models.detectors[job.camera.name]
        result = detector.assess(job.frame, grid, {"embed": embed_ms})
        if result.threshold is not None and result.score > result.threshold:
            camera.exceeding = job.frame, grid
        counts = camera.counts
        counts.processed += 1
        now_ns = self._clock.now().nanoseconds
        latency_ms = (now_ns - job.frame.stamp_ns) / 1e6 if now_ns else None
        counts.last_latency_ms = latency_ms
        # The verdict first: pictures take longer and nobody brakes by them.
        values = {"latency_ms": latency_ms, **camera.frame_counts()}
        camera.outputs.publish_result(job.header, result, values)
        camera.answered()
        if camera.outputs.wants_markers:
            self._publish_markers(job, result, detector.settings)
        alpha = detector.settings.overlay_alpha
        camera.outputs.publish_pictures(job.header, job.frame, result, detector.region, alpha)

    def _publish_markers(self, job: _Job, result: AnomalyResult, settings: Any) -> None:
        inputs, found = job.camera.inputs, []
        if result.localizations and inputs is not None:
            own = settings.camera_settings[job.camera.name]
            intrinsics = inputs.intrinsics(job.frame.image_hw)
            depth = inputs.depth_at(job.frame.stamp_ns)
            ranges = own.camera_height_m, settings.marker_range_m
            found = [
                (place, place_box(place, result.label_map, intrinsics, depth, *ranges))
                for place in result.localizations
            ]
        job.camera.outputs.publish_markers(marker_array(job.header, found))

    def _fail(self, job: _Job, error: Exception) -> None:
        job.camera.counts.failed += 1
        expected = isinstance(error, SemanticAnomalyError)
        if not expected:
            text = "".join(traceback.format_exception(error))
            self._log.error(f"{job.camera.name} model", f"camera '{job.camera.name}': {text}")
        said = str(error) if expected else f"{type(error).__name__}: {error}"
        level, kind = DiagnosticStatus.ERROR, "model error"
        job.camera.unknown(job.header, level, kind, f"{kind}: {said}")


def _is_out_of_memory(error: Exception) -> bool:
    # By name: torch is imported in one file only, and each kind of device has a class of its own.
    names = {kind.__name__ for kind in type(error).__mro__}
    return any("OutOfMemory" in name for name in names) or isinstance(error, MemoryError)
