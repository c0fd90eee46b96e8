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
CLOCK_HZ = "100"


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    share = FindPackageShare(PACKAGE)
    params_file = PathJoinSubstitution([share, "config", "semantic_anomaly.yaml"])
    rviz_config = PathJoinSubstitution([share, "config", "semantic_anomaly.rviz"])
    arguments = [
        DeclareLaunchArgument("bag", description="rosbag2 folder or file to play"),
        DeclareLaunchArgument("index", description="index folder"),
        DeclareLaunchArgument("backbone", default_value="", description="empty: that of the index"),
        DeclareLaunchArgument("params_file", default_value=params_file),
        DeclareLaunchArgument(
            "image_topic", default_value="", description="image topic of the bag"
        ),
        DeclareLaunchArgument("transport", default_value="", description="raw or compressed"),
        DeclareLaunchArgument("camera_info_topic", default_value=""),
        DeclareLaunchArgument("depth_topic", default_value=""),
        DeclareLaunchArgument("rate", default_value="1.0", description="speed of the bag"),
        DeclareLaunchArgument("rviz", default_value="true", description="start rviz"),
        DeclareLaunchArgument("rviz_config", default_value=rviz_config),
        DeclareLaunchArgument(
            "stop_at_end", default_value="true", description="shut down at the end of the bag"
        ),
    ]
    passed_on = (
        *("index", "backbone", "params_file", "image_topic", "transport"),
        *("camera_info_topic", "depth_topic"),
    )
    node = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(
            PathJoinSubstitution([share, "launch", "semantic_anomaly.launch.py"])
        ),
        launch_arguments=[
            *((name, LaunchConfiguration(name)) for name in passed_on),
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
            *("--clock", CLOCK_HZ, "--rate", LaunchConfiguration("rate")),
        ],
        output="screen",
    )
    # An inactive node would miss the first frames.
    when_active = OnStateTransition(goal_state="active", entities=[play])
    at_end = OnProcessExit(
        target_action=play,
        on_exit=[
            Shutdown(
                reason="the bag has ended",
                condition=IfCondition(LaunchConfiguration("stop_at_end")),
            )
        ],
    )
    refused = OnStateTransition(
        start_state="configuring",
        goal_state="unconfigured",
        entities=[Shutdown(reason="the node could not be configured; see its log")],
    )
    handlers = [RegisterEventHandler(handler) for handler in (when_active, at_end, refused)]
    return LaunchDescription([*arguments, *handlers, node, rviz])
