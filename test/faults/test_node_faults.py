"""The oracle of a running node objects to a node that errs, and cycles leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest

pytest.importorskip("rclpy")

from faults.lifecycle_faults import CAMERA, Laboratory, cases, laboratory, many_cycles
from faults.node_session import NodeSession
from semantic_anomaly.ros.outputs import CameraOutputs


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with laboratory(tmp_path_factory.mktemp("lifecycle")) as made:
        yield made


def _bad_image(lab: Laboratory, session: NodeSession) -> None:
    message = lab.frame(session)
    message.data = message.data[:100]
    session.ask(message, CAMERA)


def _without_reason(lab: Laboratory, session: NodeSession) -> None:
    publish = CameraOutputs.publish_unknown

    def silent(self: CameraOutputs, header: object, level: bytes, _: str, counts: object) -> None:
        publish(self, header, level, "", counts)

    with patch.object(CameraOutputs, "publish_unknown", silent):
        _bad_image(lab, session)


def _with_a_count_too_many(lab: Laboratory, session: NodeSession) -> None:
    session.bench.node._cameras[CAMERA].counts.frames_bad += 1
    session.ask(lab.frame(session), CAMERA)


def _with_another_threshold(lab: Laboratory, session: NodeSession) -> None:
    assert session.bench.set(threshold=1e6).successful
    session.ask(lab.frame(session, odd=True), CAMERA)
    session.bench.node.undeclare_parameter("threshold")


@pytest.mark.parametrize(
    ("err", "objection"),
    [
        (_without_reason, "the error has no text"),
        (_with_a_count_too_many, "frames_bad is 1, statuses say 0"),
        (_with_another_threshold, "expected ('anomaly'"),
    ],
)
def test_the_oracle_objects_to_a_node_that_errs(
    lab: Laboratory, err: Callable[[Laboratory, NodeSession], None], objection: str
) -> None:
    session = lab.session()
    assert not lab.flow(session)
    err(lab, session)
    assert objection in "; ".join(session.violations())
    # A new node, without the error.
    lab.close()


def test_cycles_leave_no_threads_and_no_files(lab: Laboratory) -> None:
    violations, _, _ = many_cycles(lab, 4)
    assert not violations


def test_every_fault_of_the_life_cycle_states_its_outcome() -> None:
    table = list(cases(0))
    assert len(table) >= 150 and all(case.allowed for case in table)
