"""Mean and deviation by image cell and by patch class, and standardised distances."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.scoring.normalisation import (
    CELLS_HW,
    NormalisationSums,
    PatchClasses,
    ScoreNormalisation,
    class_anchors,
    class_of,
    constant_normalisation,
    normalisations_without,
)

GRID = (36, 64)
EVERYWHERE = np.ones(GRID, bool)
# Two classes side by side in every cell: the distances of the first vary five times as much.
ANCHORS = np.eye(2, 4, dtype=np.float32)
SPREAD = np.array([0.1, 0.02])
CELLS = np.full(CELLS_HW, 0.1, np.float32)
ONES, ZEROS = np.ones(2, np.float32), np.zeros(2, np.float32)


def nominal(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Return distances that vary little in the lower half and much in the upper one."""
    spread = np.where(np.arange(GRID[0])[:, None] < GRID[0] // 2, 0.05, 0.01)
    return [
        np.clip(4 * spread + spread * rng.standard_normal(GRID), 0, 2).astype(np.float32)
        for _ in range(count)
    ]


def of_classes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distances of a nominal frame, its embeddings, and the class of each patch."""
    patch_class = rng.integers(0, 2, GRID)
    distances = 3 * SPREAD[patch_class] + SPREAD[patch_class] * rng.standard_normal(GRID)
    embeddings = ANCHORS[patch_class] + 0.1 * rng.standard_normal((*GRID, 4))
    embeddings /= np.linalg.norm(embeddings, axis=2, keepdims=True)
    return (
        np.clip(distances, 0, 2).astype(np.float32),
        embeddings.reshape(-1, 4).astype(np.float32),
        patch_class,
    )


def embeddings_of(inside: np.ndarray) -> np.ndarray:
    """Return embeddings of the patches inside; without classes only their number matters."""
    return np.zeros((int(inside.sum()), 4), np.float32)


def collected(frames: list[np.ndarray], inside: np.ndarray = EVERYWHERE) -> NormalisationSums:
    sums = NormalisationSums()
    for frame in frames:
        sums.add(frame, inside, embeddings_of(inside))
    return sums


def collected_classes(
    rng: np.random.Generator, frames: int, anchors: np.ndarray | None = ANCHORS
) -> NormalisationSums:
    sums = NormalisationSums(anchors)
    for _ in range(frames):
        distances, embeddings, _ = of_classes(rng)
        sums.add(distances, EVERYWHERE, embeddings)
    return sums


def relative(
    normalisation: ScoreNormalisation, distances: np.ndarray, embeddings: np.ndarray | None = None
) -> np.ndarray:
    """Return (rows, cols) standardised distances."""
    if embeddings is None:
        embeddings = embeddings_of(EVERYWHERE)
    mean, deviation = normalisation.parameters(EVERYWHERE, embeddings)
    z: np.ndarray = (distances.ravel() - mean) / deviation
    return z.reshape(GRID)


def test_mean_and_deviation_are_those_of_the_cell(rng: np.random.Generator) -> None:
    frames = nominal(rng, 30)
    normalisation = collected(frames).normalisation()
    cell = np.stack(frames)[:, 4:6, 10:12]
    assert normalisation.mean[2, 5] == pytest.approx(cell.mean(), rel=1e-5)
    assert normalisation.deviation[2, 5] == pytest.approx(cell.std(), rel=1e-4)


def test_sums_of_parts_are_the_sums_of_the_whole(rng: np.random.Generator) -> None:
    frames = [of_classes(rng) for _ in range(4)]
    whole, *parts = (NormalisationSums(ANCHORS) for _ in range(3))
    assert whole.empty
    for number, (distances, embeddings, _) in enumerate(frames):
        for sums in (whole, parts[number % 2]):
            sums.add(distances, EVERYWHERE, embeddings)
    expected, joined = whole.normalisation(), (parts[0] + parts[1]).normalisation()
    assert expected.classes is not None and joined.classes is not None and not whole.empty
    np.testing.assert_allclose(joined.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(joined.classes.mean, expected.classes.mean, atol=1e-6)
    np.testing.assert_allclose(joined.classes.deviation, expected.classes.deviation, rtol=1e-6)


def test_a_fold_is_left_out_unless_it_is_the_only_one(rng: np.random.Generator) -> None:
    first, second = (collected(nominal(rng, 2)) for _ in range(2))
    of_stage = [collected(nominal(rng, 2)) for _ in range(2)]
    folds = {0: [first, of_stage[0]], 1: [second, of_stage[1]]}
    for left_out, sums in (
        (0, [second, of_stage[1]]),
        (1, [first, of_stage[0]]),
        (None, [first + second, of_stage[0] + of_stage[1]]),
    ):
        normalisations = normalisations_without(folds, left_out)
        for found, expected in zip(normalisations, sums, strict=True):
            np.testing.assert_array_equal(found.mean, expected.normalisation().mean)
    [alone] = normalisations_without({0: [first]}, 0)
    np.testing.assert_array_equal(alone.mean, first.normalisation().mean)
    with pytest.raises(CalibrationError, match="found none"):
        normalisations_without({0: [NormalisationSums()]}, None)


def test_relative_distances_are_alike_everywhere(rng: np.random.Generator) -> None:
    normalisation = collected(nominal(rng, 100)).normalisation()
    fresh = np.stack([relative(normalisation, frame) for frame in nominal(rng, 40)])
    upper, lower = fresh[:, :14], fresh[:, 22:]
    assert upper.mean() == pytest.approx(lower.mean(), abs=0.05)
    assert upper.std() == pytest.approx(lower.std(), rel=0.1)
    # The same distance is ordinary above and very odd below, where it never occurs.
    odd = relative(normalisation, np.full(GRID, 0.12, np.float32))
    assert odd[30, 5] > fresh.max() > odd[5, 5]


def test_cells_without_nominal_patches_have_typical_statistics(rng: np.random.Generator) -> None:
    inside = EVERYWHERE.copy()
    inside[:, 32:] = False
    frames = nominal(rng, 10)
    for frame in frames:
        frame[:, 32:] = 2.0
    assert collected(frames, inside).normalisation().mean.max() < 0.5


@pytest.mark.parametrize("grid_hw", [(5, 7), (90, 160), (1, 1)])
def test_any_grid_will_do(rng: np.random.Generator, grid_hw: tuple[int, int]) -> None:
    inside = np.ones(grid_hw, bool)
    distances = [rng.random(grid_hw, np.float32) for _ in range(5)]
    normalisation = collected(distances, inside).normalisation()
    mean, deviation = normalisation.parameters(inside, embeddings_of(inside))
    assert np.isfinite(mean).all() and (deviation > 0).all()
    assert mean.shape == deviation.shape == (grid_hw[0] * grid_hw[1],)


def test_a_cell_that_never_changed_has_no_tiny_deviation(rng: np.random.Generator) -> None:
    frames = nominal(rng, 20)
    for frame in frames:
        frame[20:22, 20:22] = 0.03
    normalisation = collected(frames).normalisation()
    assert normalisation.deviation.min() > np.median(normalisation.deviation) / 20
    assert (collected([np.full(GRID, 0.2, np.float32)] * 3).normalisation().deviation > 0).all()


def test_cells_seen_in_few_frames_have_typical_statistics(rng: np.random.Generator) -> None:
    # An instance has one value for all of its patches: alone in a cell, it has no deviation.
    sums = NormalisationSums()
    for _ in range(60):
        row, col = rng.integers(0, 33), rng.integers(0, 61)
        values, inside = np.zeros(GRID, np.float32), np.zeros(GRID, bool)
        inside[row : row + 3, col : col + 3] = True
        values[inside] = rng.normal(0.3, 0.05)
        sums.add(values, inside, embeddings_of(inside))
    normalisation = sums.normalisation()
    assert normalisation.deviation.min() > 0.005
    assert np.median(normalisation.mean) == pytest.approx(0.3, abs=0.05)
    assert relative(normalisation, np.full(GRID, 0.45, np.float32)).max() < 14


def test_distances_are_alike_in_all_classes(rng: np.random.Generator) -> None:
    # 400 frames of 40 different ones: the prior of the classes hardly counts.
    normalisation, without_classes = (
        reduce(add, [collected_classes(rng, 40, anchors)] * 10).normalisation()
        for anchors in (ANCHORS, None)
    )
    distances, embeddings, patch_class = of_classes(rng)
    standardised = relative(normalisation, distances, embeddings)
    for number in range(2):
        assert standardised[patch_class == number].mean() == pytest.approx(0.0, abs=0.15)
    assert standardised[patch_class == 0].std() == pytest.approx(1.0, rel=0.15)
    # A distance that is ordinary for the first class is odd for the second.
    odd = distances.copy()
    row, col = np.argwhere(patch_class == 1)[100]
    odd[row, col] += 0.4
    assert relative(normalisation, odd, embeddings).argmax() == row * GRID[1] + col
    assert relative(without_classes, odd, embeddings).argmax() != row * GRID[1] + col


def test_class_statistics_are_those_of_distances_standardised_by_cell(
    rng: np.random.Generator,
) -> None:
    frames = [of_classes(rng) for _ in range(60)]
    sums = NormalisationSums(ANCHORS)
    for distances, embeddings, _ in frames:
        sums.add(distances, EVERYWHERE, embeddings)
    normalisation = sums.normalisation()
    assert normalisation.classes is not None
    mean, deviation = (
        np.kron(values, np.ones((2, 2))) for values in (normalisation.mean, normalisation.deviation)
    )
    z_cell = np.stack([(distances - mean) / deviation for distances, *_ in frames])
    patch_class = np.stack([frame[2] for frame in frames])
    for number in range(2):
        own = z_cell[patch_class == number]
        # The prior counts as 40 frames of mean 0 and deviation 1 beside the 60.
        assert normalisation.classes.mean[number] == pytest.approx(0.6 * own.mean(), abs=1e-3)
        variance = 0.6 * (own**2).mean() + 0.4 - (0.6 * own.mean()) ** 2
        expected = max(np.sqrt(variance), 0.7)
        assert normalisation.classes.deviation[number] == pytest.approx(expected, rel=1e-3)


def test_a_class_that_was_never_seen_has_the_statistics_of_its_cells(
    rng: np.random.Generator,
) -> None:
    anchors = np.eye(3, 4, dtype=np.float32)
    normalisation = collected_classes(rng, 10, anchors).normalisation()
    assert normalisation.classes is not None
    assert (normalisation.classes.mean[2], normalisation.classes.deviation[2]) == (0.0, 1.0)
    new = np.tile(anchors[2], (GRID[0] * GRID[1], 1))
    distances = np.full(GRID, 0.3, np.float32)
    cells_alone = ScoreNormalisation(normalisation.mean, normalisation.deviation)
    np.testing.assert_allclose(
        relative(normalisation, distances, new), relative(cells_alone, distances), atol=1e-6
    )


def test_a_constant_normalisation_is_the_same_everywhere() -> None:
    normalisation = constant_normalisation(0.1, 0.02)
    mean, deviation = normalisation.parameters(EVERYWHERE, embeddings_of(EVERYWHERE))
    np.testing.assert_allclose(mean, 0.1, rtol=1e-6)
    np.testing.assert_allclose(deviation, 0.02, rtol=1e-6)


def test_parameters_are_those_of_the_patches_inside(rng: np.random.Generator) -> None:
    inside = EVERYWHERE.copy()
    inside[:, 40:] = False
    normalisation = collected_classes(rng, 5).normalisation()
    _, embeddings, _ = of_classes(rng)
    flat = inside.ravel()
    part = normalisation.parameters(inside, embeddings[flat])
    for values, whole in zip(part, normalisation.parameters(EVERYWHERE, embeddings), strict=True):
        np.testing.assert_array_equal(values, whole[flat])


def test_anchors_are_entries_chosen_the_same_every_time(rng: np.random.Generator) -> None:
    entries = rng.standard_normal((3000, 4)).astype(np.float32)
    anchors, again = class_anchors(entries), class_anchors(entries)
    assert anchors is not None and again is not None
    np.testing.assert_array_equal(anchors, again)
    rows = [int(np.flatnonzero((entries == anchor).all(axis=1))[0]) for anchor in anchors]
    assert len(set(rows)) == 256 and max(rows) > 2000
    few = class_anchors(entries[:40])
    assert few is not None and len(few) == 5
    assert class_anchors(entries[:15]) is None


def test_the_class_is_that_of_the_nearest_anchor(rng: np.random.Generator) -> None:
    anchors = rng.standard_normal((7, 4)).astype(np.float32)
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
    np.testing.assert_array_equal(class_of(anchors, anchors), np.arange(7))
    with pytest.raises(CalibrationError, match=r"expected embeddings \(n, 4\)"):
        class_of(np.zeros((3, 5), np.float32), anchors)


def test_descriptions_keep_every_bit(rng: np.random.Generator) -> None:
    normalisation = collected_classes(rng, 3).normalisation()
    again = ScoreNormalisation.from_dict(normalisation.to_dict())
    assert normalisation.classes is not None and again.classes is not None
    for original, copy in ((normalisation, again), (normalisation.classes, again.classes)):
        for name in ("mean", "deviation"):
            np.testing.assert_array_equal(getattr(copy, name), getattr(original, name))
    np.testing.assert_array_equal(again.classes.anchors, ANCHORS)
    cells_alone = ScoreNormalisation(CELLS, CELLS)
    assert ScoreNormalisation.from_dict(cells_alone.to_dict()).classes is None


@pytest.mark.parametrize(
    ("mean", "deviation", "message"),
    [
        (CELLS[:2], CELLS, "mean: expected"),
        (CELLS, CELLS.astype(np.float64), "deviation: expected"),
        (CELLS * np.nan, CELLS, "means in"),
        (CELLS, CELLS * 0, "above 0"),
    ],
)
def test_cells_out_of_range_are_refused(
    mean: np.ndarray, deviation: np.ndarray, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        ScoreNormalisation(mean, deviation)


def test_a_normalisation_needs_a_frame() -> None:
    with pytest.raises(CalibrationError, match="found none"):
        NormalisationSums().normalisation()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": ONES[:1]}, "expected float32 anchors"),
        ({"mean": ONES[0]}, "expected float32 anchors"),
        ({"anchors": ANCHORS[:1]}, "expected float32 anchors"),
        ({"anchors": ANCHORS.astype(np.float64)}, "expected float32 anchors"),
        ({"anchors": 2 * ANCHORS}, "unit anchors"),
        ({"anchors": ANCHORS * np.nan}, "unit anchors"),
        ({"mean": ONES * np.inf}, "finite means"),
        ({"deviation": ZEROS}, "deviations above 0"),
        ({"deviation": ONES * np.nan}, "deviations above 0"),
        ({"anchors": ANCHORS[:0], "mean": ONES[:0], "deviation": ONES[:0]}, "expected float32"),
    ],
)
def test_classes_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        PatchClasses(**{"anchors": ANCHORS, "mean": ZEROS, "deviation": ONES, **changes})


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"mean": CELLS.tolist()},
        {"mean": [[1]], "deviation": "x", "classes": None},
        *(
            {"mean": CELLS.tolist(), "deviation": CELLS.tolist(), "classes": classes}
            for classes in (
                [],
                {"anchors": [[1, 0]], "mean": [0]},
                {"anchors": "x", "mean": 1, "deviation": 2},
                {"anchors": [[1, 0]], "mean": 1, "deviation": 2},
            )
        ),
    ],
)
def test_descriptions_of_something_else_are_refused(values: Any) -> None:
    with pytest.raises(CalibrationError, match="score normalisation"):
        ScoreNormalisation.from_dict(values)
