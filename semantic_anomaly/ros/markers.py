"""Localizations as rviz markers in the camera's optical frame.

Pure functions without state: any thread may call them.
"""

from __future__ import annotations

from collections.abc import Sequence

from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from std_msgs.msg import ColorRGBA, Header
from visualization_msgs.msg import Marker, MarkerArray

from semantic_anomaly.detection.geometry import ASSUMED, PlacedBox
from semantic_anomaly.structures import ComponentState, Localization

# Okabe and Ito's vermilion and yellow: told apart with any colour vision.
_COLOURS = {
    ComponentState.CONFIRMED: ColorRGBA(r=0.835, g=0.369, b=0.0, a=1.0),
    ComponentState.CANDIDATE: ColorRGBA(r=0.941, g=0.894, b=0.259, a=0.8),
}
_WHITE = ColorRGBA(r=1.0, g=1.0, b=1.0, a=1.0)
_LINE_M = 0.05
_TEXT_M = 0.4
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0))


def marker_array(header: Header, found: Sequence[tuple[Localization, PlacedBox]]) -> MarkerArray:
    """Return DELETEALL and, for every localization, its box and a label.

    A box at an assumed range is joined to the camera by rays: only its direction is known.
    """
    markers = [Marker(header=header, action=Marker.DELETEALL)]
    for localization, box in found:
        markers.append(_box(header, localization, box))
        markers.append(_label(header, localization, box))
    return MarkerArray(markers=markers)


def _marker(header: Header, namespace: str, label: int, kind: int) -> Marker:
    return Marker(
        header=header,
        ns=namespace,
        id=int(label),
        type=kind,
        action=Marker.ADD,
        pose=Pose(orientation=Quaternion(w=1.0)),
        lifetime=Duration(sec=1),
    )


def _box(header: Header, localization: Localization, box: PlacedBox) -> Marker:
    marker = _marker(header, "boxes", localization.label, Marker.LINE_LIST)
    marker.scale = Vector3(x=_LINE_M)
    marker.color = _COLOURS[localization.state]
    corners = [_point(corner) for corner in box.corners]
    marker.points = [corners[end] for edge in _EDGES for end in edge]
    if box.range_source == ASSUMED:
        marker.points += [end for corner in corners for end in (Point(), corner)]
    return marker


def _label(header: Header, localization: Localization, box: PlacedBox) -> Marker:
    marker = _marker(header, "labels", localization.label, Marker.TEXT_VIEW_FACING)
    marker.scale = Vector3(z=_TEXT_M)
    marker.color = _WHITE
    top = box.corners[:2].mean(axis=0)
    # y points down in the optical frame.
    marker.pose.position = _point((top[0], top[1] - _TEXT_M, top[2]))
    marker.text = f"{localization.score:.2f}  {box.range_m:.1f} m ({box.range_source})"
    if localization.state is ComponentState.CANDIDATE:
        marker.text += "  candidate"
    return marker


def _point(xyz: Sequence[float]) -> Point:
    return Point(x=float(xyz[0]), y=float(xyz[1]), z=float(xyz[2]))
