"""k-means over encoder frames."""

from __future__ import annotations

import torch
from torch import Tensor

from stepaudio_train.tokenizers.learning.parallel import all_sum, from_first
from stepaudio_train.tokenizers.linguistic import nearest

_ROWS_AT_ONCE = 16384


def kmeans(points: Tensor, num_clusters: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm from spread-out starting points (k-means++); empty clusters take far points.

    Args:
        points: [N, D] float32; num_clusters: at most N.

    Returns:
        centroids [num_clusters, D].
    """
    centroids = _spread(points, num_clusters, generator)
    for _ in range(iterations):
        labels, distances = assign(points, centroids)
        counts = torch.bincount(labels, minlength=num_clusters)
        sums = torch.zeros_like(centroids).index_add_(0, labels, points)
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            centroids[empty] = points[distances.topk(len(empty)).indices]
    return centroids


class MiniBatchKMeans:
    """k-means over points that come in batches, on any number of processes (Sculley 2010): a centroid moves to the mean
    of all points it has been nearest to so far. Centroids that nothing chose for a while move to far points."""

    _PATIENCE = 20
    """Batches without a point before a centroid is moved."""

    def __init__(self, centroids: Tensor) -> None:
        """
        Args:
            centroids: [K, D], changed in place; the same on all processes.
        """
        self._centroids = centroids
        self.counts = torch.zeros(len(centroids), device=centroids.device)
        self.idle = torch.zeros(len(centroids), device=centroids.device)

    @torch.no_grad()
    def update(self, points: Tensor) -> dict[str, float]:
        """Learn from points [N, D], this process's share of a batch.

        Returns:
            `inertia`, the mean squared distance of a point before the update; `used`, the share of centroids chosen.
        """
        labels, distances = assign(points, self._centroids)
        hits = all_sum(torch.bincount(labels, minlength=len(self._centroids)).float())
        sums = all_sum(torch.zeros_like(self._centroids).index_add_(0, labels, points))
        self.counts += hits
        # Moving by hits / all hits so far is what gives the mean of all points.
        steps = (sums - hits[:, None] * self._centroids) / self.counts.clamp(min=1)[:, None]
        self._centroids += steps
        self.idle = torch.where(hits > 0, 0.0, self.idle + 1)
        dead = (self.idle >= self._PATIENCE).nonzero()[:, 0]
        if len(dead):
            far = distances.topk(min(len(dead), len(points))).indices
            chosen = points[far[torch.arange(len(dead), device=far.device) % len(far)]]
            self._centroids[dead] = from_first(chosen.contiguous())
            self.counts[dead] = 0
            self.idle[dead] = 0
        totals = all_sum(torch.tensor([float(distances.sum()), float(len(points))]))
        return {"inertia": float(totals[0] / totals[1]), "used": float((hits > 0).float().mean())}


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each point [N] int64 and the squared distance to it [N]."""
    labels = torch.cat([nearest(part, centroids) for part in points.split(_ROWS_AT_ONCE)])
    return labels, (points - centroids[labels]).square().sum(1)


def perplexity(labels: Tensor, num_codes: int) -> float:
    """exp of the entropy of the codes' frequencies: how many codes are in real use."""
    shares = torch.bincount(labels.flatten(), minlength=num_codes).double()
    shares = shares[shares > 0] / shares.sum()
    return float((-shares * shares.log()).sum().exp())


def _spread(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    # A sample is enough to start from, and keeps this quadratic step small.
    sample = points[torch.randperm(len(points), generator=generator)[: max(num_clusters, 20 * num_clusters)]]
    chosen = [int(torch.randint(len(sample), (), generator=generator))]
    distances = (sample - sample[chosen[0]]).square().sum(1)
    for _ in range(num_clusters - 1):
        weights = distances if float(distances.sum()) > 0 else torch.ones_like(distances)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distances = torch.minimum(distances, (sample - sample[chosen[-1]]).square().sum(1))
    return sample[chosen]
