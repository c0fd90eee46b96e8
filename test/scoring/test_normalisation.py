"""Mean and deviation by image cell and patch class, and standardised distances."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.scoring.normalisation import CELLS_HW, NormalisationSums, ScoreNormalisation

GRID = (36, 64)
EVERYWHERE = np.ones(GRID, bool)


def nominal(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Distances of a calm lower half and a lively upper one."""
    spread = np.where(np.arange(GRID[0])[:, None] < GRID[0] // 2, 0.05, 0.01)
    return [
        np.clip(4 * spread + spread * rng.standard_normal(GRID), 0, 2).astype(np.float32)
        for _ in range(count)
    ]


def collected(frames: list[np.ndarray], inside: np.ndarray = EVERYWHERE) -> NormalisationSums:
    sums = NormalisationSums()
    for frame in frames:
        sums.add(frame, inside, embeddings_of(inside))
    return sums


def embeddings_of(inside: np.ndarray) -> np.ndarray:
    """Return embeddings of the patches inside; without classes only their number matters."""
    return np.zeros((int(inside.sum()), 4), np.float32)


def parameters(usual: ScoreNormalisation, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return usual.parameters(inside, embeddings_of(inside))


def relative(usual: ScoreNormalisation, distances: np.ndarray) -> np.ndarray:
    inside = np.ones(distances.shape, bool)
    mean, deviation = parameters(usual, inside)
    unit_mean, unit_deviation = usual.unit
    z = (distances.ravel() - mean) / deviation
    return (unit_mean + unit_deviation * z).reshape(distances.shape)


def test_mean_and_deviation_are_those_of_the_cell(rng: np.random.Generator) -> None:
    frames = nominal(rng, 30)
    usual = collected(frames).normalisation()
    cell = np.stack(frames)[:, 4:6, 10:12]
    assert usual.mean[2, 5] == pytest.approx(cell.mean(), rel=1e-5)
    assert usual.deviation[2, 5] == pytest.approx(cell.std(), rel=1e-4)


def test_frames_may_be_collected_in_parts(rng: np.random.Generator) -> None:
    frames = nominal(rng, 8)
    whole, parts = collected(frames), collected(frames[:3]) + collected(frames[3:])
    np.testing.assert_array_equal(whole.normalisation().mean, parts.normalisation().mean)
    assert NormalisationSums().empty and not parts.empty


def test_relative_distances_are_alike_everywhere(rng: np.random.Generator) -> None:
    usual = collected(nominal(rng, 200)).normalisation()
    fresh = np.stack([relative(usual, frame) for frame in nominal(rng, 40)])
    upper, lower = fresh[:, :14], fresh[:, 22:]
    assert upper.mean() == pytest.approx(lower.mean(), rel=0.05)
    assert upper.std() == pytest.approx(lower.std(), rel=0.1)
    # The same distance is ordinary above and very odd below, where it never occurs.
    odd = relative(usual, np.full(GRID, 0.12, np.float32))
    assert odd[30, 5] > fresh.max() > odd[5, 5]


def test_standardising_keeps_the_order_of_distances_at_a_place(rng: np.random.Generator) -> None:
    _, deviation = parameters(collected(nominal(rng, 5)).normalisation(), EVERYWHERE)
    assert (deviation > 0).all()


def test_only_patches_inside_count_and_are_returned(rng: np.random.Generator) -> None:
    inside = EVERYWHERE.copy()
    inside[:, 32:] = False
    frames = nominal(rng, 10)
    for frame in frames:
        frame[:, 32:] = 2.0
    usual = collected(frames, inside).normalisation()
    # Cells of which nothing is known get what is typical of the others.
    assert usual.mean.max() < 0.5
    mean, deviation = parameters(usual, inside)
    assert mean.shape == deviation.shape == (inside.sum(),)


@pytest.mark.parametrize("grid", [(5, 7), (18, 32), (90, 160), (1, 1)])
def test_any_grid_will_do(grid: tuple[int, int]) -> None:
    sums = NormalisationSums()
    rng = np.random.default_rng(0)
    for _ in range(5):
        sums.add(
            rng.random(grid, np.float32), np.ones(grid, bool), embeddings_of(np.ones(grid, bool))
        )
    usual = sums.normalisation()
    mean, deviation = parameters(usual, np.ones(grid, bool))
    assert np.isfinite(mean).all() and np.isfinite(deviation).all()
    assert len(mean) == grid[0] * grid[1]


def test_a_place_that_never_changed_does_not_explode(rng: np.random.Generator) -> None:
    frames = nominal(rng, 20)
    for frame in frames:
        frame[20:22, 20:22] = 0.03
    normalisation = collected(frames).normalisation()
    _, deviation = parameters(normalisation, EVERYWHERE)
    assert deviation.min() > normalisation.unit[1] / 20


def test_what_hardly_any_frame_showed_is_not_believed(rng: np.random.Generator) -> None:
    # An instance has one value for all of its patches: alone in a cell, no deviation at all.
    sums = NormalisationSums()
    for _ in range(60):
        row, col = rng.integers(0, 33), rng.integers(0, 61)
        values, inside = np.zeros(GRID, np.float32), np.zeros(GRID, bool)
        inside[row : row + 3, col : col + 3] = True
        values[inside] = rng.normal(0.3, 0.05)
        sums.add(values, inside, embeddings_of(inside))
    usual = sums.normalisation()
    assert usual.deviation.min() > 0.005
    assert np.median(usual.mean) == pytest.approx(0.3, abs=0.05)
    assert relative(usual, np.full(GRID, 0.45, np.float32)).max() < 1.0


def test_a_single_value_everywhere_has_some_deviation() -> None:
    usual = collected([np.full(GRID, 0.2, np.float32)] * 3).normalisation()
    assert (usual.deviation > 0).all()


def test_nothing_and_nonsense_are_refused() -> None:
    with pytest.raises(CalibrationError, match="found none"):
        NormalisationSums().normalisation()
    good = np.full(CELLS_HW, 0.1, np.float32)
    with pytest.raises(CalibrationError, match="expected"):
        ScoreNormalisation(good[:2], good)
    with pytest.raises(CalibrationError, match="means in"):
        ScoreNormalisation(good * np.nan, good)
    with pytest.raises(CalibrationError, match="above 0"):
        ScoreNormalisation(good, good * 0)
    for values in ({}, [], {"mean": [[1]], "deviation": "x"}, {"mean": good.tolist()}):
        with pytest.raises(CalibrationError):
            ScoreNormalisation.from_dict(values)


def test_descriptions_keep_every_bit(rng: np.random.Generator) -> None:
    usual = collected(nominal(rng, 3)).normalisation()
    again = ScoreNormalisation.from_dict(usual.to_dict())
    np.testing.assert_array_equal(again.mean, usual.mean)
    np.testing.assert_array_equal(again.deviation, usual.deviation)
