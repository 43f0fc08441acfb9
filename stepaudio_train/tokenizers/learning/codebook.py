"""Learning the codes of a vector quantiser by moving averages, with dead codes brought back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepaudio_train.tokenizers.learning.clustering import kmeans
from stepaudio_train.tokenizers.learning.parallel import all_sum, from_first
from stepaudio_train.tokenizers.semantic import EuclideanCodebook

_START_ITERATIONS = 10
_EPSILON = 1e-5


class CodebookLearner(nn.Module):
    """Holds the running counts and sums of a codebook's codes. The codebook itself is changed in place.

    Processes that train together see the points of all, and have the same codes."""

    counts: Tensor
    sums: Tensor

    def __init__(self, codebook: EuclideanCodebook, decay: float, generator: torch.Generator) -> None:
        """
        Args:
            decay: how much of the running averages each update keeps.
        """
        super().__init__()
        self._codebook = codebook
        self._decay = decay
        self._generator = generator
        self.register_buffer("counts", torch.zeros_like(codebook.embed[:, 0]))
        self.register_buffer("sums", torch.zeros_like(codebook.embed))

    @property
    def _codes(self) -> Tensor:
        # Asked for each time: a module that is moved to a device gets new buffers.
        return self._codebook.embed

    def start(self, points: Tensor) -> None:
        """Place the codes by k-means over points [N, D], the first process's."""
        self._codes.copy_(kmeans(points.cpu(), len(self._codes), _START_ITERATIONS, self._generator))
        from_first(self._codes)
        self.go_on()

    def go_on(self) -> None:
        """Begin with the codes as they are."""
        self.counts.fill_(1.0)
        self.sums.copy_(self._codes)

    @torch.no_grad()
    def update(self, points: Tensor, ids: Tensor) -> None:
        """Move the codes towards the points [N, D] that chose them (ids [N])."""
        hits = all_sum(torch.bincount(ids, minlength=len(self._codes)).to(self.counts.dtype))
        sums = all_sum(torch.zeros_like(self._codes).index_add_(0, ids, points))
        self.counts.mul_(self._decay).add_(hits, alpha=1 - self._decay)
        self.sums.mul_(self._decay).add_(sums, alpha=1 - self._decay)
        self._codes.copy_(self.sums / (self.counts + _EPSILON)[:, None])
        self._revive(points)

    def usage(self) -> tuple[float, float]:
        """Share of the codes in use, and the perplexity of their use, over the running averages."""
        shares = self.counts / self.counts.sum().clamp(min=_EPSILON)
        used = shares[shares > 0]
        return float((shares > 0.05 / len(shares)).float().mean()), float((-used * used.log()).sum().exp())

    def _revive(self, points: Tensor) -> None:
        """Codes with under a twentieth of the average use move to random points of the first process's batch."""
        average = float(self.counts.mean())
        dead = (self.counts < 0.05 * average).nonzero()[:, 0]
        if len(dead):
            picked = points[torch.randint(len(points), (len(dead),), generator=self._generator).to(points.device)]
            picked = from_first(picked.contiguous())
            self._codes[dead] = picked
            # Half the average: enough to show within a few steps whether anything chooses them.
            self.counts[dead] = 0.5 * average
            self.sums[dead] = picked * 0.5 * average
