"""Start the anomaly node and, with autostart, configure and activate it."""

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessStart
from launch.events import matches_action
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.event_handlers import OnStateTransition
from launch_ros.events.lifecycle import ChangeState
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare
from lifecycle_msgs.msg import Transition

PACKAGE = "semantic_anomaly"
# Launch arguments that replace a camera's parameter of the same name.
CAMERA_ARGUMENTS = ("image_topic", "transport", "camera_info_topic", "depth_topic")


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    default_params = PathJoinSubstitution(
        [FindPackageShare(PACKAGE), "config", "semantic_anomaly.yaml"]
    )
    arguments = [
        ("params_file", default_params, "YAML file with the node's parameters"),
        ("namespace", "", "namespace of the node"),
        ("autostart", "true", "configure and activate the node"),
        ("use_sim_time", "false", "take the time from /clock"),
        ("log_level", "info", "debug, info, warn, error or fatal"),
        ("index", "", "index folder; empty: as in params_file"),
        ("backbone", "", "backbone; empty: as in params_file, or else that of the index"),
        ("camera", "camera", "name of the camera to which the topic arguments apply"),
        ("image_topic", "", "image topic; empty: as in params_file"),
        ("transport", "", "raw or compressed; empty: as in params_file"),
        ("camera_info_topic", "", "CameraInfo topic; empty: as in params_file"),
        ("depth_topic", "", "depth image topic; empty: as in params_file"),
    ]
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, default, description in arguments
    ]
    return LaunchDescription([*declared, OpaqueFunction(function=_start)])


def _start(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    def given(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    def enabled(name: str) -> bool:
        value = given(name).lower()
        if value not in ("true", "false", "1", "0"):
            raise ValueError(f"launch argument '{name}': expected true or false, found '{value}'")
        return value in ("true", "1")

    overrides: dict[str, bool | ParameterValue] = {"use_sim_time": enabled("use_sim_time")}
    names = {name: name for name in ("index", "backbone")}
    names |= {name: f"{given('camera')}.{name}" for name in CAMERA_ARGUMENTS}
    for argument, parameter in names.items():
        if given(argument):
            # Without a type, a folder named 2024 would arrive as a number.
            overrides[parameter] = ParameterValue(given(argument), value_type=str)
    node = LifecycleNode(
        package=PACKAGE,
        executable="anomaly_node",
        name="semantic_anomaly",
        namespace=given("namespace"),
        parameters=[given("params_file"), overrides],
        arguments=["--ros-args", "--log-level", given("log_level")],
        output="screen",
        respawn=False,
    )
    return [*(_autostart(node) if enabled("autostart") else []), node]


def _autostart(node: LifecycleNode) -> list[LaunchDescriptionEntity]:
    configured = OnStateTransition(
        target_lifecycle_node=node,
        # Not from 'deactivating': a node that was deactivated stays inactive.
        start_state="configuring",
        goal_state="inactive",
        entities=[_change_state(node, Transition.TRANSITION_ACTIVATE)],
    )
    refused = OnStateTransition(
        target_lifecycle_node=node,
        start_state="configuring",
        goal_state="unconfigured",
        entities=[LogInfo(msg="semantic_anomaly could not be configured; see its log")],
    )
    started = OnProcessStart(
        target_action=node, on_start=[_change_state(node, Transition.TRANSITION_CONFIGURE)]
    )
    # Registered before the node starts, so that its first transition is not missed.
    return [RegisterEventHandler(handler) for handler in (configured, refused, started)]


def _change_state(node: LifecycleNode, transition_id: int) -> EmitEvent:
    event = ChangeState(lifecycle_node_matcher=matches_action(node), transition_id=transition_id)
    return EmitEvent(event=event)
