"""Package metadata: versions agree, dependencies are declared and pinned, scripts exist."""

from __future__ import annotations

import ast
import importlib
import re
import xml.etree.ElementTree as ElementTree
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import semantic_anomaly

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
MANIFEST = ElementTree.parse(ROOT / "package.xml").getroot()
SETUP = (ROOT / "setup.py").read_text("utf-8")
# Arguments of the call of setup() that are literals.
OPTIONS = {
    keyword.arg: ast.literal_eval(keyword.value)
    for call in ast.walk(ast.parse(SETUP))
    if isinstance(call, ast.Call) and ast.unparse(call.func) == "setup"
    for keyword in call.keywords
    if keyword.arg in ("install_requires", "extras_require", "entry_points", "license")
}
EXEC_DEPENDS = {element.text for element in MANIFEST.findall("exec_depend")}


def test_version_is_the_same_everywhere() -> None:
    version = semantic_anomaly.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert MANIFEST.findtext("version") == CITATION["version"] == version
    assert "version=version" in SETUP, "setup.py must read the version, not repeat it"
    assert f"## [{version}]" in changelog or f"released as {version}" in changelog


def test_licence_is_the_same_everywhere() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")[:200]
    assert MANIFEST.findtext("license") == CITATION["license"] == "Apache-2.0"
    assert OPTIONS["license"] == "Apache-2.0"


def test_citation_refers_to_the_paper() -> None:
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    [paper] = CITATION["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2505.07998" and len(paper["authors"]) == 7


def test_every_imported_ros_package_is_declared() -> None:
    imported = set()
    for path in [*(ROOT / "semantic_anomaly/ros").glob("*.py"), *(ROOT / "launch").glob("*.py")]:
        names = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text("utf-8"), re.M)
        imported |= {name for name in names if name.endswith(("_msgs", "_srvs", "_interfaces"))}
        imported |= {name for name in names if name in ("rclpy", "launch", "launch_ros")}
    assert MANIFEST.get("format") == "3"
    # vision_msgs is used where it is installed and is not required.
    assert "rclpy" in imported and imported - {"vision_msgs"} <= EXEC_DEPENDS


def test_console_scripts_lead_to_functions() -> None:
    scripts = dict(script.split(" = ") for script in OPTIONS["entry_points"]["console_scripts"])
    assert {"semantic-anomaly", "anomaly_node"} <= set(scripts)
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_what_setup_requires(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = [p for p in pins if p.marker is None or p.marker.evaluate(environment)]
    names = [canonicalize_name(pin.name) for pin in pinned]
    assert len(names) == len(set(names)), "one version for each Python"
    assert all(re.fullmatch(r"==[\w.+]+", str(pin.specifier)) for pin in pinned)
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pinned}
    texts = chain(OPTIONS["install_requires"], *OPTIONS["extras_require"].values())
    for requirement in (Requirement(text) for text in texts if text != "setuptools"):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier


def test_workflow_runs_every_supported_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    jobs = workflow["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == list(PYTHONS)
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert commands == {"make test", "make test-slow", "make docs"}
    assert f'python_requires=">={PYTHONS[0]}"' in SETUP
    assert f"python_version = {PYTHONS[0]}" in (ROOT / "setup.cfg").read_text("utf-8")
    assert 'target-version = "py310"' in (ROOT / "ruff.toml").read_text("utf-8")


def test_colcon_finds_the_tests() -> None:
    # colcon runs pytest for packages that have it in tests_require or in the extra "test".
    assert any(Requirement(text).name == "pytest" for text in OPTIONS["extras_require"]["test"])
    assert MANIFEST.findtext("export/build_type") == "ament_python"
    assert "python3-pytest" in {element.text for element in MANIFEST.findall("test_depend")}


def test_contributing_guide_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    guide = text.partition("\n## How to add")[2].partition("\n## ")[0]
    assert "reject" in guide
    sources = [*ROOT.glob("semantic_anomaly/**/*.py"), *ROOT.glob("test/**/*.py")]
    words = set(re.findall(r"\w+", "".join(path.read_text("utf-8") for path in sources)))
    for name in re.findall(r"`([\w./-]+)`", guide):
        folders = (ROOT, ROOT / "semantic_anomaly")
        path = any((folder / name).exists() for folder in folders)
        assert path or name in words, f"CONTRIBUTING.md: '{name}' does not exist"
