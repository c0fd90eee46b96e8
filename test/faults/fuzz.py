"""Grammar-based fuzzing of every parser: nothing but errors of bad input may come of any content.

Documents are valid ones of which parts were replaced by others, signed again where a digest would
refuse them at once: `PYTHONPATH=test python -m faults.fuzz --cases 1000 --out faults_output`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from faults.campaign import text_problem

# In memory where the system has such a folder: a case writes a small file.
_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Count:
    """What came of the cases of one parser."""

    parser: str
    cases: int
    accepted: int
    refused: int
    seconds: float
    failure: str

    @property
    def rate(self) -> float:
        """Return cases per second."""
        return self.cases / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Fuzz:
    """A strategy of contents, and what reads one of them."""

    contents: st.SearchStrategy[Any]
    read: Callable[[Any], object]


# ---------------------------------------------------------------------------------------------
# Grammars

_NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**31), -(2**63), 10**400]),
    st.floats(allow_nan=False, allow_infinity=False),
)
_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "0" * 64, "../x", "/etc/passwd", "a\nb", "NaN", "torch", "1e999", "\0"]),
)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=6,
)


_PLACES = st.integers(0, 1 << 16)
_ACTIONS = st.sampled_from(("replace", "replace", "remove", "add", "double"))


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values of a document, of the first ones of long lists."""
    found = [path] if path else []
    if isinstance(document, dict):
        for key, value in document.items():
            found += places(value, (*path, key))
    elif isinstance(document, list):
        for number, value in enumerate(document[:3]):
            found += places(value, (*path, number))
    return found


@st.composite
def edited(draw: st.DrawFn, document: str) -> Any:
    """Return the value of a JSON text with one to three parts replaced, removed or doubled."""
    changed = json.loads(document)
    for _ in range(draw(st.integers(1, 3))):
        paths = places(changed)
        if not paths:
            return changed
        *parents, last = paths[draw(_PLACES) % len(paths)]
        owner = changed
        for part in parents:
            owner = owner[part]
        action = draw(_ACTIONS)
        if action == "replace":
            owner[last] = draw(_VALUES)
        elif action == "remove":
            del owner[last]
        elif isinstance(owner, dict):
            owner[draw(st.text(max_size=8))] = draw(_VALUES) if action == "add" else owner[last]
        else:
            owner.append(draw(_VALUES) if action == "add" else owner[last])
    return changed


@st.composite
def spliced(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """Return bytes of which some pieces were replaced by others, also of other lengths."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        removed = draw(st.sampled_from((0, 1, 1, 2, 4, 8, 64, 1 << 20)))
        data[start : start + removed] = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from((b"\xff" * 4, b"\0" * 8, b"\x7f\xff\xff\xff", b"\xff\xd9", b"")),
            )
        )
    return bytes(data)


# ---------------------------------------------------------------------------------------------
# Parsers


def _index(folder: Path, name: str) -> Path:
    from worlds.nominal_world import build

    path = folder / name
    build(2).save(path)
    return path


def _signed(manifest: Any, *, compute: bool = True) -> bytes:
    from semantic_anomaly.index.format import _manifest_bytes
    from semantic_anomaly.storage import canonical_json, sha256_bytes

    if compute and isinstance(manifest, dict):
        manifest.pop("sha256", None)
        content = canonical_json(manifest.get("content"))
        manifest["fingerprint"] = sha256_bytes(content.encode())
        manifest["sha256"] = sha256_bytes(canonical_json(manifest).encode())
    return _manifest_bytes(manifest)


def _manifest(folder: Path) -> Fuzz:
    from semantic_anomaly.index.format import MANIFEST, read_content

    index = _index(folder, "index")
    document = (index / MANIFEST).read_text()

    def read(manifest: Any) -> None:
        (index / MANIFEST).write_bytes(_signed(manifest))
        read_content(index)

    return Fuzz(edited(document), read)


def _array(folder: Path) -> Fuzz:
    from worlds.nominal_world import sign_again

    from semantic_anomaly.index.format import read_content

    index = _index(folder, "arrays")
    path = index / "entries.npy"
    original = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        sign_again(index)
        read_content(index)

    return Fuzz(spliced([original, original[:140]]), read)


def _calibration(folder: Path) -> Fuzz:
    from worlds.calibrations import fitted

    from semantic_anomaly.calibration.calibration import Calibration
    from semantic_anomaly.storage import canonical_json, sha256_bytes

    path = fitted([0.1, 0.2, 0.3, 0.4], drives=2).save(folder)
    document = json.loads(path.read_text())
    del document["sha256"]
    text = json.dumps(document)

    def read(body: Any) -> None:
        text = canonical_json(body)
        if isinstance(body, dict):
            body["sha256"] = sha256_bytes(text.encode())
        path.write_text(canonical_json(body))
        Calibration.of_file(path)

    return Fuzz(edited(text), read)


def _settings(folder: Path) -> Fuzz:
    from semantic_anomaly.settings import (
        Settings,
        camera_setting_specs,
        read_settings_file,
        setting_specs,
    )

    names = [*setting_specs(), *(f"camera.{name}" for name in camera_setting_specs())]
    path = folder / "settings.yaml"
    keys = st.one_of(st.sampled_from(names), st.text(max_size=8))
    plain = st.dictionaries(keys, _VALUES, max_size=6)
    sections = st.one_of(
        plain,
        plain.map(lambda values: {"semantic_anomaly": {"ros__parameters": values}}),
        plain.map(lambda values: {"/**": {"ros__parameters": values}}),
    )
    lines = st.lists(
        st.one_of(
            st.tuples(keys, st.text(max_size=20)).map(lambda pair: f"{pair[0]}: {pair[1]}"),
            st.sampled_from(
                [
                    "a: &a [1]",
                    "b: *a",
                    "<<: *a",
                    "? x",
                    "- y",
                    "!!python/name:os",
                    "%YAML 1.3",
                    "---",
                ]
            ),
        ),
        max_size=6,
    ).map("\n".join)
    dumped = sections.map(lambda document: yaml.safe_dump(document, allow_unicode=True))

    def read(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        Settings.from_parameters(read_settings_file(path))

    return Fuzz(st.one_of(dumped, lines), read)


def _stage() -> Fuzz:
    from semantic_anomaly.stages import StageSpec

    words = st.one_of(
        st.sampled_from(["mobilenet_v1", "layer=3", "size=800", "average=3", "kind=instances"]),
        st.tuples(
            st.sampled_from(["layer", "size", "average", "kind", "weight", "x", ""]),
            st.one_of(_NUMBERS.map(lambda n: str(n) if abs(n) < 1e300 else "9" * 400), _TEXTS),
        ).map("=".join),
        st.text(max_size=8),
    )

    def read(text: str) -> None:
        stage = StageSpec.parse(text)
        assert StageSpec.parse(str(stage)) == stage, f"{text!r} changes as text"

    return Fuzz(st.lists(words, max_size=6).map(" ".join), read)


def _image() -> Fuzz:
    import cv2
    import numpy as np
    from worlds.ros import nominal_image

    from semantic_anomaly.io.images import decode_compressed

    image = nominal_image(0, (16, 24))
    originals = []
    for suffix in (".png", ".jpg", ".bmp", ".webp", ".tiff"):
        for pixels in (image, image[..., 0], image.astype(np.uint16) * 200):
            if pixels.dtype == np.uint16 and suffix not in (".png", ".tiff"):
                continue
            done, data = cv2.imencode(suffix, pixels)
            assert done
            originals.append(data.tobytes())

    def read(data: bytes) -> None:
        decoded = decode_compressed(data)
        assert decoded.ndim == 3 and decoded.dtype == np.uint8

    return Fuzz(spliced(originals), read)


def _raw_image() -> Fuzz:
    import numpy as np

    from semantic_anomaly.io.images import DEPTH_ENCODINGS, RAW_ENCODINGS, decode_depth, decode_raw

    sizes = st.one_of(st.integers(0, 9), st.sampled_from([2**16, 2**31, 2**32 - 1]))
    encodings = st.one_of(st.sampled_from([*RAW_ENCODINGS, *DEPTH_ENCODINGS]), st.text(max_size=8))
    fields = st.tuples(encodings, sizes, sizes, st.integers(0, 80), st.booleans())

    @st.composite
    def images(draw: st.DrawFn) -> tuple[Any, ...]:
        encoding, height, width, step, big = draw(fields)
        fitting = min(height * step, 2000) * (3 if draw(st.booleans()) else 2) // 2
        length = draw(st.sampled_from((height * step, fitting, step, 0)))
        return encoding, height, width, step, big, bytes(min(length, 2000))

    def read(image: tuple[Any, ...]) -> None:
        decode = decode_depth if image[0] in DEPTH_ENCODINGS else decode_raw
        decoded = decode(*image)
        assert decoded.shape[:2] == image[1:3]
        assert decoded.dtype in (np.uint8, np.float32)

    return Fuzz(images(), read)


def _labels(folder: Path) -> Fuzz:
    from worlds.labelled_drive import make_dataset

    from semantic_anomaly.evaluation.events import read_events
    from semantic_anomaly.evaluation.layouts import open_dataset
    from semantic_anomaly.io.open import open_source

    root = make_dataset(folder / "labelled", "..oi")
    labels, events = root / "labels.json", folder / "events.yaml"
    document = labels.read_text()
    listed = json.dumps({"events": [{"start_s": 1.0, "end_s": 2.0, "kind": "a"}]})
    both = st.one_of(
        st.tuples(st.just(labels), edited(document)), st.tuples(st.just(events), edited(listed))
    )

    def read(case: tuple[Path, Any]) -> None:
        from semantic_anomaly.errors import InputError

        path, content = case
        path.write_text(json.dumps(content))
        if path == events:
            read_events(path)
            return
        try:
            open_dataset(root)
        except InputError:
            open_source(root)
            raise

    return Fuzz(both, read)


def _message() -> Fuzz:
    from worlds.bags import STORE, compressed, raw

    from semantic_anomaly.errors import ImageError
    from semantic_anomaly.io.bags import COMPRESSED_TYPE, IMAGE_TYPE
    from semantic_anomaly.io.images import decode_compressed, decode_raw

    originals = {
        IMAGE_TYPE: bytes(STORE.serialize_cdr(raw(1), IMAGE_TYPE)),
        COMPRESSED_TYPE: bytes(STORE.serialize_cdr(compressed(1), COMPRESSED_TYPE)),
    }
    cases = st.sampled_from(sorted(originals)).flatmap(
        lambda kind: st.tuples(st.just(kind), spliced([originals[kind]]))
    )

    def read(case: tuple[str, bytes]) -> None:
        kind, data = case
        try:
            message = STORE.deserialize_cdr(data, kind)
        # As in the reader of bags, where a message that cannot be decoded is one of a damaged bag.
        except Exception as error:
            raise ImageError(f"message: {type(error).__name__}") from error
        if kind == COMPRESSED_TYPE:
            decode_compressed(message.data, message.format)
        else:
            size = message.height, message.width, message.step
            decode_raw(message.encoding, *size, bool(message.is_bigendian), message.data)

    return Fuzz(cases, read)


def _bag(folder: Path) -> Fuzz:
    from worlds.bags import COMPRESSED, compressed, data_file, write_bag

    from semantic_anomaly.io.open import open_source

    bags = []
    for storage in ("mcap", "sqlite3"):
        path = write_bag(folder / storage, {COMPRESSED: [compressed(n) for n in range(2)]}, storage)
        bags += [(file, file.read_bytes()) for file in (data_file(path), path / "metadata.yaml")]
    cases = st.sampled_from(range(len(bags))).flatmap(
        lambda number: st.tuples(st.just(number), spliced([bags[number][1]]))
    )

    def read(case: tuple[int, bytes]) -> None:
        path, original = bags[case[0]]
        path.write_bytes(case[1])
        try:
            source = open_source(path.parent)
            source.max_bad_share = 1.0
            frames = list(source)
            assert len(frames) == 2 or source.losses, f"{len(frames)} frames, no loss named"
        finally:
            path.write_bytes(original)

    return Fuzz(cases, read)


# ---------------------------------------------------------------------------------------------


def fuzz(name: str, cases: int, *, seed: int = 0) -> Count:
    """Try a parser on so many contents, and return what came of them."""
    with _folder() as folder:
        return _tried(name, parser_of(name, folder), cases, seed)


def parser_of(name: str, folder: Path) -> Fuzz:
    """Return one parser."""
    made = {
        "manifest": lambda: _manifest(folder),
        "array": lambda: _array(folder),
        "calibration": lambda: _calibration(folder),
        "settings": lambda: _settings(folder),
        "stage": _stage,
        "image": _image,
        "raw image": _raw_image,
        "labels": lambda: _labels(folder),
        "message": _message,
        "bag": lambda: _bag(folder),
    }
    return made[name]()


@contextmanager
def _folder() -> Iterator[Path]:
    place = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz_", dir=place) as folder:
        yield Path(folder)


def _tried(name: str, parser: Fuzz, cases: int, seed: int) -> Count:
    from semantic_anomaly.errors import InputError

    counts: Counter[str] = Counter()

    # Hypothesis ends early where a small grammar is exhausted.
    @seeded(seed)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(parser.contents)
    def attempt(content: Any) -> None:
        counts["cases"] += 1
        try:
            parser.read(content)
        except InputError as error:
            # A package's errors have one line; commands print the text of others as one.
            problem = text_problem(" ".join(str(error).split()))
            assert not problem, problem
            counts["refused"] += 1
            return
        counts["accepted"] += 1

    failure = ""
    begin_s = time.monotonic()
    try:
        attempt()
    except Exception as error:
        # Hypothesis raises a group of several failures.
        failures = getattr(error, "exceptions", (error,))
        failure = "; ".join(f"{type(each).__name__}: {each}"[:300] for each in failures)
    seconds = round(time.monotonic() - begin_s, 1)
    return Count(name, counts["cases"], counts["accepted"], counts["refused"], seconds, failure)


NAMES = (
    *("manifest", "array", "calibration", "settings", "stage"),
    *("image", "raw image", "labels", "message", "bag"),
)


def main() -> int:
    """Fuzz the parsers, write fuzz.json, and return 1 if something but bad input came of it."""
    import logging

    parser = argparse.ArgumentParser(prog="faults.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of each parser")
    parser.add_argument("--parser", choices=NAMES, action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for fuzz.json")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    # Decoders of images speak to the terminal.
    log = os.open(args.out / "fuzz.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    counts = []
    for name in args.parser or NAMES:
        counts.append(fuzz(name, args.cases, seed=args.seed))
        row = counts[-1]
        print(
            f"{name}: {row.cases} cases, {row.refused} refused, {row.accepted} accepted, "
            f"{row.rate:.0f} per second {row.failure}",
            flush=True,
        )
        rows = [asdict(count) for count in counts]
        (args.out / "fuzz.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 1 if any(count.failure for count in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
