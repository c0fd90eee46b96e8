"""Parts of an index: what they say of themselves, what gets into them, and what edits them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import street
from worlds.segmented_streets import ByRule, SegmentedColours, build, every_patch, halves

from semantic_anomaly.calibration import staleness as renewal
from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import (
    ArtefactError,
    IndexFormatError,
    IndexMismatchError,
    InputError,
    ModelOutputError,
    SemanticAnomalyError,
)
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.build import INSTANCES, PAIRS, SCENES, PartPlan
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline import edit_index as edit_saving
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.scoring.normalisation import CELLS_HW, UsualDistances
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import canonical_json, sha256_bytes
from semantic_anomaly.structures import Frame, PatchGrid

WHOLE = ImageRegion()
ALL = {
    **{"variant": "combined", "surroundings_weight": 0.3, "scene_frames": 3},
    "dedup_distance": 0.0005,
}
TOKENS = {"family": "tokens", "model_id": "", "digest": "a" * 64}


def settings(**changes: Any) -> Settings:
    return Settings.from_parameters({**ALL, **changes})


@pytest.mark.parametrize(
    "made",
    [
        {PAIRS: {}},
        {INSTANCES: {"foo": 1}},
        {INSTANCES: {"segmenter": "tokens"}},
        {INSTANCES: {"segmenter": {**TOKENS, "digest": "short"}}},
        {INSTANCES: {"segmenter": TOKENS}, PAIRS: {"segmenter": TOKENS}},
        *(
            {
                INSTANCES: {"segmenter": TOKENS},
                PAIRS: {"segmenter": TOKENS, "surroundings_weight": weight},
            }
            for weight in ("x", None, 5.0, 0.0, float("nan"), 1)
        ),
        {
            INSTANCES: {"segmenter": TOKENS},
            PAIRS: {"segmenter": {**TOKENS, "digest": "b" * 64}, "surroundings_weight": 0.3},
        },
        {PAIRS: {"segmenter": TOKENS, "surroundings_weight": 0.3}},
        {SCENES: {}},
    ],
)
def test_parts_that_disagree_are_refused(made: dict[str, Any]) -> None:
    with pytest.raises(IndexFormatError):
        PartPlan.of_made(made)


def test_what_parts_are_made_with_is_read_back() -> None:
    plan = PartPlan.of_settings(settings(), SegmentedColours().segmenter)
    assert PartPlan.of_made({**plan.made, "others": {}}) == plan
    assert PartPlan.of_made({}) == PartPlan()


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda c: c["parts"].update({".": "0" * 64}), "expected a name"),
        (lambda c: c["parts"].update({"../x/pairs": "0" * 64}), "expected a name"),
        (lambda c: c.update(made={"segmenter": TOKENS}), ""),
    ],
)
def test_altered_manifests_are_refused(
    tmp_path: Path, attack: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = tmp_path / "index"
    build(SegmentedColours(), settings()).save(folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    attack(manifest["content"])
    manifest["fingerprint"] = sha256_bytes(canonical_json(manifest["content"]).encode())
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest["sha256"] = sha256_bytes(canonical_json(rest).encode())
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    if message:
        with pytest.raises(SemanticAnomalyError, match=message):
            NominalIndex.load(folder)
    else:
        # Of patches, it says nothing.
        assert NominalIndex.load(folder).plan == PartPlan.of_settings(
            settings(), SegmentedColours().segmenter
        )


def test_what_is_not_nominal_reaches_no_part() -> None:
    embedder = SegmentedColours(ByRule(every_patch))
    plan = PartPlan.of_settings(settings(), embedder.segmenter)
    frame, grid = embedder.frames([1])[0]
    nominal = np.ones(grid.grid_hw, bool)
    nominal[2:4, 5:9] = False
    spoilt = grid.features.copy()
    spoilt[~nominal] = np.float32([0, 0, 0, 1])
    other = PatchGrid(spoilt, grid.global_feature, grid.image_hw, grid.instances)
    one, two = (plan.places((frame, each, nominal), WHOLE) for each in (grid, other))
    assert set(one) == set(two) == {INSTANCES, PAIRS}, "a scene is nominal as a whole or not"
    for name in one:
        assert len(one[name].embeddings) == nominal.sum()
        np.testing.assert_array_equal(one[name].embeddings, two[name].embeddings)
    assert set(plan.places((frame, grid, np.ones(grid.grid_hw, bool)), WHOLE)) == {*one, SCENES}


def test_frames_of_one_name_are_scenes_of_their_own() -> None:
    embedder = SegmentedColours()
    given = settings(variant="grid", surroundings_weight=0.0, scene_frames=1, dedup_distance=0.0,
                     place_normalisation=False, smoothing=0.0)  # fmt: skip
    frames = [(Frame(f.image, name="front/000.png"), g) for f, g in embedder.frames(range(5))]
    index = NominalIndex.build(
        frames, identity=embedder.identity, region=WHOLE, settings=given, segmenter=None
    )
    detector = AnomalyDetector(embedder, index, None, given, WHOLE)
    # Of the frame itself, every patch is there; of others, none is.
    for _, grid in frames:
        assert detector.score(grid)[0] < 1e-6
    _, other = embedder.frames([77])[0]
    scenes = index.parts[SCENES].content.embeddings
    nearest = int((scenes @ (other.global_feature / np.linalg.norm(other.global_feature))).argmax())
    rows = index.content.entries[:, 0] == nearest
    assert rows.sum() == 9 * 16
    wanted = 1 - (other.features.reshape(-1, 4) @ index.content.embeddings[rows].T).max(axis=1)
    np.testing.assert_allclose(detector.score(other)[1].ravel(), wanted, atol=1e-6)


def test_scenes_of_frames_without_entries_are_refused() -> None:
    embedder = SegmentedColours()
    given = settings(variant="grid", surroundings_weight=0.0, place_normalisation=False)
    index, other = (
        NominalIndex.build(
            embedder.frames(seeds), identity=embedder.identity, region=WHOLE, settings=given
        )
        for seeds in (range(3), range(10, 13))
    )
    mixed = index.with_parts({SCENES: other.parts[SCENES]})
    with pytest.raises(IndexMismatchError, match="scenes: expected those of frames with entries"):
        AnomalyDetector(embedder, mixed, None, given, WHOLE)


def test_two_additions_at_once_are_undone_one_by_one() -> None:
    embedder = SegmentedColours(ByRule(halves))
    index = build(embedder, settings())
    prints = [index.fingerprint]
    for seed in (90, 91):
        tinted = [(f, g) for f, g in embedder.frames([seed], odd=seed == 90)]
        if seed == 91:
            image = np.roll(street(91).image, 40, axis=2)
            tinted = [(Frame(image, name="rolled"), embedder.embed([image])[0])]
        index, _ = index_edits.add_nominal(index, tinted, region=WHOLE, source="same")
        prints.append(index.fingerprint)
    for wanted in reversed(prints[:-1]):
        index, _ = index_edits.undo(index)
        assert index.fingerprint == wanted


def test_a_new_arrangement_of_familiar_patches_can_be_added(tmp_path: Path) -> None:
    embedder = SegmentedColours(ByRule(halves))
    index = build(embedder, settings(dedup_distance=0.02))
    image = street(5).image.copy()
    # Half of the sky is road: every patch is familiar, the instance is not.
    image[:32, :64] = image[40:72, :64]
    frame = Frame(image, name="new")
    given = [(frame, embedder.embed([image])[0])]
    grown, report = index_edits.add_nominal(index, given, region=WHOLE, source="new")
    assert report.stored == 0 and grown.count == index.count and not grown.edits
    assert grown.parts[INSTANCES].count > index.parts[INSTANCES].count
    assert [e.kind for e in grown.parts[INSTANCES].edits] == ["add"]
    back = grown.with_parts(
        {n: index_edits.undo(p)[0] if p.edits else p for n, p in grown.parts.items()}
    )
    assert back.fingerprint == index.fingerprint


def test_a_part_that_is_full_is_named() -> None:
    embedder = SegmentedColours(ByRule(halves))
    index = build(embedder, settings(dedup_distance=0.0))
    part = index.parts[INSTANCES]
    limits = {**part.content.limits, "max_entries": part.count}
    full = part.with_content(dataclasses.replace(part.content, limits=limits))
    index = index.with_parts({**index.parts, INSTANCES: full})
    with pytest.raises(InputError, match="part 'instances' of the index: expected room"):
        index_edits.add_nominal(index, embedder.frames([95]), region=WHOLE, source="x")


def test_undoing_names_the_part_that_stands_in_the_way() -> None:
    embedder = SegmentedColours(ByRule(halves))
    index = build(embedder, settings())
    grown, _ = index_edits.add_nominal(
        index, embedder.frames([96], odd=True), region=WHOLE, source="x"
    )
    part = grown.parts[INSTANCES]
    blocked = grown.with_parts(
        {**grown.parts, INSTANCES: index_edits.retract(part, [part.count - 1])}
    )
    with pytest.raises(InputError, match="part 'instances': undo: edit 1 cannot be undone while"):
        index_edits.undo(blocked)


def test_edits_of_pairs_and_scenes_promise_no_direction(tmp_path: Path) -> None:
    embedder = SegmentedColours(ByRule(halves))
    index = build(embedder, settings())
    folder = tmp_path / "index"
    index.save(folder)
    Calibration.fit(
        {"a": np.linspace(0.1, 1.0, 40).tolist()},
        heatmap_low=0.05,
        index=index,
        settings=settings(target_false_alarm_rate=0.1),
        region=WHOLE,
        camera="camera",
    ).save(folder)
    grown, _ = index_edits.add_nominal(
        index, embedder.frames([96], odd=True), region=WHOLE, source="x"
    )
    calibration = edit_saving.save_edited(folder, index, grown)
    assert calibration is not None
    assert {change.part: change.mixed for change in calibration.renewal} == {
        **{"": True, INSTANCES: False, PAIRS: True, SCENES: True}
    }
    assert "some distances have grown and others shrunk" in calibration.warnings[-1]
    told = renewal.describe(calibration.renewal)
    for each in told:
        del each["mixed"]
    assert not any(change.mixed for change in renewal.from_description(told))
    with pytest.raises(ArtefactError):
        index.with_parts({"frames": index.parts[SCENES]})


def test_added_frames_reach_the_parts_and_leave_with_the_edit(tmp_path: Path) -> None:
    embedder = SegmentedColours(ByRule(halves))
    index = build(embedder, settings())
    odd = embedder.frames([95], odd=True)
    grown, report = index_edits.add_nominal(index, odd, region=WHOLE, source="odd")
    assert report.stored == grown.count - index.count > 0
    for name, part in grown.parts.items():
        assert part.count > index.parts[name].count, name
    tenths = np.full(CELLS_HW, 0.01, np.float32)
    usual = dict.fromkeys(("grid", INSTANCES, PAIRS), UsualDistances(tenths, tenths))
    scores = [
        AnomalyDetector(embedder, each, None, settings(), WHOLE, usual).score(odd[0][1])[0]
        for each in (index, grown)
    ]
    assert scores[1] < 0.2 * scores[0]
    grown.save(tmp_path / "index")
    undone, _ = index_edits.undo(NominalIndex.load(tmp_path / "index"))
    assert undone.fingerprint == index.fingerprint
    bare = [(f, PatchGrid(g.features, g.global_feature, g.image_hw)) for f, g in odd]
    with pytest.raises(ModelOutputError, match="segmented"):
        index_edits.add_nominal(index, bare, region=WHOLE, source="odd")
    with pytest.raises(InputError, match="expected new patches"):
        index_edits.add_nominal(grown, odd, region=WHOLE, source="odd")
