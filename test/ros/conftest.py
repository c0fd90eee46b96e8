"""Fixtures of the node's tests: a small index on disk, and the parameters of a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """Return a calibrated index; tests read it."""
    from worlds.ros import build_monitor

    return build_monitor(tmp_path_factory.mktemp("monitor"), tiny_backbone)


@pytest.fixture
def values(index: Path, tiny_backbone: Path) -> dict[str, Any]:
    """Return flat parameters of a node with the index."""
    from worlds.ros import parameters

    return parameters(index, tiny_backbone)
