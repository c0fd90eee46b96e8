"""Models of the node: unset settings, cameras with several indexes, instances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from worlds.backbones import save_backbone
from worlds.ros import (
    FAILURE,
    bench,
    build_monitor,
    frame,
    nominal_image,
    odd_image,
    offline_detector,
    parameters,
)

from semantic_anomaly.errors import IndexMismatchError, SettingsError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.ros.models import load_detectors
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings

CONFIG = Path(__file__).resolve().parents[2] / "config" / "semantic_anomaly.yaml"


def test_the_parameter_file_of_the_package_needs_only_the_index(
    index: Path, tiny_backbone: Path
) -> None:
    arguments = ["--params-file", str(CONFIG), "-p", f"index:={index}"]
    with bench({"max_age_s": 10.0}, args=arguments) as b:
        b.start("status")
        settings = b.node.models.detectors["camera"].settings
        status = b.answer(b.send(odd_image()))
    assert settings.input_size == 140 and settings.target_false_alarm_rate == 0.1
    assert settings.backbone == str(tiny_backbone)
    assert float(status["score"]) > float(status["threshold"]) > 0
    assert status["decision"] == "anomaly"


def test_cameras_share_embedder_and_index(index: Path) -> None:
    settings = Settings(index=str(index), cameras=("left", "right"), device="cpu")
    detectors = load_detectors(settings)
    assert detectors["left"].embedder is detectors["right"].embedder
    assert detectors["left"].index is detectors["right"].index


def test_cameras_with_different_backbones_are_refused(
    tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_backbone(tmp_path / "other_backbone", hidden_size=48)
    build_monitor(tmp_path, other)
    closed: list[RunningEmbedder] = []
    monkeypatch.setattr(RunningEmbedder, "close", lambda self: closed.append(self))
    parameters = {"device": "cpu", "cameras": ["left", "right"], "left.index": str(index)}
    settings = Settings.from_parameters({**parameters, "right.index": str(tmp_path / "index")})
    with pytest.raises(IndexMismatchError, match=r"camera 'right'.*backbone of camera 'left'"):
        load_detectors(settings)
    assert len(closed) == 1
    with pytest.raises(SettingsError, match="camera 'right': setting 'index'"):
        load_detectors(Settings.from_parameters(parameters))


@pytest.fixture(scope="module")
def combined_index(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return build_monitor(tmp_path_factory.mktemp("combined"), tiny_backbone, variant="combined")


@pytest.fixture
def combined(combined_index: Path, tiny_backbone: Path) -> dict[str, Any]:
    return parameters(combined_index, tiny_backbone, variant="combined")


def test_the_status_has_the_stages_of_the_detector(combined: dict[str, Any]) -> None:
    image = odd_image()
    with bench(combined) as b:
        b.start("status", "score")
        sent = b.send(image)
        status = b.answer(sent)
        nominal = b.answer(b.send(nominal_image(41)))
    expected = offline_detector(combined).detect(frame(image, sent))
    assert abs(float(status["score"]) - expected.score) < 1e-6
    assert set(expected.parts) == {"grid", "instances"}
    for stage, value in expected.parts.items():
        assert float(status[f"{stage}_deviation"]) == pytest.approx(value, abs=1e-3)
    assert float(status["grid_deviation"]) > float(nominal["grid_deviation"])
    assert "note" not in status


def test_configure_names_a_setting_that_differs_and_may_be_tried_again(
    combined: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with bench({**combined, "segmenter": "universal"}) as b:
        assert b.node.trigger_configure() == FAILURE
        assert "'segmenter': expected tokens, found universal" in capfd.readouterr().err
        assert b.set(segmenter="tokens").successful
        b.start("status")
        assert b.answer(b.send(odd_image(3)))["decision"] in ("anomaly", "nominal")


def test_the_service_adds_a_frame_to_the_parts_of_the_index(
    combined: dict[str, Any], combined_index: Path
) -> None:
    before = NominalIndex.load(combined_index)
    with bench({**combined, "allow_add_nominal": True, "threshold": 0.0001}) as b:
        b.start("status")
        b.answer(b.send(odd_image(3)))
        response = b.call("add_nominal")
        assert response.success, response.message
    after = NominalIndex.load(combined_index)
    assert after.count > before.count
    for name, part in after.parts.items():
        assert part.count > before.parts[name].count, name
