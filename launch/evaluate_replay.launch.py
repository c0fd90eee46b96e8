"""Play a bag to the node, record its results, and write the report of `semantic-anomaly replay`."""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    IncludeLaunchDescription,
    OpaqueFunction,
    RegisterEventHandler,
    Shutdown,
)
from launch.event_handlers import OnProcessExit
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare

PACKAGE = "semantic_anomaly"
PASSED_ON = {
    "bag": None,
    "index": None,
    "backbone": "",
    "image_topic": "",
    "transport": "",
    "camera_info_topic": "",
    "depth_topic": "",
    "rate": "1.0",
}


def _recorder(context):
    """Return the recorder, and the shutdown of all processes after its report."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ("labels", "bag")}
    recorder = Node(
        package=PACKAGE,
        executable="result_recorder",
        output="screen",
        arguments=[
            *("--out", LaunchConfiguration("out")),
            *("--name", given["bag"]),
            *("--camera", LaunchConfiguration("camera")),
            # The last results arrive after the end of the bag.
            *("--idle-s", LaunchConfiguration("idle_s")),
            *(("--labels", given["labels"]) if given["labels"] else ()),
        ],
    )
    end = Shutdown(reason="the recorder has ended; its last line says with which result")
    return [RegisterEventHandler(OnProcessExit(target_action=recorder, on_exit=[end])), recorder]


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    share = FindPackageShare(PACKAGE)
    params_file = PathJoinSubstitution([share, "config", "semantic_anomaly.yaml"])
    described = {"bag": "rosbag2 folder or file to play", "index": "index folder"}
    arguments = [
        DeclareLaunchArgument(
            name,
            default_value=default,
            description=described.get(name, f"as for replay.launch.py: {name}"),
        )
        for name, default in PASSED_ON.items()
    ]
    arguments += [
        DeclareLaunchArgument("out", description="folder for the report"),
        DeclareLaunchArgument("labels", default_value="", description="events of the drive, YAML"),
        DeclareLaunchArgument(
            "camera", default_value="camera", description="name of the camera in the node"
        ),
        DeclareLaunchArgument(
            "idle_s",
            default_value="10.0",
            description="seconds without a status that end the recording",
        ),
        DeclareLaunchArgument("params_file", default_value=params_file),
    ]
    replay = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "replay.launch.py"])),
        launch_arguments=[
            *((name, LaunchConfiguration(name)) for name in (*PASSED_ON, "params_file")),
            ("rviz", "false"),
            # The recorder shuts down after the last results.
            ("stop_at_end", "false"),
        ],
    )
    return LaunchDescription([*arguments, OpaqueFunction(function=_recorder), replay])
