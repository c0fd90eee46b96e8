"""What the commands are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.cli import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> World:
    """Return drives and indexes; tests read them and write elsewhere."""
    return make_world(tmp_path_factory.mktemp("world"), tiny_backbone)


@pytest.fixture
def index(world: World, tmp_path: Path) -> Path:
    """Return a copy of the calibrated index."""
    return world.copy("index", tmp_path / "index")
