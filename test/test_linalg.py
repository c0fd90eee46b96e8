"""Matrix products by torch."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from semantic_anomaly.linalg import inner_products


@pytest.mark.parametrize("writeable", [True, False])
def test_products_are_those_of_numpy(writeable: bool) -> None:
    rng = np.random.default_rng(4)
    left = rng.standard_normal((7, 12)).astype(np.float32)
    right = rng.standard_normal((5, 12)).astype(np.float32).T
    left.flags.writeable = right.flags.writeable = writeable
    expected = left.astype(np.float64) @ right.astype(np.float64)
    out = np.empty((7, 5), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(inner_products(left, right), expected, rtol=0, atol=1e-5)
        inner_products(left, right, out)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_shapes_and_dtypes_that_do_not_match_are_refused() -> None:
    left = np.ones((2, 3), np.float32)
    with pytest.raises(RuntimeError):
        inner_products(left, left)
    with pytest.raises(RuntimeError):
        inner_products(left, np.ones((3, 2)))
