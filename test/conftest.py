"""Fixtures shared by the tests: small models made here, nothing from a network."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Field assignments of messages are unchecked by default, and wrong scalars arrive as zero.
os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")
os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "LARGE_DATA")
# A shell that starts the tests in the background makes them, and their children, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _reference_precision() -> Iterator[None]:
    """Compute in float32 by torch; tests of the choice set the limit again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semantic_anomaly.embedding.precision._FAST_MS", float("inf"))
        yield


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random DINOv2: 32-d, 3 layers, patch 14."""
    from worlds.backbones import save_backbone

    return save_backbone(tmp_path_factory.mktemp("backbone") / "tiny_dinov2")


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a seeded random generator."""
    return np.random.default_rng(0)
