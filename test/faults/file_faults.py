"""Faults of files: of indexes, calibrations, backbones and settings, damaged or forged.

Forged files are consistent: all digests fit again. Nothing of them may reach hnswlib or torch.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from faults.campaign import (
    ALTERED,
    HARMLESS,
    REFUSED,
    Case,
    Outcome,
    compute_as_in_tests,
)

# A valid file with other values, which no digest protects.
ACCEPTED = "accepted"
OFFLINE, UNCONFIGURED = "offline", "unconfigured"
EDITED_ONLY = ("retracted_embeddings.npy", "retracted_entries.npy")
INDEX_FILES = (
    *("manifest.json", "graph.hnsw", "embeddings.npy", "entries.npy", "centroids.npy"),
    *("lists.npy", "support.npy", "frames/000000.jpg"),
    *("stage_1/manifest.json", "stage_1/embeddings.npy", "stage_1/graph.hnsw"),
    *EDITED_ONLY,
)
BACKBONE_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
CALIBRATION, SETTINGS = "calibration.json", "settings.yaml"
# The commands and the node are given some of the files only.
FEW_FILES = ("manifest.json", "embeddings.npy", "frames/000000.jpg", "stage_1/embeddings.npy")
FEW_DAMAGES = ("truncated", "bit flipped", "emptied", "missing", "folder in its place")
NOBODY = 65534


@dataclass(frozen=True)
class Place:
    """Copies of everything that a case may damage.

    Attributes:
        index: with calibration.
        backbone: Hugging Face folder.
        settings: parameter file.
        outside: a file of nobody, which must stay as it is.
    """

    root: Path

    @property
    def index(self) -> Path:
        return self.root / "index"

    @property
    def backbone(self) -> Path:
        return self.root / "backbone"

    @property
    def settings(self) -> Path:
        return self.root / SETTINGS

    def file(self, name: str) -> Path:
        """Return the place of a file by its name in the index, the backbone or beside them."""
        if name == SETTINGS:
            return self.settings
        return (self.backbone if name in BACKBONE_FILES else self.index) / name


class Laboratory:
    """An index of two stages, an edited one, another one, a backbone, settings, and a node.

    Args:
        folder: where everything is made.
    """

    def __init__(self, folder: Path) -> None:
        from worlds.backbones import save_backbone
        from worlds.ros import build_monitor, nominal_image, odd_image, parameters

        from semantic_anomaly.index.edits import retract
        from semantic_anomaly.index.nominal_index import NominalIndex
        from semantic_anomaly.offline.edit_index import save_edited

        compute_as_in_tests()
        # A user without rights reads some of the copies.
        for parent in (folder, *folder.parents[:3]):
            if parent.stat().st_uid == os.geteuid() and parent != parent.parent:
                parent.chmod(parent.stat().st_mode | 0o055)
        self.folder = folder.resolve()
        self._originals = self.folder / "originals"
        self._numbers = itertools.count()
        self._backbone = save_backbone(self._originals / "backbone")
        stages = [
            f"{self._backbone} layer=3 size=140",
            f"{self._backbone} layer=2 size=112 average=3 weight=0.5",
        ]
        made = {
            name: build_monitor(self.folder / name, self._backbone, stages=stages, **changes)
            for name, changes in (("plain", {}), ("other", {"dedup_distance": 0.01}))
        }
        before = NominalIndex.load(made["plain"])
        made["edited"] = Path(shutil.copytree(made["plain"], self.folder / "edited"))
        save_edited(made["edited"], before, retract(before, {0: [3, 4], 1: [2]}))
        self.indexes = made
        shorthand = parameters(made["plain"], self._backbone, stages=stages)
        self._parameters = {name: v for name, v in shorthand.items() if name != "stages"}
        self.images = nominal_image(99), odd_image(1), odd_image(2)
        self.answers: dict[str, Any] = {}
        for name, index in made.items():
            detector = self.detector(index, self._backbone)
            self.answers[name] = self.answers_of(detector)
            if name == "plain":
                self.embedder = detector.embedder
            decisions = [decision for _, decision, *_ in self.answers[name]]
            assert decisions == ["nominal", "anomaly", "anomaly"], decisions
        self._bench: Any = None

    def place(self, index: str = "plain") -> Place:
        """Return fresh copies to damage."""
        place = Place(self.folder / f"case_{next(self._numbers)}")
        shutil.copytree(self.indexes[index], place.index)
        shutil.copytree(self._backbone, place.backbone)
        parameters = self.parameters(place.index, place.backbone)
        document = {"semantic_anomaly": {"ros__parameters": parameters}}
        place.settings.write_text(yaml.safe_dump(document))
        return place

    def parameters(self, index: Path, backbone: Path) -> dict[str, Any]:
        """Return flat parameters of a detector or node."""
        return {**self._parameters, "index": str(index), "backbone": str(backbone)}

    def detector(self, index: Path, backbone: Path, embedder: Any = None) -> Any:
        """Return the detector that commands and node load."""
        from semantic_anomaly.detection.detector import load_detector
        from semantic_anomaly.settings import Settings

        settings = Settings.from_parameters(self.parameters(index, backbone))
        return load_detector(settings, "camera", embedder=embedder)

    def answers_of(self, detector: Any) -> list[tuple[Any, ...]]:
        """Return score, decision, threshold and boxes of the images."""
        from semantic_anomaly.structures import Frame

        results = [
            detector.detect(Frame(image, number * 10**8))
            for number, image in enumerate(self.images)
        ]
        return [
            (
                round(result.score, 4),
                str(result.decision.value),
                round(result.threshold, 4),
                [item.box_xyxy for item in result.localizations],
            )
            for result in results
        ]

    @property
    def bench(self) -> Any:
        """Return a node that is made when it is first used."""
        if self._bench is None:
            import rclpy
            from worlds.ros import Bench

            rclpy.init(args=[])
            self._bench = Bench(self.parameters(self.indexes["plain"], self._backbone))
        return self._bench

    def close(self) -> None:
        """End the node."""
        if self._bench is not None:
            import rclpy

            self._bench.close()
            rclpy.try_shutdown()


@contextmanager
def laboratory(folder: Path) -> Iterator[Laboratory]:
    made = Laboratory(folder)
    try:
        yield made
    finally:
        made.close()


# ---------------------------------------------------------------------------------------------
# Damages of a file, without knowledge of its content


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(1, len(data))])


def truncate_last(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_block(path: Path, rng: random.Random) -> None:
    before = path.read_bytes()
    data = bytearray(before)
    # Until it was no block of zeros.
    while data == before:
        length = min(len(data), rng.choice((16, 64, 512, 4096)))
        start = rng.randrange(len(data) - length + 1)
        data[start : start + length] = bytes(length)
    path.write_bytes(data)


def append(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice((1, 7, 4096))))


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def folder_instead(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link_instead(path: Path, rng: random.Random) -> None:
    moved = path.rename(path.parents[2] / f"moved_{path.name}")
    path.symlink_to(moved)


def dangling_link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def endless_device(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def named_pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def random_bytes(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(path.stat().st_size))


def unreadable(path: Path, rng: random.Random) -> None:
    path.chmod(0)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": truncate,
    "last byte missing": truncate_last,
    "bit flipped": flip_bit,
    "block zeroed": zero_block,
    "bytes appended": append,
    "emptied": empty,
    "missing": remove,
    "folder in its place": folder_instead,
    "link in its place": link_instead,
    "dangling link": dangling_link,
    "link to an endless device": endless_device,
    "named pipe": named_pipe,
    "other bytes": random_bytes,
    "unreadable": unreadable,
}
# Of these there are several, at other positions.
_RANDOM = ("truncated", "bit flipped", "block zeroed")


# ---------------------------------------------------------------------------------------------
# Where a file is read: each returns what came of it


def _refusal(work: Callable[[], Outcome]) -> Outcome:
    from semantic_anomaly.errors import InputError, SemanticAnomalyError

    try:
        return work()
    except SemanticAnomalyError as error:
        against = "" if isinstance(error, InputError) else f"{type(error).__name__} is no bad input"
        return Outcome(REFUSED, str(error)).objecting(against)


def by_index(lab: Laboratory, place: Place, reference: str) -> Outcome:
    """Load the index, search its graph, and decode its thumbnails."""

    def work() -> Outcome:
        from semantic_anomaly.index.nominal_index import NominalIndex

        index = NominalIndex.load(place.index)
        index.configure_search("graph", 50)
        queries = index.content.embeddings[:5]
        distances = index.distances(queries, 1)
        for name in index.frame_names:
            list(index.thumbnails(name))
        if not np.allclose(distances, 0.0, atol=1e-4):
            return Outcome(ALTERED, f"entries are {distances.max():.3g} from themselves")
        return Outcome(HARMLESS)

    return _refusal(work)


def by_calibration(lab: Laboratory, place: Place, reference: str) -> Outcome:
    """Load the calibration alone."""

    def work() -> Outcome:
        from semantic_anomaly.calibration.calibration import Calibration

        calibration = Calibration.load(place.index, "camera")
        expected = lab.answers[reference][0][2]
        if round(calibration.threshold, 4) != expected:
            return Outcome(ALTERED, f"threshold {calibration.threshold}, expected {expected}")
        return Outcome(HARMLESS)

    return _refusal(work)


def by_detector(lab: Laboratory, place: Place, reference: str, *, own: bool = False) -> Outcome:
    """Load index, calibration and backbone as commands and node do, and assess images."""

    def work() -> Outcome:
        detector = lab.detector(place.index, place.backbone, None if own else lab.embedder)
        try:
            answers = lab.answers_of(detector)
        finally:
            if own:
                detector.embedder.close()
        if answers != lab.answers[reference]:
            return Outcome(ALTERED, f"{answers[:2]}, expected {lab.answers[reference][:2]}")
        return Outcome(HARMLESS)

    return _refusal(work)


def by_settings(lab: Laboratory, place: Place, reference: str) -> Outcome:
    """Read the settings file as commands do."""

    def work() -> Outcome:
        from semantic_anomaly.settings import Settings, read_settings_file

        settings = Settings.from_parameters(read_settings_file(place.settings))
        expected = Settings.from_parameters(lab.parameters(place.index, place.backbone))
        return Outcome(HARMLESS if settings == expected else ACCEPTED)

    return _refusal(work)


def by_command(lab: Laboratory, place: Place, reference: str, *, verb: str) -> Outcome:
    """Run a command in this process."""
    out = place.root / "out"
    arguments = {
        "inspect-index": ["inspect-index", str(place.index)],
        "replay": [
            *("replay", str(lab.folder / "plain" / "drive_0"), "--index", str(place.index)),
            *("--settings", str(place.settings), "--out", str(out)),
        ],
    }
    outcome = command(arguments[verb])
    if outcome.kind == REFUSED and out.exists():
        outcome = outcome.objecting(f"the refused command left {sorted(out.rglob('*'))[:3]}")
    return outcome


def command(arguments: list[str]) -> Outcome:
    """Run a command in this process; REFUSED for exit code 2 with one line, HARMLESS for 0."""
    from semantic_anomaly.cli import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    lines = [s for s in errors.getvalue().splitlines() if s.startswith("semantic-anomaly: error:")]
    if code == 2:
        against = "" if len(lines) == 1 else f"exit code 2 with {len(lines)} lines of errors"
        return Outcome(REFUSED, "\n".join(lines)).objecting(against)
    if code == 0:
        return Outcome(HARMLESS).objecting("exit code 0 with an error" if lines else "")
    return Outcome(f"exit code {code}", errors.getvalue()[-500:])


def by_node(lab: Laboratory, place: Place, reference: str) -> Outcome:
    """Configure the node with it; afterwards with good files."""
    from rclpy.parameter import Parameter
    from worlds.ros import FAILURE, SUCCESS

    bench = lab.bench
    node = bench.node

    def configure(index: Path, backbone: Path) -> Any:
        values = {"index": str(index), "backbone": str(backbone)}
        node.set_parameters([Parameter(name, value=value) for name, value in values.items()])
        return node.trigger_configure()

    seen = len(bench.log)
    result = configure(place.index, place.backbone)
    if result == SUCCESS:
        node.trigger_cleanup()
        outcome = Outcome(HARMLESS)
    elif result == FAILURE:
        bench.spin_until(lambda: any("cannot configure" in line for line in bench.log[seen:]), 20)
        errors = [line for line in bench.log[seen:] if "cannot configure" in line]
        outcome = Outcome(REFUSED, errors[0])
    else:
        bench.executor.spin_once(timeout_sec=0.1)
        outcome = Outcome(str(result), " ".join(bench.log[seen:])[-500:])
    held = [name for name, value in (("models", node.models), ("cameras", node._cameras)) if value]
    after = configure(lab.indexes["plain"], lab._backbone)
    node.trigger_cleanup()
    return outcome.objecting(
        f"the unconfigured node holds {', '.join(held)}" if held else "",
        "" if after == SUCCESS else f"configuring with good files afterwards: {after}",
    )


ENTRIES: dict[str, Callable[[Laboratory, Place, str], Outcome]] = {
    "NominalIndex.load": by_index,
    "Calibration.load": by_calibration,
    "load_detector": by_detector,
    "load_detector with backbone": partial(by_detector, own=True),
    "settings file": by_settings,
    "inspect-index": partial(by_command, verb="inspect-index"),
    "replay": partial(by_command, verb="replay"),
    "configure": by_node,
}


# ---------------------------------------------------------------------------------------------
# The table


def cases(seed: int) -> Iterator[Case]:
    yield from _damaged(seed)
    yield from _swapped(seed)
    yield from _forged(seed)


def _case(
    fault_class: str,
    point: str,
    entry: str,
    inject: Callable[[Laboratory, Place], object],
    *,
    seed: int = 0,
    allowed: tuple[str, ...] = (REFUSED,),
    index: str = "plain",
    names: tuple[str, ...] = ("index", "backbone", "calibration", "settings"),
    as_nobody: bool = False,
) -> Case:
    def run(lab: Laboratory) -> Outcome:
        place = lab.place(index)
        # Lets the commands run as in a folder of the user.
        place.root.chmod(0o777)
        try:
            inject(lab, place)
            before = listing(place.root)
            with _nobody(as_nobody):
                outcome = ENTRIES[entry](lab, place, index)
            changed = "" if listing(place.root) == before else "reading changed files"
            return outcome.objecting(changed if entry != "replay" else "")
        finally:
            shutil.rmtree(place.root, ignore_errors=True)

    state = UNCONFIGURED if entry == "configure" else OFFLINE
    where = f"{point} by {entry}" if point else entry
    return Case("files", fault_class, where, state, seed, frozenset(allowed), run, names)


@contextmanager
def _nobody(wanted: bool) -> Iterator[None]:
    """Run as a user without rights, where this process has those of root."""
    if not wanted or os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def listing(folder: Path) -> dict[str, Any]:
    """Return kind, size and time of change of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = status.st_mode, status.st_size, status.st_mtime_ns
    return found


def _damage(name: str, damage: str, seed: int) -> Callable[[Laboratory, Place], object]:
    rng = random.Random(f"{name} {damage} {seed}")
    return lambda lab, place: DAMAGES[damage](place.file(name), rng)


def _damaged(seed: int) -> Iterator[Case]:
    entry_of = {
        **dict.fromkeys(INDEX_FILES, "load_detector"),
        **dict.fromkeys(BACKBONE_FILES, "load_detector with backbone"),
        **{CALIBRATION: "load_detector", SETTINGS: "settings file"},
    }

    def case(damage: str, name: str, entry: str, number: int = 0) -> Case:
        allowed = {REFUSED}
        if name == SETTINGS:
            # No digest: a flipped bit may make another valid value.
            allowed |= {ACCEPTED, HARMLESS}
        if damage == "link in its place" and name in (*BACKBONE_FILES, CALIBRATION, SETTINGS):
            # The hub cache consists of links, and a file of settings may be one.
            allowed |= {HARMLESS}
        if damage in ("missing", "dangling link") and name == CALIBRATION:
            # Without a calibration all decisions are unknown, which the node logs.
            entry = "Calibration.load" if entry.startswith("load") else entry
        return _case(
            damage,
            name,
            entry,
            _damage(name, damage, seed + number),
            seed=seed + number,
            allowed=tuple(allowed),
            index="edited" if name in EDITED_ONLY else "plain",
            as_nobody=damage == "unreadable",
        )

    for name, entry in entry_of.items():
        for damage in DAMAGES:
            for number in range(2 if damage in _RANDOM else 1):
                yield case(damage, name, entry, number)
    for damage in FEW_DAMAGES:
        for name in FEW_FILES:
            yield case(damage, name, "NominalIndex.load")
            yield case(damage, name, "inspect-index")
        for entry in ("inspect-index", "Calibration.load"):
            if (damage, entry) != ("missing", "inspect-index") and (
                damage != "missing" or entry != "Calibration.load"
            ):
                yield case(damage, CALIBRATION, entry)
        for name in ("manifest.json", "model.safetensors", SETTINGS):
            yield case(damage, name, "replay")
    for name, damage in (
        *(("manifest.json", damage) for damage in FEW_DAMAGES),
        *((name, "bit flipped") for name in INDEX_FILES[1:8]),
        *((name, "truncated") for name in (CALIBRATION, *BACKBONE_FILES)),
        *((name, "missing") for name in BACKBONE_FILES),
        *(("graph.hnsw", damage) for damage in ("named pipe", "link to an endless device")),
    ):
        yield case(damage, name, "configure")


def _swapped(seed: int) -> Iterator[Case]:
    def swap(name: str) -> Callable[[Laboratory, Place], object]:
        return lambda lab, place: shutil.copy(lab.indexes["other"] / name, place.index / name)

    # The other index has the same frames, and no support either.
    same = ("support.npy", "frames/000000.jpg")
    for name in (*(name for name in INDEX_FILES[:11] if name not in same), CALIBRATION):
        for entry in ("load_detector", "inspect-index"):
            yield _case("swapped with another index", name, entry, swap(name))
    yield _case("swapped with another index", CALIBRATION, "configure", swap(CALIBRATION))

    def swap_stage(lab: Laboratory, place: Place) -> None:
        shutil.rmtree(place.index / "stage_1")
        shutil.copytree(lab.indexes["other"] / "stage_1", place.index / "stage_1")

    yield _case("swapped with another index", "stage_1", "load_detector", swap_stage)


def _forged(seed: int) -> Iterator[Case]:
    from faults import forgeries

    yield from forgeries.cases(seed, _case)
