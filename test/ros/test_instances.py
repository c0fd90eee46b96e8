"""The node with instances: what it publishes, what it refuses, and what it adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from rclpy.lifecycle import TransitionCallbackReturn
from worlds.ros import (
    bench,
    build_monitor,
    frame,
    nominal_image,
    odd_image,
    offline_detector,
    parameters,
    values_of,
)

from semantic_anomaly.index.nominal_index import NominalIndex

WANTED = {"variant": "combined", "surroundings_weight": 0.3, "scene_frames": 3}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return build_monitor(tmp_path_factory.mktemp("monitor"), tiny_backbone, **WANTED)


@pytest.fixture
def values(index: Path, tiny_backbone: Path) -> dict[str, Any]:
    return parameters(index, tiny_backbone, **WANTED)


def test_the_status_tells_every_branch_and_equals_the_detectors(values: dict[str, Any]) -> None:
    image = odd_image()
    with bench(values) as b:
        b.start("status", "score")
        sent = b.send(image)
        said = values_of(b.answer_message(sent).status[0])
        quiet = b.answer(b.send(nominal_image(41)))
    wanted = offline_detector(values).detect(frame(image, sent))
    assert abs(float(said["score"]) - wanted.score) < 1e-6
    assert set(wanted.parts) == {"grid", "instances", "pairs"}
    for branch, value in wanted.parts.items():
        assert float(said[f"{branch}_deviation"]) == pytest.approx(value, abs=1e-3)
    assert float(said["grid_deviation"]) > float(quiet["grid_deviation"])
    assert "note" not in said


def test_configure_names_what_does_not_fit_and_a_second_try_works(
    values: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    from rclpy.parameter import Parameter

    with bench({**values, "surroundings_weight": 0.5}) as b:
        assert b.node.trigger_configure() == TransitionCallbackReturn.FAILURE
        assert "surroundings_weight: expected 0.3, found 0.5" in capfd.readouterr().err
        b.node.set_parameters([Parameter("surroundings_weight", value=0.3)])
        b.start("status")
        assert b.answer(b.send(odd_image(3)))["decision"] in ("anomaly", "nominal")
    with bench({**values, "segmenter": "universal"}) as b:
        assert b.node.trigger_configure() == TransitionCallbackReturn.FAILURE
        assert "segmenter 'universal': expected a model" in capfd.readouterr().err


def test_a_frame_added_by_the_service_reaches_the_parts(
    values: dict[str, Any], index: Path
) -> None:
    before = NominalIndex.load(index)
    with bench({**values, "allow_add_nominal": True, "threshold": 0.0001}) as b:
        b.start("status")
        b.answer(b.send(odd_image(3)))
        added = b.call("add_nominal")
        assert added.success, added.message
    after = NominalIndex.load(index)
    assert after.count > before.count
    for name, part in after.parts.items():
        assert part.count > before.parts[name].count, name
