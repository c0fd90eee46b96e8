"""The settings of one camera."""

from __future__ import annotations

from dataclasses import dataclass

from semantic_anomaly.errors import SettingsError
from semantic_anomaly.setting_spec import check_fields, setting


@dataclass(frozen=True)
class CameraSettings:
    """The settings of one camera; in YAML under the camera's name."""

    image_topic: str = setting(
        "/camera/image_raw",
        "Image topic; compressed topics end in the transport's name, e.g. .../compressed.",
    )
    transport: str = setting(
        "raw",
        "How images arrive: sensor_msgs/Image or sensor_msgs/CompressedImage.",
        choices=("raw", "compressed"),
    )
    camera_info_topic: str = setting(
        "", "CameraInfo topic; empty: markers are drawn with an assumed 90 degree lens."
    )
    depth_topic: str = setting(
        "",
        "Depth image topic (32FC1 metres or 16UC1 millimetres) aligned with the image; "
        "empty: none.",
    )
    camera_height_m: float = setting(
        0.0,
        "Height of the camera above a flat ground, for marker ranges without depth; 0: unknown.",
        minimum=0.0,
        maximum=100.0,
    )
    index: str = setting("", "Index folder of this camera; empty: the common 'index'.")
    region_of_interest: tuple[float, ...] = setting(
        (),
        "Polygon x0, y0, x1, y1, ... in relative image coordinates [0, 1]; empty: the whole image.",
        minimum=0.0,
        maximum=1.0,
    )
    ego_mask: str = setting(
        "", "PNG whose non-zero pixels show the vehicle itself and take no part; empty: none."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        # A polygon needs three corners of two coordinates each.
        if len(self.region_of_interest) % 2 or 0 < len(self.region_of_interest) < 6:
            raise SettingsError(
                "setting 'region_of_interest': expected at least 3 pairs x, y, "
                f"found {len(self.region_of_interest)} numbers"
            )
