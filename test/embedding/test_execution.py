"""Execution by OpenVINO: the embeddings of torch, one compiled network a size, no telemetry."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds.backbones import FAMILIES, images, save_backbone

from semantic_anomaly.embedding import execution
from semantic_anomaly.embedding.backbone import Backbone, PatchEmbedder
from semantic_anomaly.embedding.execution import (
    OpenVinoRun,
    choose_execution,
    has_openvino,
    openvino_dtypes,
)
from semantic_anomaly.errors import BackboneError, ModelOutputError
from semantic_anomaly.settings import OPENVINO, TORCH, Settings
from semantic_anomaly.stages import StageSpec

CPU = torch.device("cpu")
needs_openvino = pytest.mark.skipif(not has_openvino(), reason="the extra [cpu] is not installed")


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let imports of openvino fail."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    execution._openvino.cache_clear()
    execution._core.cache_clear()
    yield
    execution._openvino.cache_clear()
    execution._core.cache_clear()


def largest_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest cosine distance of embeddings in their last dimension."""
    return float((1 - torch.nn.functional.cosine_similarity(one, other, dim=-1)).max())


# The same embeddings ----------------------------------------------------------------------------


@needs_openvino
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_has_the_embeddings_of_torch(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    tiny = FAMILIES[name]
    folder = str(save_backbone(tmp_path / name, tiny.model_class, **tiny.config))
    plain, converted = (Backbone(folder, "cpu", execution=way) for way in (TORCH, OPENVINO))
    assert (plain.execution, converted.execution) == (TORCH, OPENVINO)
    layers = [plain.layers // 2 - 1, plain.layers // 2]
    for loaded in (plain, converted):
        loaded.truncate(layers[-1])
    input_hw = 2 * plain.side_px, 3 * plain.side_px
    # Another size, so that the images are resized.
    batch = np.stack(images(rng, *[(input_hw[0] + 9, input_hw[1])] * 2))
    expected, found = (loaded.embed(batch, input_hw, layers) for loaded in (plain, converted))
    for values, others in zip(expected, found, strict=True):
        assert values.shape == others.shape and others.dtype == torch.float32
        # Position embeddings are interpolated a little differently.
        assert largest_distance(values, others) < 5e-5
        assert largest_distance(values[:1], values[1:]) > 1e-4


@needs_openvino
def test_embedders_run_by_openvino_are_alike_in_all_else(
    tiny_backbone: Path, rng: np.random.Generator
) -> None:
    stages = [StageSpec(str(tiny_backbone), layer, 112, average=3) for layer in (1, 2)]
    settings = Settings(stages=tuple(map(str, stages)), device="cpu", execution=OPENVINO)
    plain = PatchEmbedder(stages, device="cpu", place_weight=0.2)
    converted = PatchEmbedder.from_settings(settings)
    assert [identity.execution for identity in converted.identities] == [OPENVINO] * 2
    for one, other in zip(plain.identities, converted.identities, strict=True):
        assert one.difference(other) is None and one != other
    batch = images(rng, (60, 80), (90, 50), (60, 80))
    grids = converted.embed(batch)
    for grid, expected in zip(grids, plain.embed(batch), strict=True):
        for stage, expected_stage in zip(grid.stages, expected.stages, strict=True):
            np.testing.assert_allclose(stage.features, expected_stage.features, atol=1e-4)
    # Results are not overwritten by the next image.
    before = grids[0].features.copy()
    converted.embed(batch[1:])
    np.testing.assert_array_equal(grids[0].features, before)
    converted.close()
    with pytest.raises(ModelOutputError, match="closed"):
        converted.embed(batch)


@needs_openvino
def test_few_compiled_networks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    run = OpenVinoRun(
        lambda pixels, layers: [pixels.float().mean((2, 3)) + layer for layer in layers],
        torch.float32,
        "means",
    )
    compile_once = run._compiled
    monkeypatch.setattr(run, "_compiled", lambda *key: compiled.append(key) or compile_once(*key))
    pixels = torch.arange(48, dtype=torch.uint8).view(2, 3, 2, 4)
    for _ in range(2):
        [zero, one] = run(pixels, [0, 1])
        torch.testing.assert_close(zero, pixels.float().mean((2, 3)))
        torch.testing.assert_close(one, zero + 1)
    assert len(compiled) == 1
    sizes = [(2, width) for width in range(5, 9)]
    for height, width in sizes:
        run(torch.zeros(1, 3, height, width, dtype=torch.uint8), [0])
    assert len(compiled) == 5 and len(run._requests) == execution._MAX_COMPILED == 4
    # The last sizes are there, the first one is compiled again.
    run(torch.zeros(1, 3, *sizes[-1], dtype=torch.uint8), [0])
    assert len(compiled) == 5
    run(pixels, [0, 1])
    assert len(compiled) == 6


@needs_openvino
def test_networks_that_are_gone_take_no_memory() -> None:
    def resident_mb() -> float:
        return (
            int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        )

    def load_and_run() -> None:
        weights = torch.rand(2000, 5000)  # 40 MB
        run = OpenVinoRun(
            lambda pixels, _: [(pixels.float().mean() * weights).sum(dim=1)], torch.float32, "large"
        )
        run(torch.ones(1, 3, 8, 8, dtype=torch.uint8), [0])

    load_and_run()
    before_mb = resident_mb()
    for _ in range(8):
        load_and_run()
    gc.collect()
    assert resident_mb() - before_mb < 160


@needs_openvino
def test_networks_that_cannot_be_converted_are_named() -> None:
    def fail(pixels: torch.Tensor, layers: Any) -> list[torch.Tensor]:
        raise ValueError("no such operation\nhere")

    run = OpenVinoRun(fail, torch.float32, "backbone 'odd'")
    expected = r"^backbone 'odd': OpenVINO cannot run this network \(no such operation\); set exec"
    with pytest.raises(BackboneError, match=expected):
        run(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), [0])


# The choice -------------------------------------------------------------------------------------


def test_torch_is_the_execution_where_none_is_chosen(tiny_backbone: Path) -> None:
    assert choose_execution("auto", CPU, torch.float16) == TORCH
    assert choose_execution(TORCH, torch.device("cuda"), torch.float32) == TORCH
    assert Backbone(str(tiny_backbone), "cpu").execution == TORCH
    with pytest.raises(BackboneError, match="execution 'onnx': expected auto, torch or openvino"):
        choose_execution("onnx", CPU, torch.float32)
    with pytest.raises(BackboneError, match="expected the device cpu, found cuda"):
        choose_execution(OPENVINO, torch.device("cuda"), torch.float32)


@pytest.mark.usefixtures("without_openvino")
def test_without_the_library_torch_runs_and_openvino_names_the_extra(tiny_backbone: Path) -> None:
    assert Backbone(str(tiny_backbone), "cpu").execution == TORCH
    for make in (openvino_dtypes, lambda: Backbone(str(tiny_backbone), "cpu", "auto", OPENVINO)):
        with pytest.raises(BackboneError, match=r"expected the package openvino.*extra \[cpu\]"):
            make()


def test_precisions_that_the_cpu_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Core:
        def __init__(self, *capabilities: str) -> None:
            self.capabilities = capabilities

        def get_property(self, device: str, name: str) -> tuple[str, ...]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return self.capabilities

    monkeypatch.setattr(execution, "_core", lambda: _Core("FP32", "BF16", "INT8"))
    assert choose_execution(OPENVINO, CPU, torch.bfloat16) == OPENVINO
    monkeypatch.setattr(execution, "_core", lambda: _Core("FP32", "INT8"))
    assert choose_execution(OPENVINO, CPU, torch.float32) == OPENVINO
    with pytest.raises(BackboneError, match=r"on this CPU \(float32\), found bfloat16"):
        choose_execution(OPENVINO, CPU, torch.bfloat16)


# Telemetry --------------------------------------------------------------------------------------

_TELEMETRY = """
import pathlib
(pathlib.Path.home() / "telemetry").write_text("imported")
class Telemetry:
    def __init__(self, *args, **options):
        import socket
        socket.socket()
"""
_PROGRAM = """
import os, sys
events = []
sys.addaudithook(lambda event, args: event.startswith("socket.") and events.append(event))
import torch
from semantic_anomaly.embedding.execution import OpenVinoRun
run = OpenVinoRun(lambda pixels, layers: [pixels.float() + 1], torch.float32, "sum")
assert float(run(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [0])[0].sum()) == 12
links = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
         if os.path.exists(f"/proc/self/fd/{n}")]
assert not [link for link in links if "socket" in link], links
assert not events, events
assert not os.listdir(os.environ["HOME"]), os.listdir(os.environ["HOME"])
assert "openvino_telemetry" not in sys.modules
import openvino_telemetry
assert os.listdir(os.environ["HOME"]) == ["telemetry"]
print("done")
"""


@needs_openvino
def test_importing_and_converting_opens_no_socket_and_writes_no_file(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    package = tmp_path / "site" / "openvino_telemetry"
    (package / "backend").mkdir(parents=True)
    (package / "__init__.py").write_text(_TELEMETRY)
    (package / "backend" / "__init__.py").write_text("")
    (package / "backend" / "backend_ga4.py").write_text("")
    # The package in site-packages, where there is one, comes after this one.
    paths = [str(tmp_path / "site"), *filter(None, sys.path)]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HF_"))},
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "done\n", done.stderr
