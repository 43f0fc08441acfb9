"""Mels that a trained flow makes of recordings' tokens: what the vocoder will hear once it speaks."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from stepaudio_train.audio.features import batches_of_like_length
from stepaudio_train.config.vocoder_training import VocoderTrainConfig
from stepaudio_train.data.paired_speech import PairedSpeech
from stepaudio_train.data.segments import MadeMels
from stepaudio_train.models.decoder.flow import FlowPrompt
from stepaudio_train.models.decoder.speech_decoder import read_flow, require_fitting

_BATCH_FRAMES = 4000


def made_mels(config: VocoderTrainConfig, device: torch.device) -> MadeMels | None:
    """Those of `config.flow_clips` recordings, in their own voices, the same on every process; None without a flow.
    Every process calls it, and makes its share.

    Raises:
        UserError: the flow cannot be read, makes other mels than the vocoder takes, or learned from other recordings.
    """
    if config.flow is None:
        return None
    flow, speaker, solver = read_flow(Path(config.flow))
    require_fitting(flow.config, config.vocoder.mel)
    folders = (Path(folder) / config.train_split for folder in (config.corpus, config.tokens or ""))
    speech = PairedSpeech(*folders, flow.config, speaker.embed)
    number = min(config.flow_clips, len(speech))
    chosen = random.Random(f"{config.seed} made mels").sample(range(len(speech)), number)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    own = chosen[rank::num_ranks]
    batches = list(batches_of_like_length([speech.num_frames[index] for index in own], _BATCH_FRAMES))
    flow, made = flow.to(device), dict[int, Tensor]()
    for batch in tqdm(batches, desc="mels of the flow", unit="batch", dynamic_ncols=True, disable=rank > 0):
        read = {index: speech.read(index) for index in (own[place] for place in batch)}
        clips = {index: clip for index, clip in read.items() if clip is not None}
        prompts = [FlowPrompt.of_speaker(clip.speaker, flow.config.num_mel_bins) for clip in clips.values()]
        mels = flow.generate([clip.tokens for clip in clips.values()], prompts, solver)
        made |= {speech.recording(index): mel for index, mel in zip(clips, mels, strict=True)}
    parts: list[dict[int, Tensor] | None] = [None] * num_ranks
    dist.all_gather_object(parts, made)
    return MadeMels({index: mel for part in parts for index, mel in (part or {}).items()}, config.flow_share)
