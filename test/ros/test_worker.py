"""The worker: what the model may do to it, and what waits while it works."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from worlds.ros import Bench, bench, build_monitor, nominal_image, parameters, values_of

from semantic_anomaly.errors import ModelOutputError


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return build_monitor(tmp_path_factory.mktemp("monitor"), tiny_backbone)


@pytest.fixture
def values(index: Path, tiny_backbone: Path) -> dict[str, Any]:
    return parameters(index, tiny_backbone)


class CudaOutOfMemoryError(RuntimeError):
    """Named like torch's, whose class tests without a GPU cannot provoke."""


@pytest.mark.parametrize(
    ("error", "times", "decision"),
    [
        (ModelOutputError("patch features: not finite"), 9, "unknown"),
        (RuntimeError("something else"), 9, "unknown"),
        (CudaOutOfMemoryError("tried to allocate"), 1, "nominal"),  # one retry
        (CudaOutOfMemoryError("tried to allocate"), 9, "unknown"),
    ],
)
def test_model_errors_give_unknown_and_memory_a_second_try(
    values: dict[str, Any],
    error: Exception,
    times: int,
    decision: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with bench(values) as b:
        b.start("status")
        assert b.node.models is not None
        embedder, failures = b.node.models.embedder, iter(range(times))
        embed = embedder.embed

        def failing(images: Any) -> Any:
            for _ in failures:
                raise error
            return embed(images)

        monkeypatch.setattr(embedder, "embed", failing)
        told = b.answer(b.send(nominal_image(10)))
        assert told["decision"] == decision
        if decision == "unknown":
            assert "model error" in told["reason"] and str(error) in told["reason"]
            assert "score" not in told and told["frames_failed"] == "1"
            # The traceback of what nobody expected is in the log.
            expected = isinstance(error, ModelOutputError)
            assert ("Traceback" in capfd.readouterr().err) != expected
        monkeypatch.setattr(embedder, "embed", embed)
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"


def test_one_cameras_failure_is_not_the_others(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {
        **values,
        "cameras": ["left", "right"],
        "left.image_topic": "/left/image",
        "right.image_topic": "/right/image",
    }
    with bench(both, ("left", "right")) as b:
        b.start("status")
        assert b.node.models is not None
        embedder = b.node.models.embedder
        embed = embedder.embed

        def failing(images: Any) -> Any:
            if any(image.shape[0] == 70 for image in images):
                raise ModelOutputError("patch features: not finite")
            return embed(images)

        monkeypatch.setattr(embedder, "embed", failing)
        b.publisher("/left/image")
        b.publisher("/right/image")
        bad = b.send(nominal_image(10, (70, 140)), "/left/image")
        good = b.send(nominal_image(10), "/right/image")
        assert b.answer(bad, "left")["decision"] == "unknown"
        assert b.answer(good, "right")["decision"] == "nominal"


class Gate:
    """Holds the worker inside the embedder until it is opened."""

    def __init__(self, b: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        assert b.node.models is not None
        self.entered, self.opened = threading.Event(), threading.Event()
        embed = b.node.models.embedder.embed

        def held(images: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(20)
            return embed(images)

        monkeypatch.setattr(b.node.models.embedder, "embed", held)


def test_only_the_newest_frame_waits(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench({**values, "qos_depth": 10}) as b:
        b.start("status")
        gate = Gate(b, monkeypatch)
        first = b.send(nominal_image(10))
        b.spin_until(gate.entered.is_set)
        later = [b.send(nominal_image(seed)) for seed in (11, 12, 13)]
        counts = b.node._cameras["camera"].counts
        b.spin_until(lambda: counts.received == 4)
        gate.opened.set()
        b.answer(first)
        told = b.answer(later[-1])
        assert told["frames_replaced"] == "2" and told["frames_processed"] == "2"
        assert told["frames_received"] == "4"


def test_frames_that_nobody_answers_are_reported(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench({**values, "silent_after_s": 0.4}) as b:
        b.start("status")
        gate = Gate(b, monkeypatch)
        heard = b.got["camera"]["status"]

        def told() -> bool:
            b.send(nominal_image(10))
            reasons = [values_of(array.status[0])["reason"] for array in heard]
            return any("none was answered" in reason for reason in reasons)

        b.spin_until(told)
        gate.opened.set()
