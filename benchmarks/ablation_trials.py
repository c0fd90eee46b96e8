"""What the ablation is tried on: held-out streets, and rendered and real sets where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import carla_composites
import carla_drive

from semantic_anomaly.cli import main as command
from semantic_anomaly.synthetic import KINDS, family

INDEX_DRIVES, CALIBRATION_DRIVES = 80, 60
TEST_DRIVES_A_KIND = 10


@dataclass(frozen=True)
class Trial:
    """Where index, calibration and tests come from; without an index, the test sets' own pixels.

    Attributes:
        index, calibration: sources.
        tests: labelled sources by name.
    """

    index: list[str]
    calibration: list[str]
    tests: dict[str, str]


def synthesise(folder: Path, first_seed: int) -> dict[str, Path]:
    """Write the drives of all sets and return their folders by name."""
    kinds = {name: [k for k in KINDS if family(k) == name] for name in map(family, KINDS)}
    plans = {
        "index": (INDEX_DRIVES, 48, 12, first_seed, "none"),
        "calibration": (CALIBRATION_DRIVES, 96, 24, first_seed + 500, "none"),
    }
    for number, (name, listed) in enumerate(kinds.items()):
        drives = TEST_DRIVES_A_KIND * len(listed)
        plans[name] = drives, 100, 10, first_seed + 1000 + 500 * number, ",".join(listed)
    for name, (drives, frames, stride, seed, anomalies) in plans.items():
        if (folder / name / "labels.json").exists():
            continue
        wanted = [] if anomalies == "none" else ["--anomalies", anomalies]
        numbers = [
            ("--drives", drives),
            ("--frames", frames),
            ("--stride", stride),
            ("--seed", seed),
        ]
        given = [str(part) for pair in numbers for part in pair]
        if command(["synth", str(folder / name), *given, *wanted]):
            raise SystemExit(1)
    return {name: folder / name for name in plans}


def street_trial(folder: Path, first_seed: int) -> Trial:
    """Return the trial of the street world, writing its drives where they are not yet."""
    sets = synthesise(folder, first_seed)
    tests = {n: str(p) for n, p in sets.items() if n not in ("index", "calibration")}
    return Trial([str(sets["index"])], [str(sets["calibration"])], tests)


def real_trials(data: Path, scratch: Path) -> list[Trial]:
    """Return the trials of the real and rendered sets that are there."""
    trials = []
    drive = data / "carla_drives/spawn_props"
    if drive.is_dir():
        tests = {"CARLA drive, box on the road": f"{drive}{carla_drive.TEST}"}
        trials.append(
            Trial([f"{drive}{carla_drive.INDEX}"], [f"{drive}{carla_drive.CALIBRATION}"], tests)
        )
    frames = data / "carla_frames"
    if frames.is_dir():
        made = scratch / "composites"
        carla_composites.write_composites(frames, made, 0)
        index, calibration = (
            carla_composites.slices(frames, towns)
            for towns in (carla_composites.INDEX, carla_composites.CALIBRATION)
        )
        tests = {"CARLA composites, lights and signs on vehicles": str(made)}
        trials.append(Trial(index, calibration, tests))
    for name, title in (("road_anomaly", "Road Anomaly"), ("road_obstacle21", "RoadObstacle21")):
        if (data / name).is_dir():
            trials.append(Trial([], [], {f"{title}, self-nominal": str(data / name)}))
    return trials
