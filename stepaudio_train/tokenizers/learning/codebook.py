"""Learning the codes of a vector quantiser by moving averages, with dead codes brought back."""

from __future__ import annotations

import torch
from torch import Tensor

from stepaudio_train.tokenizers.learning.clustering import kmeans
from stepaudio_train.tokenizers.semantic import EuclideanCodebook

_START_ITERATIONS = 10
_EPSILON = 1e-5


class CodebookLearner:
    """Holds the running counts and sums of a codebook's codes. The codebook itself is changed in place."""

    def __init__(self, codebook: EuclideanCodebook, decay: float, generator: torch.Generator) -> None:
        """
        Args:
            decay: how much of the running averages each update keeps.
        """
        self._codes = codebook.embed
        self._decay = decay
        self._generator = generator
        self._counts = torch.zeros(len(self._codes), device=self._codes.device)
        self._sums = torch.zeros_like(self._codes)

    def start(self, points: Tensor) -> None:
        """Place the codes by k-means over points [N, D]."""
        self._codes.copy_(kmeans(points.cpu(), len(self._codes), _START_ITERATIONS, self._generator))
        self._counts.fill_(1.0)
        self._sums.copy_(self._codes)

    @torch.no_grad()
    def update(self, points: Tensor, ids: Tensor) -> None:
        """Move the codes towards the points [N, D] that chose them (ids [N])."""
        hits = torch.bincount(ids, minlength=len(self._codes)).float()
        sums = torch.zeros_like(self._codes).index_add_(0, ids, points)
        self._counts.mul_(self._decay).add_(hits, alpha=1 - self._decay)
        self._sums.mul_(self._decay).add_(sums, alpha=1 - self._decay)
        self._codes.copy_(self._sums / (self._counts + _EPSILON)[:, None])
        self._revive(points)

    def _revive(self, points: Tensor) -> None:
        """Codes with under a twentieth of the average use move to random points of the batch."""
        average = float(self._counts.mean())
        dead = (self._counts < 0.05 * average).nonzero()[:, 0]
        if len(dead):
            picked = points[torch.randint(len(points), (len(dead),), generator=self._generator).to(points.device)]
            self._codes[dead] = picked
            # Half the average: enough to show within a few steps whether anything chooses them.
            self._counts[dead] = 0.5 * average
            self._sums[dead] = picked * 0.5 * average
