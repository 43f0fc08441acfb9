"""From the rate of tokens to the rate of mel frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepaudio_train.models.decoder.masking import MaskedGroupNorm, mask_of, zeroed

_NUM_CONVOLUTIONS = 4


def stretch(x: Tensor, num_rows: Tensor, num_frames: Tensor, size: int) -> Tensor:
    """Linear interpolation of each segment of each clip to a length of its own; the frames lie one behind another.

    Frame j of a segment stretched from n rows to m is row (j + 1/2) n / m - 1/2, held at its ends, as in torch's
    `interpolate`. A prompt and what follows it are two segments, so that no frame is mixed of both.

    Args:
        x: [B, T, C], the rows of a clip's segments one behind another.
        num_rows: [B, S] int64.
        num_frames: [B, S] int64; 0 for a segment that is absent, and over 0 for the last one.
        size: F, at least the frames of the longest clip.

    Returns:
        [B, F, C]; meaningless behind a clip's last frame.
    """
    ends = num_frames.cumsum(1)
    frames = torch.arange(size, device=x.device)[None].expand(len(x), -1)
    segment = (frames[:, :, None] >= ends[:, None]).sum(2).clamp(max=ends.shape[1] - 1)
    rows, length, first_frame, first_row = (
        values.gather(1, segment) for values in (num_rows, num_frames, ends - num_frames, num_rows.cumsum(1) - num_rows)
    )
    # In integers, twice as large: exact for clips of any length.
    position = ((2 * (frames - first_frame) + 1) * rows - length).clamp(min=0)
    before = torch.minimum(position // (2 * length), rows - 1)
    after = torch.minimum(before + 1, rows - 1)
    share = ((position % (2 * length)).to(x.dtype) / (2 * length).to(x.dtype))[:, :, None]
    batch = torch.arange(len(x), device=x.device)[:, None]
    return torch.lerp(x[batch, first_row + before], x[batch, first_row + after], share)


class LengthRegulator(nn.Module):
    """Interpolation, then convolutions over mel frames. `model` and the numbers in it are the released names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(_NUM_CONVOLUTIONS):
            layers += [nn.Conv1d(channels, channels, 3, padding=1), MaskedGroupNorm(1, channels), nn.Mish()]
        self.model = nn.ModuleList([*layers, nn.Conv1d(channels, channels, 1)])

    def forward(self, x: Tensor, num_rows: Tensor, num_frames: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
        """As `stretch`: [B, C, F], zero behind a clip's end, and the mask [B, F] of `mask_of`."""
        mask = mask_of(num_frames.sum(1), size)
        x = stretch(x, num_rows, num_frames, size).transpose(1, 2)
        for layer in self.model:
            x = layer(x, mask) if isinstance(layer, MaskedGroupNorm) else layer(zeroed(x, mask))
        return zeroed(x, mask), mask
