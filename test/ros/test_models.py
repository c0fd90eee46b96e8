"""Models of the node: unset settings, cameras with several indexes, several stages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from worlds.backbones import save_backbone
from worlds.ros import (
    FAILURE,
    SUCCESS,
    bench,
    build_monitor,
    frame,
    nominal_image,
    odd_image,
    offline_detector,
    values_of,
)

from semantic_anomaly.errors import IndexMismatchError, SettingsError
from semantic_anomaly.index import edits
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.edit_index import save_edited
from semantic_anomaly.ros.models import load_detectors
from semantic_anomaly.scoring import distances
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
    assert settings.stages == (f"{tiny_backbone} layer=3 size=140",)
    assert settings.target_false_alarm_rate == 0.1 and settings.threshold is None
    assert float(status["score"]) > float(status["threshold"])
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


def test_a_score_that_is_not_finite_fails_the_self_test(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distances, "tail_mean", lambda *_: float("nan"))
    with bench(values) as b:
        assert b.node.trigger_configure() == FAILURE
        text = "self-test of camera 'camera': score: expected a finite number, found nan"
        assert text in capfd.readouterr().err
        monkeypatch.undo()
        assert b.node.trigger_configure() == SUCCESS


def test_the_status_has_the_score_of_each_stage(staged: dict[str, Any]) -> None:
    image = odd_image()
    with bench(staged) as b:
        b.listen_diagnostics()
        b.start("status", "score")
        sent = b.send(image)
        status = b.answer(sent)
        nominal = b.answer(b.send(nominal_image(41)))
        b.spin_until(lambda: b.diagnostics)
        diagnostics = values_of(b.diagnostics[-1].status[0])
    detector = offline_detector(staged)
    expected = detector.detect(frame(image, sent))
    assert abs(float(status["score"]) - expected.score) < 1e-4
    names = [index.stage.name for index in detector.index.stages]
    backbone = "tiny_dinov2"
    assert names == [
        f"{backbone}:3@140",
        f"{backbone}:2@112 average=3",
        f"{backbone}:3@140 instances",
    ]
    assert list(expected.stage_scores) == names
    for number, value in enumerate(expected.stage_scores.values()):
        key = f"stage_{number}_deviation"
        assert float(status[key]) == pytest.approx(value, abs=1e-3)
        assert float(status[key]) > float(nominal[key])
    assert "stage_3_deviation" not in status
    assert diagnostics["stages"] == ", ".join(names)


def test_configure_names_a_setting_that_differs_and_may_be_tried_again(
    staged: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with bench({**staged, "segmenter": "universal", "stages": staged["stages"][:2]}) as b:
        assert b.node.trigger_configure() == FAILURE
        assert "'stages': expected [" in capfd.readouterr().err
        assert b.set(stages=staged["stages"]).successful
        assert b.node.trigger_configure() == FAILURE
        assert "'segmenter': expected tokens, found universal" in capfd.readouterr().err
        assert b.set(segmenter="tokens").successful
        b.start("status")
        assert b.answer(b.send(odd_image(3)))["decision"] in ("anomaly", "nominal")


def test_the_service_adds_a_frame_to_all_stages_of_the_index(
    staged: dict[str, Any], staged_index: Path, tmp_path: Path
) -> None:
    index = shutil.copytree(staged_index, tmp_path / "index")
    before = NominalIndex.load(index)
    changes = {"index": str(index), "allow_add_nominal": True, "threshold": -1e4}
    with bench({**staged, **changes}) as b:
        b.start("status")
        b.answer(b.send(odd_image(3)))
        response = b.call("add_nominal")
        assert response.success, response.message
        assert float(b.answer(b.send(odd_image(3)))["score"]) < 1
    after = NominalIndex.load(index)
    assert len(after.stages) == 3
    for old, new in zip(before.stages, after.stages, strict=True):
        assert new.count > old.count, new.stage.name
    added = sum(index.count for index in after.stages) - sum(i.count for i in before.stages)
    assert f"added {added} entries of 'camera/" in response.message
    save_edited(index, after, edits.undo(after)[0])
    assert NominalIndex.load(index).fingerprint == before.fingerprint
