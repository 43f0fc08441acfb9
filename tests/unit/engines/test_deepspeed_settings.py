"""DeepSpeed's JSON out of our configuration: what reaches it, and what is refused."""

from dataclasses import replace

import pytest
import torch

from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.schema import EngineConfig, OptimizerConfig, PretrainConfig
from stepaudio_train.engines.deepspeed.settings import deepspeed_config

CPU = torch.device("cpu")


def _settings(dtype=torch.float32, device=CPU, **engine):
    config = replace(PretrainConfig(), engine=EngineConfig(name="deepspeed", **engine))
    return deepspeed_config(config, device, dtype)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stage_and_precision(stage):
    settings = _settings(zero_stage=stage)
    assert settings["zero_optimization"]["stage"] == stage
    assert not settings["bf16"]["enabled"]
    assert _settings(torch.bfloat16)["bf16"]["enabled"]


def test_offload_keeps_states_or_weights_too_in_host_memory():
    assert "offload_optimizer" not in _settings()["zero_optimization"]
    some, everything = (_settings(offload=name)["zero_optimization"] for name in ("optimizer", "all"))
    assert some["offload_optimizer"]["device"] == everything["offload_param"]["device"] == "cpu"
    assert "offload_param" not in some
    assert not some["offload_optimizer"]["pin_memory"]
    cuda = _settings(device=torch.device("cuda"), offload="all")["zero_optimization"]
    assert cuda["offload_param"]["pin_memory"] and cuda["overlap_comm"]


def test_clipping_is_the_optimizers():
    config = replace(PretrainConfig(), optimizer=OptimizerConfig(clip_grad_norm=0.3))
    assert deepspeed_config(config, CPU, torch.float32)["gradient_clipping"] == 0.3


def test_extra_changes_what_it_names_and_nothing_else():
    before = _settings(zero_stage=2)
    after = _settings(zero_stage=2, extra={"zero_optimization": {"round_robin_gradients": True}, "steps_per_print": 5})
    assert after["zero_optimization"] == {**before["zero_optimization"], "round_robin_gradients": True}
    assert after["steps_per_print"] == 5
    assert {key: after[key] for key in before if key != "zero_optimization"} == {
        key: value for key, value in before.items() if key != "zero_optimization"
    }


def test_buckets_are_no_larger_than_a_small_model_needs():
    buckets = _settings()["zero_optimization"]
    assert buckets["reduce_bucket_size"] < 10_000_000
    # DeepSpeed refuses an odd size.
    assert buckets["reduce_bucket_size"] % 2 == buckets["allgather_bucket_size"] % 2 == 0


def test_unknown_extra_names_the_nearest():
    with pytest.raises(ConfigError) as refused:
        _settings(extra={"zero_optimisation": {}, "nonsense_of_all_kinds": 1})
    assert len(refused.value.problems) == 2
    assert "did you mean engine.extra.zero_optimization?" in refused.value.problems[0]


def test_what_another_field_sets_is_refused_with_that_field():
    with pytest.raises(ConfigError, match=r"engine\.extra\.gradient_clipping: set optimizer\.clip_grad_norm instead"):
        _settings(extra={"gradient_clipping": 0.5})
    with pytest.raises(ConfigError, match=r"set engine\.zero_stage instead"):
        _settings(extra={"zero_optimization": {"stage": 1}})
