"""The one torch inner product."""

from __future__ import annotations

import numpy as np
import torch


def inner_products(
    left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Return (n, m) float32, the matrix product of (n, dim) and (dim, m) float32.

    Threads of numpy's own library keep the cores busy for a tenth of a second after every product,
    and the backbone's next image waits for them; torch computes both with the same threads.

    Args:
        left, right: the factors.
        out: (n, m) float32, C order, to write to; None: a new array.

    Raises:
        RuntimeError: shapes or dtypes that do not fit each other; torch's message names both.
    """
    # Torch warns of arrays that it could write to but may not.
    factors = [torch.from_numpy(np.require(each, requirements="W")) for each in (left, right)]
    into = None if out is None else torch.from_numpy(out)
    product: np.ndarray = torch.mm(*factors, out=into).numpy()
    return product
