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
# Arguments of replay.launch.py without a default here, and with one.
REQUIRED = {"bag": "rosbag2 folder or file to play", "index": "index folder"}
OPTIONAL = {
    **dict.fromkeys(("backbone", "image_topic", "transport", "camera_info_topic"), ""),
    **{"depth_topic": "", "rate": "1.0"},
}


def _recorder(context):
    """Return the recorder, and the shutdown of all processes after its report."""
    labels = LaunchConfiguration("labels").perform(context)
    recorder = Node(
        package=PACKAGE,
        executable="result_recorder",
        output="screen",
        arguments=[
            *("--out", LaunchConfiguration("out")),
            *("--name", LaunchConfiguration("bag")),
            *("--camera", LaunchConfiguration("camera")),
            # The last results arrive after the end of the bag.
            *("--idle-s", LaunchConfiguration("idle_s")),
            *(("--labels", labels) if labels else ()),
        ],
    )
    end = Shutdown(reason="the recorder has ended; its last line says with which result")
    return [RegisterEventHandler(OnProcessExit(target_action=recorder, on_exit=[end])), recorder]


def generate_launch_description() -> LaunchDescription:
    """Return the launch description."""
    share = FindPackageShare(PACKAGE)
    params_file = PathJoinSubstitution([share, "config", "semantic_anomaly.yaml"])
    arguments = [
        *((name, None, description) for name, description in REQUIRED.items()),
        *(
            (name, default, f"as for replay.launch.py: {name}")
            for name, default in OPTIONAL.items()
        ),
        ("out", None, "folder for the report"),
        ("labels", "", "events of the drive, YAML"),
        ("camera", "camera", "name of the camera in the node"),
        ("idle_s", "10.0", "seconds without a status that end the recording"),
        ("params_file", params_file, "YAML file with the node's parameters"),
    ]
    declared = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, default, description in arguments
    ]
    replay = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "replay.launch.py"])),
        launch_arguments=[
            *((name, LaunchConfiguration(name)) for name in (*REQUIRED, *OPTIONAL, "params_file")),
            ("rviz", "false"),
            # The recorder shuts down after the last results.
            ("stop_at_end", "false"),
        ],
    )
    return LaunchDescription([*declared, OpaqueFunction(function=_recorder), replay])
