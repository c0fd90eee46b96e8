"""The node's services: `~/reset` and `~/reload_index`.

Callbacks run in the executor's thread; a reload loads in a thread of its own and is awaited, so
that images, timers and the worker go on meanwhile.
"""

from __future__ import annotations

import threading
import traceback
from typing import Any, Protocol

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.lifecycle import LifecycleNode
from rclpy.task import Future
from std_srvs.srv import Trigger

from semantic_anomaly.errors import SemanticAnomalyError
from semantic_anomaly.ros.models import Models
from semantic_anomaly.settings import Settings


class ModelsHolder(Protocol):
    """What the services need of the node: the models and settings in force."""

    models: Models | None
    settings: Settings


class NodeServices:
    """The services, as long as the node lives.

    rclpy cannot answer by a service that was destroyed while its answer was awaited, so a cleanup
    does not take them away; unconfigured, they say so.
    """

    def __init__(self, node: LifecycleNode, holder: ModelsHolder) -> None:
        self._node = node
        self._holder = holder
        self._loader: threading.Thread | None = None
        # A group of its own: while a reload is awaited, all other callbacks go on.
        group = MutuallyExclusiveCallbackGroup()
        node.create_service(Trigger, "~/reset", self._on_reset)
        node.create_service(Trigger, "~/reload_index", self._on_reload, callback_group=group)

    def join(self) -> None:
        """Wait for the end of a reload that is under way."""
        if self._loader is not None:
            self._loader.join()
            self._loader = None

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        models = self._holder.models
        if models is None:
            response.message = "nothing to forget: the node is not configured"
            return response
        models.reset()
        response.success, response.message = True, "earlier frames are forgotten"
        return response

    async def _on_reload(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        logger = self._node.get_logger()
        try:
            response.message = await self._reload()
            response.success = True
            logger.info(response.message)
        except Exception as error:
            if not isinstance(error, SemanticAnomalyError):
                logger.error(traceback.format_exc())
            response.message = f"index not reloaded, the old one stays: {error}"
            logger.warning(response.message)
        return response

    async def _reload(self) -> str:
        before, settings = self._holder.models, self._holder.settings
        if before is None:
            raise SemanticAnomalyError("the node is not configured")
        loaded: Any = Future()

        def load() -> None:
            try:
                loaded.set_result(before.reloaded(settings))
            except Exception as error:
                loaded.set_exception(error)

        self._loader = threading.Thread(target=load, name="index_reload")
        self._loader.start()
        after = await loaded
        if self._holder.models is not before:
            raise SemanticAnomalyError("the node was cleaned up meanwhile")
        # Live parameters may have changed while loading.
        after.update(self._holder.settings)
        self._holder.models = after
        counts = [f"{name} {one.index.count}" for name, one in after.detectors.items()]
        return f"index reloaded; embeddings: {', '.join(counts)}"
