"""The file of a calibration: every bit back, and every alteration refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.format import FILE_NAME
from semantic_anomaly.errors import ArtefactError, CalibrationError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import CELLS_HW, ScoreNormalisation
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import canonical_json, sha256_bytes

REGION = RegionOfInterest(((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)))


def usual() -> ScoreNormalisation:
    mean = np.linspace(0.01, 0.2, CELLS_HW[0] * CELLS_HW[1], dtype=np.float32).reshape(CELLS_HW)
    return ScoreNormalisation(mean, mean / 3)


def fitted(scores: np.ndarray, drives: int = 1) -> Calibration:
    parts = np.array_split(scores, drives)
    return Calibration.fit(
        {f"drive_{number}": part.tolist() for number, part in enumerate(parts)},
        heatmap_low=0.05,
        index=SimpleNamespace(fingerprint="f" * 64),
        settings=Settings(target_false_alarm_rate=0.1),
        roi=REGION,
        camera="camera",
        dtype="float32",
        normalisations={"grid": usual()},
    )


def small() -> Calibration:
    """Return a calibration of 20 scores, 0.001 to 0.020."""
    return fitted(np.arange(1, 21) / 1000)


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    scores = np.random.default_rng(2).gamma(2.0, 0.05, 333)
    written = fitted(scores, drives=4)
    assert written.save(tmp_path) == tmp_path / FILE_NAME
    read = Calibration.load(tmp_path)
    np.testing.assert_array_equal(read.scores, np.sort(scores))
    assert read.scores.dtype == np.float64
    for name in ("drives", "target_false_alarm_rate", "heatmap_low", "index_fingerprint"):
        assert getattr(read, name) == getattr(written, name)
    assert set(read.normalisations) == set(written.normalisations) == {"grid"}
    both = read.normalisations["grid"], written.normalisations["grid"]
    np.testing.assert_array_equal(both[0].mean, both[1].mean)
    np.testing.assert_array_equal(both[0].deviation, both[1].deviation)
    assert read.threshold == written.threshold and read.dtype == "float32"
    read.check("f" * 64, Settings(), REGION)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME], "nothing is left beside it"


def test_missing_calibration_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"does not exist.*semantic-anomaly calibrate"):
        Calibration.load(tmp_path)


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Return an attack that changes the content and makes its digest agree again."""

    def attack(content: bytes) -> bytes:
        body = json.loads(content)
        del body["sha256"]
        change(body)
        # As in the format's description: sha256 of the canonical JSON of everything else.
        sealed = {**body, "sha256": sha256_bytes(canonical_json(body).encode())}
        return canonical_json(sealed).encode()

    return attack


def edited(pattern: bytes, replacement: bytes) -> Callable[[bytes], bytes]:
    def attack(content: bytes) -> bytes:
        changed = re.sub(pattern, replacement, content, count=1)
        assert changed != content
        return changed

    return attack


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda content: content[: len(content) // 2], "not JSON"),
        (lambda content: b"", "not JSON"),
        (lambda content: b"\x80" + content, "not JSON"),
        (lambda content: content + b"{}", "not JSON"),
        (lambda content: b"[" * 100000, "not JSON"),
        (lambda content: b"[]", "expected format 1, found 'list'"),
        (lambda content: b"{}", "expected format 1, found None"),
        (edited(rb"0\.012", b"0.013"), "altered or damaged"),
        (edited(rb"0\.012", b"NaN"), "NaN is not a finite number"),
        (edited(rb"0\.012", b"Infinity"), "not a finite number"),
        (edited(rb"0\.012", b"1e999"), "not a finite number"),
        (edited(rb'"sha256":"', b'"sha256":"0'), "altered or damaged"),
        (resealed(lambda b: b.update(format=2)), "expected format 1, found 2"),
        (resealed(lambda b: b.pop("camera")), "differing: camera"),
        (resealed(lambda b: b.update(extra=1)), "differing: extra"),
        (resealed(lambda b: b.update(heatmap_low=1)), "'heatmap_low' has the type int"),
        (resealed(lambda b: b.update(episodes=[])), "'episodes' has the type list"),
        (resealed(lambda b: b.update(stale_edits=[{}])), "stale_edits"),
        (resealed(lambda b: b.update(scores="0.1")), "'scores' has the type str"),
        (resealed(lambda b: b["scores"].reverse()), "ascending order"),
        (resealed(lambda b: b["scores"].append(None)), "not a number"),
        (resealed(lambda b: b["scores"].append("0.9")), "not a number"),
        (resealed(lambda b: b["scores"].append(True)), "not a number"),
        (resealed(lambda b: b["scores"].append([0.9])), "not a number"),
        (resealed(lambda b: b["scores"].append(2.5)), r"\[0, 2\]"),
        (resealed(lambda b: b["scores"].append(10**400)), "not a number"),
        (resealed(lambda b: b["scores"].append(0.9)), "21 in all"),
        (resealed(lambda b: b["scores"].clear()), "0 in all"),
        (resealed(lambda b: b.update(heatmap_low=-1.0)), "heatmap_low"),
        (resealed(lambda b: b.update(target_false_alarm_rate=0.0)), "target_false_alarm_rate"),
        (resealed(lambda b: b.update(target_false_alarm_rate=0.001)), "needs at least 999"),
        (resealed(lambda b: b.update(drives=[["drive_0", 20]])), "'drives' contains"),
        (resealed(lambda b: b["drives"][0].update(frames=20.0)), "'drives' contains"),
        (resealed(lambda b: b["drives"][0].update(frames=-20)), r"found \[-20\]"),
        (resealed(lambda b: b.update(roi=[])), "'roi' has the type list"),
    ],
)
def test_damaged_or_altered_files_are_refused(
    tmp_path: Path, attack: Callable[[bytes], bytes], message: str
) -> None:
    small().save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_bytes(attack(path.read_bytes()))
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    small().save(tmp_path)
    path = tmp_path / FILE_NAME
    content = path.read_bytes()
    ends = {*range(400), *range(len(content) - 400, len(content))}
    # The long table between is tried here and there.
    for position in sorted(ends | set(range(0, len(content), 31))):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        with pytest.raises(CalibrationError):
            Calibration.load(tmp_path)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(CalibrationError, match="directory"):
        Calibration.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtefactError, match="cannot write"):
        small().save(tmp_path / "file")


def test_saving_again_replaces_the_file(tmp_path: Path) -> None:
    small().save(tmp_path)
    fitted(np.linspace(0.1, 0.3, 50)).save(tmp_path)
    assert Calibration.load(tmp_path).count == 50
