"""Files that somebody edited and signed again: all digests fit, the content does not.

What an attacker may say with them is limited to values that somebody could have built; the oracle
asks that nothing crashes, hangs, takes memory, leaves its folder, or is answered in silence.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from faults.campaign import HARMLESS, REFUSED, Case

Inject = Callable[[Any, Any], object]
Change = Callable[[dict[str, Any]], object]
MakeCase = Callable[..., Case]
HUGE = (2**31, 2**40, 2**62, 2**64, 10**30)
DEPTHS = (100, 400, 900, 3000, 200_000)

_UNUSED = "embeddings.mask_token"


def cases(seed: int, case: MakeCase) -> Iterator[Case]:
    """Yield all forgeries; `case` makes a case of class, point, entry and injection."""
    yield from _manifests(case)
    yield from _by_hand(case)
    yield from _arrays(case)
    yield from _graphs(seed, case)
    yield from _calibrations(case)
    yield from _deep(case)
    yield from _backbones(case)
    yield from _settings(case)
    yield from _thumbnails(case)


def sign(folder: Path, change: Change = lambda m: None, stage: Change | None = None) -> None:
    """Change the manifests of an index, and make all digests and its calibration fit again."""
    from worlds.nominal_world import sign_again

    sign_again(folder / "stage_1", stage or (lambda m: None))
    further = json.loads((folder / "stage_1" / "manifest.json").read_text())["fingerprint"]

    def changed(manifest: dict[str, Any]) -> None:
        manifest["content"]["further"] = [further]
        change(manifest)

    sign_again(folder, changed)
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    sign_calibration(folder, lambda body: body.update(index_fingerprint=fingerprint))


def sign_calibration(folder: Path, change: Change) -> None:
    """Change the calibration of an index, and make its digest fit again."""
    from worlds.calibrations import sealed

    path = folder / "calibration.json"
    body = json.loads(path.read_bytes())
    change(body)
    path.write_text(sealed(body))


def adopt_backbone(place: Any) -> None:
    """Write the digests of the backbone as it is now into the index."""
    from semantic_anomaly.storage import canonical_json, sha256_bytes, sha256_file

    names = ("config.json", "preprocessor_config.json")
    digests = {name: sha256_file(place.backbone / name) for name in names}
    found = {
        "weights_sha256": sha256_file(place.backbone / "model.safetensors"),
        "config_sha256": sha256_bytes(canonical_json(digests).encode()),
    }

    def change(manifest: dict[str, Any]) -> None:
        manifest["content"]["identity"].update(found)

    sign(place.index, change, change)


# ---------------------------------------------------------------------------------------------


def _manifests(case: MakeCase) -> Iterator[Case]:
    def content(**values: Any) -> Change:
        return lambda m: m["content"].update(values)

    def identity(**values: Any) -> Change:
        return lambda m: m["content"]["identity"].update(values)

    def frames(row: Callable[[list[Any]], Any]) -> Change:
        return lambda m: m["content"].update(frames=[row(list(f)) for f in m["content"]["frames"]])

    def file(name: str, **facts: Any) -> Change:
        return lambda m: m["files"].setdefault(name, dict(bytes=1, sha256="0" * 64)).update(facts)

    counts = ("count", "dim", "lists", "support")
    changes: dict[str, dict[str, Change]] = {
        "oversized numbers": {
            **{f"{key} {n}": content(**{key: n}) for key in counts for n in HUGE[1:4]},
            **{f"identity dim {n}": identity(dim=n) for n in HUGE[1:3]},
            **{f"identity patch_px {n}": identity(patch_px=n) for n in HUGE[1:3]},
            **{f"identity input_size {n}": identity(input_size=n) for n in HUGE[1:3]},
            **{f"identity average {n}": identity(average=n) for n in (17, HUGE[1])},
            **{f"identity layer {n}": identity(layer=n) for n in (99, HUGE[1])},
            **{f"search_ef {n}": content(search_ef=n) for n in HUGE},
            "rows of frames": frames(lambda f: [f[0], 2**40, 2**40, f[3]]),
            "rows of frames beyond int64": frames(lambda f: [f[0], 2**70, f[2], f[3]]),
            "stride": lambda m: m["written"].update(stride=2**70),
            "bytes of a file": file("embeddings.npy", bytes=2**62),
            "weight": lambda m: m["content"].update(weight=10**400),
        },
        "negative or zero numbers": {
            **{f"{key} {n}": content(**{key: n}) for key in counts for n in (-1, 0)},
            **{f"search_ef {n}": content(search_ef=n) for n in (-1, 0)},
            **{
                f"identity {k} {n}": identity(**{k: n})
                for k in ("dim", "patch_px")
                for n in (-1, 0)
            },
            "rows of frames": frames(lambda f: [f[0], -1, f[2], f[3]]),
            "no rows of frames": frames(lambda f: [f[0], 0, 0, f[3]]),
            "bytes of a file": file("embeddings.npy", bytes=-1),
            "weight": content(weight=-1.0),
        },
        "numbers of another type": {
            **{
                f"{key} {n!r}": content(**{key: n}) for key in counts for n in ("5", None, [], True)
            },
            "count of a float": content(count=240.0),
            "count of NaN text": content(count="NaN"),
            "identity dtype": identity(dtype=1),
            "identity execution": identity(execution="os.system"),
            "frames": content(frames={"a": 1}),
            "a frame": frames(lambda f: f[0]),
            "build": content(build=[]),
            "roi": content(roi={"polygon_xy": [[["0"], 0]], "ego_mask_sha256": ""}),
            "limits": content(limits="none"),
            "files": lambda m: m.update(files=[["embeddings.npy", 1]]),
            "file facts": file("embeddings.npy", sha256=None),
            "content": lambda m: m.update(content=None),
            "written": lambda m: m.update(written=[]),
            "sources": lambda m: m["written"].update(sources={"opened": 1}),
        },
        "paths that leave the folder": {
            "file by ..": file("../outside"),
            "file by an absolute path": file("/etc/passwd"),
            "frame file by ..": file("frames/../../outside.jpg"),
            "frame file with a line break": file("frames/000000.jpg\n"),
            "further stage by ..": content(further=["../../originals"]),
            "further stage absolute": content(further=["/etc"]),
            "camera by ..": content(camera="../../camera"),
            "backbone by ..": lambda m: m["written"].update(backbone="../../../etc"),
            "segmenter model by ..": lambda m: m["written"].update(segmenter_model="../../x"),
        },
        "other versions": {
            f"format_version {n!r}": (lambda m, n=n: m.update(format_version=n))  # type: ignore[misc]
            for n in (4, 6, "5", 5.0, True, None, [5], 2**70)
        },
        "keys missing or unknown": {
            **{
                f"content without {key}": (lambda m, key=key: m["content"].pop(key))  # type: ignore[misc]
                for key in ("identity", "frames", "roi", "camera", "graph", "recordings", "limits")
            },
            **{
                f"{key} missing": (lambda m, key=key: m.pop(key))  # type: ignore[misc]
                for key in ("files", "written", "format")
            },
            "unknown key": lambda m: m.update(unknown=1),
            "unknown content": content(unknown=1),
            "fewer files": lambda m: m["files"].pop("graph.hnsw"),
            "surplus file": file("frames/999999.jpg"),
            "other graph": lambda m: m["content"]["graph"].update(m=2**20),
            "other segmenter": content(
                segmenter={"family": "pickle", "model_id": "", "digest": ""}
            ),
        },
    }
    # Names and search breadths that somebody could have written are answered as before.
    harmless = {"camera by ..", "backbone by ..", "segmenter model by ..", "stride"}
    harmless |= {f"search_ef {n}" for n in HUGE} | {"identity dtype", "support 0"}
    for fault_class, named in changes.items():
        for name, change in named.items():
            allowed = (REFUSED, HARMLESS) if name in harmless else (REFUSED,)

            def inject(lab: Any, place: Any, change: Change = change) -> None:
                sign(place.index, change)

            point = f"manifest: {name}"
            yield case(f"forged: {fault_class}", point, "load_detector", inject, allowed=allowed)

    def edited(lab: Any, place: Any) -> None:
        path = place.index / "manifest.json"
        manifest = json.loads(path.read_bytes())
        manifest["written"]["stride"] += 1
        path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")

    yield case("edited, its digest not renewed", "manifest.json", "load_detector", edited)

    def stage_change(change: Change) -> Inject:
        return lambda lab, place: sign(place.index, stage=change)

    for name, change in {
        "count": content(count=2**62),
        "dim": identity(dim=2**40),
        "edits": content(edits=[[1, "add", 1, 1]]),
        "region": lambda m: m["content"]["roi"].update(ego_mask_sha256="1"),
        "weight": content(weight=-0.5),
        "further stages of its own": content(further=["0" * 64]),
    }.items():
        yield case(
            "forged: further stage", f"stage_1: {name}", "load_detector", stage_change(change)
        )

    def surplus(name: str) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.index / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"1")

        return inject

    for name in ("code.py", "frames/000999.jpg", "frames/a/b", "stage_2/manifest.json", "x.npy"):
        yield case("surplus file", name, "load_detector", surplus(name))
    yield case(
        *("forged: oversized numbers", "manifest: count 4611686018427387904", "configure"),
        lambda lab, place: sign(place.index, content(count=2**62)),
    )
    yield case(
        *("forged: paths that leave the folder", "manifest: file by ..", "configure"),
        lambda lab, place: sign(place.index, file("../outside")),
    )


def _by_hand(case: MakeCase) -> Iterator[Case]:
    """Yield edits that any editor could make, without new digests."""

    def edit(name: str, old: str, new: str) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.index / name
            text = path.read_text()
            assert old in text, f"{old} is not in {name}"
            path.write_text(text.replace(old, new, 1))

        return inject

    for name, old, new in (
        ("manifest.json", '"stride": 1', '"stride": 2'),
        ("manifest.json", '"weight": 1.0', '"weight": 2.0'),
        ("manifest.json", '"stride": 1', '"stride":  1'),
        ("manifest.json", '"package_version"', '"package_versions"'),
        ("calibration.json", '"confidence":0', '"confidence":1e-9,"_":0'),
        ("calibration.json", '"left_out":false', '"left_out":true'),
        ("calibration.json", '"camera":"camera"', '"camera":"camerb"'),
    ):
        point = f"{name}: {new}"
        yield case("edited by hand", point, "load_detector", edit(name, old, new))


def _arrays(case: MakeCase) -> Iterator[Case]:
    arrays: dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]] = {
        "embeddings": {
            "not of unit norm": lambda e: e * np.float32(1.1),
            "zero": lambda e: np.where(np.arange(len(e))[:, None] == 3, np.float32(0), e),
            "NaN": lambda e: np.where(np.arange(len(e))[:, None] == 3, np.float32(np.nan), e),
            "infinite": lambda e: np.where(np.arange(len(e))[:, None] == 0, np.float32(np.inf), e),
            "float64": lambda e: e.astype(np.float64),
            "float16": lambda e: e.astype(np.float16),
            "big-endian": lambda e: e.astype(">f4"),
            "Fortran order": np.asfortranarray,
            "fewer": lambda e: e[:-1],
            "none": lambda e: e[:0],
            "flat": lambda e: e.reshape(-1),
            "three axes": lambda e: e[None],
            "structured": lambda e: e.view([("a", "<f4")]),
            "texts": lambda e: e.astype("U8"),
        },
        "entries": {
            "int64": lambda e: e.astype(np.int64),
            "negative": lambda e: e - 1,
            "beyond their frames": lambda e: e + np.int32(8),
            "huge": lambda e: e + np.int32(2**31 - 10),
            "fewer columns": lambda e: e[:, :2],
        },
        "centroids": {
            "not of unit norm": lambda c: c * np.float32(1.1),
            "NaN": lambda c: np.where(np.arange(len(c))[:, None] == 0, np.float32(np.nan), c),
            "fewer": lambda c: c[:-1],
        },
        "lists": {
            "negative": lambda n: n - 1,
            "huge": lambda n: n + np.int32(9999),
            "fewer": lambda n: n[:-1],
            "int64": lambda n: n.astype(np.int64),
        },
        "support": {
            "int64": lambda s: s.astype(np.int64),
            "fewer columns": lambda s: s[:, :2],
        },
    }

    def forge(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.index / f"{name}.npy"
            changed = change(np.load(path, allow_pickle=False))
            np.save(path, changed)
            sign(place.index)

        return inject

    for name, changes in arrays.items():
        for text, change in changes.items():
            yield case("forged: array", f"{name}.npy: {text}", "load_detector", forge(name, change))

    def pickled(lab: Any, place: Any) -> None:
        np.save(place.index / "entries.npy", np.array([{"a": 1}], dtype=object))
        sign(place.index)

    yield case("forged: array of Python objects", "entries.npy", "load_detector", pickled)

    def header(text: str, version: bytes = b"\x01\x00") -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.index / "entries.npy"
            body = path.read_bytes()[128:]
            size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text))
            path.write_bytes(b"\x93NUMPY" + version + size + text.encode("latin1") + body)
            sign(place.index)

        return inject

    row = "{{'descr': '{}', 'fortran_order': False, 'shape': {}}}\n"
    for name, text in {
        "huge shape": row.format("<i4", f"({2**62}, 3)"),
        "overflowing shape": row.format("<i4", f"({2**33}, {2**33})"),
        "negative shape": row.format("<i4", "(-1, 3)"),
        "shape of a float": row.format("<i4", "(240.0, 3)"),
        "shape of a text": row.format("<i4", "'240'"),
        "objects": row.format("|O", "(240, 3)"),
        "unknown type": row.format("<z9", "(240, 3)"),
        "type of zero bytes": row.format("|V0", "(240, 3)"),
        "huge type": row.format(f"|V{2**31 - 1}", "(240, 3)"),
        "code": "__import__('os').system('true')\n",
        "unterminated": "{'descr': (\n",
        "many brackets": "[" * 4000 + "\n",
        "many signs": "-" * 9000 + "1\n",
        "many additions": "1" + "+1j" * 3000 + "\n",
        "no dictionary": "3\n",
        "other keys": "{'a': 1}\n",
        "null bytes": "\0" * 64 + "\n",
        "long": row.format("<i4", "(240, 3)").rstrip() + " " * 60000 + "\n",
    }.items():
        yield case(
            "forged: header of an array", f"entries.npy: {name}", "load_detector", header(text)
        )
    for version in (b"\x02\x00", b"\x03\x00", b"\x09\x00"):
        text = row.format("<i4", f"({2**62}, 3)")
        point = f"entries.npy: version {version[0]}"
        yield case("forged: header of an array", point, "load_detector", header(text, version))


_GRAPH_HEADER = struct.Struct("<QQQQQQiIQQQdQ")
_GRAPH_FIELDS = (
    *("offset_level_0", "max_elements", "count", "element_bytes", "label_offset", "data_offset"),
    *("max_level", "entry_point", "max_m", "max_m0", "m", "mult", "ef_construction"),
)


def _graphs(seed: int, case: MakeCase) -> Iterator[Case]:
    # Nothing that a search uses depends on the last two.
    ignored = {"mult", "ef_construction"}

    def field(number: int, value: Any) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.index / "graph.hnsw"
            data = bytearray(path.read_bytes())
            values = list(_GRAPH_HEADER.unpack_from(data))
            values[number] = value
            _GRAPH_HEADER.pack_into(data, 0, *values)
            path.write_bytes(data)
            sign(place.index)

        return inject

    for number, name in enumerate(_GRAPH_FIELDS):
        small = name in ("max_level", "entry_point")
        for value in (0, 1, 7, 2**31 - 1 if small else 2**40):
            value = float(value) if name == "mult" else value
            allowed = (REFUSED, HARMLESS) if name in ignored or value == 0 else (REFUSED,)
            if name in ("max_level", "entry_point"):
                allowed = (REFUSED, HARMLESS)
            point = f"graph.hnsw: {name} {value}"
            inject = field(number, value)
            yield case("forged: graph header", point, "NominalIndex.load", inject, allowed=allowed)

    def damaged(number: int, part: str) -> Inject:
        rng = random.Random(f"{part} {seed} {number}")

        def inject(lab: Any, place: Any) -> None:
            path = place.index / "graph.hnsw"
            data = bytearray(path.read_bytes())
            if part == "bytes":
                for _ in range(50):
                    data[rng.randrange(96, len(data))] = rng.randrange(256)
            elif part == "zeros":
                start = rng.randrange(96, len(data) - 64)
                length = rng.choice((64, 1024, 8192))
                data[start : start + length] = bytes(len(data[start : start + length]))
            elif part == "cut":
                del data[rng.randrange(1, len(data)) :]
            elif part == "longer":
                data += rng.randbytes(100)
            elif part == "links":
                # Of one entry: 33 numbers of 4 bytes, then its vector and label.
                entry_bytes = _GRAPH_HEADER.unpack_from(data)[3]
                start = 96 + rng.randrange(200) * entry_bytes + 4 * rng.randrange(1, 5)
                data[start : start + 4] = rng.choice((240, 2**31, 2**32 - 1)).to_bytes(4, "little")
            elif part == "link counts":
                entry_bytes = _GRAPH_HEADER.unpack_from(data)[3]
                start = 96 + rng.randrange(200) * entry_bytes
                data[start : start + 4] = rng.choice((33, 65535, 2**24)).to_bytes(4, "little")
            elif part == "vectors swapped":
                # Each of unit norm, and of the index.
                entry_bytes = _GRAPH_HEADER.unpack_from(data)[3]
                starts = [96 + n * entry_bytes + 4 * 33 for n in rng.sample(range(200), 2)]
                one, other = (data[s : s + entry_bytes - 4 * 33 - 8] for s in starts)
                for start, vector in zip(starts, (other, one), strict=True):
                    data[start : start + len(vector)] = vector
            path.write_bytes(data)
            sign(place.index)

        return inject

    for part in ("bytes", "zeros", "cut", "longer", "links", "link counts", "vectors swapped"):
        for number in range(4):
            inject = damaged(number, part)
            # Zeros may meet zeros.
            allowed = (REFUSED, HARMLESS) if part == "zeros" else (REFUSED,)
            more = {"seed": seed + number, "allowed": allowed}
            point = f"graph.hnsw: {part}"
            yield case("forged: graph body", point, "NominalIndex.load", inject, **more)


def _calibrations(case: MakeCase) -> Iterator[Case]:
    nan, inf = float("nan"), float("inf")

    def first_drive(**values: Any) -> Change:
        return lambda b: b["drives"][0].update(values)

    def normalisation(name: str, value: Any) -> Change:
        return lambda b: b["normalisations"][0].update({name: value})

    changes: dict[str, Change] = {
        **{
            f"without {key}": (lambda b, key=key: b.pop(key))  # type: ignore[misc]
            for key in ("drives", "scoring", "roi", "normalisations", "camera", "episodes")
        },
        "unknown key": lambda b: b.update(unknown=1),
        **{
            f"format {value!r}": (lambda b, value=value: b.update(format=value))  # type: ignore[misc]
            for value in (3, 5, "4", True, None, 2**70)
        },
        "no drives": lambda b: b.update(drives=[]),
        "drives of one name": lambda b: b.update(drives=[b["drives"][0]] * 2),
        "drives of another type": lambda b: b.update(drives=["a"]),
        "scores of texts": first_drive(scores=["1.0"]),
        "no scores": first_drive(scores=[]),
        "scores in disorder": first_drive(scores=[2.0, 1.0]),
        "nested scores": first_drive(scores=[[1.0]]),
        "huge scores": first_drive(scores=[10**400]),
        "left_out of another type": first_drive(left_out=1),
        "rate above 1": lambda b: b.update(target_false_alarm_rate=1.5),
        "rate 0": lambda b: b.update(target_false_alarm_rate=0.0),
        "rate of a text": lambda b: b.update(target_false_alarm_rate="0.1"),
        "confidence 1": lambda b: b.update(confidence=1.0),
        "confidence of too many drives": lambda b: b.update(confidence=0.99999),
        "heatmap_low of a text": lambda b: b.update(heatmap_low="0"),
        "fingerprint of another index": lambda b: b.update(index_fingerprint="0" * 64),
        "fingerprint of another type": lambda b: b.update(index_fingerprint=[]),
        "no normalisations": lambda b: b.update(normalisations=[]),
        "too few normalisations": lambda b: b["normalisations"].pop(),
        "normalisations of another type": lambda b: b.update(normalisations=[1, 2]),
        "scoring of another type": lambda b: b.update(scoring={"neighbours": "many"}),
        "other neighbours": lambda b: b["scoring"].update(neighbours=3),
        "roi of another type": lambda b: b.update(roi={"polygon_xy": 1, "ego_mask_sha256": ""}),
        "roi without polygon": lambda b: b.update(roi={}),
        "roi outside": lambda b: b["roi"].update(polygon_xy=[[9, 9], [10, 9], [10, 10]]),
        "roi of huge numbers": lambda b: b["roi"].update(polygon_xy=[[10**400, 0], [1, 0], [1, 1]]),
        "execution unknown": lambda b: b.update(execution="tensorrt"),
        "dtype unknown": lambda b: b.update(dtype="int4", execution="torch"),
        "probe scores of texts": lambda b: b.update(probe_scores=["1"]),
        "more pattern scores": lambda b: b.update(pattern_scores=[1.0] * 99),
        "episodes of another type": lambda b: b.update(episodes={"a": 1}),
        "stale edits of another type": lambda b: b.update(stale_edits=[{"number": "1"}]),
    }
    for name in ("mean", "deviation"):
        for text, value in (
            ("a text", "x"),
            ("empty", []),
            ("ragged", [[1.0], []]),
            ("null", None),
        ):
            changes[f"normalisation {name} {text}"] = normalisation(name, value)
    harmless = {"dtype unknown"}
    for name, change in changes.items():

        def inject(lab: Any, place: Any, change: Change = change) -> None:
            sign_calibration(place.index, change)

        allowed = (REFUSED, HARMLESS) if name in harmless else (REFUSED,)
        point = f"calibration.json: {name}"
        yield case("forged: calibration", point, "load_detector", inject, allowed=allowed)
    yield case(
        *("forged: calibration", "calibration.json: rate above 1", "configure"),
        lambda lab, place: sign_calibration(
            place.index, lambda b: b.update(target_false_alarm_rate=1.5)
        ),
    )

    def edited(lab: Any, place: Any) -> None:
        from semantic_anomaly.storage import canonical_json

        path = place.index / "calibration.json"
        body = json.loads(path.read_bytes())
        body["heatmap_low"] -= 1e-3
        path.write_text(canonical_json(body))

    yield case("edited, its digest not renewed", "calibration.json", "load_detector", edited)

    def literal(text: str) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.index / "calibration.json"
            body = json.loads(path.read_bytes())
            body["heatmap_low"] = 0.0
            path.write_text(json.dumps(body).replace('"heatmap_low": 0.0', text))

        return inject

    for value in (nan, inf, -inf):
        text = f'"heatmap_low": {json.dumps(value)}'
        point = f"calibration.json: {value}"
        yield case("forged: numbers that are not finite", point, "load_detector", literal(text))
    for text in ("1e999", "-1e999", "9" * 5000):
        point = f"calibration.json: {text[:6]}"
        inject = literal(f'"heatmap_low": {text}')
        yield case("forged: numbers that are not finite", point, "load_detector", inject)


def _deep(case: MakeCase) -> Iterator[Case]:
    def nested(kind: str, depth: int) -> str:
        return {
            "lists": "[" * depth + "]" * depth,
            "mappings": '{"a":' * depth + "1" + "}" * depth,
            "open": "[" * depth,
        }[kind]

    def deep(name: str, kind: str, depth: int) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.file(name)
            text = nested(kind, depth)
            if name == "settings.yaml" or kind == "open":
                path.write_text(f'{{"index": {text}}}' if kind != "open" else text)
                return
            # A key that readers pass over, or compare only after they have read it all.
            document = json.loads(path.read_text())
            key = "written" if name == "manifest.json" else "_deep"
            if name == "calibration.json":
                key = "roi"
            document[key] = "DEEP"
            indent = 1 if name == "manifest.json" else None
            dumped = json.dumps(document, indent=indent, sort_keys=True) + "\n"
            path.write_text(dumped.replace('"DEEP"', text))

        return inject

    files = {
        "manifest.json": "load_detector",
        "calibration.json": "load_detector",
        "config.json": "load_detector with backbone",
        "preprocessor_config.json": "load_detector with backbone",
        "settings.yaml": "settings file",
    }
    for name, entry in files.items():
        for kind in ("lists", "mappings", "open"):
            for depth in DEPTHS:
                if kind == "open" and depth < 3000:
                    continue
                # YAML is read by Python code, which takes long before it gives up.
                if name == "settings.yaml" and depth > 10_000:
                    continue
                yield case(
                    "deeply nested", f"{name}: {depth} {kind}", entry, deep(name, kind, depth)
                )

    # With its digest renewed, the value comes as far as the comparison with the settings.
    for depth in DEPTHS[:3]:

        def compared(lab: Any, place: Any, depth: int = depth) -> None:
            value: Any = 1
            for _ in range(depth):
                value = [value]
            sign_calibration(place.index, lambda body: body["scoring"].update(neighbours=value))

        point = f"calibration.json: {depth} lists, digest renewed"
        yield case("deeply nested", point, "load_detector", compared)

    def aliases(kind: str) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            lines = ["a0: &a0 {neighbours: 1}"]
            for number in range(1, 40):
                before = f"*a{number - 1}"
                value = {
                    "lists": f"[{before}, {before}]",
                    "mappings": f"{{x: {before}, y: {before}}}",
                    "merges": f"{{<<: [{before}, {before}]}}",
                }[kind]
                lines.append(f"a{number}: &a{number} {value}")
            place.settings.write_text("\n".join(lines) + "\n")

        return inject

    for kind in ("lists", "mappings", "merges"):
        yield case("expanding aliases", f"settings.yaml: {kind}", "settings file", aliases(kind))


def _backbones(case: MakeCase) -> Iterator[Case]:
    entry = "load_detector with backbone"

    def tensors(change: Callable[[dict[str, Any]], object]) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            from safetensors.torch import load_file, save_file

            path = place.backbone / "model.safetensors"
            weights = dict(load_file(path))
            change(weights)
            save_file(weights, path, metadata={"format": "pt"})

        return inject

    def first(weights: Mapping[str, Any]) -> str:
        return sorted(name for name in weights if name.endswith("weight"))[0]

    def replaced(make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
        return lambda weights: weights.update({first(weights): make(weights[first(weights)])})

    def nan(tensor: Any) -> Any:
        changed = tensor.clone()
        changed.view(-1)[0] = float("nan")
        return changed

    def infinite(tensor: Any) -> Any:
        changed = tensor.clone()
        changed.view(-1)[-1] = float("inf")
        return changed

    weight_changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "one missing": lambda w: w.pop(first(w)),
        "all missing": lambda w: [w.pop(name) for name in list(w)[1:]],
        "one renamed": lambda w: w.update({"renamed.weight": w.pop(first(w))}),
        "all renamed": lambda w: w.update({f"other.{name}": w.pop(name) for name in list(w)}),
        "one extra": lambda w: w.update({"extra.weight": w[first(w)].clone()}),
        "NaN": replaced(nan),
        "infinite": replaced(infinite),
        # Images without masked patches do not use it.
        "NaN that no output shows": lambda w: w.update({_UNUSED: nan(w[_UNUSED])}),
        "another shape": replaced(lambda t: t[..., :-1].contiguous()),
        "more axes": replaced(lambda t: t[None].contiguous()),
        "a scalar": replaced(lambda t: t.reshape(-1)[0].clone()),
        "of integers": replaced(lambda t: t.int()),
    }
    for name, change in weight_changes.items():
        for adopted in (False, True):

            def inject(
                lab: Any,
                place: Any,
                change: Callable[[dict[str, Any]], object] = change,
                adopted: bool = adopted,
            ) -> None:
                tensors(change)(lab, place)
                if adopted:
                    adopt_backbone(place)

            point = f"model.safetensors: {name}" + ", digests renewed" * adopted
            yield case("forged: weights", point, entry, inject)

    def header(make: Callable[[dict[str, Any], int], tuple[bytes, int | None]]) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.backbone / "model.safetensors"
            data = path.read_bytes()
            (size,) = struct.unpack_from("<Q", data)
            described, body = json.loads(data[8 : 8 + size]), data[8 + size :]
            text, length = make(described, len(body))
            path.write_bytes(
                struct.pack("<Q", len(text) if length is None else length) + text + body
            )
            adopt_backbone(place)

        return inject

    def edited(change: Callable[[dict[str, Any]], object]) -> Inject:
        def make(described: dict[str, Any], body: int) -> tuple[bytes, None]:
            change(described)
            return json.dumps(described).encode(), None

        return header(make)

    def some(described: dict[str, Any]) -> dict[str, Any]:
        return next(v for k, v in described.items() if k != "__metadata__" and len(v["shape"]) > 1)

    for name, inject in {
        "length of the header": header(lambda d, n: (json.dumps(d).encode(), 2**62)),
        "length 0": header(lambda d, n: (json.dumps(d).encode(), 0)),
        "header of no JSON": header(lambda d, n: (b"x" * 100, None)),
        "deep header": header(lambda d, n: (b"[" * 100_000, None)),
        "huge shape": edited(lambda d: some(d).update(shape=[2**40, 2**40])),
        "negative shape": edited(lambda d: some(d).update(shape=[-1, 3])),
        "offsets beyond the end": edited(lambda d: some(d).update(data_offsets=[0, 2**50])),
        "offsets reversed": edited(lambda d: some(d).update(data_offsets=[100, 0])),
        "offsets overlapping": edited(
            lambda d: some(d).update(data_offsets=[4, 4 + np.diff(some(d)["data_offsets"]).item()])
        ),
        "type unknown": edited(lambda d: some(d).update(dtype="PICKLE")),
        "type of other size": edited(lambda d: some(d).update(dtype="F64")),
    }.items():
        yield case("forged: header of weights", f"model.safetensors: {name}", entry, inject)

    def config(name: str, **values: Any) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.backbone / name
            document = json.loads(path.read_text())
            path.write_text(json.dumps({**document, **values}))
            adopt_backbone(place)

        return inject

    for values in (
        {"num_hidden_layers": 5},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 100_000},
        {"num_hidden_layers": "3"},
        {"hidden_size": 64},
        {"hidden_size": 2**40},
        {"hidden_size": 0},
        {"hidden_size": -32},
        {"hidden_size": 32.5},
        {"patch_size": 7},
        {"patch_size": 0},
        {"patch_size": -14},
        {"patch_size": 2**40},
        {"image_size": 2**30},
        {"image_size": 0},
        {"num_channels": 4},
        {"num_channels": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"mlp_ratio": 2**40},
        {"mlp_ratio": "x"},
        {"hidden_act": "os.system"},
        {"layer_norm_eps": "x"},
        {"model_type": "vit"},
        {"model_type": "../../x"},
        {"model_type": ["dinov2"]},
        {"model_type": None},
        {"auto_map": {"AutoModel": "code.Model"}, "model_type": "custom"},
        {"transformers_weights": "../other.safetensors"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"out_indices": [99]},
        {"out_indices": ["a"]},
        {"out_indices": 3},
        {"dtype": "object"},
        {"torch_dtype": "float8"},
        {"architectures": ["Pickle"]},
    ):
        ((key, value),) = list(values.items())[:1]
        point = f"config.json: {key} {str(value)[:40]}"
        # Some keys are not used, or only with weights of the right shape.
        unused = {"dtype", "torch_dtype", "architectures", "out_indices", "image_size"}
        allowed = (REFUSED, HARMLESS) if key in unused else (REFUSED,)
        inject = config("config.json", **values)
        yield case("forged: backbone configuration", point, entry, inject, allowed=allowed)
    for key, value in {
        "image_mean": [0.5, 0.5],
        "image_std": [0.0, 1.0, 1.0],
        "rescale_factor": 0,
        "image_std ": [1.0, 1.0, "1"],
    }.items():
        inject = config("preprocessor_config.json", **{key.strip(): value})
        point = f"preprocessor_config.json: {key.strip()} {value}"
        yield case("forged: backbone configuration", point, entry, inject)

    def pickle_only(lab: Any, place: Any) -> None:
        (place.backbone / "model.safetensors").rename(place.backbone / "pytorch_model.bin")

    yield case("weights as a pickle", "pytorch_model.bin", entry, pickle_only)

    def shards(files: Any) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            (place.backbone / "model.safetensors").rename(place.root / "outside.safetensors")
            text = json.dumps({"weight_map": files})
            (place.backbone / "model.safetensors.index.json").write_text(text)

        return inject

    for name, files in {
        "by ..": {"a": "../outside.safetensors"},
        "absolute": {"a": os.path.join("/", "etc", "x.safetensors")},  # noqa: PTH118
        "missing": {"a": "model-00001.safetensors"},
        "no texts": {"a": 1},
        "a list": ["model.safetensors"],
        "none": {},
        "a pickle": {"a": "pytorch_model.bin"},
    }.items():
        yield case("forged: shards of weights", f"weight_map: {name}", entry, shards(files))


def _settings(case: MakeCase) -> Iterator[Case]:
    def text(content: str | bytes) -> Inject:
        data = content.encode() if isinstance(content, str) else content
        return lambda lab, place: place.settings.write_bytes(data)

    for name, content in {
        "a list": "[1, 2]",
        "a text": "index",
        "a tag of Python": "index: !!python/object/apply:os.system ['true']",
        "a tag of a name": "index: !!python/name:os.system",
        "a tab": "index:\n\t- a",
        "NUL bytes": b"index: \x00\x00",
        "bytes of no UTF-8": b"index: \xff\xfe\xfa",
        "UTF-16": "index: a".encode("utf-16"),
        "a name twice": "index: a\nindex: b",
        "an unknown name": "indx: a",
        "a close name": "neighbors: 3",
        "a text for a number": "neighbours: many",
        "a float for an integer": "neighbours: 1.5",
        "a boolean for an integer": "neighbours: true",
        "NaN": "tail_percent: .nan",
        "infinite": "smoothing: .inf",
        "huge": f"neighbours: {10**400}",
        "negative": "neighbours: -1",
        "a mapping for a number": "neighbours: {a: 1}",
        "a list for a number": "neighbours: [1]",
        "a number for a list": "cameras: 3",
        "numbers for names": "cameras: [1, 2]",
        "a camera by ..": "cameras: ['../x']",
        "a camera named as a setting": "cameras: [index]",
        "cameras of one name": "cameras: [a, a]",
        "a camera that is not listed": "front.index: a",
        "a date": "index: 2020-13-45",
        "a number in base 60": f"neighbours: {':'.join(['59'] * 2000)}",
        "a number that Python does not write": f"neighbours: 0x{'f' * 20000}",
        "a long number in base 60": f"neighbours: {':'.join(['59'] * 5000)}",
        "an endless pattern": "recording_pattern: '((a+)+)+$'",
        "a pattern of no group": "recording_pattern: 'a'",
        "a bad pattern": "recording_pattern: '('",
        "stages of another type": "stages: [1]",
        "a stage of an unknown key": "stages: ['mobilenet_v1 pickle=1']",
        "a stage without a backbone": "stages: ['size=800']",
        "stages and shorthand": "stages: [mobilenet_v1]\nbackbone: mobilenet_v1",
        "a home of nobody": "index: '~nobody_at_all/x'",
        "two nodes": "a: {ros__parameters: {index: x}}\nb: {ros__parameters: {index: y}}",
        "no parameters": "a: {ros__parameters: 3}",
        "many nodes": "\n".join(f"n{n}: {{ros__parameters: {{}}}}" for n in range(2000)),
    }.items():
        names = ("setting", "stage", "camera")
        inject = text(content)
        allowed = (REFUSED,) if name != "UTF-16" else (REFUSED, "accepted")
        more = {"names": names, "allowed": allowed}
        yield case("wrong settings", f"settings.yaml: {name}", "settings file", inject, **more)


def _thumbnails(case: MakeCase) -> Iterator[Case]:
    def thumbnail(make: Callable[[bytes], bytes]) -> Inject:
        def inject(lab: Any, place: Any) -> None:
            path = place.index / "frames" / "000000.jpg"
            path.write_bytes(make(path.read_bytes()))
            sign(place.index)

        return inject

    def claimed(data: bytes, height: int, width: int) -> bytes:
        start = next(
            data.find(bytes((255, marker)))
            for marker in (0xC0, 0xC2)
            if bytes((255, marker)) in data
        )
        return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]

    for name, make in {
        "claims 20000 x 20000": lambda data: claimed(data, 20000, 20000),
        "claims 65535 x 65535": lambda data: claimed(data, 65535, 65535),
        "claims 0 x 0": lambda data: claimed(data, 0, 0),
        "no image": lambda data: b"not an image",
        "empty": lambda data: b"",
        "cut": lambda data: data[: len(data) // 2],
    }.items():
        inject = thumbnail(make)
        # Nothing but the pictures of reports needs them; scores do not.
        point = f"frames/000000.jpg: {name}"
        yield case(
            "forged: thumbnail", point, "NominalIndex.load", inject, names=("image", "jpeg", "data")
        )
