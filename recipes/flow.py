"""Train the speech decoder's flow, speech tokens to mel frames, at any size, on any number of processes (paper 3.3).

    stepaudio prepare recordings corpora/prepared
    stepaudio tokenize corpora/prepared corpora/tokens --text-tokenizer FILE --speech-tokenizer DIR
    stepaudio run flow corpus=corpora/prepared tokens=corpora/tokens run_dir=runs/flow
    stepaudio run flow experiment=flow_released speaker=CosyVoice-300M-25Hz/campplus.onnx num_workers=8 --nproc 8

Writes flow.safetensors and flow.json, with the speaker encoder beside them; on the way metrics.jsonl and checkpoints.
Stopped, the same command goes on from the last checkpoint, with the same losses. With the files of `stepaudio run
vocoder` in the same folder it is a speech decoder.
"""

import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import DataLoader

from stepaudio_train.audio.features import batches_of_like_length
from stepaudio_train.config.compose import run_recipe
from stepaudio_train.config.flow_training import FlowTrainConfig, flow_train_problems
from stepaudio_train.data.paired_speech import PairedSpeech
from stepaudio_train.models.decoder.flow_files import NoSpeaker, copy_speaker, load_speaker, save_flow
from stepaudio_train.models.decoder.flow_loss import FlowBatch
from stepaudio_train.training.flow import FlowLearner, flow_batch
from stepaudio_train.training.learning import learn, started

log = logging.getLogger("flow")


def main(config: FlowTrainConfig) -> None:
    with started(config) as (run, logger, device):
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        share_frames = config.training.batch_frames // num_ranks
        speech = _speech(config, config.train_split)
        held_out = [] if logger is None else _held_out(config)
        log.info("%d recordings to learn from", len(speech))
        learner = FlowLearner(config, held_out, device)

        def batches(first: int) -> Iterable[FlowBatch]:
            own = islice(speech.batches(share_frames, config.seed), (first - 1) * num_ranks + rank, None, num_ranks)
            return DataLoader(speech, batch_sampler=own, collate_fn=flow_batch, num_workers=config.num_workers)

        finished = learn(config, learner, batches, run, logger)
        if finished and logger is not None:
            save_flow(learner.average, run.path)
            if config.speaker is not None:
                copy_speaker(Path(config.speaker), run.path)
        log.info("%s: %s", "finished" if finished else "stopped; the same command goes on from here", run.path)


def _speech(config: FlowTrainConfig, split: str) -> PairedSpeech:
    size = config.flow.speaker_size
    speaker = NoSpeaker(size) if config.speaker is None else load_speaker(Path(config.speaker), size)
    return PairedSpeech(Path(config.corpus) / split, Path(config.tokens) / split, config.flow, speaker.embed)


def _held_out(config: FlowTrainConfig) -> list[FlowBatch]:
    speech = _speech(config, config.held_out_split)
    frames = speech.num_frames[: config.held_out_clips]
    chosen = batches_of_like_length(frames, config.training.batch_frames)
    return [flow_batch([speech[index] for index in batch]) for batch in chosen]


if __name__ == "__main__":
    run_recipe(main, FlowTrainConfig, "flow", flow_train_problems)
