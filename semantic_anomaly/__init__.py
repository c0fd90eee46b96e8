"""Semantic anomaly detection for cameras: is the camera seeing something never seen while safe?"""

import os

__version__ = "0.1.0"

# Images with more pixels are refused. OpenCV reads the variable once, when it is imported.
MAX_IMAGE_PIXELS = 40_000_000
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_IMAGE_PIXELS))
