"""The loss by which an encoder learns to tell voices apart."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def am_softmax(embeddings: Tensor, centres: Tensor, speakers: Tensor, margin: float, scale: float) -> Tensor:
    """Additive-margin softmax (Wang et al. 2018, arXiv 1801.05599, equation 6).

    A clip's cosine with the centre of its speaker must be over its cosines with all others by a margin.

    Args:
        embeddings: [B, D]; centres: [speakers, D], both of any length; speakers: [B] int64, each clip's centre.

    Returns:
        Scalar: the mean over the clips, in nats.
    """
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(centres, dim=1).T
    own = F.one_hot(speakers, len(centres))
    return F.cross_entropy(scale * (cosines - margin * own), speakers)
