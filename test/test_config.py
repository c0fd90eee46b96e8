"""YAML, documentation and settings table agree; the rviz file names what exists."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from semantic_anomaly.settings import (
    Settings,
    camera_setting_specs,
    read_settings_file,
    setting_specs,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "config" / "semantic_anomaly.yaml"
RVIZ = ROOT / "config" / "semantic_anomaly.rviz"
PAGE = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")

# plugins_description.xml of ros2/rviz, rviz_default_plugins, and the panels built into rviz_common.
RVIZ_CLASSES = {
    *(f"rviz_default_plugins/{name}" for name in (
        "AccelStamped", "Axes", "Camera", "CameraInfo", "DepthCloud", "Effort", "FluidPressure",
        "Grid", "GridCells", "Illuminance", "Image", "InteractiveMarkers", "LaserScan", "Map",
        "Marker", "MarkerArray", "Odometry", "Path", "PointCloud", "PointCloud2", "PointStamped",
        "Polygon", "Pose", "PoseArray", "PoseWithCovariance", "Range", "RelativeHumidity",
        "RobotModel", "TF", "Temperature", "TwistStamped", "Wrench",
        "FocusCamera", "Interact", "Measure", "MoveCamera", "PublishPoint", "Select",
        "SetGoal", "SetInitialPose",
        "FPS", "Orbit", "ThirdPersonFollower", "TopDownOrtho", "XYOrbit",
    )),
    *(f"rviz_common/{name}" for name in (
        "Displays", "Help", "Selection", "Time", "Tool Properties", "Transformation", "Views",
    )),
}  # fmt: skip


@pytest.fixture(scope="module")
def render() -> ModuleType:
    path = ROOT / "tools" / "render_settings.py"
    spec = importlib.util.spec_from_file_location("render_settings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> dict[str, tuple[object, str]]:
    """Return default and description of every parameter by its name in YAML."""
    defaults = {name: (spec.default, spec.description) for name, spec in setting_specs().items()}
    for name, spec in camera_setting_specs().items():
        defaults[f"camera.{name}"] = (spec.default, spec.description)
    return defaults


def test_the_yaml_holds_every_parameter_and_its_default() -> None:
    document = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    [(node, content)] = document.items()
    assert node == "/**"
    flat = dict(content["ros__parameters"])
    flat |= {f"camera.{name}": value for name, value in flat.pop("camera").items()}
    # ROS parameters have no null: what is unset stands in a comment.
    assert list(flat) == [name for name, (default, _) in rows().items() if default is not None]
    for name, (default, _) in rows().items():
        if default is None:
            assert f"    # {name}: unset\n" in CONFIG.read_text(encoding="utf-8")
            continue
        expected = list(default) if isinstance(default, tuple) else default
        assert flat[name] == expected and type(flat[name]) is type(expected), name
    assert Settings.from_parameters(read_settings_file(CONFIG)) == Settings()


def test_every_parameter_in_the_yaml_has_its_description_above() -> None:
    lines = CONFIG.read_text(encoding="utf-8").splitlines()
    above = {}
    for comment, line in itertools.pairwise(lines):
        prefix = "camera." if line.startswith(" " * 6) else ""
        above[prefix + line.strip("# ").partition(":")[0]] = comment.strip()
    for name, (_, description) in rows().items():
        assert above[name].startswith(f"# {description}"), name


def test_the_documentation_lists_every_parameter(render: ModuleType) -> None:
    table = PAGE.partition(render.BEGIN)[2].partition(render.END)[0]
    cells = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in table.splitlines()]
    listed = {row[0].strip("`"): (row[1].strip("`"), row[-1]) for row in cells if len(row) > 3}
    for name, (default, description) in rows().items():
        shown = name.replace("camera.", "<camera>.", 1) if name.startswith("camera.") else name
        assert listed[shown] == (render.value_text(default), description), name


def test_the_rendered_files_are_up_to_date(render: ModuleType) -> None:
    assert render.main(["--check"]) == 0, "run tools/render_settings.py --write"


def test_check_notices_a_change_and_write_repairs_it(
    render: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, page = tmp_path / "c.yaml", tmp_path / "settings.md"
    page.write_text(f"before\n{render.BEGIN}\n(outdated)\n{render.END}\nafter\n")
    monkeypatch.setattr(render, "CONFIG", config)
    monkeypatch.setattr(render, "PAGE", page)
    assert render.main(["--check"]) == 1 and not config.exists()
    assert render.main(["--write"]) == 0
    assert render.main(["--check"]) == 0
    assert config.read_text() == CONFIG.read_text(encoding="utf-8")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "(outdated)" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        render.main(["--write"])


def classes(tree: object) -> list[str]:
    if isinstance(tree, dict):
        own = [tree["Class"]] if tree.get("Class") else []
        return own + [name for value in tree.values() for name in classes(value)]
    if isinstance(tree, list):
        return [name for value in tree for name in classes(value)]
    return []


def test_rviz_shows_image_overlay_heatmap_and_markers() -> None:
    tree = yaml.safe_load(RVIZ.read_text(encoding="utf-8"))
    assert classes(tree) and set(classes(tree)) <= RVIZ_CLASSES
    displays = {row["Name"]: row for row in tree["Visualization Manager"]["Displays"]}
    base = "/semantic_anomaly/camera"
    assert displays["Image"]["Topic"]["Value"] == Settings().camera_settings["camera"].image_topic
    assert displays["Overlay"]["Topic"]["Value"] == f"{base}/overlay"
    assert displays["Heatmap"]["Topic"]["Value"] == f"{base}/heatmap"
    assert displays["Markers"]["Topic"]["Value"] == f"{base}/markers"
    # A range of its own per image would make every nominal frame glow.
    assert displays["Heatmap"]["Normalize Range"] is False
