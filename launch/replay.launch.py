"""Play a bag to the anomaly node with the time of the bag, and show the results in rviz."""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    RegisterEventHandler,
    Shutdown,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.event_handlers import OnStateTransition
from launch_ros.substitutions import FindPackageShare

PACKAGE = "semantic_anomaly"


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    share = FindPackageShare(PACKAGE)
    params_file = PathJoinSubstitution([share, "config", "semantic_anomaly.yaml"])
    rviz_config = PathJoinSubstitution([share, "config", "semantic_anomaly.rviz"])
    node_arguments = [
        ("index", None, "index folder"),
        ("backbone", "", "empty: that of the index"),
        ("params_file", params_file, "YAML file with the node's parameters"),
        ("image_topic", "", "image topic of the bag"),
        ("transport", "", "raw or compressed"),
        ("camera_info_topic", "", "CameraInfo topic of the bag"),
        ("depth_topic", "", "depth image topic of the bag"),
    ]
    arguments = [
        ("bag", None, "rosbag2 folder or file to play"),
        *node_arguments,
        ("rate", "1.0", "speed of the bag"),
        ("rviz", "true", "start rviz"),
        ("rviz_config", rviz_config, "configuration of rviz"),
        ("stop_at_end", "true", "shut down at the end of the bag"),
    ]
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, default, description in arguments
    ]
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(
            PathJoinSubstitution([share, "launch", "semantic_anomaly.launch.py"])
        ),
        launch_arguments=[
            *((name, LaunchConfiguration(name)) for name, _, _ in node_arguments),
            ("use_sim_time", "true"),
        ],
    )
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        arguments=["-d", LaunchConfiguration("rviz_config")],
        parameters=[{"use_sim_time": True}],
        condition=IfCondition(LaunchConfiguration("rviz")),
    )
    play = ExecuteProcess(
        cmd=[
            *("ros2", "bag", "play", LaunchConfiguration("bag")),
            *("--clock", "100", "--rate", LaunchConfiguration("rate")),
        ],
        output="screen",
    )
    # An inactive node would miss the first frames.
    when_active = OnStateTransition(goal_state="active", entities=[play])
    stop_at_end = IfCondition(LaunchConfiguration("stop_at_end"))
    at_end = OnProcessExit(
        target_action=play, on_exit=[Shutdown(reason="the bag has ended", condition=stop_at_end)]
    )
    refused = OnStateTransition(
        start_state="configuring",
        goal_state="unconfigured",
        entities=[Shutdown(reason="the node could not be configured; see its log")],
    )
    handlers = [RegisterEventHandler(handler) for handler in (when_active, at_end, refused)]
    return LaunchDescription([*declared, *handlers, node, rviz])
