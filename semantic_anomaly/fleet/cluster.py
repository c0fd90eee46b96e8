"""Plain tasks on a Ray cluster: connection, checks of its nodes, and results as they come in."""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from semantic_anomaly import __version__
from semantic_anomaly.errors import (
    ImageError,
    InputError,
    SemanticAnomalyError,
    SourceError,
    first_line,
)
from semantic_anomaly.evaluation import extras
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import atomic_write_bytes

# `--ray` without an address.
LOCAL = "local"
_ADDRESS = re.compile(r"(ray://)?(?P<host>[^\s/:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
_ANSWER_S, _CHECK_S = 5.0, 60.0
# Ray answers as every server of gRPC: preface and empty settings by settings (RFC 9113).
_HTTP2_SETTINGS = 4
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0]
)
# Arrays go through files, so the store holds little.
_OBJECT_STORE_BYTES = 100 * 2**20
_RETRIES = 3
_TOKEN = ".nodes"
_COMPARED = ("ray", "numpy", "torch", "transformers", "hnswlib", "openvino")
_log = logging.getLogger(__name__)


class ClusterError(InputError):
    """A cluster does not answer, or its nodes cannot do the work."""


class TaskError(SemanticAnomalyError):
    """A task has failed on its node, whatever was tried."""


class StorageError(ClusterError):
    """A node does not see what the command sees on the shared storage."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        value: that it returned; None if its source cannot be read.
        unreadable: why its source cannot be read; empty otherwise.
    """

    value: Any = None
    unreadable: str = ""


def check_address(address: str) -> None:
    """Check the form of an address: 'local', 'auto', HOST:PORT or ray://HOST:PORT.

    Raises:
        InputError: another form.
    """
    if address not in (LOCAL, "auto") and not _ADDRESS.fullmatch(address):
        raise InputError(
            f"--ray: expected HOST:PORT, ray://HOST:PORT or auto, found '{address}'; without an "
            "address, put --ray after the sources"
        )


@contextmanager
def connected(address: str, folder: Path, num_gpus: float = 0.0) -> Iterator[Cluster]:
    """Yield a connection to a Ray cluster whose nodes were checked; it ends with the block.

    Args:
        address: of a cluster, or 'local': one is started on this machine.
        folder: on storage that all nodes share.
        num_gpus: GPUs of each task, may be a part of one.

    Raises:
        ClusterError: the cluster does not answer, or nodes have other versions, do not see the
            folder, or have no GPU.
        MissingPackageError: Ray is not installed.
    """
    check_address(address)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Tasks without a GPU see none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    ray: Any = extras.load("ray", "fleet")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    elif match := _ADDRESS.fullmatch(address):
        _check_answers(address, match["host"].strip("[]"), int(match["port"]))
    try:
        ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError, ImportError, TimeoutError) as error:
        raise ClusterError(f"Ray cluster '{address}': {first_line(error)}") from error
    try:
        cluster = Cluster(ray, num_gpus)
        cluster.check(folder)
        yield cluster
    finally:
        ray.shutdown()


class Cluster:
    """A connected Ray cluster.

    Args:
        ray: the module.
        num_gpus: GPUs of each task.
    """

    def __init__(self, ray: Any, num_gpus: float) -> None:
        self._ray, self._num_gpus = ray, num_gpus

    def check(self, folder: Path) -> None:
        """Check that all nodes have the versions of this process and share a folder with it.

        Raises:
            ClusterError: naming the node.
        """
        ray = self._ray
        affinity = extras.load("ray.util.scheduling_strategies", "fleet")
        found = ray.cluster_resources().get("GPU", 0.0)
        if found < self._num_gpus:
            raise ClusterError(
                f"Ray cluster: expected a node with {self._num_gpus:g} GPUs (--num-gpus), found "
                f"{found:g} in all nodes"
            )
        token = secrets.token_hex(8)
        atomic_write_bytes(folder / _TOKEN, token.encode())
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        if not nodes:
            raise ClusterError("Ray cluster: expected nodes with CPUs, found none")
        checks = {}
        for node in nodes:
            strategy = affinity.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(node_problem)
            checks[task.remote(versions(), str(folder), token)] = (
                f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            )
        ready, late = ray.wait(list(checks), num_returns=len(checks), timeout=_CHECK_S)
        if late:
            raise ClusterError(f"{checks[late[0]]}: does not answer within {_CHECK_S:g} s")
        left = 0
        for check in ready:
            try:
                problem = ray.get(check)
            except ray.exceptions.RayTaskError as error:
                problem = f"cannot run semantic_anomaly: {_last_line(error)}"
            except ray.exceptions.RayError:
                # It has left the cluster meanwhile.
                _log.warning("%s has left the cluster", checks[check])
                left += 1
                continue
            if problem:
                raise ClusterError(f"{checks[check]}: {problem}")
        if left == len(checks):
            raise ClusterError("Ray cluster: all nodes have left it")

    def run(
        self,
        function: Callable[..., Any],
        requests: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        *,
        description: str,
        on_gpu: bool = True,
        progress: bool = False,
    ) -> Iterator[tuple[int, Outcome]]:
        """Run a function once for each request; yield number and outcome as they come in.

        A task whose node or worker is lost runs again on another one. If it is lost again and
        again, the others are finished first.

        Args:
            function: of a module of this package, called with a request as keyword arguments.
            requests: arguments, of JSON types.
            names: of the sources of the requests, for messages.
            description: of the progress bar.
            on_gpu: tasks take their GPUs; otherwise CPUs only.
            progress: show a progress bar on a terminal.

        Raises:
            StorageError, InputError, TaskError: a task has failed; those that wait do not run.
        """
        ray = self._ray
        num_gpus = self._num_gpus if on_gpu else 0
        remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=_RETRIES)(run_task)
        folder = str(Path.cwd())
        waiting = {remote.remote(function, dict(r), folder): n for n, r in enumerate(requests)}
        lost: list[str] = []
        disable = None if progress else True
        try:
            with tqdm(total=len(names), desc=description, unit="source", disable=disable) as bar:
                while waiting:
                    ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
                    for reference in ready:
                        number = waiting.pop(reference)
                        try:
                            answer = ray.get(reference)
                        except ray.exceptions.RayTaskError as error:
                            raise TaskError(f"'{names[number]}': {_last_line(error)}") from error
                        except ray.exceptions.RayError as error:
                            lost.append(f"'{names[number]}': {first_line(error)}")
                            _log.warning("%s", lost[-1])
                            continue
                        yield number, _outcome(names[number], answer)
                        bar.update()
                    bar.refresh()
        finally:
            for reference in waiting:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(reference, force=True)
        if lost:
            raise TaskError(
                f"{lost[0]}; lost {_RETRIES + 1} times: memory, or a defect of its source"
                + (f"; and {len(lost) - 1} more sources" if len(lost) > 1 else "")
            )


def run_task(
    function: Callable[..., Any], request: Mapping[str, Any], folder: str
) -> dict[str, Any]:
    """Run a function on a node; return its value or why there is none.

    Relative paths, such as of backbones, mean the same as in the command, which runs in `folder`.

    Errors of this package become text: an exception travels as code of its class.
    """
    node = platform.node()
    with suppress(OSError):
        os.chdir(folder)
    try:
        return {"node": node, "value": function(**request)}
    except (SourceError, ImageError) as error:
        return {"node": node, "unreadable": str(error)}
    except StorageError as error:
        return {"node": node, "storage": str(error)}
    except SemanticAnomalyError as error:
        kind = "input" if isinstance(error, InputError) else "failed"
        return {"node": node, kind: str(error)}


def _outcome(name: str, answer: Mapping[str, Any]) -> Outcome:
    where = f"'{name}' on node {answer['node']}"
    if "storage" in answer:
        raise StorageError(f"{where}: {answer['storage']}")
    if "input" in answer:
        raise InputError(f"{where}: {answer['input']}")
    if "failed" in answer:
        raise TaskError(f"{where}: {answer['failed']}")
    return Outcome(answer.get("value"), answer.get("unreadable", ""))


def on_nodes(settings: Settings, num_gpus: float) -> Settings:
    """Return settings whose device is the one that tasks have: none falls back to another one."""
    if settings.device != "auto":
        return settings
    return settings.replace(device="cuda" if num_gpus else "cpu")


def versions() -> dict[str, str]:
    """Return the versions on which results depend, without builds such as +cpu."""
    found = {"semantic_anomaly": __version__}
    for name in _COMPARED:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def node_problem(expected: Mapping[str, str], folder: str, token: str) -> str:
    """Return why this node cannot take part, or an empty string.

    Args:
        expected: `versions()` of the command.
        folder: that the command shares with all nodes.
        token: that the command has written there.
    """
    for name, version in versions().items():
        if version != expected.get(name):
            return f"expected {name} {expected.get(name)} as this command has, found {version}"
    shared = Path(folder)
    try:
        found = (shared / _TOKEN).read_text(encoding="ascii")
    except OSError as error:
        return f"cannot read '{folder}': {error.strerror}; expected a folder that all nodes share"
    if found != token:
        return f"'{folder}' is another folder there; expected one that all nodes share"
    probe = shared / f".{secrets.token_hex(4)}.tmp"
    try:
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        return f"cannot write '{folder}': {error.strerror}"
    return ""


def _check_answers(address: str, host: str, port: int) -> None:
    """Raise ClusterError if nothing answers at an address, or something else: Ray tries minutes."""
    try:
        with socket.create_connection((host, port), timeout=_ANSWER_S) as connection:
            connection.sendall(_HTTP2_HELLO)
            answer = connection.recv(9)
    except OSError as error:
        reason = "timed out" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ClusterError(f"Ray cluster '{address}' does not answer: {reason}") from error
    if len(answer) < 9 or answer[3] != _HTTP2_SETTINGS:
        raise ClusterError(f"Ray cluster '{address}': expected Ray there, found something else")


def _last_line(error: BaseException) -> str:
    """Return the last line of a traceback as text: the error itself."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__
