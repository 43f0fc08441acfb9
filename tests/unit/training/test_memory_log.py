"""The log says what memory a run was planned to take, part by part, and what its first steps took."""

import logging
import re
from dataclasses import replace

import torch

from stepaudio_train.config.compose import load_config
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.engines.build import build_engine
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.loop import fit
from stepaudio_train.training.memory_log import parts, peak
from stepaudio_train.training.plan import StagePlan
from stepaudio_train.training.run_directory import RunDirectory


def test_parts_that_are_nothing_are_left_out():
    gib = 2**30
    states = {"weights": 2 * gib, "gradients": gib, "optimizer": 4 * gib, "buffers": 0}
    stage = StagePlan(0, 7, **states, activations=gib // 2, models=0, runtime=0, host=gib)
    assert parts(stage) == "weights 2.00, gradients 1.00, optimizer 4.00, activations 0.50, host 1.00; 8.50 GiB in all"


def test_the_peak_of_this_process_is_more_than_what_it_just_held():
    held = torch.ones(2**27)
    told = float(re.match(r"[\d.]+", peak(torch.device("cpu")))[0])
    assert told * 2**30 >= held.numel() * 4


def test_a_run_tells_its_plan_once_and_its_peak_after_the_second_step(tmp_path, caplog):
    typed = ["experiment=debug", "training.max_steps=3", "training.sequence_length=64", "training.export_hf=false"]
    config = load_config("pretrain", PretrainConfig, [*typed, f"run_dir={tmp_path / 'run'}"])
    config = replace(config, logging=replace(config.logging, tensorboard=False, wandb="disabled", progress_bar=False))
    vocabulary = Vocabulary.from_config(config.vocabulary)
    loader = SyntheticLoader(config.data, vocabulary, 64, config.training.global_batch_rows, 0)
    with caplog.at_level(logging.INFO, "stepaudio_train.training.memory_log"):
        run = RunDirectory(config.run_dir)
        run.claim(config)
        assert fit(config, build_engine(config), loader, LanguageModelling(vocabulary), run)
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("memory_log")]
    assert len(lines) == 2
    assert re.fullmatch(
        r"memory of rank 0 as planned: weights [\d.]+, gradients [\d.]+, optimizer [\d.]+, activations [\d.]+; "
        r"[\d.]+ GiB in all",
        lines[0],
    )
    assert re.fullmatch(r"memory of rank 0 after 2 steps: [\d.]+ GiB at most in the whole process.*", lines[1])
