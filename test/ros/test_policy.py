"""The example policy of SROS 2: its structure, and exactly the topics and services of a node."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

POLICY = ElementTree.parse(Path(__file__).parents[2] / "config/sros2_policy.xml").getroot()
[PROFILE] = POLICY.iter("profile")
# As policy.xsd of sros2: the attributes of an element, and what may stand in it.
STRUCTURE = {
    "policy": ({"version"}, {"enclaves"}),
    "enclaves": (set(), {"enclave"}),
    "enclave": ({"path"}, {"profiles"}),
    "profiles": (set(), {"profile"}),
    "profile": ({"ns", "node"}, {"topics", "services"}),
    "topics": ({"publish", "subscribe"}, {"topic"}),
    "services": ({"reply", "request"}, {"service"}),
    "topic": (set(), set()),
    "service": (set(), set()),
}
OPTIONAL = {"publish", "subscribe", "reply", "request"}


def allowed(kind: str, action: str) -> set[str]:
    names = [item.text or "" for group in PROFILE.findall(f"{kind}s[@{action}]") for item in group]
    assert len(set(names)) == len(names), "each name once"
    return set(names)


def test_structure_is_that_of_the_schema() -> None:
    assert POLICY.tag == "policy" and POLICY.get("version") == "0.2.0"
    for element in POLICY.iter():
        attributes, children = STRUCTURE[element.tag]
        assert {child.tag for child in element} <= children
        assert set(element.attrib) <= attributes
        assert attributes - OPTIONAL <= set(element.attrib)
        if attributes & OPTIONAL:
            assert element.attrib and set(element.attrib.values()) <= {"ALLOW", "DENY"}
        if not children:
            assert (element.text or "").startswith("/"), "full names"
        else:
            assert len(element)


def test_it_allows_exactly_what_a_running_node_uses(values: dict[str, Any]) -> None:
    pytest.importorskip("rclpy")
    from worlds.ros import SUCCESS, bench

    topics = {
        "camera.camera_info_topic": "/camera/camera_info",
        "camera.depth_topic": "/camera/depth/image_raw",
    }
    with bench({**values, **topics, "use_sim_time": True}) as b:
        for transition in (b.node.trigger_configure, b.node.trigger_activate):
            assert transition() == SUCCESS
        publishers = {publisher.topic_name for publisher in b.node.publishers}
        subscriptions = {subscription.topic_name for subscription in b.node.subscriptions}
        own = b.node.get_name(), b.node.get_namespace()
        replies = b.node.get_service_names_and_types_by_node(*own)
        published = b.node.get_publisher_names_and_types_by_node(*own)
        requests = b.node.get_client_names_and_types_by_node(*own)
    # rclpy does not list the publishers of rcl; vision_msgs may be missing.
    publishers |= {name for name, _ in published}
    publishers.add("/semantic_anomaly/camera/detections")
    assert (PROFILE.get("node"), PROFILE.get("ns")) == own
    assert allowed("topic", "publish") == publishers
    assert allowed("topic", "subscribe") == subscriptions | {"/clock"}
    # Older distributions have no type descriptions, or they are switched off.
    described = {"/semantic_anomaly/get_type_description"}
    assert allowed("service", "reply") == {name for name, _ in replies} | described
    assert allowed("service", "request") == {name for name, _ in requests} == set()
