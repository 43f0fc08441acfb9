"""The helper that runs functions in several processes."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from stepaudio_train.testing.distributed import RankFailed, run_distributed

PRELOAD = ["stepaudio_train.engines.megatron.engine"]


def test_results_come_in_rank_order():
    results = run_distributed(_add_ranks, 3, 10, preload=PRELOAD)
    assert [total for total, _ in results] == [33, 33, 33]
    assert [rank.tolist() for _, rank in results] == [[0], [1], [2]]


def test_failing_ranks_traceback_is_told_and_the_others_are_ended():
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed:.*in _fail_on_one.*ValueError: told by rank 1"):
        run_distributed(_fail_on_one, 2, preload=PRELOAD)
    assert time.monotonic() - started < 60


def test_death_and_silence_are_told():
    with pytest.raises(RankFailed, match="rank 1 died without a traceback"):
        run_distributed(_die_on_one, 2, preload=PRELOAD)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] did not finish"):
        run_distributed(_die_on_one, 1, timeout_s=0.5, preload=PRELOAD)


def _add_ranks(offset: int) -> tuple[int, torch.Tensor]:
    dist.init_process_group("gloo")
    total = torch.tensor(offset + dist.get_rank())
    dist.all_reduce(total)
    rank = torch.tensor([dist.get_rank()])
    dist.destroy_process_group()
    return int(total), rank


def _fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("told by rank 1")
    time.sleep(120)


def _die_on_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)
    time.sleep(120)
