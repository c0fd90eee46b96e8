"""How the network of a backbone is run: by torch as it is, or on a CPU by OpenVINO."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from semantic_anomaly.embedding.pretrained import quiet_transformers
from semantic_anomaly.errors import BackboneError, first_line
from semantic_anomaly.settings import OPENVINO, TORCH

# (n, 3, height, width) uint8 and numbers of hidden states -> (n, rows, cols, channels) of each.
Run = Callable[[torch.Tensor, Sequence[int]], list[torch.Tensor]]
# (dtype, execution), such as ("bfloat16", "openvino").
Pair = tuple[str, str]
REFERENCE: Pair = "float32", TORCH
# Cameras of one vehicle have few image sizes; a compiled network takes tens of megabytes.
_MAX_COMPILED = 4
_TELEMETRY = "openvino_telemetry"
_ABSENT = object()
_LOG = logging.getLogger(__name__)
_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def choose_execution(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the execution of a name: auto, torch or openvino.

    Args:
        name: auto is torch, which runs everywhere.
        device: on which the network is to run.
        dtype: precision of the computation.

    Raises:
        BackboneError: an unknown name, OpenVINO on another device than a CPU, without its library,
            or in a precision that it does not have on this CPU.
    """
    if name in ("auto", TORCH):
        return TORCH
    if name != OPENVINO:
        raise BackboneError(f"execution '{name}': expected auto, {TORCH} or {OPENVINO}")
    if device.type != "cpu":
        raise BackboneError(f"execution '{OPENVINO}': expected the device cpu, found {device}")
    if dtype not in openvino_dtypes():
        has = ", ".join(str(known).removeprefix("torch.") for known in openvino_dtypes())
        raise BackboneError(
            f"execution '{OPENVINO}': expected a precision that OpenVINO has on this CPU ({has}), "
            f"found {str(dtype).removeprefix('torch.')}"
        )
    return OPENVINO


def has_openvino() -> bool:
    """Return whether OpenVINO is installed, without importing it."""
    return find_spec("openvino") is not None


def openvino_dtypes() -> list[torch.dtype]:
    """Return the precisions that OpenVINO computes in on this CPU, float32 first.

    Raises:
        BackboneError: OpenVINO is not installed.
    """
    # It would compute in float32 in silence where bfloat16 is missing.
    capabilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [torch.float32, *([torch.bfloat16] if "BF16" in capabilities else [])]


def candidates(device: torch.device) -> list[Pair]:
    """Return the precisions and executions that a device has instructions for, reference first."""
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported()
        return [REFERENCE, ("float16", TORCH), *([("bfloat16", TORCH)] if has else [])]
    pairs = [REFERENCE]
    if _cpu_has_bfloat16():
        pairs.append(("bfloat16", TORCH))
    if device.type == "cpu" and has_openvino():
        try:
            dtypes = openvino_dtypes()
        except BackboneError as error:
            _LOG.warning("%s", error)
            return pairs
        pairs += [(str(dtype).removeprefix("torch."), OPENVINO) for dtype in dtypes]
    return pairs


class OpenVinoRun:
    """A network that OpenVINO runs on the CPU.

    The torch network itself is converted in memory, for each size of image when it first comes.

    Args:
        run: runs the network by torch, in float32; what is converted, by tracing.
        dtype: precision of the computation.
        what: name of the network, for messages.

    Raises:
        BackboneError: OpenVINO is not installed.
    """

    def __init__(self, run: Run, dtype: torch.dtype, what: str) -> None:
        self._run = run
        self._what = what
        self._options = {
            "INFERENCE_PRECISION_HINT": _HINTS[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            # One number of threads for all, and the system decides where they run.
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,
        }
        self._requests: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        _core()

    def __call__(self, pixels: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """Return hidden states as maps, as `run` does; a batch is run image by image.

        Args:
            pixels: (n, 3, height, width) uint8; the resize leaves colours apart in memory.
            layers: numbers of the hidden states.

        Raises:
            BackboneError: OpenVINO cannot convert the network.
            RuntimeError: it failed.
        """
        height, width = pixels.shape[2:]
        request = self._request((height, width), tuple(layers))
        maps: list[list[torch.Tensor]] = [[] for _ in layers]
        for image in pixels.contiguous().split(1):
            outputs = request.infer([image.numpy()], share_inputs=True, share_outputs=True)
            for number, of_layer in enumerate(maps):
                # The next image overwrites the memory of the outputs.
                of_layer.append(torch.from_numpy(np.array(outputs[number], np.float32)))
        return [torch.cat(of_layer) if len(of_layer) > 1 else of_layer[0] for of_layer in maps]

    def _request(self, input_hw: tuple[int, int], layers: tuple[int, ...]) -> Any:
        """Return what runs the compiled network of an image size; the least used is forgotten."""
        key = (*input_hw, *layers)
        if key not in self._requests:
            self._requests[key] = self._compiled(input_hw, layers)
            if len(self._requests) > _MAX_COMPILED:
                self._requests.popitem(last=False)
        self._requests.move_to_end(key)
        return self._requests[key]

    def _compiled(self, input_hw: tuple[int, int], layers: tuple[int, ...]) -> Any:
        shape = (1, 3, *input_hw)
        try:
            # Networks of transformers branch on the shape, which is fixed here.
            with torch.no_grad(), quiet_transformers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # The converter would trace three times, to check what the self-test checks here.
                traced = torch.jit.trace(
                    _OneImage(self._run, layers),
                    torch.zeros(shape, dtype=torch.uint8),
                    check_trace=False,
                )
                model = _openvino().convert_model(traced, input=[*shape])
                del traced
                # Torch would keep what was traced, with all weights, for as long as the process.
                torch._C._jit_clear_class_registry()
            return _core().compile_model(model, "CPU", self._options).create_infer_request()
        # The converter raises errors of its own, of torch and of Python.
        except Exception as error:
            raise BackboneError(
                f"{self._what}: OpenVINO cannot run this network ({first_line(error)}); "
                f"set execution to {TORCH}"
            ) from error


def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16; emulated ones are slower by far."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


class _OneImage(nn.Module):
    """What is converted: (1, 3, height, width) uint8 -> maps of hidden states.

    The network is no part of it, so that its frozen weights are traced as constants, which is
    several times faster.
    """

    def __init__(self, run: Run, layers: Sequence[int]) -> None:
        super().__init__()
        self._run = run
        self._layers = layers

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self._run(pixels, self._layers))


@lru_cache(maxsize=1)
def _openvino() -> Any:
    """Return OpenVINO, imported without its telemetry.

    That would send an event, and write a file to the home directory, with every import and every
    conversion.

    Raises:
        BackboneError: not installed.
    """
    before = sys.modules.get(_TELEMETRY, _ABSENT)
    # An import of None fails as if the package were missing; OpenVINO then has a stub for it.
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackboneError(
            f"execution '{OPENVINO}': expected the package openvino, found none "
            f"({first_line(error)}); install the extra [cpu]: pip install 'semantic_anomaly[cpu]'"
        ) from error
    finally:
        # Other users of the package may import it as before.
        if before is _ABSENT:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = before  # type: ignore[assignment]
    return openvino


@lru_cache(maxsize=1)
def _core() -> Any:
    """Return the one runtime of OpenVINO of this process."""
    return _openvino().Core()
