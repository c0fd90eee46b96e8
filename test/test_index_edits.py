"""Edits of an index: provenance, exact undo, calibrations that are carried over, parts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from colours import ColourEmbedder, make_detector, street
from nominal_world import DIM, IDENTITY, build, make_frames, patches, unit

from semantic_anomaly import edit_saving, entry_numbers, explanation, index_edits
from semantic_anomaly.calibration import Calibration
from semantic_anomaly.detector import AnomalyDetector
from semantic_anomaly.errors import (
    ArtefactError,
    CalibrationError,
    IndexFormatError,
    IndexMismatchError,
    InputError,
    MismatchError,
)
from semantic_anomaly.index import NominalIndex
from semantic_anomaly.nominal_frames import NominalPlaces
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import canonical_json, sha256_bytes

WHOLE = ImageRegion()


def added(index: NominalIndex, count: int = 2, seed: int = 7) -> NominalIndex:
    frames = make_frames(count, seed)
    return index_edits.add_nominal(index, frames, region=WHOLE, source="new", note="why")[0]


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


def test_retracted_entries_explain_nothing_any_more(index: NominalIndex, tmp_path: Path) -> None:
    query = index.content.embeddings[5:6]
    edited = index_edits.retract(index, [5, 9], note="a cow")
    assert edited.count == index.count - 2 and edited.fingerprint != index.fingerprint
    assert edited.exact_distances(query, 1)[0] > 0.01 > index.exact_distances(query, 1)[0]
    [edit] = edited.edits
    assert (edit.number, edit.kind, edit.entries, edit.note) == (1, "retract", 2, "a cow")
    assert edit.when.endswith("+00:00") and edit.what == "retract 2 entries"
    edited.save(tmp_path / "index")
    loaded = NominalIndex.load(tmp_path / "index")
    assert loaded.edits == edited.edits and loaded.fingerprint == edited.fingerprint
    loaded.configure_search("graph", 200)
    np.testing.assert_allclose(
        loaded.distances(query, 1), edited.exact_distances(query, 1), atol=1e-5
    )


def test_numbers_stay_while_entries_go(index: NominalIndex) -> None:
    edited = index_edits.retract(index_edits.retract(index, [3]), [7])
    row = entry_numbers.rows_of(edited.content, [8])[0]
    np.testing.assert_array_equal(edited.content.embeddings[row], index.content.embeddings[8])
    with pytest.raises(InputError, match="entry 7: it is taken out already, by edit 2"):
        index_edits.retract(edited, [7])


def test_added_frames_are_nominal_and_bring_their_pictures(index: NominalIndex) -> None:
    edited = added(index)
    queries = patches(2, seed=7)
    assert edited.exact_distances(queries, 1).max() <= 0.05 + 1e-6
    assert index.exact_distances(queries, 1).max() > 0.05
    [edit] = edited.edits
    assert (edit.kind, edit.frames, edit.source) == ("add", 2, "new")
    assert edit.entries == edited.count - index.count
    assert len(edited.content.frames) == len(index.content.frames) + 2
    with pytest.raises(InputError, match="expected new patches"):
        added(edited)


def test_undoing_returns_everything_exactly(index: NominalIndex, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for trial in range(6):
        states, edited = [index], index
        for step in range(4):
            if random.random() < 0.5:
                numbers = random.choice(edited.content.numbers, 5, replace=False).tolist()
                edited = index_edits.retract(edited, numbers)
            else:
                edited = added(edited, 1, 100 * trial + step + 1)
            states.append(edited)
        for before in reversed(states[:-1]):
            edited, _ = index_edits.undo(edited)
            assert edited.fingerprint == before.fingerprint
            np.testing.assert_array_equal(edited.content.embeddings, before.content.embeddings)
    index.save(tmp_path / "a")
    edited.save(tmp_path / "b")
    for name in ("graph.hnsw", "embeddings.npy", "entries.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_edits_are_undone_in_any_order(index: NominalIndex) -> None:
    edited = added(added(index_edits.retract(index, [1, 2, 4]), 1, 11), 1, 12)
    last = edited.content.entries[-1].copy()
    edited, edit = index_edits.undo(edited, 2)
    assert edit.number == 2 and [e.number for e in edited.edits] == [1, 3]
    assert (
        edited.content.frames[-1].name == "drive/000"
        and edited.content.entries[-1][0] == last[0] - 1
    )
    edited, _ = index_edits.undo(edited, 1)
    assert edited.fingerprint != index.fingerprint
    edited, _ = index_edits.undo(edited)
    assert edited.fingerprint == index.fingerprint


def test_an_addition_that_was_retracted_from_waits(index: NominalIndex) -> None:
    edited = added(index, 1)
    edited = index_edits.retract(edited, [edited.count - 1])
    with pytest.raises(InputError, match="edit 1 cannot be undone while edit 2"):
        index_edits.undo(edited, 1)
    edited, _ = index_edits.undo(index_edits.undo(edited)[0])
    assert edited.fingerprint == index.fingerprint


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [([], "at least one"), ([-1], "from 0 to"), ([10**6], "entry 1000000"), (None, "to stay")],
)
def test_entries_that_cannot_be_retracted(
    index: NominalIndex, numbers: list[int] | None, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        index_edits.retract(index, range(index.count) if numbers is None else numbers)


def test_what_else_is_refused(index: NominalIndex) -> None:
    with pytest.raises(InputError, match="found none"):
        index_edits.undo(index)
    with pytest.raises(InputError, match=r"edits \[1\], found 9"):
        index_edits.undo(index_edits.retract(index, [0]), 9)
    with pytest.raises(InputError, match="room"):
        added(build(max_entries=20))
    half = ImageRegion(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)))
    with pytest.raises(IndexMismatchError, match="polygon"):
        index_edits.add_nominal(index, make_frames(1, 7), region=half, source="")
    full = index_edits.retract(build(max_entries=50), [0])
    with pytest.raises(InputError, match="undo an addition first"):
        index_edits.undo(added(full), 1)


def test_neighbours_and_frames_name_entries(index: NominalIndex) -> None:
    found = entry_numbers.near(index, 4, 0.3)
    embeddings = index.content.embeddings
    assert found == np.flatnonzero(embeddings @ embeddings[4] >= 0.7 - 1e-6).tolist()
    assert entry_numbers.near(index, 4, 0.0) == [4]
    of_frame = entry_numbers.of_frame(index, "drive/002")
    assert of_frame == np.flatnonzero(index.content.entries[:, 0] == 2).tolist()
    with pytest.raises(InputError, match="unknown frame"):
        entry_numbers.of_frame(index, "drive/999")


FILES = ("retracted_embeddings.npy", "retracted_entries.npy")


@pytest.mark.parametrize("name", FILES)
def test_damage_to_what_was_retracted_is_noticed(
    index: NominalIndex, name: str, tmp_path: Path
) -> None:
    index_edits.retract(index, [1, 5]).save(tmp_path / "index")
    file = tmp_path / "index" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IndexFormatError, match=name):
        NominalIndex.load(tmp_path / "index")
    file.unlink()
    with pytest.raises(IndexFormatError, match=name):
        NominalIndex.load(tmp_path / "index")


@pytest.mark.parametrize(
    "forge",
    [
        lambda c: c["edits"][0].__setitem__(0, 0),
        lambda c: c["edits"][0].__setitem__(1, "other"),
        lambda c: c["edits"][0].__setitem__(2, 3),
        lambda c: c["edits"][1].__setitem__(2, 100_000),
        lambda c: c["edits"][1].__setitem__(3, 100_000),
        lambda c: c["edits"].reverse(),
        lambda c: c["edits"].pop(),
        lambda c: c["retracted"].update(count=1),
    ],
)
def test_forged_edits_are_refused(index: NominalIndex, forge: object, tmp_path: Path) -> None:
    added(index_edits.retract(index, [1, 5])).save(tmp_path / "index")
    path = tmp_path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    forge(manifest["content"])  # type: ignore[operator]
    del manifest["sha256"]
    manifest["fingerprint"] = sha256_bytes(canonical_json(manifest["content"]).encode())
    manifest["sha256"] = sha256_bytes(canonical_json(manifest).encode())
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(IndexFormatError):
        NominalIndex.load(tmp_path / "index")


def test_indexes_of_version_1_are_read(index: NominalIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "index")
    path = tmp_path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"], manifest["written"]["edits"]
    manifest["format_version"] = 1
    manifest["sha256"] = sha256_bytes(canonical_json(manifest).encode())
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    assert NominalIndex.load(tmp_path / "index").fingerprint == index.fingerprint


@pytest.fixture
def calibrated(tmp_path: Path) -> tuple[Path, AnomalyDetector]:
    detector = make_detector()
    folder = tmp_path / "index"
    detector.index.save(folder)
    assert detector.calibration is not None
    detector.calibration.save(folder)
    return folder, detector


def edit(folder: Path, *numbers: int) -> tuple[NominalIndex, Calibration]:
    before = NominalIndex.load(folder)
    edited = index_edits.retract(before, numbers) if numbers else index_edits.undo(before)[0]
    calibration = edit_saving.save_edited(folder, before, edited)
    assert calibration is not None
    return edited, calibration


def test_a_calibration_goes_along_and_says_that_it_is_due(
    calibrated: tuple[Path, AnomalyDetector],
) -> None:
    folder, detector = calibrated
    before = (folder / "calibration.json").read_bytes()
    edited, calibration = edit(folder, 0, 1)
    loaded = Calibration.load(folder)
    assert loaded.index_fingerprint == edited.fingerprint and loaded.renewal == calibration.renewal
    assert loaded.threshold == detector.threshold
    assert "1 edit of the index since calibration: retract 2 entries" in loaded.warnings[-1]
    assert "false alarms may exceed" in loaded.warnings[-1]
    AnomalyDetector(detector.embedder, NominalIndex.load(folder), loaded, detector.settings, WHOLE)
    both = NominalIndex.load(folder)
    frame = street(5000, odd=True)
    grid = ColourEmbedder().embed([frame.image])[0]
    more, _ = index_edits.add_nominal(both, [(frame, grid)], region=WHOLE, source="s")
    edit_saving.save_edited(folder, both, more)
    last = Calibration.load(folder).warnings[-1]
    assert (
        "2 edits" in last and "retract 2 entries, add 1 frame;" in last and "others shrunk" in last
    )
    edit(folder)
    edit(folder)
    assert (folder / "calibration.json").read_bytes() == before
    assert Calibration.load(folder).sha256 == detector.calibration.sha256  # type: ignore[union-attr]


def test_undoing_what_was_calibrated_is_a_change_too(
    calibrated: tuple[Path, AnomalyDetector],
) -> None:
    folder, _ = calibrated
    edited, calibration = edit(folder, 0, 1)
    dataclasses.replace(calibration, renewal=()).save(folder)
    _, undone = edit(folder)
    assert "undo: retract 2 entries" in undone.warnings[-1] and "shrunk" in undone.warnings[-1]
    _, again = edit(folder, 0, 1)
    assert again.index_fingerprint == edited.fingerprint and len(again.renewal) == 2


def test_nothing_is_saved_over_another_state(calibrated: tuple[Path, AnomalyDetector]) -> None:
    folder, _ = calibrated
    before = NominalIndex.load(folder)
    edit(folder, 3)
    with pytest.raises(MismatchError, match="edited meanwhile"):
        edit_saving.save_edited(folder, before, index_edits.retract(before, [4]))
    strange = dataclasses.replace(Calibration.load(folder), index_fingerprint="0" * 64)
    strange.save(folder)
    with pytest.raises(MismatchError, match="calibrate again"):
        edit(folder, 5)


def test_a_renewal_of_another_kind_is_refused(calibrated: tuple[Path, AnomalyDetector]) -> None:
    folder, _ = calibrated
    edit(folder, 3)
    path = folder / "calibration.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    for forged in ([{"edit": 1}], "text", [1]):
        body["renewal"] = forged
        sealed = {**body, "sha256": sha256_bytes(canonical_json(body).encode())}
        path.write_text(canonical_json(sealed))
        with pytest.raises(CalibrationError, match="renewal"):
            Calibration.load(folder)


def make_part(dim: int = 5, seed: int = 0) -> NominalIndex:
    random = np.random.default_rng(seed)
    frames = [
        NominalPlaces(
            frame, (6, 8), random.integers(0, 6, (3, 2)), unit(random.normal(size=(3, dim)))
        )
        for frame, _ in make_frames(4)
    ]
    identity = dataclasses.replace(IDENTITY, dim=dim)
    settings = Settings(dedup_distance=0.0)
    return NominalIndex.build(frames, identity=identity, region=WHOLE, settings=settings)


def test_parts_are_saved_checked_and_edited(index: NominalIndex, tmp_path: Path) -> None:
    folder, part = tmp_path / "index", make_part()
    whole = index.with_parts({"halves": part})
    assert whole.fingerprint != index.fingerprint and whole.count == index.count
    whole.save(folder)
    loaded = NominalIndex.load(folder)
    assert loaded.fingerprint == whole.fingerprint and list(loaded.parts) == ["halves"]
    found = loaded.parts["halves"]
    assert (found.count, found.dim, found.fingerprint) == (12, 5, part.fingerprint)
    found.configure_search("graph", 50)
    assert found.distances(part.content.embeddings, 1).max() < 1e-5
    edited = index_edits.retract(loaded, [0])
    edit_saving.save_edited(folder, loaded, edited)
    assert NominalIndex.load(folder).parts["halves"].count == 12
    smaller = edited.with_parts({"halves": index_edits.retract(found, [0, 1])})
    edit_saving.save_edited(folder, edited, smaller)
    assert NominalIndex.load(folder).parts["halves"].count == 10
    index.save(folder)
    assert not NominalIndex.load(folder).parts and not (folder / "halves").exists()


def test_parts_that_do_not_belong_are_refused(index: NominalIndex, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index.with_parts({"halves": make_part()}).save(folder)
    kept = shutil.copytree(folder, tmp_path / "kept")
    make_part(seed=1).save(folder / "halves")
    with pytest.raises(IndexFormatError, match="part 'halves': expected fingerprint"):
        NominalIndex.load(folder)
    shutil.rmtree(folder / "halves")
    with pytest.raises(IndexFormatError, match="expected an index folder"):
        NominalIndex.load(folder)
    (folder / "halves").symlink_to(kept / "halves")
    with pytest.raises(IndexFormatError, match="a link"):
        NominalIndex.load(folder)
    make_part().save(kept / "other")
    with pytest.raises(IndexFormatError, match="only files of the manifest, found other"):
        NominalIndex.load(kept)


@pytest.mark.parametrize("name", ["frames", "", "../x", "A", "graph.hnsw"])
def test_part_names(index: NominalIndex, name: str) -> None:
    with pytest.raises(ArtefactError, match="name of lower-case"):
        index.with_parts({name: make_part()})


def test_parts_of_another_kind(index: NominalIndex) -> None:
    with pytest.raises(ArtefactError, match="no parts"):
        index.with_parts({"a": build(3).with_parts({"b": make_part()})})
    other = dataclasses.replace(IDENTITY, weights_sha256="3" * 64)
    frames, settings = make_frames(2), Settings(dedup_distance=0.0)
    strange = NominalIndex.build(frames, identity=other, region=WHOLE, settings=settings)
    with pytest.raises(IndexMismatchError, match="part 'a' of an index: weights_sha256"):
        index.with_parts({"a": strange})
    assert strange.dim == DIM


def test_what_explains_a_box_is_found_and_drawn() -> None:
    index, embedder = make_detector(calibrated=False).index, ColourEmbedder()
    frame = street(3)
    grid = embedder.embed([frame.image])[0]
    inside = explanation.patches_of_box(grid, WHOLE, (16, 8, 40, 24))
    assert np.argwhere(inside).min(0).tolist() == [1, 2] and inside.sum() == 6
    assert explanation.patches_of_box(grid, WHOLE, (17, 9, 19, 11)).sum() == 1
    found = explanation.explain(index, grid.features[inside], 3)
    assert [e.patches for e in found] == sorted((e.patches for e in found), reverse=True)
    assert sum(e.patches for e in found) == 18
    products = grid.features[inside] @ index.content.embeddings.T
    assert min(e.distance for e in found) == pytest.approx(1 - products.max(), abs=1e-5)
    drawn = explanation.picture(frame.image, (16, 8, 40, 24), index, found)
    assert drawn.ndim == 3 and drawn.shape[1] >= 2 * 480
    for box in ((0, 0, 0, 5), (5, 5, 4, 9), (-1, 0, 4, 4), (0, 0, 129, 4), (0, 0, float("nan"), 4)):
        with pytest.raises(InputError, match="within the image of 128x72"):
            explanation.patches_of_box(grid, WHOLE, box)
    half = ImageRegion(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)))
    with pytest.raises(InputError, match="region of interest"):
        explanation.patches_of_box(grid, half, (100, 10, 120, 30))
