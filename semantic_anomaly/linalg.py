"""Matrix products of numpy arrays by torch."""

from __future__ import annotations

import numpy as np
import torch


def inner_products(
    left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Return the (n, m) float32 matrix product of two float32 matrices.

    Threads of the BLAS of numpy spin for a tenth of a second after every product and delay the
    next image of the backbone; torch uses the same threads for both.

    Args:
        left: (n, dim) float32.
        right: (dim, m) float32.
        out: (n, m) float32, C order, written in place; None: a new array.

    Raises:
        RuntimeError: shapes or dtypes do not match.
    """
    # torch warns about read-only arrays.
    factors = [torch.from_numpy(np.require(factor, requirements="W")) for factor in (left, right)]
    into = None if out is None else torch.from_numpy(out)
    product: np.ndarray = torch.mm(*factors, out=into).numpy()  # (n, m)
    return product
