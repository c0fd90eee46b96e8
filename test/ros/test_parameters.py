"""Parameters: declared from the table, changed together or not at all, live for one camera."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from rclpy.parameter import Parameter
from worlds.ros import FAILURE, SUCCESS, bench, nominal_image, odd_image, two_cameras

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.settings import (
    Settings,
    camera_override_specs,
    camera_setting_specs,
    read_settings_file,
    setting_specs,
)


def test_every_setting_is_declared_described_and_bounded() -> None:
    overrides = {f"camera.{name}": spec for name, spec in camera_override_specs().items()}
    rows = {**setting_specs(), **overrides}
    rows.update({f"camera.{name}": spec for name, spec in camera_setting_specs().items()})
    with bench({}) as b:
        for name, spec in rows.items():
            descriptor = b.node.describe_parameter(name)
            assert descriptor.description.startswith(spec.description), name
            assert ("live" in descriptor.description) == spec.live, name
            assert not descriptor.read_only, name
            if spec.minimum is not None and not spec.is_list:
                [span] = [*descriptor.integer_range, *descriptor.floating_point_range]
                assert (span.from_value, span.to_value) == (spec.minimum, spec.maximum), name
            value = b.node.get_parameter(name).value
            expected = None if name in overrides else spec.default
            assert (tuple(value) if spec.is_list else value) == expected, name
        assert b.node._node_parameters.settings() == Settings()


def test_a_parameter_file_with_empty_lists_and_whole_numbers(tmp_path: Path) -> None:
    file = tmp_path / "parameters.yaml"
    file.write_text(
        "/**:\n  ros__parameters:\n    layers: []\n    threshold: 0\n    cameras: [front, rear]\n"
        "    front:\n      region_of_interest: [0, 0, 1, 0, 1, 1]\n      camera_height_m: 2\n"
        "      threshold: 1\n      confirm_count: 3\n"
        "    rear:\n      region_of_interest: []\n      image_topic: /rear/image\n"
    )
    with bench({}, args=["--params-file", str(file)]) as b:
        settings = b.node._node_parameters.settings()
        kind = b.node.get_parameter("rear.region_of_interest").type_
    assert settings == Settings.from_parameters(read_settings_file(file))
    assert settings.camera_settings["front"].region_of_interest == (0.0, 0.0, 1.0, 0.0, 1.0, 1.0)
    assert settings.camera_settings["front"].camera_height_m == 2.0
    assert settings.camera_settings["rear"].image_topic == "/rear/image"
    assert settings.for_camera("front").threshold == 1.0
    assert settings.for_camera("front").confirm_count == 3
    assert settings.for_camera("rear").threshold == 0.0
    assert kind == Parameter.Type.DOUBLE_ARRAY


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        ({"neighbors": 1}, "did you mean 'neighbours'"),
        ({"camera.image_topics": "/x"}, "did you mean 'camera.image_topic'"),
        ({"front.image_topic": "/x"}, "unknown parameter 'front.image_topic'"),
        ({"input_size": -1}, "'input_size': expected at least 0, found -1"),
        ({"camera.threshold": "high"}, "'camera.threshold': expected float, found 'high'"),
        ({"threshold": float("nan")}, "'threshold': expected a finite number"),
        ({"camera.neighbours": 1}, "unknown parameter 'camera.neighbours'"),
        ({"cameras": ["a b"]}, "a b"),
        ({"camera.image_topic": ""}, "'camera.image_topic'"),
        ({"camera.depth_topic": "/no spaces"}, "'camera.depth_topic': Invalid topic name"),
    ],
)
def test_an_invalid_parameter_is_named_at_configure(
    values: dict[str, Any], parameter: dict[str, Any], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with bench({**values, **parameter}) as b:
        assert b.node.trigger_configure() == FAILURE
    assert text in capfd.readouterr().err


def test_an_invalid_value_may_be_corrected_before_the_next_configure(
    values: dict[str, Any],
) -> None:
    with bench({**values, "input_size": -1}) as b:
        assert b.node.trigger_configure() == FAILURE
        assert b.set(input_size=140).successful
        assert b.node.trigger_configure() == SUCCESS


def test_before_configure_everything_may_change_but_is_checked() -> None:
    with bench({}) as b:
        assert b.set(input_size=320, camera__image_topic="/front").successful
        refused = b.set(input_size=640, neighbours=0)
        assert not refused.successful
        # All of a set together, or none of it.
        assert b.node.get_parameter("input_size").value == 320
        assert "expected one of" in b.set(qos_reliability="perhaps").reason
        assert "expected str" in b.set(index=7).reason
        assert not b.set(confirm_count=0).successful
        assert b.set(confirm_count=2, confirm_s=2.0).successful
        assert b.node._node_parameters.settings().confirm_count == 2


def test_cameras_named_later_get_their_parameters() -> None:
    with bench({}) as b:
        assert b.set(cameras=["front", "rear"]).successful
        assert b.set(rear__image_topic="/rear").successful
        settings = b.node._node_parameters.settings()
        assert settings.camera_settings["rear"].image_topic == "/rear"
        assert not b.set(cameras=["two words"]).successful
        assert b.node._node_parameters.settings().cameras == ("front", "rear")


def test_after_configure_only_live_ones_change_until_cleanup(values: dict[str, Any]) -> None:
    with bench(values) as b:
        assert b.node.trigger_configure() == SUCCESS
        for name, value in {"input_size": 280, "cameras": ["x"], "backbone": "y"}.items():
            refused = b.set(**{name: value})
            assert not refused.successful and "read-only after configure" in refused.reason
            assert "threshold" in refused.reason
        assert b.set(input_size=140).successful, "the value in force is no change"
        assert b.set(min_area_px=5, overlay_alpha=1).successful
        assert b.node.trigger_cleanup() == SUCCESS
        assert b.set(input_size=280).successful


def test_live_parameters_take_effect_at_once(values: dict[str, Any]) -> None:
    with bench(values) as b:
        b.start("status")
        first = b.answer(b.send(nominal_image(10)))
        assert first["decision"] == "nominal"
        # Scores are deviations: zero and negative numbers are thresholds too.
        for threshold in (0, -50.0):
            assert b.set(threshold=threshold).successful
            status = b.answer(b.send(nominal_image(10)))
            above = float(status["score"]) > threshold
            assert status["threshold"] == str(float(threshold))
            assert (status["decision"] == "anomaly") == above
        assert above
        assert b.set(threshold=None).successful
        assert b.answer(b.send(nominal_image(10)))["threshold"] == first["threshold"]
        assert b.set(target_false_alarm_rate=0.5).successful
        assert float(b.answer(b.send(nominal_image(10)))["threshold"]) < float(first["threshold"])
        assert b.set(confirm_count=2, confirm_s=30.0, silence_s=30.0).successful
        assert b.answer(b.send(odd_image(1)))["decision"] == "nominal"
        assert b.answer(b.send(odd_image(1)))["decision"] == "anomaly"
        assert b.set(max_age_s=0.05).successful
        assert "stale" in b.answer(b.send(nominal_image(10), ahead_s=-1.0))["reason"]


def test_live_parameters_of_one_camera(values: dict[str, Any]) -> None:
    both = {**two_cameras(values, "front", "rear"), "front.threshold": 1e4}
    with bench(both, ("front", "rear")) as b:
        b.start("status")

        def statuses() -> dict[str, dict[str, str]]:
            b.publisher("/front/image")
            b.publisher("/rear/image")
            sent = {c: b.send(odd_image(1), f"/{c}/image") for c in ("front", "rear")}
            return {c: b.answer(message, c) for c, message in sent.items()}

        first = statuses()
        assert first["front"]["threshold"] == "10000.0" and first["front"]["decision"] == "nominal"
        assert first["rear"]["decision"] == "anomaly"
        assert b.set(front__threshold=-50.0, rear__threshold=1).successful
        second = statuses()
        assert second["front"]["decision"] == "anomaly" and second["rear"]["threshold"] == "1.0"
        # The common value is for cameras without a value of their own.
        assert b.set(threshold=0.7).successful
        assert b.node.models.detectors["front"].threshold == -50.0
        # Deleting the parameter restores the common value; afterwards it may be set again.
        assert b.set(front__threshold=None).successful
        assert b.node.models.detectors["front"].threshold == 0.7
        if hasattr(b.node, "add_post_set_parameters_callback"):
            # Not the value that the node started with.
            assert b.node.get_parameter("front.threshold").value is None
            assert b.set(front__threshold=0.4).successful
            assert b.node.models.detectors["front"].threshold == 0.4
        for name, value in {"rear__threshold": "high", "rear__confirm_count": "often"}.items():
            refused = b.set(**{name: value})
            assert not refused.successful and name.replace("__", ".") in refused.reason
        unset = {"threshold": None, "rear__threshold": None}
        refused = b.set(rear__confidence=0.9, **unset)
        assert not refused.successful and "at least 9 nominal" in refused.reason
        assert b.node.models.detectors["rear"].threshold == 1.0


def test_the_threshold_has_no_value_until_it_is_set(values: dict[str, Any]) -> None:
    with bench({**values, "threshold": 0.0}) as b:
        assert b.node.trigger_configure() == SUCCESS
        assert b.node.models is not None
        detector = b.node.models.detectors["camera"]
        assert detector.threshold == 0.0 and detector.calibration is not None
        assert b.set(threshold=None).successful
        assert detector.threshold == detector.calibration.threshold
        if hasattr(b.node, "add_post_set_parameters_callback"):
            # Declared again, without the value that the node started with.
            assert b.node.get_parameter("threshold").value is None
            assert b.set(threshold=2).successful and detector.threshold == 2.0
            assert b.set(threshold=None).successful
        assert b.node.trigger_cleanup() == SUCCESS
        assert b.node.trigger_configure() == SUCCESS
        assert b.node.settings.threshold is None
        assert b.set(threshold=-1.5).successful
        assert b.node.models.detectors["camera"].threshold == -1.5


def test_refused_live_parameters_change_nothing(values: dict[str, Any]) -> None:
    both = {**values, "cameras": ["left", "right"]}
    with bench(both, ("left", "right")) as b:
        assert b.node.trigger_configure() == SUCCESS
        assert b.node.models is not None
        before = {n: d.threshold for n, d in b.node.models.detectors.items()}
        # Two calibration drives cannot promise a rate with a confidence of nine in ten.
        refused = b.set(overlay_alpha=0.1, confidence=0.9)
        assert not refused.successful and "at least 9 nominal" in refused.reason
        assert not b.set(threshold=float("inf")).successful
        assert not b.set(confirm_count=0).successful
        assert b.node.settings.overlay_alpha == 0.5
        assert {n: d.threshold for n, d in b.node.models.detectors.items()} == before
        assert all(d.settings.overlay_alpha == 0.5 for d in b.node.models.detectors.values())
        assert b.node.get_parameter("overlay_alpha").value == 0.5


def test_a_refusal_by_one_camera_is_undone_for_the_others(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {**values, "cameras": ["left", "right"]}
    with bench(both, ("left", "right")) as b:
        assert b.node.trigger_configure() == SUCCESS
        assert b.node.models is not None
        left, right = b.node.models.detectors["left"], b.node.models.detectors["right"]

        def refuse(_: Settings) -> None:
            raise CalibrationError("too few frames")

        monkeypatch.setattr(right, "update", refuse)
        assert b.set(threshold=0.7).reason == "too few frames"
        assert left.settings.threshold is None


def test_an_unexpected_exception_refuses_the_change(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Settings) -> None:
        raise ZeroDivisionError("unexpected")

    with bench(values) as b:
        assert b.node.trigger_configure() == SUCCESS
        monkeypatch.setattr(b.node._node_parameters, "_apply", broken)
        refused = b.set(threshold=0.5)
    assert not refused.successful and "internal error" in refused.reason
    assert "Traceback" in capfd.readouterr().err


def test_sim_time_and_foreign_parameters_are_left_alone(values: dict[str, Any]) -> None:
    foreign = {"use_sim_time": False, "qos_overrides./clock.subscription.depth": 2}
    with bench({**values, **foreign}) as b:
        assert b.node.trigger_configure() == SUCCESS
        assert b.set(use_sim_time=True).successful


def test_relative_paths_of_a_parameter_file_are_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(
        "/**:\n  ros__parameters:\n    index: data/index\n    stages: [./dino layer=2, other]\n"
        "    segmenter_model: ./model\n"
    )
    arguments = ["--params-file", str(file), "-p", "camera.index:=own"]
    monkeypatch.setattr("sys.argv", ["anomaly_node", "--ros-args", *arguments])
    with bench({}, args=arguments) as b:
        settings = b.node._node_parameters.settings()
    assert settings.index == str(tmp_path / "data" / "index")
    assert settings.stages == (f"{tmp_path / 'dino'} layer=2", "other")
    assert settings.segmenter_model == str(tmp_path / "model")
    assert settings.index_of("camera") == "own", "of the command line, not of the file"
