"""Launch files: evaluated where the launch system is installed, otherwise by their syntax tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from semantic_anomaly.settings import camera_setting_specs, setting_specs

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
NODE = LAUNCH / "semantic_anomaly.launch.py"
REPLAY = LAUNCH / "replay.launch.py"
EVALUATE = LAUNCH / "evaluate_replay.launch.py"
STATES = ("start_state", "goal_state")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def strings(path: Path) -> set[str]:
    return {
        node.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("path", [NODE, REPLAY, EVALUATE])
def test_launch_files_have_their_entry_point_and_import_what_is_declared(path: Path) -> None:
    names = [node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)]
    assert "generate_launch_description" in names
    declared = re.findall(r"<exec_depend>(\w+)<", (ROOT / "package.xml").read_text("utf-8"))
    modules = [n.module or "" for n in ast.walk(tree(path)) if isinstance(n, ast.ImportFrom)]
    assert modules and {module.partition(".")[0] for module in modules} <= set(declared)


def test_launch_files_name_what_the_package_installs() -> None:
    setup = (ROOT / "setup.py").read_text("utf-8")
    assert "anomaly_node = semantic_anomaly.ros.node:main" in setup
    assert {"anomaly_node", "semantic_anomaly.yaml"} <= strings(NODE)
    assert {"semantic_anomaly.launch.py", "semantic_anomaly.rviz"} <= strings(REPLAY)
    assert "result_recorder = semantic_anomaly.ros.recorder:main" in setup
    assert {"replay.launch.py", "result_recorder"} <= strings(EVALUATE)
    for name in ("semantic_anomaly.yaml", "semantic_anomaly.rviz"):
        assert (ROOT / "config" / name).is_file()


def test_arguments_that_replace_parameters_are_settings() -> None:
    [listed] = [
        ast.literal_eval(node.value)
        for node in tree(NODE).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CAMERA_ARGUMENTS"
    ]
    assert set(listed) <= set(camera_setting_specs())
    assert {"index", "backbone"} <= set(setting_specs()) & strings(NODE)


def test_activation_follows_configuration_only() -> None:
    # A node that was deactivated on request must stay inactive.
    transitions = [
        {item.arg: ast.literal_eval(item.value) for item in call.keywords if item.arg in STATES}
        for call in ast.walk(tree(NODE))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "OnStateTransition"
    ]
    assert {"start_state": "configuring", "goal_state": "inactive"} in transitions
    assert all(states.get("start_state") == "configuring" for states in transitions)


class TestRealLaunch:
    """The descriptions, evaluated by launch_ros."""

    @staticmethod
    def entities(path: Path, **arguments: str) -> tuple[Any, list[Any]]:
        pytest.importorskip("launch_ros")
        from launch import LaunchContext
        from launch.launch_description_sources import PythonLaunchDescriptionSource

        context = LaunchContext()
        source = PythonLaunchDescriptionSource(str(path))
        description = source.get_launch_description(context)
        context.launch_configurations.update(arguments)
        return context, list(description.entities)

    def test_every_argument_has_a_description_or_a_default(self) -> None:
        for path in (NODE, REPLAY, EVALUATE):
            _, entities = self.entities(path)
            declared = [e for e in entities if type(e).__name__ == "DeclareLaunchArgument"]
            assert len(declared) >= 10
            assert all(e.description or e.default_value is not None for e in declared)

    def test_autostart_adds_its_handlers_and_the_node_comes_last(self) -> None:
        arguments = {
            "params_file": str(ROOT / "config" / "semantic_anomaly.yaml"),
            **dict.fromkeys(("namespace", "image_topic", "transport", "backbone"), ""),
            **dict.fromkeys(("camera_info_topic", "depth_topic"), ""),
            **{"camera": "camera", "index": "2024", "log_level": "info"},
            "use_sim_time": "true",
        }
        for autostart, count in (("true", 4), ("false", 1)):
            context, entities = self.entities(NODE, autostart=autostart, **arguments)
            [opaque] = [e for e in entities if type(e).__name__ == "OpaqueFunction"]
            actions = opaque.execute(context)
            assert len(actions) == count and type(actions[-1]).__name__ == "LifecycleNode"

    def test_a_switch_that_is_neither_true_nor_false_is_refused(self) -> None:
        context, entities = self.entities(NODE, autostart="perhaps", use_sim_time="perhaps")
        [opaque] = [e for e in entities if type(e).__name__ == "OpaqueFunction"]
        with pytest.raises(ValueError, match="use_sim_time"):
            opaque.execute(context)
