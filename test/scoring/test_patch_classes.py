"""What is usual for a kind of patch, besides what is usual at its place."""

from __future__ import annotations

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
)

GRID = (36, 64)
EVERYWHERE = np.ones(GRID, bool)
# Two kinds of things, side by side at every place: walls vary five times as much as asphalt.
ANCHORS = np.eye(2, 4, dtype=np.float32)
SPREAD = np.array([0.1, 0.02])


def seen(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distances of a nominal frame, its embeddings, and the kind of each patch."""
    kind = rng.integers(0, 2, GRID)
    distances = 3 * SPREAD[kind] + SPREAD[kind] * rng.standard_normal(GRID)
    embeddings = ANCHORS[kind] + 0.1 * rng.standard_normal((*GRID, 4))
    embeddings /= np.linalg.norm(embeddings, axis=2, keepdims=True)
    return (
        np.clip(distances, 0, 2).astype(np.float32),
        embeddings.reshape(-1, 4).astype(np.float32),
        kind,
    )


def collected(
    rng: np.random.Generator, frames: int, anchors: np.ndarray | None
) -> NormalisationSums:
    sums = NormalisationSums(anchors)
    for _ in range(frames):
        distances, embeddings, _ = seen(rng)
        sums.add(distances, EVERYWHERE, embeddings)
    return sums


def relative(
    usual: ScoreNormalisation, distances: np.ndarray, embeddings: np.ndarray
) -> np.ndarray:
    mean, deviation = usual.parameters(EVERYWHERE, embeddings)
    unit_mean, unit_deviation = usual.unit
    return (unit_mean + unit_deviation * (distances.ravel() - mean) / deviation).reshape(GRID)


def test_distances_are_alike_whatever_the_kind(rng: np.random.Generator) -> None:
    usual = collected(rng, 400, ANCHORS).normalisation()
    distances, embeddings, kind = seen(rng)
    found = relative(usual, distances, embeddings)
    walls, asphalt = found[kind == 0], found[kind == 1]
    mean, deviation = usual.unit
    for each in (walls, asphalt):
        assert each.mean() == pytest.approx(mean, abs=0.15 * deviation)
    assert walls.std() == pytest.approx(deviation, rel=0.15)
    # What would be ordinary for a wall is odd for asphalt.
    odd = distances.copy()
    row, col = np.argwhere(kind == 1)[100]
    odd[row, col] += 0.4
    assert relative(usual, odd, embeddings).argmax() == row * GRID[1] + col
    plain = collected(rng, 400, None).normalisation()
    assert relative(plain, odd, embeddings).argmax() != row * GRID[1] + col


def test_what_is_usual_for_a_kind_is_what_is_left_of_its_place(rng: np.random.Generator) -> None:
    frames = [seen(rng) for _ in range(60)]
    sums = NormalisationSums(ANCHORS)
    for distances, embeddings, _ in frames:
        sums.add(distances, EVERYWHERE, embeddings)
    usual = sums.normalisation()
    assert usual.classes is not None
    of_cell = [np.kron(each, np.ones((2, 2))) for each in (usual.mean, usual.deviation)]
    left = np.stack([(distances - of_cell[0]) / of_cell[1] for distances, *_ in frames])
    for number in range(2):
        own = left[np.stack([kind for *_, kind in frames]) == number]
        # Forty frames of no surprise, as rich in the kind as the sixty, stand before them.
        assert usual.classes.mean[number] == pytest.approx(0.6 * own.mean(), abs=1e-3)
        square = 0.6 * (own**2).mean() + 0.4 - (0.6 * own.mean()) ** 2
        expected = max(np.sqrt(square), 0.7)
        assert usual.classes.deviation[number] == pytest.approx(expected, rel=1e-3)


def test_frames_may_be_collected_in_parts(rng: np.random.Generator) -> None:
    frames = [seen(rng) for _ in range(4)]
    parts = [NormalisationSums(ANCHORS) for _ in range(2)]
    whole = NormalisationSums(ANCHORS)
    for number, (distances, embeddings, _) in enumerate(frames):
        for sums in (whole, parts[number % 2]):
            sums.add(distances, EVERYWHERE, embeddings)
    one, other = whole.normalisation().classes, (parts[0] + parts[1]).normalisation().classes
    assert one is not None and other is not None
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-6)
    np.testing.assert_allclose(one.deviation, other.deviation, rtol=1e-6)


def test_a_kind_that_was_never_seen_is_as_usual_as_its_place(rng: np.random.Generator) -> None:
    anchors = np.eye(3, 4, dtype=np.float32)
    sums = collected(rng, 10, anchors)
    usual = sums.normalisation()
    assert usual.classes is not None
    assert (usual.classes.mean[2], usual.classes.deviation[2]) == (0.0, 1.0)
    new = np.tile(anchors[2], (GRID[0] * GRID[1], 1))
    distances = np.full(GRID, 0.3, np.float32)
    plain = ScoreNormalisation(usual.mean, usual.deviation)
    np.testing.assert_allclose(
        relative(usual, distances, new), relative(plain, distances, new), atol=1e-6
    )


def test_only_patches_inside_count(rng: np.random.Generator) -> None:
    inside = EVERYWHERE.copy()
    inside[:, 40:] = False
    usual = collected(rng, 5, ANCHORS).normalisation()
    _, embeddings, _ = seen(rng)
    flat = inside.ravel()
    part = usual.parameters(inside, embeddings[flat])
    for some, all_ in zip(part, usual.parameters(EVERYWHERE, embeddings), strict=True):
        np.testing.assert_array_equal(some, all_[flat])


def test_anchors_are_entries_chosen_the_same_every_time(rng: np.random.Generator) -> None:
    entries = rng.standard_normal((400, 4)).astype(np.float32)
    one, other = class_anchors(entries, 16), class_anchors(entries, 16)
    assert one is not None and other is not None and one.shape == (16, 4)
    np.testing.assert_array_equal(one, other)
    rows = [int(np.flatnonzero((entries == anchor).all(axis=1))[0]) for anchor in one]
    assert len(set(rows)) == 16 and max(rows) > 200
    few = class_anchors(entries[:40], 16)
    assert few is not None and len(few) == 5
    assert class_anchors(entries[:15], 16) is None


def test_the_kind_is_that_of_the_nearest_anchor(rng: np.random.Generator) -> None:
    anchors = rng.standard_normal((7, 4)).astype(np.float32)
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
    np.testing.assert_array_equal(class_of(anchors, anchors), np.arange(7))
    with pytest.raises(CalibrationError, match=r"expected embeddings \(n, 4\)"):
        class_of(np.zeros((3, 5), np.float32), anchors)


def test_descriptions_keep_every_bit(rng: np.random.Generator) -> None:
    usual = collected(rng, 3, ANCHORS).normalisation()
    again = ScoreNormalisation.from_dict(usual.to_dict())
    assert usual.classes is not None and again.classes is not None
    for name, values in vars(usual.classes).items():
        np.testing.assert_array_equal(getattr(again.classes, name), values)


ONES, ZEROS = np.ones(2, np.float32), np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mean": ONES[:1]}, "expected float32 anchors"),
        ({"anchors": ANCHORS[:1]}, "expected float32 anchors"),
        ({"anchors": ANCHORS[0]}, "expected float32 anchors"),
        ({"anchors": ANCHORS.astype(np.float64)}, "expected float32 anchors"),
        ({"anchors": 2 * ANCHORS}, "unit anchors"),
        ({"anchors": ANCHORS * np.nan}, "unit anchors"),
        ({"mean": ONES * np.nan}, "finite means"),
        ({"mean": ONES * np.inf}, "finite means"),
        ({"deviation": ZEROS}, "deviations above 0"),
        ({"deviation": ONES * np.nan}, "deviations above 0"),
        (
            {"anchors": ANCHORS[:0], "mean": ONES[:0], "deviation": ONES[:0]},
            "expected float32 anchors",
        ),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        PatchClasses(**{"anchors": ANCHORS, "mean": ZEROS, "deviation": ONES, **changes})


@pytest.mark.parametrize(
    "kinds",
    [[], {}, {"anchors": [[1, 0]], "mean": [0]}, {"anchors": "x", "mean": 1, "deviation": 2}],
)
def test_descriptions_of_something_else_are_refused(kinds: Any) -> None:
    cells = np.full(CELLS_HW, 0.1).tolist()
    with pytest.raises(CalibrationError, match="score normalisation"):
        ScoreNormalisation.from_dict({"mean": cells, "deviation": cells, "classes": kinds})
