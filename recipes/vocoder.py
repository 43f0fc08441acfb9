"""Train the speech decoder's vocoder, mel frames to sound, at any size, on any number of processes (paper 3.3).

    stepaudio prepare recordings corpora/prepared
    stepaudio run vocoder corpus=corpora/prepared run_dir=runs/vocoder
    stepaudio run vocoder corpus=RECORDINGS run_dir=runs/vocoder experiment=vocoder_released num_workers=8 --nproc 8
    stepaudio run vocoder corpus=RECORDINGS init=CosyVoice-300M-25Hz/hift.pt experiment=vocoder_released

Writes hift.safetensors and hift.json (release=true: hift.pt too, for the released programs); on the way metrics.jsonl,
checkpoints and samples/step_XXXXXXXX/, held-out recordings beside their copies. Stopped, the same command goes on from
the last checkpoint, with the same losses. See docs/speech_decoder.md.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import DataLoader

from stepaudio_train.config.compose import run_recipe
from stepaudio_train.config.vocoder_training import VocoderTrainConfig, vocoder_train_problems
from stepaudio_train.data.segments import SegmentBatch, SegmentBatches, find_corpus
from stepaudio_train.models.decoder.vocoder_files import save_vocoder
from stepaudio_train.training.learning import learn, started
from stepaudio_train.training.vocoder import HeldOutClips, VocoderLearner

log = logging.getLogger("vocoder")


def main(config: VocoderTrainConfig) -> None:
    with started(config) as (run, logger, device):
        mel, training = config.vocoder.mel, config.training
        splits = (config.train_split, config.held_out_split, config.held_out_clips)
        recordings, clips = find_corpus(Path(config.corpus), *splits, mel.sample_rate_hz, config.seed)
        log.info("%d recordings to learn from, %d held-out clips", len(recordings), len(clips))
        segments = SegmentBatches(
            recordings,
            mel,
            training.batch_segments,
            training.segment_samples,
            config.seed,
            dist.get_rank(),
            dist.get_world_size(),
        )
        learner = VocoderLearner(config, HeldOutClips(clips, config, logger), device)

        def batches(first: int) -> Iterable[SegmentBatch]:
            steps = range(first, training.max_steps + 1)
            return DataLoader(segments, batch_size=None, sampler=steps, num_workers=config.num_workers)

        finished = learn(config, learner, batches, run, logger)
        if finished and logger is not None:
            save_vocoder(learner.average, run.path, config.release)
        log.info("%s: %s", "finished" if finished else "stopped; the same command goes on from here", run.path)


if __name__ == "__main__":
    run_recipe(main, VocoderTrainConfig, "vocoder", vocoder_train_problems)
