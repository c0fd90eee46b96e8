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


def stages(backbone: Path) -> list[str]:
    """Return two grids of patches, and instances."""
    return [
        f"{backbone} layer=3 size=140",
        f"{backbone} layer=2 size=112 average=3 weight=0.5",
        f"{backbone} layer=3 size=140 kind=instances",
    ]


@pytest.fixture(scope="session")
def staged_index(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """Return a calibrated index of three stages; tests read it."""
    from worlds.ros import build_monitor

    folder = tmp_path_factory.mktemp("staged")
    return build_monitor(folder, tiny_backbone, stages=stages(tiny_backbone))


@pytest.fixture
def staged(staged_index: Path, tiny_backbone: Path) -> dict[str, Any]:
    """Return flat parameters of a node with the index of three stages."""
    from worlds.ros import parameters

    return parameters(staged_index, tiny_backbone, stages=stages(tiny_backbone))
