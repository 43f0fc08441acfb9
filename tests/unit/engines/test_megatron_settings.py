"""Megatron's configuration out of ours: what reaches it, and what is refused."""

from dataclasses import replace

import pytest
import torch

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import EngineConfig, PretrainConfig
from stepaudio_train.engines.megatron.settings import transformer_config


def _transformer(**engine):
    config = replace(PretrainConfig(), engine=EngineConfig(name="megatron", **engine))
    return transformer_config(config, torch.device("cpu"), torch.float32)


def test_sequence_parallelism_comes_with_tensor_parallelism():
    assert not _transformer().sequence_parallel
    assert _transformer(tensor_parallel=2).sequence_parallel


def test_extra_is_passed_on():
    assert _transformer(extra={"attention_softmax_in_fp32": False}).attention_softmax_in_fp32 is False


def test_unknown_extra_names_the_nearest():
    with pytest.raises(ConfigError) as refused:
        _transformer(extra={"recompute_num_layer": 2, "nonsense_of_all_kinds": 1})
    assert len(refused.value.problems) == 2
    assert "did you mean engine.extra.recompute_num_layers?" in refused.value.problems[0]


def test_what_megatron_refuses_is_told_with_the_key():
    with pytest.raises(ConfigError, match=r"engine\.extra=.*refused by Megatron-Core"):
        _transformer(extra={"recompute_granularity": "some"})
