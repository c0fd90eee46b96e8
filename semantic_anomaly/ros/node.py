"""The lifecycle node.

Threads: the executor's thread runs every callback and transition; a worker thread, with a GPU two,
computes and publishes while the node is active; a reload loads in a thread of its own. They share
the slots of the worker, the inputs with their locks, and `models`, which is replaced as a whole.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Header

from semantic_anomaly.calibration.drift import DRIFT
from semantic_anomaly.errors import SemanticAnomalyError
from semantic_anomaly.ros.camera import CHECK_PERIOD_S, Camera
from semantic_anomaly.ros.logs import RosLogHandler, ThrottledLog
from semantic_anomaly.ros.models import Models, stale_calibration
from semantic_anomaly.ros.outputs import STATUS_QOS
from semantic_anomaly.ros.parameters import NodeParameters
from semantic_anomaly.ros.pipeline import STOP_S, Pipeline, Worker
from semantic_anomaly.ros.services import NodeServices
from semantic_anomaly.settings import Settings
from semantic_anomaly.stamps import LATE_NS
from semantic_anomaly.storage import forbid_writing_by_all
from semantic_anomaly.structures import Frame, PatchGrid

DIAGNOSTICS_PERIOD_S = 1.0

Transition = Callable[["AnomalyNode", LifecycleState], TransitionCallbackReturn]


def _logged(transition: Transition) -> Transition:
    # rclpy turns an exception in a transition into ERROR without a log line.
    @wraps(transition)
    def guard(self: AnomalyNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(self, state)
        except Exception:
            name = transition.__name__
            self.get_logger().error(f"{name} failed:\n{traceback.format_exc()}")
            self.release()
            return TransitionCallbackReturn.ERROR

    return guard


class AnomalyNode(LifecycleNode):
    """Detects semantic anomalies in the images of one or more cameras.

    A launch file or a lifecycle manager changes its state, never the node itself.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("semantic_anomaly", **options)
        self._log = ThrottledLog(self.get_logger())
        self._log_handler = RosLogHandler(self.get_logger())
        logging.getLogger("semantic_anomaly").addHandler(self._log_handler)
        self._node_parameters = NodeParameters(self, self._apply)
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.settings = Settings()
        self.models: Models | None = None
        self._cameras: dict[str, Camera] = {}
        self._node_services = NodeServices(self)
        # Each undoes the steps of its transition in reverse order, even if it failed half-way.
        self._undo_configure, self._undo_activate = ExitStack(), ExitStack()
        # Threads that hung when they were to end; they may be there for good.
        self.abandoned_threads = 0

    @_logged
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load, check and warm up the models, run the self-test, and create the outputs.

        SUCCESS -> inactive. FAILURE -> unconfigured: a setting or file cannot be used; the log has
        one line about it, everything is undone, and configure may be tried again. ERROR ->
        errorprocessing -> unconfigured: an unexpected exception, logged with its traceback.
        """
        try:
            self.settings = self._node_parameters.settings()
            self.models = Models.load(self.settings)
        except SemanticAnomalyError as error:
            self.get_logger().error(f"cannot configure: {error}")
            self.release()
            return TransitionCallbackReturn.FAILURE
        self._node_parameters.frozen = True
        for name in self.settings.cameras:
            self._cameras[name] = Camera(self, name, self.settings, self._log)
            self._undo_configure.callback(self._cameras[name].destroy)
        # Every node shares /diagnostics; a supervisor of this one need not filter ~/heartbeat.
        publishers = []
        for topic in ("/diagnostics", "~/heartbeat"):
            publishers.append(self.create_publisher(DiagnosticArray, topic, STATUS_QOS))
            self._undo_configure.callback(self.destroy_publisher, publishers[-1])
        publish = partial(self._publish_diagnostics, publishers)
        self._start_timer(DIAGNOSTICS_PERIOD_S, publish, self._undo_configure)
        self._announce()
        return super().on_configure(state)

    @_logged
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start the worker and subscribe. SUCCESS -> active, ERROR -> unconfigured."""
        undo = self._undo_activate
        self._in_force().reset()
        undo.callback(lambda: self._in_force().reset())
        # Enables the publishers before the worker publishes.
        result = super().on_activate(state)
        pipeline = Pipeline(self._in_force, self._cameras, self.get_clock(), self._log)
        worker = Worker(pipeline.process, self._report_worker)
        for camera in self._cameras.values():
            undo.callback(camera.alarms.end)
        undo.callback(lambda: self._note_end(pipeline.close()))
        undo.callback(lambda: self._note_end(worker.stop()))
        for camera in self._cameras.values():
            undo.callback(camera.deactivate)
            camera.activate(worker.put)
        self._start_timer(CHECK_PERIOD_S, partial(self._watch, worker), undo)
        backward = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-LATE_NS))
        jumps = self.get_clock().create_jump_callback(
            backward, post_callback=self._log.guarded(self._on_jump)
        )
        undo.callback(jumps.unregister)
        return result

    @_logged
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe, join the worker, clear the tracks.

        SUCCESS -> inactive. ERROR -> unconfigured: the worker hangs, for example in a forward pass,
        and was abandoned with its models.
        """
        abandoned_threads = self.abandoned_threads
        self._undo_activate.close()
        if self.abandoned_threads > abandoned_threads:
            return TransitionCallbackReturn.ERROR
        return super().on_deactivate(state)

    @_logged
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the models and destroy the outputs. SUCCESS -> unconfigured."""
        self.release()
        return super().on_cleanup(state)

    @_logged
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything, from any state. SUCCESS -> finalized."""
        self.release()
        return super().on_shutdown(state)

    @_logged
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free everything. SUCCESS -> unconfigured, where configure may be tried again."""
        self.release()
        return super().on_error(state)

    def take_exceeding(self) -> dict[str, tuple[Frame, PatchGrid]]:
        """Return the last frame above the threshold of each camera that has one, once."""
        frames = {}
        for name, camera in self._cameras.items():
            if camera.exceeding is not None:
                frames[name], camera.exceeding = camera.exceeding, None
        return frames

    def release(self) -> None:
        """Undo activate and configure, even if they failed half-way; the parameters stay."""
        self._undo_activate.close()
        self._note_end(self._node_services.join())
        self._undo_configure.close()
        self._cameras.clear()
        models, self.models = self.models, None
        if models is not None:
            models.embedder.close()
        self._node_parameters.frozen = False

    def close(self) -> None:
        """Shut down from any state; takes as long as the present frame, and at most `STOP_S`."""
        try:
            self.trigger_shutdown()
        except Exception as error:
            # Already finalized, or the context is shut down: no transition is possible.
            self.get_logger().debug(f"no shutdown transition: {error}")
        self.release()
        logging.getLogger("semantic_anomaly").removeHandler(self._log_handler)

    def _start_timer(self, period_s: float, callback: Callable[[], None], undo: ExitStack) -> None:
        # On the steady clock: silence must be noticed even if simulated time stands still.
        timer = self.create_timer(period_s, self._log.guarded(callback), clock=self._steady)
        undo.callback(self.destroy_timer, timer)

    def _announce(self) -> None:
        for camera in self._cameras:
            detector = self._in_force().detectors[camera]
            if detector.threshold is None:
                self.get_logger().warning(
                    f"camera '{camera}': the index is not calibrated and no threshold is set; "
                    "all decisions will be unknown"
                )
            else:
                self.get_logger().info(
                    f"camera '{camera}': index of {detector.index.count} entries, threshold "
                    f"{detector.threshold:.4f}"
                )

    def _in_force(self) -> Models:
        models = self.models
        if models is None:
            raise RuntimeError("no models are loaded")
        return models

    def _apply(self, settings: Settings) -> None:
        if self.models is not None:
            self.models.update(settings)
            self.settings = settings

    def _report_worker(self, text: str) -> None:
        self._log.error("worker", f"worker failed on a batch:\n{text}")

    def _note_end(self, ended: bool) -> None:
        if not ended:
            self.abandoned_threads += 1
            self.get_logger().error(
                f"a thread hangs: it did not end within {STOP_S:g} s and was abandoned; restart "
                "the node"
            )

    def _watch(self, worker: Worker) -> None:
        lost, end = worker.revive()
        for name, message in lost.items():
            reason = f"the worker ended unexpectedly ({end}) and was started again"
            self._cameras[name].report_lost(message.header, reason)
        detectors = self._in_force().detectors
        for name, camera in self._cameras.items():
            camera.check(detectors[name].settings.max_age_s)

    def _on_jump(self, _: Any) -> None:
        self._in_force().reset()
        self.get_logger().warning(
            "the clock changed or went back: tracks of earlier frames are cleared"
        )

    def _publish_diagnostics(self, publishers: Sequence[Any]) -> None:
        models = self._in_force()
        statuses = []
        for name, camera in self._cameras.items():
            detector = models.detectors[name]
            calibration = detector.calibration
            values = {
                "state": "active" if camera.inputs is not None else "inactive",
                "device": models.embedder.device,
                "index_fingerprint": detector.index.fingerprint,
                "stages": ", ".join(stage.stage.name for stage in detector.index.stages),
                "threshold": detector.threshold,
                "promise": detector.promise,
                "calibration_created": calibration.created or None if calibration else None,
                "calibration_age_days": calibration.age_days if calibration else None,
                "stale_calibration": stale_calibration(detector),
                "drift": DRIFT if detector.is_drift else None,
            }
            statuses.append(camera.diagnostics(values))
        header = Header(stamp=self.get_clock().now().to_msg())
        for publisher in publishers:
            publisher.publish(DiagnosticArray(header=header, status=statuses))


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM.

    Returns:
        0, 1 if a thread hung and was abandoned, or 2 if ROS refuses the arguments.
    """
    forbid_writing_by_all()
    stop = threading.Event()
    # Instead of the handlers of rclpy, which shut the context down while the worker publishes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except Exception as error:
        print(f"anomaly_node: {error}", file=sys.stderr)
        return 2
    node = AnomalyNode()
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stop.is_set() and rclpy.ok():
            executor.spin_once(timeout_sec=0.1)
    finally:
        node.close()
        executor.shutdown()
        node.destroy_node()
        abandoned_threads = node.abandoned_threads
        # The lifecycle services exist until their state machine is collected.
        del node, executor
        gc.collect()
        rclpy.try_shutdown()
    if abandoned_threads:
        # Python would wait for the thread.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    # At exit Python would collect all objects of torch, which takes seconds on a busy machine, and
    # launch kills the process after five.
    gc.freeze()
    return 0


if __name__ == "__main__":
    sys.exit(main())
