"""The package's own description: versions agree, what setup.py names exists."""

from __future__ import annotations

import importlib
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import semantic_anomaly

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ElementTree.parse(ROOT / "package.xml").getroot()
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


def test_version_is_the_same_everywhere() -> None:
    assert MANIFEST.findtext("version") == semantic_anomaly.__version__
    assert "version=version" in SETUP, "setup.py must read the version, not repeat it"


@pytest.mark.parametrize(
    "name", ["rclpy", "cv_bridge", "sensor_msgs", "std_msgs", "lifecycle_msgs"]
)
def test_package_xml_names_the_ros_dependencies(name: str) -> None:
    assert MANIFEST.get("format") == "3"
    assert name in [element.text for element in MANIFEST.findall("exec_depend")]


@pytest.mark.parametrize("name", ["torch", "transformers", "numpy", "hnswlib", "opencv-python"])
def test_setup_names_the_python_dependencies(name: str) -> None:
    required = re.search(r"install_requires=\[(.*?)\]", SETUP, re.S)
    assert required is not None and f'"{name}' in required.group(1)


def test_every_imported_ros_package_is_declared() -> None:
    declared = {element.text for element in MANIFEST.findall("exec_depend")}
    imported = set()
    for path in [*(ROOT / "semantic_anomaly/ros").glob("*.py"), *(ROOT / "launch").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"^\s*(?:from|import) (\w+)", text, re.M)
        imported |= {n for n in found if n.endswith(("_msgs", "_srvs", "_interfaces"))}
        imported |= {n for n in found if n in ("rclpy", "launch", "launch_ros", "cv_bridge")}
    # vision_msgs is used where it is installed and is not required.
    assert imported and imported - {"vision_msgs"} <= declared


def test_console_scripts_lead_to_functions() -> None:
    scripts = re.findall(r'"([\w-]+) = ([\w.]+):(\w+)"', SETUP)
    assert {name for name, _, _ in scripts} >= {"semantic-anomaly", "anomaly_node"}
    for name, module, function in scripts:
        assert callable(getattr(importlib.import_module(module), function)), name


def test_constraints_pin_what_setup_requires() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins.splitlines()}
    required = re.findall(r'^\s+"([A-Za-z][\w-]*)(?:\[\w+\])?(?:>=[\d.]+)?",$', SETUP, re.M)
    missing = {name.lower() for name in required} - pinned - {"setuptools"}
    assert not missing
    assert "torch==2.13.0" in pins and "hnswlib==0.8.0" in pins


def test_licence_is_apache() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]
    assert MANIFEST.findtext("license") == "Apache-2.0"
