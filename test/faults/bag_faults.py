"""Bags cut off, damaged in the middle, without metadata, or of other types."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from faults.campaign import ALTERED, HARMLESS, INCOMPLETE, REFUSED, Case, Outcome

FRAMES = 12
# A message of this size fits into one page of a database.
_RAW_HW = 24, 32
Damage = Callable[[Path, random.Random], object]


def cases(seed: int, case: Callable[..., Case]) -> Iterator[Case]:
    """Yield the faults of bags; `case` makes a case of class, point, run and allowed outcomes."""
    # A bag may be read up to the break, with the loss named. Metadata and the end of a file, which
    # has its index, are not needed: then all frames are there, and the oracle compares them.
    cut = (REFUSED, INCOMPLETE, HARMLESS)
    for storage in ("mcap", "sqlite3"):
        for share in (0.999, 0.9, 0.5, 0.1, 0.001):
            point = f"{storage} at {share:.1%}"
            yield case("bag cut off", point, _reading(storage, _cut(share)), cut)
        # Without a digest or an end mark, missing bytes of raw images would be read as black.
        run = _reading(storage, _cut_bytes(500), is_raw=True)
        yield case("bag cut off", f"{storage} by 500 bytes, raw images", run, cut)
        for number in range(3):
            run = _reading(storage, _zero_middle, seed + number)
            yield case(
                "bag damaged in the middle", f"{storage}, zeros", run, cut, seed=seed + number
            )
            run = _reading(storage, _flip_bits, seed + number)
            yield case(
                "bag damaged in the middle", f"{storage}, bits", run, cut, seed=seed + number
            )
        for name, damage in METADATA.items():
            yield case("bag metadata", f"{storage}, {name}", _reading(storage, damage), cut)
        for name, damage in (("emptied", _empty), ("missing", _remove), ("folder", _folder)):
            yield case("bag without its data", f"{storage}, {name}", _reading(storage, damage), cut)
        for verb in ("replay", "build-index", "calibrate"):
            run = _command(storage, _cut(0.5), verb)
            yield case("bag cut off", f"{storage} by {verb}", run, cut)
    for number in (0, 5, FRAMES - 1):
        run = _reading("sqlite3", _lose(number))
        point = f"sqlite3, message {number}"
        yield case("bag with lost messages", point, run, (REFUSED, INCOMPLETE))
    for name, topics in _TYPES.items():
        yield case("bag of other types", name, _typed(topics), (REFUSED,))


def _cut(share: float) -> Damage:
    def damage(bag: Path, rng: random.Random) -> None:
        path = _data(bag)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def _cut_bytes(count: int) -> Damage:
    def damage(bag: Path, rng: random.Random) -> None:
        path = _data(bag)
        path.write_bytes(path.read_bytes()[:-count])

    return damage


def _zero_middle(bag: Path, rng: random.Random) -> None:
    path = _data(bag)
    data = bytearray(path.read_bytes())
    start = len(data) // 3 + rng.randrange(len(data) // 4)
    data[start : start + 4000] = bytes(4000)
    path.write_bytes(data)


def _flip_bits(bag: Path, rng: random.Random) -> None:
    path = _data(bag)
    data = bytearray(path.read_bytes())
    for _ in range(20):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _empty(bag: Path, rng: random.Random) -> None:
    _data(bag).write_bytes(b"")


def _remove(bag: Path, rng: random.Random) -> None:
    _data(bag).unlink()


def _folder(bag: Path, rng: random.Random) -> None:
    path = _data(bag)
    path.unlink()
    path.mkdir()


def _lose(number: int) -> Damage:
    def damage(bag: Path, rng: random.Random) -> None:
        with closing(sqlite3.connect(_data(bag))) as database, database:
            of_order = f"(SELECT id FROM messages ORDER BY id LIMIT 1 OFFSET {number})"
            database.execute(f"DELETE FROM messages WHERE id = {of_order}")

    return damage


def _metadata(change: Callable[[str], str]) -> Damage:
    def damage(bag: Path, rng: random.Random) -> None:
        path = bag / "metadata.yaml"
        path.write_text(change(path.read_text()))

    return damage


METADATA: dict[str, Damage] = {
    "missing": lambda bag, rng: (bag / "metadata.yaml").unlink(),
    "emptied": _metadata(lambda text: ""),
    "cut": _metadata(lambda text: text[: len(text) // 2]),
    "a list": _metadata(lambda text: "[1, 2]"),
    "unknown type": _metadata(
        lambda text: text.replace("sensor_msgs/msg/CompressedImage", "a/msg/B")
    ),
    "unknown storage": _metadata(
        lambda text: text.replace("mcap", "zip").replace("sqlite3", "zip")
    ),
    "another file": _metadata(
        lambda text: text.replace("relative_file_paths:\n  - ", "&  - ../../x")
    ),
    "path outside": _metadata(lambda text: text.replace("  - bag", "  - ../../../bag")),
    "more messages": _metadata(lambda text: text.replace(f": {FRAMES}", ": 99999")),
    "negative messages": _metadata(lambda text: text.replace(f": {FRAMES}", ": -1")),
    "deep": _metadata(lambda text: "[" * 2000),
    "expanding": _metadata(
        lambda text: (
            "a0: &a0 {x: 1}\n"
            + "\n".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))
        )
    ),
}


def _data(bag: Path) -> Path:
    from worlds.bags import data_file

    return data_file(bag)


def _made(lab: Any, place: Path, storage: str, *, is_raw: bool = False) -> Path:
    from worlds.bags import COMPRESSED, RAW, compressed, raw, write_bag
    from worlds.ros import nominal_image

    from semantic_anomaly.io.images import encode_png

    if is_raw:
        images = [nominal_image(n)[: _RAW_HW[0], : _RAW_HW[1]] for n in range(FRAMES)]
        height, width = images[0].shape[:2]
        size = {"height": height, "width": width, "step": 3 * width, "encoding": "rgb8"}
        raws = [raw(n, data=image.reshape(-1), **size) for n, image in enumerate(images)]
        return write_bag(place / "bag", {RAW: raws}, storage)
    messages = [compressed(n, encode_png(nominal_image(n))) for n in range(FRAMES)]
    return write_bag(place / "bag", {COMPRESSED: messages}, storage)


def _reading(
    storage: str, damage: Damage, seed: int = 0, *, is_raw: bool = False
) -> Callable[[Any], Outcome]:
    """Return what reads a damaged bag: every frame is right, or its loss is named."""

    def run(lab: Any) -> Outcome:
        from worlds.bags import FIRST_S
        from worlds.ros import nominal_image

        from semantic_anomaly.errors import InputError
        from semantic_anomaly.io.open import open_source

        place = lab.place()
        try:
            bag = _made(lab, place, storage, is_raw=is_raw)
            damage(bag, random.Random(f"{storage} {seed}"))
            try:
                source = open_source(bag)
                source.max_bad_share = 1.0
                frames = list(source)
            except InputError as error:
                return Outcome(REFUSED, str(error))
            for frame in frames:
                # By its stamp: names are numbers of what could be read.
                number, (height, width) = frame.stamp_ns // 10**9 - FIRST_S, frame.image_hw
                if not (frame.image == nominal_image(number)[:height, :width]).all():
                    return Outcome(ALTERED, f"other pixels in frame {number}")
            if len(frames) == FRAMES:
                return Outcome(HARMLESS)
            if not source.losses:
                return Outcome(ALTERED, f"{len(frames)} of {FRAMES} frames, no loss named")
            return Outcome(INCOMPLETE, source.losses)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    return run


def _command(storage: str, damage: Damage, verb: str) -> Callable[[Any], Outcome]:
    def run(lab: Any) -> Outcome:
        from faults.process_faults import forked, outcome_of, run_command

        place = lab.place()
        try:
            bag = _made(lab, place, storage)
            damage(bag, random.Random(0))
            index = str(place / "index")
            arguments = {
                "replay": ["replay", str(bag), "--index", index, "--out", str(place / "out")],
                "build-index": ["build-index", str(bag), "--out", str(place / "out"), *lab.options],
                "calibrate": ["calibrate", index, str(bag)],
            }[verb]
            if verb != "build-index":
                arguments += ["--set", "execution=torch"]
            code, errors = forked(lambda: run_command(arguments))
            shutil.rmtree(bag)
            return outcome_of(code, errors).objecting(*lab.leftovers(place, hidden=False))
        finally:
            shutil.rmtree(place, ignore_errors=True)

    return run


def _texts(count: int) -> list[Any]:
    from worlds.bags import text

    return [text("a")] * count


_TYPES: dict[str, Callable[[], dict[str, list[Any]]]] = {
    "texts only": lambda: {"/a": _texts(3)},
    "no messages": lambda: {"/camera/image_raw": []},
    "no topics": dict,
}


def _typed(topics: Callable[[], dict[str, list[Any]]]) -> Callable[[Any], Outcome]:
    def run(lab: Any) -> Outcome:
        from worlds.bags import write_bag

        from semantic_anomaly.errors import InputError
        from semantic_anomaly.io.open import open_source

        place = lab.place()
        try:
            try:
                frames = list(open_source(write_bag(place / "bag", topics())))
            except InputError as error:
                return Outcome(REFUSED, str(error))
            return Outcome(ALTERED, f"{len(frames)} frames of a bag without images")
        finally:
            shutil.rmtree(place, ignore_errors=True)

    return run
