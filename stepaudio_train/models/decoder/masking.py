"""Clips of different lengths in one batch: what lies behind a clip's end changes nothing in it."""

from __future__ import annotations

from torch import Tensor, nn

from stepaudio_train.audio.features import length_mask


def mask_of(lengths: Tensor, size: int) -> Tensor | None:
    """[B, size] bool, True inside a clip; None where all clips are `size` long, for which faster kernels serve."""
    return None if bool((lengths == size).all()) else length_mask(lengths, size)


def zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, C, T] with zeros behind each clip's end, as a convolution sees them behind a single clip."""
    return x if mask is None else x * mask[:, None]


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm over a clip's own frames. The released one counts padding, and is only exact for single clips."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, C, T], mask [B, T] -> [B, C, T]."""
        if mask is None:
            return super().forward(x)
        groups, inside = x.unflatten(1, (self.num_groups, -1)), mask[:, None, None]
        count = inside.sum(dim=(2, 3), keepdim=True) * groups.shape[2]
        centred = groups - (groups * inside).sum(dim=(2, 3), keepdim=True) / count
        variance = (centred.square() * inside).sum(dim=(2, 3), keepdim=True) / count
        normal = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        return normal * self.weight[:, None] + self.bias[:, None]
