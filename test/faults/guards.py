"""Remove guards of the package one by one, and show that the campaign notices each.

Every guard is a replacement of text of the package. Functions that it changes get their new code in
a fork of the laboratory, where the cases that should notice run:
`PYTHONPATH=test python -m faults.guards --out faults_output`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 120
_CASES = 40


@dataclass(frozen=True)
class Guard:
    """A guard, how it is removed, and the cases that should notice.

    Attributes:
        name: what it guards against.
        file: in the package.
        old, new: text and its replacement; `old` occurs exactly once.
        group: of the cases.
        only: regular expression that their names contain.
    """

    name: str
    file: str
    old: str
    new: str
    group: str
    only: str


GUARDS = (
    Guard(
        "digest of the files of an index",
        "index/format.py",
        'if sha256_file(path) != facts["sha256"]:',
        "if False:",
        "files",
        "bit flipped/(entries|embeddings|support|centroids|frames).*load_detector/",
    ),
    Guard(
        "size of the files of an index",
        "index/format.py",
        'if size != facts["bytes"]:',
        "if False:",
        "files",
        "oversized numbers/manifest: bytes|zero numbers/manifest: bytes",
    ),
    Guard(
        "links among the files of an index",
        "index/format.py",
        "if not path.is_file() or path.is_symlink():\n        raise _wrong(folder, name,",
        "if not path.is_file():\n        raise _wrong(folder, name,",
        "files",
        "link in its place/embeddings",
    ),
    Guard(
        "digest of the manifest",
        "index/format.py",
        'if not intact or sha256_bytes(canonical_json(rest).encode()) != manifest["sha256"]:',
        "if False:",
        "files",
        "edited by hand/manifest.json",
    ),
    Guard(
        "fingerprint of the content",
        "index/format.py",
        'if content.manifest()["fingerprint"] != manifest["fingerprint"]:',
        "if False:",
        "files",
        "unknown content|other graph|swapped.*manifest|numbers of another type",
    ),
    Guard(
        "names in the list of files",
        "index/format.py",
        "if foreign or not needed <= set(files):",
        "if False:",
        "files",
        "paths that leave|fewer files",
    ),
    Guard(
        "surplus files in an index",
        "index/format.py",
        "    if extra:\n",
        "    if False:\n",
        "files",
        "surplus file/",
    ),
    Guard(
        "version of the format of an index",
        "index/format.py",
        "if type(version) is not int or version != FORMAT_VERSION:",
        "if False:",
        "files",
        "other versions/",
    ),
    Guard(
        "shape and type of arrays",
        "index/format.py",
        "if mapped.shape != shape or mapped.dtype != dtype or not mapped.flags.c_contiguous:",
        "if False:",
        "files",
        "forged: array/",
    ),
    Guard(
        "unit norm and finite embeddings",
        "index/format.py",
        "if not are_unit_vectors(embeddings):",
        "if False:",
        "files",
        "forged: array/embeddings",
    ),
    Guard(
        "entries that point into their frames",
        "index/format.py",
        "if not inside or not (cells < grids_hw[frame]).all():",
        "if False:",
        "files",
        "forged: array/entries|rows of frames",
    ),
    Guard(
        "range of the lists",
        "index/format.py",
        "if not ((partition.lists >= 0) & (partition.lists < len(partition.centroids))).all():",
        "if False:",
        "files",
        "forged: array/lists",
    ),
    Guard(
        "unit norm of the centroids",
        "index/format.py",
        "if not len(partition.centroids) or not are_unit_vectors(partition.centroids):",
        "if not len(partition.centroids):",
        "files",
        "forged: array/centroids",
    ),
    Guard(
        "any error of the header of an array",
        "index/format.py",
        "another one.\n    except Exception as error:\n",
        "another one.\n    except ZeroDivisionError as error:\n",
        "files",
        "header of an array",
    ),
    Guard(
        "header of a graph",
        "index/hnsw.py",
        "    if found != expected:\n",
        "    if False:\n",
        "files",
        "forged: graph header/",
    ),
    Guard(
        "links of a graph",
        "index/hnsw.py",
        "if len(ids) and ids.max() >= count:",
        "if False:",
        "files",
        "forged: graph body/.*: links",
    ),
    Guard(
        "vectors of a graph",
        "index/hnsw.py",
        'if not np.array_equal(piece["vector"], embeddings[start : start + rows]):',
        "if False:",
        "files",
        "forged: graph body/.*vectors swapped",
    ),
    Guard(
        "digest of a calibration",
        "calibration/format.py",
        "if sha256 != _digest(body) or created_sha256 != _created_digest(created, sha256):",
        "if not sha256:",
        "files",
        "digest not renewed/calibration",
    ),
    Guard(
        "types in a calibration",
        "calibration/format.py",
        "if type(body[key]) not in types:",
        "if False:",
        "files",
        "forged: calibration/",
    ),
    Guard(
        "fingerprint in a calibration",
        "calibration/calibration.py",
        '"index fingerprint": (self.index_fingerprint, index.fingerprint),',
        "",
        "files",
        "swapped.*calibration|fingerprint of another index",
    ),
    Guard(
        "number of normalisations of a calibration",
        "calibration/calibration.py",
        '"score normalisations": (len(self.normalisations), len(index.stages)),',
        "",
        "files",
        "too few normalisations",
    ),
    Guard(
        "regions of a calibration",
        "calibration/format.py",
        'RegionOfInterest.checked_description(body["roi"])',
        "pass",
        "files",
        "forged: calibration/.*roi",
    ),
    Guard(
        "finite numbers in a calibration",
        "calibration/format.py",
        "if not math.isfinite(number := float(text)):",
        "if (number := float(text)) == 1e-300:",
        "files",
        "numbers that are not finite",
    ),
    Guard(
        "depth of JSON and YAML",
        "storage.py",
        "    refuse_deep(value)\n    return value\n\n\ndef parse_yaml",
        "    return value\n\n\ndef parse_yaml",
        "files",
        "deeply nested/.*digest renewed",
    ),
    Guard(
        "merge keys of YAML",
        "storage.py",
        "        _refuse_merge_keys(root)\n",
        "",
        "files",
        "expanding aliases/settings.yaml: merges",
    ),
    Guard(
        "regular files only",
        "storage.py",
        "    if not stat.S_ISREG(status.st_mode):\n",
        "    if False:\n",
        "files",
        "(endless device|named pipe)/(calibration|settings)",
    ),
    Guard(
        "digests of the backbone",
        "index/nominal_index.py",
        "            if difference is not None:\n",
        "            if False:\n",
        "files",
        "bit flipped/(model|config|preprocessor).*load_detector|layer_norm",
    ),
    Guard(
        "missing and unexpected weights",
        "embedding/pretrained.py",
        "        if wrong:\n",
        "        if False:\n",
        "files",
        "forged: weights/.*digests renewed",
    ),
    Guard(
        "finite weights",
        "embedding/pretrained.py",
        "if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):",
        "if False:",
        "files",
        "forged: weights/.*no output shows, digests renewed",
    ),
    Guard(
        "more layers than weights",
        "embedding/pretrained.py",
        "    _refuse_more_layers(folder)\n    try:",
        "    try:",
        "files",
        "num_hidden_layers 100000",
    ),
    Guard(
        "shards outside the folder",
        "embedding/pretrained.py",
        "if not names or not all(isinstance(n, str) and _SAFETENSORS.fullmatch(n) for n in names):",
        "if not names:",
        "files",
        "forged: shards",
    ),
    Guard(
        "step of a raw image",
        "io/images.py",
        "    if step < row_bytes:\n",
        "    if False:\n",
        "messages",
        "step too small/.*offline",
    ),
    Guard(
        "length of the data of a raw image",
        "io/images.py",
        "    if content.size != data_rows * step:\n",
        "    if content.size < data_rows * step:\n",
        "messages",
        "data (long|short)/.*offline",
    ),
    Guard(
        "size of an image",
        "io/images.py",
        "    if height < 1 or width < 1 or height * width > MAX_IMAGE_PIXELS:\n",
        "    if False:\n",
        "messages",
        "(size (zero|huge)|compressed bomb)/.*offline",
    ),
    # The check for the end of a JPEG is not here: OpenCV 5 refuses truncated ones too.
    Guard(
        "end of a compressed image",
        "io/images.py",
        'return width, height, data.rfind(b"\\xff\\xd9", position) >= 0',
        "return width, height, True",
        "messages",
        "compressed truncated/.*jpeg.*offline",
    ),
    Guard(
        "byte order of 16 bits",
        "io/images.py",
        '.view(">u2" if is_bigendian else "<u2")',
        '.view("<u2")',
        "messages",
        "16 bits big-endian/.*offline",
    ),
    Guard(
        "frozen camera",
        "detection/blindness.py",
        "        if 0 < frozen_after_s < repeated_s and self._repeats >= _LEAST_REPEATS:\n",
        "        if False:\n",
        "messages",
        "frozen image/",
    ),
    Guard(
        "covered camera",
        "detection/blindness.py",
        "        if least_contrast > 0:\n",
        "        if False:\n",
        "messages",
        "image without contrast/.*first frame",
    ),
    Guard(
        "undo of a failed configure",
        "ros/node.py",
        'error(f"cannot configure: {error}")\n            self.release()\n',
        'error(f"cannot configure: {error}")\n            self._cameras = {"camera": None}\n',
        "files",
        "by configure",
    ),
    Guard(
        "atomic folders",
        "storage.py",
        "    finally:\n        shutil.rmtree(temporary, ignore_errors=True)\n",
        "    finally:\n        pass\n",
        "processes",
        "SIGINT/build-index while it handles (files|rename)|file size limit/build-index",
    ),
    Guard(
        "handling of SIGTERM",
        "cli/__init__.py",
        "    signal.signal(signal.SIGTERM, terminate)\n",
        "",
        "processes",
        "SIGTERM/build-index while",
    ),
    Guard(
        "foreign files in an output folder",
        "index/format.py",
        "if foreign or (names and MANIFEST not in names):",
        "if False:",
        "processes",
        "output in the way/build-index",
    ),
    Guard(
        "number of messages that a bag announces",
        "io/bags.py",
        "        if found == expected:\n            return\n",
        "        if True:\n            return\n",
        "processes",
        "bag with lost messages/",
    ),
    Guard(
        "truncated databases of bags",
        "io/bags.py",
        "        if file.stat().st_size < announced:\n",
        "        if False:\n",
        "processes",
        "bag cut off/sqlite3.*raw images",
    ),
    Guard(
        "metadata of bags that expand",
        "io/bags.py",
        "        parse_yaml(read_file(metadata))\n",
        "        pass\n",
        "processes",
        "bag metadata/mcap, expanding",
    ),
    Guard(
        "out of memory is tried once more",
        "ros/pipeline.py",
        "            if _is_out_of_memory(error):\n",
        "            if False:\n",
        "processes",
        "out of memory/.*, 1 times",
    ),
    Guard(
        "finite outputs of a network",
        "structures.py",
        "        if not np.all(np.abs(squares - 1.0) <= 2 * UNIT_NORM_TOLERANCE):\n",
        "        if False:\n",
        "processes",
        "failing computation/NaN",
    ),
    Guard(
        "age of frames",
        "ros/pipeline.py",
        "    if -max_age_s <= age_s <= max_age_s:\n",
        "    if True:\n",
        "processes",
        "clock jumps/old frames",
    ),
)


def remove(guard: Guard) -> None:
    """Remove a guard from the package in this process: changed functions get their new code.

    Raises:
        ValueError: the guard is not found exactly once, or changes no function.
    """
    path = ROOT / "semantic_anomaly" / guard.file
    text = path.read_text(encoding="utf-8")
    if text.count(guard.old) != 1:
        raise ValueError(f"'{guard.name}': found {text.count(guard.old)} times in {guard.file}")
    name = "semantic_anomaly." + guard.file.removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name.removesuffix(".__init__"))
    new_text = text.replace(guard.old, guard.new)
    codes = dict(_codes(compile(new_text, str(path), "exec")))
    changed = 0
    for key, function in _functions(vars(module), module.__name__):
        code = codes.get(key)
        if code is not None and _meaning(code) != _meaning(function.__code__):
            function.__code__ = code
            changed += 1
    if not changed:
        raise ValueError(f"'{guard.name}' changes no function of {guard.file}")


def _codes(code: CodeType, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the code of functions and methods by class and name."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield (*path, constant.co_name), constant
            if not path:
                yield from _codes(constant, (constant.co_name,))


def _functions(
    names: Mapping[str, Any], module: str, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FunctionType]]:
    """Yield the functions and methods of a module by class and name, without decorators."""
    for value in list(names.values()):
        value = value.fget if isinstance(value, property) else value
        value = getattr(value, "__func__", value)
        while hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        if isinstance(value, FunctionType) and value.__module__ == module:
            yield (*path, value.__code__.co_name), value
        elif isinstance(value, type) and value.__module__ == module and not path:
            yield from _functions(vars(value), module, (value.__name__,))


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """Return what a function does, whatever its lines."""
    constants = [_meaning(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return code.co_code, code.co_names, tuple(constants)


def results(guards: Sequence[Guard]) -> Iterator[dict[str, Any]]:
    """Yield what came of each removal: a fork of the laboratory of its group, without the guard."""
    from faults.campaign import MODULES, cases_of, prepare_environment

    prepare_environment()
    for group in dict.fromkeys(guard.group for guard in guards):
        module: Any = importlib.import_module(MODULES[group])
        cases = cases_of(group)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guards_")))
            laboratory = stack.enter_context(module.laboratory(folder))
            for guard in guards:
                if guard.group == group:
                    chosen = [case for case in cases if re.search(guard.only, case.name)]
                    yield _result(guard, chosen, laboratory, folder)


def _result(guard: Guard, cases: Sequence[Any], laboratory: Any, folder: Path) -> dict[str, Any]:
    row = {"guard": guard.name, "file": guard.file, "cases": 0, "noticed": False, "by": ""}
    _note(folder, row)
    if not (pid := os.fork()):
        _run_until_noticed(guard, row, cases, laboratory, folder)
    end = time.monotonic() + _TIMEOUT_S
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.02)
    # The next fork uses the same names, and a fork that was killed could not clean up.
    for left in folder.glob("case_*"):
        shutil.rmtree(left, ignore_errors=True)
    found: dict[str, Any] = json.loads((folder / "row.json").read_text())
    return found


def _run_until_noticed(
    guard: Guard, row: dict[str, Any], cases: Sequence[Any], laboratory: Any, folder: Path
) -> None:
    from faults.campaign import limit_memory, observed, sample

    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        remove(guard)
        limit_memory()
        for number, case in enumerate(sample(cases, _CASES, 0), start=1):
            # What is read if the case kills or hangs the process.
            row = {**row, "cases": number}
            _note(folder, {**row, "noticed": True, "by": f"{case.name}: crashed or hung"})
            violations = observed(case, laboratory).violations
            by = " ".join(f"{case.name}: {violations[0]}".split())[:200] if violations else ""
            _note(folder, {**row, "noticed": bool(violations), "by": by})
            if violations:
                break
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _note(folder: Path, row: dict[str, Any]) -> None:
    (folder / "row.new").write_text(json.dumps(row), encoding="utf-8")
    (folder / "row.new").replace(folder / "row.json")


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the report as Markdown."""
    found = sum(bool(row["noticed"]) for row in rows)
    lines = [
        "# Guards removed",
        "",
        f"{len(rows)} guards of the package were removed one by one; {found} removals were noticed "
        "by the campaign.",
        "",
        "| guard | cases until one notices | by |",
        "|---|---|---|",
    ]
    for row in rows:
        by = row["by"].replace("|", "/")
        lines.append(
            f"| {row['guard']} | {row['cases']} | {by if row['noticed'] else 'not noticed'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Remove every guard, write guards.json and guards.md; 1 if a removal goes unnoticed."""
    parser = argparse.ArgumentParser(prog="faults.guards", description=__doc__)
    parser.add_argument("--only", default="", help="guards whose name contains this")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the report")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    chosen = [guard for guard in GUARDS if args.only in guard.name]
    for row in tqdm(results(chosen), total=len(chosen), desc="guards", unit="guard"):
        rows.append(row)
        text = json.dumps(rows, indent=1) + "\n"
        (args.out / "guards.json").write_text(text, encoding="utf-8")
    (args.out / "guards.md").write_text(markdown(rows), encoding="utf-8")
    missed = [row["guard"] for row in rows if not row["noticed"]]
    print(
        f"{len(rows)} guards removed, {len(rows) - len(missed)} removals noticed; missed: {missed}"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
