"""The services of the node: `~/reset`, `~/reload_index`, `~/add_nominal` and `~/self_test`.

Callbacks run in the executor's thread. A reload loads in a thread of its own and is awaited;
images, timers and the worker continue meanwhile.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.task import Future
from std_srvs.srv import Trigger

from semantic_anomaly.errors import SemanticAnomalyError
from semantic_anomaly.ros.models import Models
from semantic_anomaly.ros.pipeline import STOP_S

if TYPE_CHECKING:
    from semantic_anomaly.ros.node import AnomalyNode


class NodeServices:
    """The services; they exist as long as the node.

    rclpy cannot respond by a service that was destroyed while its response was awaited, so a
    cleanup does not destroy them. Before configure they respond with a failure.
    """

    def __init__(self, node: AnomalyNode) -> None:
        self._node = node
        self._loader: threading.Thread | None = None
        # A group of its own: other callbacks run while a reload is awaited.
        group = MutuallyExclusiveCallbackGroup()
        node.create_service(Trigger, "~/reset", self._on_reset)
        node.create_service(Trigger, "~/reload_index", self._on_reload, callback_group=group)
        node.create_service(Trigger, "~/add_nominal", self._on_add, callback_group=group)
        node.create_service(Trigger, "~/self_test", self._on_self_test, callback_group=group)

    def join(self) -> bool:
        """Wait for the end of a running reload or self-test.

        Returns:
            Whether it ended within `STOP_S`; otherwise it hangs and is abandoned.
        """
        loader, self._loader = self._loader, None
        if loader is not None:
            loader.join(STOP_S)
        return loader is None or not loader.is_alive()

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        models = self._node.models
        if models is None:
            response.message = "nothing to reset: the node is not configured"
            return response
        models.reset()
        response.success, response.message = True, "tracks of earlier frames are cleared"
        return response

    async def _on_reload(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        def reload(before: Models) -> tuple[Models, str]:
            after = before.reloaded(self._node.settings)
            counts = [f"{name} {item.index.count}" for name, item in after.detectors.items()]
            return after, f"index reloaded; entries: {', '.join(counts)}"

        return await self._respond(response, reload, "index not reloaded, the old one is kept")

    async def _on_add(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        def add(before: Models) -> tuple[Models, str]:
            settings = self._node.settings
            if not settings.allow_add_nominal:
                raise SemanticAnomalyError("parameter 'allow_add_nominal' is false")
            frames = self._node.take_exceeding()
            if not frames:
                raise SemanticAnomalyError(
                    "no frame was above its threshold since the last addition"
                )
            summary = before.add_nominal(settings, frames)
            return before.reloaded(settings), f"{summary}; the calibration is stale"

        return await self._respond(response, add, "nothing added")

    async def _on_self_test(
        self, _: Trigger.Request, response: Trigger.Response
    ) -> Trigger.Response:
        def test(models: Models) -> tuple[Models, str]:
            lines = [f"{name}: {item.self_test()}" for name, item in models.detectors.items()]
            return models, "; ".join(lines)

        return await self._respond(response, test, "self-test failed")

    async def _respond(
        self,
        response: Trigger.Response,
        change: Callable[[Models], tuple[Models, str]],
        failure: str,
    ) -> Trigger.Response:
        logger = self._node.get_logger()
        try:
            response.message = await self._replace(change)
            response.success = True
            logger.info(response.message)
        except Exception as error:
            if not isinstance(error, SemanticAnomalyError):
                logger.error(traceback.format_exc())
            response.message = f"{failure}: {error}"
            logger.warning(response.message)
        return response

    async def _replace(self, change: Callable[[Models], tuple[Models, str]]) -> str:
        before = self._node.models
        if before is None:
            raise SemanticAnomalyError("the node is not configured")
        loaded: Any = Future()

        def load() -> None:
            try:
                loaded.set_result(change(before))
            except Exception as error:
                loaded.set_exception(error)

        self._loader = threading.Thread(target=load, name="index_reload")
        self._loader.start()
        after, summary = await loaded
        if self._node.models is not before:
            raise SemanticAnomalyError("the node was cleaned up meanwhile")
        # Live parameters may have changed while loading.
        after.update(self._node.settings)
        self._node.models = after
        return summary
