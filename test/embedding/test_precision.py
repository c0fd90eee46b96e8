"""The choice of precision and execution: fastest of those whose embeddings are the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds.backbones import images

from semantic_anomaly.embedding import execution, precision
from semantic_anomaly.embedding.backbone import PatchEmbedder
from semantic_anomaly.embedding.execution import REFERENCE, candidates, has_openvino
from semantic_anomaly.embedding.precision import choose_precision
from semantic_anomaly.errors import BackboneError
from semantic_anomaly.settings import OPENVINO, TORCH, Settings

CPU = torch.device("cpu")
HALF = ("bfloat16", TORCH)


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_FAST_MS", 5.0)


@pytest.fixture
def settings(tiny_backbone: Path) -> Settings:
    return Settings(stages=(f"{tiny_backbone} size=112",), device="cpu")


@pytest.fixture
def frames(rng: np.random.Generator) -> list[np.ndarray]:
    # One of another size takes no part.
    return images(rng, (60, 80), (60, 80), (90, 50))


def of_cpu(monkeypatch: pytest.MonkeyPatch, ms: dict[str, float]) -> None:
    """Let float32 and bfloat16 by torch be the candidates, with the times of a frame by dtype."""
    monkeypatch.setattr(precision, "candidates", lambda device: [REFERENCE, HALF])
    monkeypatch.setattr(
        precision, "_timed_ms", lambda embedder, image: ms[embedder.identities[0].dtype]
    )


def chosen(
    settings: Settings, frames: list[np.ndarray], nominal: float = 1.0, preferred: Any = None
) -> tuple[str, str]:
    found = choose_precision(settings, frames, lambda grids: [nominal], preferred)
    assert found == settings.replace(dtype=found.dtype, execution=found.execution)
    return found.dtype, found.execution


def test_the_fastest_is_chosen_and_logged_in_one_line(
    settings: Settings,
    frames: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    of_cpu(monkeypatch, {"float32": 30.0, "bfloat16": 20.0})
    with caplog.at_level(logging.INFO):
        assert chosen(settings, frames) == HALF
    [record] = caplog.records
    assert record.getMessage() == (
        "backbones run in bfloat16 by torch, of float32 by torch 30.0 ms, bfloat16 by torch 20.0 "
        "ms for a frame of 80 x 60 pixels"
    )


@pytest.mark.parametrize(
    ("ms", "preferred", "expected"),
    [
        # A few percent are not worth a change, and slower ones are not taken.
        ({"float32": 30.0, "bfloat16": 28.0}, None, REFERENCE),
        ({"float32": 30.0, "bfloat16": 28.0}, HALF, HALF),
        ({"float32": 30.0, "bfloat16": 32.0}, HALF, HALF),
        ({"float32": 30.0, "bfloat16": 40.0}, HALF, REFERENCE),
        # Fast enough.
        ({"float32": 4.0, "bfloat16": 1.0}, None, REFERENCE),
        # Emulated.
        ({"float32": 30.0, "bfloat16": 2000.0}, HALF, REFERENCE),
        # One that this device has not.
        ({"float32": 30.0, "bfloat16": 28.0}, ("float32", OPENVINO), REFERENCE),
    ],
)
def test_changes_need_a_reason(
    settings: Settings,
    frames: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    ms: dict[str, float],
    preferred: Any,
    expected: tuple[str, str],
) -> None:
    of_cpu(monkeypatch, ms)
    assert chosen(settings, frames, preferred=preferred) == expected


@pytest.mark.parametrize("nominal", [0.0, 1e-6])
def test_shifts_beyond_a_tenth_of_nominal_distances_are_refused(
    settings: Settings,
    frames: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    nominal: float,
) -> None:
    of_cpu(monkeypatch, {"float32": 30.0, "bfloat16": 10.0})
    with caplog.at_level(logging.INFO):
        assert chosen(settings, frames, nominal, HALF) == REFERENCE
    assert "bfloat16 by torch 10.0 ms (shifts " in caplog.text


def test_settings_limit_the_choice(
    settings: Settings, frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_cpu(monkeypatch, {"float32": 30.0, "bfloat16": 20.0})
    monkeypatch.setattr(precision, "_trials", None)
    assert chosen(settings.replace(dtype="float32"), frames) == REFERENCE
    assert chosen(settings.replace(dtype="bfloat16"), frames) == HALF
    both = settings.replace(dtype="float16", execution=TORCH)
    assert choose_precision(both, frames, lambda grids: []) is both
    # Loading then says what is missing.
    other = settings.replace(execution=OPENVINO)
    assert choose_precision(other, frames, lambda grids: []) is other


def test_the_cpu_is_asked_for_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "has_openvino", lambda: False)
    for names, expected in ((["avx512_bf16"], [REFERENCE, HALF]), (["avx2"], [REFERENCE])):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda n=names: dict.fromkeys(n, True), raising=False
        )
        assert candidates(CPU) == expected
    monkeypatch.setattr(execution, "has_openvino", lambda: True)
    monkeypatch.setattr(execution, "openvino_dtypes", lambda: [torch.float32, torch.bfloat16])
    assert candidates(CPU)[1:] == [("float32", OPENVINO), ("bfloat16", OPENVINO)]

    def broken() -> list[torch.dtype]:
        raise BackboneError("damaged")

    monkeypatch.setattr(execution, "openvino_dtypes", broken)
    assert candidates(CPU) == [REFERENCE]


@pytest.mark.skipif(not has_openvino(), reason="the extra [cpu] is not installed")
def test_what_is_measured_runs(
    settings: Settings, frames: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_FAST_MS", 0.0)
    pairs = candidates(CPU)
    trials = precision._trials(settings, pairs, frames[:2], lambda grids: [1.0])
    assert {trial.pair for trial in trials} <= set(pairs)
    assert all(trial.ms > 0 and trial.shift < 0.1 for trial in trials)
    found = choose_precision(settings, frames, lambda grids: [1.0])
    assert PatchEmbedder.from_settings(found).identities[0].execution == found.execution
