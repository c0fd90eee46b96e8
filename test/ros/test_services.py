"""Services: the index is replaced as a whole or not at all, and tracks are reset on request."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from std_srvs.srv import Trigger
from worlds.ros import SUCCESS, Bench, bench, nominal_image, odd_image, parameters

from semantic_anomaly.index import edits
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import write_image
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.offline.edit_index import save_edited
from semantic_anomaly.ros import models
from semantic_anomaly.ros.models import stale_calibration
from semantic_anomaly.settings import Settings


@pytest.fixture
def index(index: Path, tmp_path: Path) -> Path:
    """Return a copy of the index, with the drives beside it, that may be written."""
    shutil.copytree(index.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "index"


@pytest.fixture
def values(index: Path, tiny_backbone: Path) -> dict[str, Any]:
    return parameters(index, tiny_backbone)


def test_reset_clears_the_tracks(values: dict[str, Any]) -> None:
    with bench({**values, "confirm_count": 2, "confirm_s": 30.0, "silence_s": 30.0}) as b:
        b.start("status")
        assert b.answer(b.send(odd_image(1)))["decision"] == "nominal"
        assert b.call("reset").success
        assert b.answer(b.send(odd_image(2)))["decision"] == "nominal"
        assert b.answer(b.send(odd_image(3)))["decision"] == "anomaly"


def test_reload_takes_a_new_index_and_keeps_live_parameters(
    values: dict[str, Any], index: Path, tmp_path: Path
) -> None:
    with bench(values) as b:
        b.start("status")
        assert b.set(overlay_alpha=0.25).successful
        before = b.node.models
        assert before is not None
        # An index of the odd scene: the anomaly is nominal now.
        for number in range(12):
            write_image(tmp_path / "drive_0" / f"odd_{number:03d}.png", odd_image(number))
        assert b.answer(b.send(odd_image(3)))["decision"] == "anomaly"
        settings = Settings.from_parameters(values)
        rebuilt = build_index(tmp_path / "drive_0", settings=settings, out=index, force=True)
        drives = [tmp_path / "drive_1", tmp_path / "drive_2"]
        calibrate(rebuilt, drives, settings=settings, out=index)
        response = b.call("reload_index")
        assert response.success and "reloaded" in response.message
        after = b.node.models
        assert after is not None and after is not before
        assert after.embedder is before.embedder
        old, new = before.detectors["camera"], after.detectors["camera"]
        assert old.index.fingerprint != new.index.fingerprint
        assert new.settings.overlay_alpha == 0.25
        assert b.answer(b.send(odd_image(3)))["decision"] == "nominal"


def test_a_false_alarm_is_added_and_the_addition_undone(
    values: dict[str, Any], index: Path
) -> None:
    with bench({**values, "allow_add_nominal": True}) as b:
        b.start("status")
        nothing = b.call("add_nominal")
        assert not nothing.success and "no frame was above" in nothing.message
        assert b.answer(b.send(odd_image(3)))["decision"] == "anomaly"
        before = NominalIndex.load(index)
        added = b.call("add_nominal")
        assert added.success and "the calibration is stale" in added.message, added.message
        assert b.answer(b.send(odd_image(3)))["decision"] == "nominal"
        assert not b.call("add_nominal").success
        reason = stale_calibration(b.node.models.detectors["camera"])
        assert reason is not None and "stale calibration, 1 edit" in reason
    edited = NominalIndex.load(index)
    assert edited.count > before.count and edited.edits[0].source.startswith("camera/")
    undone, _ = edits.undo(edited)
    save_edited(index, edited, undone)
    assert NominalIndex.load(index).fingerprint == before.fingerprint


def test_nothing_is_added_unless_it_is_allowed(values: dict[str, Any], index: Path) -> None:
    with bench(values) as b:
        b.start("status")
        assert b.answer(b.send(odd_image(3)))["decision"] == "anomaly"
        before = NominalIndex.load(index).fingerprint
        refused = b.call("add_nominal")
        assert not refused.success and "'allow_add_nominal' is false" in refused.message
        assert NominalIndex.load(index).fingerprint == before


def test_a_reload_that_would_lose_the_calibration_keeps_the_old_one(
    values: dict[str, Any], index: Path
) -> None:
    with bench(values) as b:
        b.start("status")
        before = b.node.models
        calibration = index / "calibration.json"
        content = calibration.read_bytes()
        calibration.unlink()
        response = b.call("reload_index")
        assert not response.success and "the old one is kept" in response.message
        assert "expected a calibration, as before, found none" in response.message
        assert b.node.models is before
        assert b.answer(b.send(nominal_image(50)))["decision"] == "nominal"
        calibration.write_bytes(content)
        assert b.call("reload_index").success


def test_a_reload_that_fails_keeps_the_old_index_and_says_why(
    values: dict[str, Any], index: Path
) -> None:
    with bench(values) as b:
        b.start("status")
        before = b.node.models
        embeddings = index / "embeddings.npy"
        content = embeddings.read_bytes()
        embeddings.write_bytes(content[:-4] + b"\0\0\0\1")
        response = b.call("reload_index")
        assert not response.success
        assert "embeddings.npy" in response.message and "the old one is kept" in response.message
        assert b.node.models is before
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"
        shutil.rmtree(index)
        assert str(index) in b.call("reload_index").message
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"


class HeldReload:
    """A call of ~/reload_index that is held while it loads."""

    def __init__(self, b: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        begun, self.go_on = threading.Event(), threading.Event()
        original = models.load_detectors

        def held(*args: Any) -> Any:
            begun.set()
            assert self.go_on.wait(20)
            return original(*args)

        monkeypatch.setattr(models, "load_detectors", held)
        client = b.helper.create_client(Trigger, "/semantic_anomaly/reload_index")
        b.spin_until(client.service_is_ready)
        self.response = client.call_async(Trigger.Request())
        b.spin_until(begun.is_set)


def test_frames_are_processed_during_a_reload(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(values) as b:
        b.start("status")
        reload = HeldReload(b, monkeypatch)
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"
        # Live parameters set meanwhile hold for the new index as well.
        assert b.set(threshold=0.9).successful
        assert not reload.response.done()
        reload.go_on.set()
        b.spin_until(reload.response.done)
        assert reload.response.result().success
        assert b.answer(b.send(nominal_image(10)))["threshold"] == "0.9"


def test_a_reload_overtaken_by_cleanup_changes_nothing(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(values) as b:
        assert b.node.trigger_configure() == SUCCESS
        reload = HeldReload(b, monkeypatch)
        # The reload goes on when cleanup waits for it.
        services = b.node._node_services
        join = services.join
        monkeypatch.setattr(services, "join", lambda: (reload.go_on.set(), join()))
        assert b.node.trigger_cleanup() == SUCCESS
        assert b.node.models is None
        b.spin_until(reload.response.done)
        assert "cleaned up meanwhile" in reload.response.result().message
        assert b.node.models is None
        monkeypatch.undo()
        assert b.node.trigger_configure() == SUCCESS


def test_services_of_an_unconfigured_node_fail(values: dict[str, Any]) -> None:
    with bench(values) as b:
        for service in ("reset", "reload_index"):
            response = b.call(service)
            assert not response.success and "not configured" in response.message


def test_the_self_test_runs_while_frames_flow(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(values) as b:
        assert "not configured" in b.call("self_test").message
        b.start("status")
        alone = b.answer(b.send(odd_image(1)))["score"]
        client = b.helper.create_client(Trigger, "/semantic_anomaly/self_test")
        b.spin_until(client.service_is_ready)
        future = client.call_async(Trigger.Request())
        scores = []
        while not future.done():
            scores.append(b.answer(b.send(odd_image(1)))["score"])
        assert scores and set(scores) == {alone}
        assert future.result().success, future.result().message
        assert future.result().message.startswith("camera: self-test passed: 4 nominal frames")
        # A network that has gone wrong since.
        models = b.node.models
        assert models is not None
        embed = models.embedder.embed
        monkeypatch.setattr(
            models.embedder, "embed", lambda images: embed([image[::-1] for image in images])
        )
        response = b.call("self_test")
        assert not response.success
        assert response.message.startswith("self-test failed: self-test: scores of")
        assert b.node.models is models
