"""Train the small speaker encoder, which tells the speech decoder's flow whose voice it is to make (paper 3.3).

    stepaudio prepare recordings.jsonl corpora/prepared
    stepaudio run speaker corpus=corpora/prepared run_dir=runs/speaker
    stepaudio run flow corpus=corpora/prepared tokens=corpora/tokens speaker=runs/speaker/speaker.safetensors

Learns from the recordings whose records name a speaker, in one process, in under a minute on two cores; stopped, it
begins anew. Writes speaker.safetensors, metrics.jsonl and summary.json: the equal error rate over pairs of held-out
recordings (null where these hold no such pairs), and how many recordings and speakers there were.
"""

import json
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from stepaudio_train.audio.features import SAMPLE_RATE_HZ
from stepaudio_train.config.compose import run_recipe
from stepaudio_train.config.errors import UserError
from stepaudio_train.config.speaker import SpeakerTrainConfig, speaker_train_problems
from stepaudio_train.data.files import write_atomically
from stepaudio_train.data.segments import ShardRecordings
from stepaudio_train.models.decoder.flow_files import SPEAKER_FILES
from stepaudio_train.models.decoder.speaker import SmallSpeakerEncoder
from stepaudio_train.training.learning import started
from stepaudio_train.training.loggers import MetricsLogger
from stepaudio_train.training.speaker import DrawnClips, draw_clips, speaker_error, train_speaker_encoder

log = logging.getLogger("speaker")

_LOG_EVERY = 10


def main(config: SpeakerTrainConfig) -> None:
    with started(config) as (run, logger, device):
        assert logger is not None, "the only process is the first"
        summary_file = run.path / "summary.json"
        if summary_file.is_file():
            log.info("%s: finished before", run.path)
            return
        run.truncate_metrics(0)
        train = _drawn(config, config.train_split, config.max_clips)
        held_out = _drawn(config, config.held_out_split, config.held_out_clips)
        encoder = _learned(config, train, device, logger)
        summary = {
            "equal_error_rate_percent": _error(encoder, held_out),
            "train": train.counts(),
            "held_out": held_out.counts(),
        }
        encoder.save(run.path / SPEAKER_FILES[0])
        # Written last: a folder with summary.json is whole.
        write_atomically(summary_file, json.dumps(summary, indent=1).encode())
        log.info("finished: %s: %s", run.path, json.dumps(summary))


def _drawn(config: SpeakerTrainConfig, split: str, max_clips: int) -> DrawnClips:
    recordings = ShardRecordings(Path(config.corpus) / split, SAMPLE_RATE_HZ)
    return draw_clips(recordings, max_clips, config.seed, config.logging.progress_bar)


def _learned(
    config: SpeakerTrainConfig, train: DrawnClips, device: torch.device, logger: MetricsLogger
) -> SmallSpeakerEncoder:
    steps = config.training.steps
    with tqdm(total=steps, unit="step", disable=not config.logging.progress_bar, dynamic_ncols=True) as bar:

        def report(step: int, metrics: dict[str, float]) -> None:
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            bar.update()
            if step % _LOG_EVERY == 0 or step == steps:
                logger.write({"step": step, **metrics})

        return train_speaker_encoder(train.clips, config, device, report)


def _error(encoder: SmallSpeakerEncoder, held_out: DrawnClips) -> float | None:
    try:
        return speaker_error(encoder, held_out.clips)
    except UserError as error:
        log.warning("not measured on held-out recordings: %s", error)
        return None


if __name__ == "__main__":
    run_recipe(main, SpeakerTrainConfig, "speaker", speaker_train_problems)
