"""The file of a calibration: every bit back, and every alteration refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from worlds.calibrations import FINGERPRINT, RIGHT_HALF, fitted, index_of, sealed

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import Episodes
from semantic_anomaly.calibration.format import FILE_NAME, calibration_files
from semantic_anomaly.calibration.staleness import StaleEdit
from semantic_anomaly.errors import ArtefactError, CalibrationError
from semantic_anomaly.settings import Settings

SCORES = np.arange(1, 21) / 1000


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    scores = np.random.default_rng(2).normal(0.0, 2.0, 333)
    episodes = Episodes((np.linspace(-1.0, 1.0, 9), np.zeros(1)), 1.0, 1, 1.0, 1.0, 0.3)
    edit = StaleEdit(1, "retract 2 entries", False, True)
    probes = {"probe_scores": [0.5, 1.25], "pattern_scores": [4, 3], "execution": "openvino"}
    more = {"confidence": 0.4, "left_out": ["drive_1"], "episodes": episodes, **probes}
    written = fitted(scores, drives=4, **more).carried(
        SimpleNamespace(fingerprint=FINGERPRINT), [edit]
    )
    assert written.save(tmp_path) == tmp_path / FILE_NAME
    loaded = Calibration.load(tmp_path)
    np.testing.assert_array_equal(loaded.scores, np.sort(scores))
    for found, expected in zip(loaded.drives, written.drives, strict=True):
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert found.scores.dtype == np.float64
        assert (found.name, found.left_out) == (expected.name, expected.left_out)
    for name, value in vars(written).items():
        if name not in ("drives", "normalisations", "episodes"):
            assert getattr(loaded, name) == value, name
    assert loaded.scores[0] < 0 and len(loaded.normalisations) == 1
    for name in ("mean", "deviation"):
        expected = getattr(written.normalisations[0], name)
        np.testing.assert_array_equal(getattr(loaded.normalisations[0], name), expected)
    assert loaded.episodes is not None
    for found, expected in zip(
        loaded.episodes.scores_by_drive, episodes.scores_by_drive, strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert (
        loaded.sha256 == written.sha256 == json.loads((tmp_path / FILE_NAME).read_text())["sha256"]
    )
    loaded.check(index_of(), Settings(), RIGHT_HALF)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME], "no temporary files"


def test_equal_calibrations_of_different_age_have_equal_digests(tmp_path: Path) -> None:
    now = fitted(SCORES)
    old = replace(now, created="2020-02-29T23:59:59Z")
    digests = []
    for name, calibration in (("now", now), ("old", old), ("unknown", replace(now, created=""))):
        (tmp_path / name).mkdir()
        calibration.save(tmp_path / name)
        loaded = Calibration.load(tmp_path / name)
        assert loaded.created == calibration.created
        digests.append(loaded.sha256)
    assert len(set(digests)) == 1


def test_age_is_that_of_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 3, 1, 12, tzinfo=tz)

    monkeypatch.setattr("semantic_anomaly.calibration.calibration.datetime", Clock)
    made = fitted(SCORES)
    assert (made.created, made.age_days) == ("2026-03-01T12:00:00Z", 0.0)
    old = replace(made, created="2026-02-27T00:00:00Z")
    assert old.age_days == 2.5 and replace(made, created="").age_days is None
    assert replace(made, created="2026-03-02T12:00:00Z").age_days == -1.0
    # An edit of the index makes it stale, not younger.
    edit = StaleEdit(1, "retract 2 entries", False, True)
    assert old.carried(SimpleNamespace(fingerprint=FINGERPRINT), [edit]).age_days == 2.5


def test_each_camera_has_its_own_file(tmp_path: Path) -> None:
    names = [fitted(SCORES, camera=camera).save(tmp_path).name for camera in ("front", "rear")]
    assert names == ["calibration.json", "calibration.rear.json"]
    fitted(SCORES * 2, camera="front").save(tmp_path)
    fitted(SCORES * 3, camera="rear").save(tmp_path)
    assert [path.name for path in calibration_files(tmp_path)] == names
    loaded = {camera: Calibration.load(tmp_path, camera) for camera in ("front", "rear", "left")}
    assert loaded["front"].scores[-1] == 0.04 and loaded["rear"].scores[-1] == 0.06
    assert loaded["left"].camera == "front", "cameras without a file share the first"


def test_a_damaged_first_file_is_replaced(tmp_path: Path) -> None:
    path = fitted(SCORES, camera="front").save(tmp_path)
    path.write_text("{")
    assert fitted(SCORES, camera="rear").save(tmp_path) == path
    assert Calibration.load(tmp_path, "rear").camera == "rear"


def test_missing_calibration_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"does not exist.*semantic-anomaly calibrate"):
        Calibration.load(tmp_path)


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Return an attack that changes the content and makes its digest agree again."""

    def attack(content: bytes) -> bytes:
        body = json.loads(content)
        change(body)
        return sealed(body).encode()

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
        (lambda content: b"\x80" + content, "not JSON"),
        (lambda content: b"[" * 100000, "not JSON"),
        (lambda content: b"[]", "expected format 4, found 'list'"),
        (edited(rb"0\.012", b"0.013"), "altered or damaged"),
        (edited(rb"0\.012", b"NaN"), "NaN is not a finite number"),
        (edited(rb"0\.012", b"1e999"), "not a finite number"),
        (resealed(lambda b: b.update(format=3)), "expected format 4, found 3"),
        (resealed(lambda b: b.pop("camera")), "differing: camera"),
        (resealed(lambda b: b.update(extra=1)), "differing: extra"),
        (resealed(lambda b: b.pop("created")), "differing: created"),
        (resealed(lambda b: b.update(created=1)), "'created' has the type int"),
        (resealed(lambda b: b.update(created="yesterday")), "a time such as .* found 'yesterday'"),
        (edited(rb'"created":"20', b'"created":"19'), "altered or damaged"),
        (resealed(lambda b: b.update(heatmap_low=1)), "'heatmap_low' has the type int"),
        (resealed(lambda b: b.update(episodes=[])), "'episodes' has the type list"),
        (resealed(lambda b: b.update(stale_edits=[{"edit": 1}])), "'stale_edits' contains"),
        (resealed(lambda b: b.update(stale_edits=[1])), "'stale_edits' contains 1"),
        (resealed(lambda b: b["drives"][0]["scores"].reverse()), "'drive_0': expected ascending"),
        (resealed(lambda b: b["drives"][0]["scores"].append(None)), "expected a list of numbers"),
        (resealed(lambda b: b["drives"][0]["scores"].append(True)), "expected a list of numbers"),
        (resealed(lambda b: b["drives"][0]["scores"].append(10**400)), "a list of numbers"),
        (resealed(lambda b: b["drives"][0]["scores"].clear()), r"'drive_0': .* found \(0,\)"),
        (resealed(lambda b: b["pattern_scores"].append(1)), "'pattern_scores' contains"),
        (resealed(lambda b: b["pattern_scores"].append(1.5)), "pattern_scores: expected 0"),
        (resealed(lambda b: b["probe_scores"].append(1)), "'probe_scores' contains"),
        (resealed(lambda b: b.update(execution="cuda")), "execution: expected one of torch, open"),
        (resealed(lambda b: b.update(normalisations=[])), "normalisations"),
        (resealed(lambda b: b.update(target_false_alarm_rate=0.0)), "target_false_alarm_rate"),
        (resealed(lambda b: b.update(confidence=1.0)), "'confidence' is 1.0"),
        (resealed(lambda b: b.update(confidence=0.9)), "needs at least 9 .* drives, found 1"),
        (resealed(lambda b: b.update(drives=[])), "drives of distinct names"),
        (resealed(lambda b: b["drives"].append(b["drives"][0])), "drives of distinct names"),
        (resealed(lambda b: b.update(drives=[["drive_0", 20]])), "'drives' contains"),
        (resealed(lambda b: b["drives"][0].update(left_out=1)), "'drives' contains"),
        (resealed(lambda b: b["drives"][0].update(name=None)), "'drives' contains"),
        (resealed(lambda b: b["drives"][0].pop("left_out")), "'drives' contains"),
    ],
)
def test_damaged_or_altered_files_are_refused(
    tmp_path: Path, attack: Callable[[bytes], bytes], message: str
) -> None:
    fitted(SCORES).save(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_bytes(attack(path.read_bytes()))
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = fitted(SCORES).save(tmp_path)
    content = path.read_bytes()
    # Every region of the file is sampled, the long table of the normalisation included.
    for position in {*range(0, len(content), 41), len(content) - 1}:
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CalibrationError):
            Calibration.load(tmp_path)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(CalibrationError, match="directory"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize(
    "roi",
    [
        {},
        {"polygon_xy": 1, "ego_mask_sha256": ""},
        {"polygon_xy": [[0.0]], "ego_mask_sha256": ""},
        {"polygon_xy": [["0", 0.0]], "ego_mask_sha256": ""},
        {"polygon_xy": [[10**400, 0], [1, 0], [1, 1]], "ego_mask_sha256": ""},
        {"polygon_xy": [], "ego_mask_sha256": 1},
    ],
)
def test_regions_of_interest_of_another_form_are_refused(
    tmp_path: Path, roi: dict[str, Any]
) -> None:
    path = fitted(SCORES).save(tmp_path)
    body = {**json.loads(path.read_text()), "roi": roi}
    path.write_text(sealed(body))
    with pytest.raises(CalibrationError, match=f"{path}.*region of interest: expected"):
        Calibration.of_file(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / FILE_NAME
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CalibrationError, match="expected a regular file"):
        Calibration.of_file(path)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_deep_values_are_refused(tmp_path: Path, depth: int) -> None:
    path = fitted(SCORES).save(tmp_path)
    deep = "[" * depth + "]" * depth
    path.write_text(path.read_text().replace('"roi":', f'"roi":{deep},"before":'))
    with pytest.raises(CalibrationError, match="nest too deep"):
        Calibration.of_file(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtefactError, match="cannot write"):
        fitted(SCORES).save(tmp_path / "file")
