"""Every transition, what fails on the way, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy
from lifecycle_msgs.msg import State
from lifecycle_msgs.srv import ChangeState, GetState
from worlds.ros import (
    ERROR,
    FAILURE,
    SUCCESS,
    Bench,
    bench,
    nominal_image,
    odd_image,
)

from semantic_anomaly.ros import models, node


def state(b: Bench) -> str:
    return b.node._state_machine.current_state[1]


def entities(b: Bench) -> dict[str, int]:
    return {
        "publishers": len(list(b.node.publishers)),
        "subscriptions": len(list(b.node.subscriptions)),
        "services": len(list(b.node.services)),
        "timers": len(list(b.node.timers)),
        "managed": len(b.node._managed_entities),
        "threads": threading.active_count(),
        "files": open_files(),
    }


def open_files() -> int:
    """Count what is open on disk; sockets belong to the middleware, which keeps a pool."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(link.readlink())
            count += target.startswith("/") and not target.startswith("/dev/")
    return count


def test_the_node_never_changes_its_own_state(values: dict[str, Any]) -> None:
    with bench(values) as b:
        for _ in range(5):
            b.executor.spin_once(timeout_sec=0.05)
        assert state(b) == "unconfigured"


def test_each_transition_creates_or_destroys_its_entities(values: dict[str, Any]) -> None:
    with bench(values) as b:
        bare = entities(b)
        assert b.node.trigger_configure() == SUCCESS and state(b) == "inactive"
        configured = entities(b)
        assert configured["managed"] == 7
        assert configured["subscriptions"] == bare["subscriptions"]
        assert b.node.trigger_activate() == SUCCESS and state(b) == "active"
        active = entities(b)
        assert active["subscriptions"] == bare["subscriptions"] + 1
        assert active["threads"] == bare["threads"] + 1
        assert b.node.trigger_deactivate() == SUCCESS and state(b) == "inactive"
        inactive = entities(b)
        for name in ("publishers", "subscriptions", "services", "timers", "threads"):
            assert inactive[name] == configured[name], name
        assert b.node.models is not None
        assert b.node.trigger_cleanup() == SUCCESS and state(b) == "unconfigured"
        assert b.node.models is None
        clean = entities(b)
        for name in ("publishers", "subscriptions", "services", "timers", "threads", "managed"):
            assert clean[name] == bare[name], name


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_shutdown_from_any_state(values: dict[str, Any], steps: int) -> None:
    with bench(values) as b:
        for transition in (b.node.trigger_configure, b.node.trigger_activate)[:steps]:
            assert transition() == SUCCESS
        threads = threading.active_count()
        assert b.node.trigger_shutdown() == SUCCESS
        assert state(b) == "finalized"
        assert b.node.models is None and not b.node._managed_entities
        assert threading.active_count() == threads - (steps == 2)


def test_transitions_by_service(values: dict[str, Any]) -> None:
    with bench(values) as b:
        change = b.helper.create_client(ChangeState, "/semantic_anomaly/change_state")
        ask = b.helper.create_client(GetState, "/semantic_anomaly/get_state")
        b.spin_until(lambda: change.service_is_ready() and ask.service_is_ready())
        seen = []
        for label in ("configure", "activate", "deactivate", "cleanup", "shutdown"):
            request = ChangeState.Request()
            request.transition.label = label
            done = change.call_async(request)
            b.spin_until(done.done)
            assert done.result().success, label
            answer = ask.call_async(GetState.Request())
            b.spin_until(answer.done)
            seen.append(answer.result().current_state.id)
    assert seen == [
        State.PRIMARY_STATE_INACTIVE,
        State.PRIMARY_STATE_ACTIVE,
        State.PRIMARY_STATE_INACTIVE,
        State.PRIMARY_STATE_UNCONFIGURED,
        State.PRIMARY_STATE_FINALIZED,
    ]


def test_results_after_deactivation_and_cleanup(values: dict[str, Any]) -> None:
    with bench({**values, "confirm_count": 2, "confirm_s": 30.0, "silence_s": 30.0}) as b:
        b.start("status")
        first = [b.answer(b.send(odd_image(i)))["decision"] for i in range(2)]
        assert b.node.trigger_deactivate() == SUCCESS
        assert b.node.trigger_activate() == SUCCESS
        b.spin_until(b.connected)
        second = [b.answer(b.send(odd_image(i)))["decision"] for i in range(2)]
        for transition in (
            b.node.trigger_deactivate,
            b.node.trigger_cleanup,
            b.node.trigger_configure,
            b.node.trigger_activate,
        ):
            assert transition() == SUCCESS
        b.spin_until(b.connected)
        third = b.answer(b.send(odd_image(3)))
    # Deactivation forgets the frames that confirmation counts.
    assert first == second == ["nominal", "anomaly"]
    assert third["decision"] == "nominal" and third["frames_received"] == "1"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"index": ""}, "setting 'index'"),
        ({"index": "/nowhere/index"}, "/nowhere/index"),
        ({"backbone": "/nowhere/backbone"}, "/nowhere/backbone"),
        ({"input_size": 280}, "input_size"),
        ({"tail_percent": 7.0}, "tail_percent"),
        ({"target_false_alarm_rate": 0.0001}, "9999"),
        ({"camera.region_of_interest": [0.0, 0.0, 1.0, 0.0, 1.0, 0.5]}, "polygon_xy"),
        ({"camera.ego_mask": "/nowhere/mask.png"}, "/nowhere/mask.png"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_an_unusable_setting_fails_in_one_line_and_configure_may_be_tried_again(
    values: dict[str, Any],
    change: dict[str, Any],
    text: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with bench({**values, **change}) as b:
        bare = entities(b)
        capfd.readouterr()
        assert b.node.trigger_configure() == FAILURE
        assert state(b) == "unconfigured" and b.node.models is None
        lines = [line for line in capfd.readouterr().err.splitlines() if "[ERROR]" in line]
        assert len(lines) == 1 and "cannot configure" in lines[0] and text in lines[0]
        clean = entities(b)
        for name in ("publishers", "subscriptions", "services", "timers", "threads", "managed"):
            assert clean[name] == bare[name], name
        repaired = {
            "camera.region_of_interest": rclpy.Parameter(
                "camera.region_of_interest", rclpy.Parameter.Type.DOUBLE_ARRAY, []
            ),
            "camera.ego_mask": rclpy.Parameter("camera.ego_mask", value=""),
            "device": rclpy.Parameter("device", value="cpu"),
            "tail_percent": rclpy.Parameter("tail_percent", value=0.2),
        }
        for name in change:
            parameter = repaired.get(name) or rclpy.Parameter(name, value=values[name])
            assert b.node.set_parameters([parameter])[0].successful
        assert b.node.trigger_configure() == SUCCESS
        assert b.node.trigger_activate() == SUCCESS


def test_an_unexpected_exception_is_logged_and_undone(
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("unexpected")

    with bench(values) as b:
        bare = entities(b)
        # After models and outputs were created, all of which must be undone.
        monkeypatch.setattr(node.AnomalyNode, "_announce", broken)
        assert b.node.trigger_configure() == ERROR
        assert state(b) == "unconfigured" and b.node.models is None
        err = capfd.readouterr().err
        assert "Traceback" in err and "unexpected" in err
        clean = entities(b)
        for name in ("publishers", "subscriptions", "services", "timers", "threads", "managed"):
            assert clean[name] == bare[name], name
        monkeypatch.undo()
        assert b.node.trigger_configure() == SUCCESS

        monkeypatch.setattr(node, "Pipeline", broken)
        assert b.node.trigger_activate() == ERROR
        assert state(b) == "unconfigured" and b.node.models is None
        assert "unexpected" in capfd.readouterr().err
        monkeypatch.undo()
        b.start("status")
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"

        monkeypatch.setattr(node.AnomalyNode, "_stop", broken_once(node.AnomalyNode._stop))
        assert b.node.trigger_deactivate() == ERROR
        assert state(b) == "unconfigured" and not b.node._managed_entities


def broken_once(original: Any) -> Any:
    calls: list[int] = []

    def wrapped(self: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("unexpected")
        original(self)

    return wrapped


def test_a_self_test_that_fails_fails_to_configure(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    with bench(values) as b:

        def refuse(self: Any) -> None:
            embedder = self.embedder
            monkeypatch.setattr(embedder, "close", lambda: closed.append(embedder))
            raise models.ModelOutputError("self-test: expected a score in [0, 2], found nan")

        monkeypatch.setattr(models.Models, "self_test", refuse)
        assert b.node.trigger_configure() == FAILURE
        assert len(closed) == 1 and b.node.models is None


def test_twenty_cycles_leave_nothing_behind(values: dict[str, Any]) -> None:
    with bench(values) as b:
        seen = []
        for _ in range(20):
            for transition in (
                b.node.trigger_configure,
                b.node.trigger_activate,
                b.node.trigger_deactivate,
                b.node.trigger_cleanup,
            ):
                assert transition() == SUCCESS
            # Entities are destroyed when the executor has let go of them.
            b.executor.spin_once(timeout_sec=0.01)
            seen.append(entities(b))
    # The first cycles load libraries and fill pools.
    assert seen[-1] == seen[4], (seen[4], seen[-1])
