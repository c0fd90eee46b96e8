"""Synthetic street: drives with ground truth for the demo, tests and the shipped backbone."""

from semantic_anomaly.synthetic.drive import (
    KINDS,
    ODD_ARRANGEMENTS,
    ODD_OBJECTS,
    StreetDrive,
    StreetFrame,
    family,
)
from semantic_anomaly.synthetic.scene import CameraModel

__all__ = [
    "KINDS",
    "ODD_ARRANGEMENTS",
    "ODD_OBJECTS",
    "CameraModel",
    "StreetDrive",
    "StreetFrame",
    "family",
]
