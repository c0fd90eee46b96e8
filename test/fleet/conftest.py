"""A real Ray cluster of two nodes on this machine, and drives for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds.cli import SIZE
from worlds.fleet import NODE

from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import write_folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Return a cluster of two nodes with a CPU each."""
    pytest.importorskip("ray", reason="Ray is not installed: extra [fleet]")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def drives(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return folders of five nominal drives."""
    root = tmp_path_factory.mktemp("drives")
    for seed in range(5):
        drive = StreetDrive(seed, 36, image_hw=SIZE)
        write_folder([drive], root / f"drive_{seed}", stride=6, progress=False)
    return [str(root / f"drive_{seed}") for seed in range(5)]


@pytest.fixture(scope="session")
def options(tiny_backbone: Path) -> dict[str, Any]:
    """Return settings of a small backbone, everything set that is measured otherwise."""
    return {
        **{"backbone": str(tiny_backbone), "input_size": 140, "device": "cpu", "threads": 1},
        **{"dtype": "float32", "execution": "torch", "dedup_distance": 0.05},
    }
