"""Exact search on a GPU: products in float16, what could be nearest compared again in float32."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from semantic_anomaly.errors import IndexMismatchError
from semantic_anomaly.index.search import largest_of_pairs

# More than the error of a float16 product of unit vectors: both factors are off by at most 2^-11 of
# their norm, results and limits by 2^-12. bfloat16 is as quick, and eight times coarser.
_HALF_ERROR = 2e-3
# Products that are held at once; with their comparison three times as many bytes.
_PRODUCTS = 2**27
# Entries of a query that are compared again; a query with more takes a float32 product with all.
_MAX_CANDIDATES = 256
_PAIRS = 2**16


class DeviceEntries:
    """The entries on a GPU, and their exact search there.

    Holds the embeddings in float32 and float16; a search takes at most 0.8 GB more.

    Args:
        embeddings: (count, dim) float32, unit norm.
        device: as torch names it, such as cuda:0.

    Attributes:
        device: as given.

    Raises:
        IndexMismatchError: the device has too little free memory.
    """

    def __init__(self, embeddings: np.ndarray, device: str) -> None:
        self.device = device
        _check_memory(embeddings.shape, device)
        if device.startswith("cuda"):
            # Partial sums in float16 would exceed the error that is allowed for.
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        with warnings.catch_warnings():
            # Nothing here writes into it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._entries = torch.from_numpy(embeddings).to(device)
        self._half = self._entries.to(torch.float16)

    def similarities(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return (n, k) float32: the largest inner products of each query, in no order.

        Args:
            queries: (n, dim) float32, unit norm.
            k: 1 to count.
        """
        vectors = torch.from_numpy(np.require(queries, requirements="W")).to(self.device)
        rows = max(1, _PRODUCTS // len(self._entries))
        best = [self._nearest(vectors[n : n + rows], k) for n in range(0, len(vectors), rows)]
        similarities: np.ndarray = torch.cat(best).cpu().numpy()
        return similarities

    def _nearest(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        products = torch.mm(queries.to(torch.float16), self._half.T)  # (n, count)
        if k == 1:
            least = products.amax(dim=1, keepdim=True)
        else:
            least = products.topk(k, dim=1).values[:, -1:]
        # The k best by float16 are off by one error, what competes with them by another.
        is_candidate = products >= least - 2 * _HALF_ERROR
        is_wide = is_candidate.sum(dim=1) > max(_MAX_CANDIDATES, k)
        is_candidate[is_wide] = False
        rows, entries = torch.nonzero(is_candidate, as_tuple=True)
        del products, is_candidate
        similarities = torch.empty(len(rows), device=queries.device)
        for start in range(0, len(rows), _PAIRS):
            piece = slice(start, start + _PAIRS)
            compared = queries[rows[piece]] * self._entries[entries[piece]]
            torch.sum(compared, dim=1, out=similarities[piece])
        best = largest_of_pairs(rows, similarities, len(queries), k)
        wide = torch.nonzero(is_wide)[:, 0]
        for some in wide.split(max(1, _PRODUCTS // 2 // len(self._entries))):
            best[some] = torch.mm(queries[some], self._entries.T).topk(k, dim=1).values
        return best


def _check_memory(shape: tuple[int, ...], device: str) -> None:
    """Refuse entries that do not fit on a GPU."""
    if not device.startswith("cuda"):
        return
    free, _ = torch.cuda.mem_get_info(device)
    needed = 6 * shape[0] * shape[1] + 6 * _PRODUCTS
    if needed > free:
        raise IndexMismatchError(
            f"index: memory of {device}",
            f"{needed} bytes for entries and search",
            f"{free} bytes available",
            "set 'search' to 'lists', which uses the memory of the CPU",
        )
