"""Which rows of a global batch each data-parallel rank computes, so that none waits for another.

Packed rows are equally long, and still cost unequally: attention within documents takes as much as the sum of their
squared lengths. Dealing rows out by cost changes who computes what, and neither the batch nor its loss.
"""

from __future__ import annotations

import numpy as np

_GOOD_ENOUGH = 1e-4
"""Of the mean: a swap of rows that gains less is not made."""


def deal_rows(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """Deal rows to ranks: equally many each, of as equal cost as swaps of two rows make them.

    Ranks begin with one of every `num_ranks` neighbours in the order of cost. Then the ranks of most and least cost
    exchange the two rows that bring them closest together, until that gains nothing. Each takes its rows from the
    most expensive to the cheapest. So the ranks' n-th rows cost about the same too, which counts where they meet after
    each (ZeRO-3), and so do neighbours in a pipeline.

    Args:
        costs: [R] of the rows, in any unit.

    Returns:
        [num_ranks, R / num_ranks] indices of rows. The same on every machine for the same costs.

    Raises:
        ValueError: the ranks cannot share the rows evenly.
    """
    if len(costs) % num_ranks:
        raise ValueError(f"{len(costs)} rows for {num_ranks} data-parallel ranks: must be a multiple of them")
    dealt = np.empty((num_ranks, len(costs) // num_ranks), np.int64)
    totals = np.zeros(num_ranks)
    for place, rows in enumerate(np.argsort(-costs, kind="stable").reshape(-1, num_ranks)):
        cheapest = np.argsort(totals, kind="stable")
        dealt[cheapest, place] = rows
        totals[cheapest] += costs[rows]
    least_gain = _GOOD_ENOUGH * totals.mean()
    # Every swap makes the sum of squared totals smaller, so this ends; the bound is for rounding's sake.
    for _ in range(len(costs)):
        high, low = int(totals.argmax()), int(totals.argmin())
        moved = costs[dealt[high]][:, None] - costs[dealt[low]]
        # What the further of the two ends up nearer to the other.
        gain = np.minimum(moved, totals[high] - totals[low] - moved)
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= least_gain:
            break
        dealt[high, i], dealt[low, j] = dealt[low, j], dealt[high, i]
        totals[high] -= moved[i, j]
        totals[low] += moved[i, j]
    return np.take_along_axis(dealt, np.argsort(-costs[dealt], 1, kind="stable"), 1)
