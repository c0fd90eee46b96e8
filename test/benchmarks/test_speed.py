"""The benchmark of the search runs, on small indexes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed.py"


@pytest.mark.parametrize("mode", ["lists", "graph", "exact"])
def test_search_is_measured_for_every_kind_of_frame(mode: str) -> None:
    specification = importlib.util.spec_from_file_location("speed", SCRIPT)
    assert specification is not None and specification.loader is not None
    speed = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(speed)
    rows = speed.search_rows(speed.World(16), [(300, mode, (9, 16))], 2)
    assert [row["frames"] for row in rows] == list(speed.KINDS)
    assert all(row["median_ms"] >= 0.0 for row in rows)
