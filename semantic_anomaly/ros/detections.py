"""Localizations as vision_msgs/Detection2DArray, where vision_msgs is installed.

Pure functions without state: any thread may call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from std_msgs.msg import Header

from semantic_anomaly.structures import Localization

CLASS_ID = "anomaly"


def detection_array_type() -> Any | None:
    """Return the message class, None where vision_msgs is not installed."""
    try:
        from vision_msgs.msg import Detection2DArray
    except ImportError:
        return None
    return Detection2DArray


def detections_message(header: Header, localizations: Sequence[Localization]) -> Any:
    """Return a Detection2DArray: one class, the patch distance as its score, the label as id."""
    from vision_msgs import msg

    array = msg.Detection2DArray(header=header)
    for place in localizations:
        x0, y0, x1, y1 = (float(edge) for edge in place.box_xyxy)
        box = msg.BoundingBox2D(size_x=x1 - x0, size_y=y1 - y0)
        # Boxes span pixel edges; ROS counts from pixel centres.
        box.center.position.x = (x0 + x1) / 2 - 0.5
        box.center.position.y = (y0 + y1) / 2 - 0.5
        hypothesis = msg.ObjectHypothesisWithPose()
        hypothesis.hypothesis.class_id = CLASS_ID
        hypothesis.hypothesis.score = float(place.score)
        found = msg.Detection2D(header=header, bbox=box, id=str(place.label))
        found.results = [hypothesis]
        array.detections.append(found)
    return array
