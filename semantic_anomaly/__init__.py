"""Semantic anomaly detection for cameras: is the camera seeing something never seen while safe?"""

__version__ = "0.1.0"
