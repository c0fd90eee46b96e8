"""A seeded sample of the fault campaign; `make faults` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.campaign import groups, run_group
from faults.fuzz import NAMES, fuzz
from faults.guards import GUARDS, ROOT

# Faults of each group: enough for a part of the classes, another one with another seed.
SAMPLES = {"files": 60, "processes": 12, "messages": 40, "lifecycle": 12}
FUZZ_CASES = 40


@pytest.mark.parametrize("group", groups())
def test_no_fault_gets_through(group: str, tmp_path: Path) -> None:
    verdicts = run_group(group, tmp_path / group, count=SAMPLES[group], progress=False)
    assert len(verdicts) >= SAMPLES[group]
    wrong = [verdict for verdict in verdicts if not verdict.is_allowed]
    assert not wrong, "\n".join(f"{v.fault_class}, {v.point}: {v.violations}" for v in wrong)


@pytest.mark.parametrize("name", NAMES)
def test_parsers_raise_nothing_but_errors_of_bad_input(name: str) -> None:
    count = fuzz(name, FUZZ_CASES)
    assert not count.failure
    assert count.cases >= FUZZ_CASES // 2 and count.refused


def test_guards_that_are_removed_are_still_there() -> None:
    counts = {
        guard.name: (ROOT / "semantic_anomaly" / guard.file).read_text().count(guard.old)
        for guard in GUARDS
    }
    assert len(counts) == len(GUARDS) and set(counts.values()) == {1}, counts
