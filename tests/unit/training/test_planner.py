"""The planner of clusters: its pieces by hand, its constants, published step times, and layouts that can be typed."""

import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import pytest

from stepaudio_train.cli import build_parser, main
from stepaudio_train.cli.parsing import typed
from stepaudio_train.commands.plan import PlanOptions
from stepaudio_train.config.checks import layout_problems
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.gpus import GPUS, GpuName
from stepaudio_train.config.schema import PretrainConfig, Step1Config
from stepaudio_train.training.plan import plan_run
from stepaudio_train.training.plan_remedies import overrides_between
from stepaudio_train.training.planner.calibration import FITTED, Check, check_figures, fit
from stepaudio_train.training.planner.cost import (
    Constants,
    Layout,
    ModelSizes,
    attention_flops_per_s,
    collective_s,
    step_time,
    wave_fill,
)
from stepaudio_train.training.planner.figures import FIGURES
from stepaudio_train.training.planner.search import (
    Cluster,
    checkpoint_s,
    engine_layout,
    model_sizes,
    search,
    slower_by,
    training_days,
)
from stepaudio_train.training.throughput import matmul_parameters, training_flops

ROOT = Path(__file__).resolve().parents[3]
H100, H800 = GPUS["h100"], GPUS["h800"]
STEP1_130B = ModelSizes(12288, 31232, 88, 96, 8, 74752)
# Round numbers to count with.
CONSTANTS = Constants(matmul=0.5, memory=0.5, tensor_exposed=0.25)
LARGE = ("experiment=pretrain_130b_stage1",)


def large(*overrides: str) -> PretrainConfig:
    return load_config("pretrain", PretrainConfig, (*LARGE, *overrides))


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    return check_figures()


def test_weights_and_flops_of_the_130b():
    # Queries and output 12,288 squared, keys and values of 8 heads of 128, three matrices of 31,232.
    assert STEP1_130B.layer_weights == 2 * 12288**2 + 2 * 12288 * 1024 + 3 * 12288 * 31232 == 1_478_492_160
    config = Step1Config(12288, 31232, 88, 96, 8, 74752)
    assert model_sizes(config) == STEP1_130B
    assert STEP1_130B.step_flops(1, 0) == 6 * matmul_parameters(config)
    # As the training loop counts: 3 rows of 8,192 with documents of 1,024.
    tokens = 3 * 8192
    assert STEP1_130B.step_flops(tokens, 1024) == training_flops(config, tokens, tokens * 1024)


def test_collectives_move_all_but_the_own_part():
    # 800 MB over 8 ranks at 1 GB/s: 7 of 8 parts arrive at each.
    assert collective_s(800e6, 8, 1e9) == pytest.approx(0.7)
    assert collective_s(800e6, 1, 1e9) == 0


def test_tensor_parallel_communication_by_hand():
    layout = Layout(4096, tp=8, micro_batches=3, overlaps_tp=False)
    # Ten collectives a layer and micro-batch of 4,096 x 12,288 numbers of two bytes, at 369 GB/s.
    seconds = 3 * 88 * 10 * 4096 * 12288 * 2 * 7 / 8 / 369e9
    assert step_time(STEP1_130B, layout, H100, CONSTANTS).tensor_comm_s == pytest.approx(seconds)
    overlapped = step_time(STEP1_130B, replace(layout, overlaps_tp=True), H100, CONSTANTS)
    assert overlapped.tensor_comm_s == pytest.approx(seconds / 4)
    # An H800's links have 400 of 900 GB/s.
    slow = step_time(STEP1_130B, layout, H800, CONSTANTS)
    assert slow.tensor_comm_s == pytest.approx(seconds * 9 / 4)
    assert slow.matmul_s == step_time(STEP1_130B, layout, H100, CONSTANTS).matmul_s


def test_tiles_come_in_whole_waves():
    # 11 x 12 tiles of 128 x 256 are the 132 multiprocessors; one more row of 12 takes a second wave.
    assert wave_fill(11 * 128, 12 * 256, H100) == 1
    assert wave_fill(12 * 128, 12 * 256, H100) == pytest.approx(144 / 264)


def test_matmuls_by_hand():
    # All sides whole waves: 132 x 128 tokens; 132 x 256 is hidden, inner, and the width of keys and values.
    wide = ModelSizes(hidden=33792, inner=33792, layers=2, heads=264, groups=264, vocab=256, gated=False)
    found = step_time(wide, Layout(132 * 128, micro_batches=5), H100, CONSTANTS)
    assert found.matmul_s == pytest.approx(5 * 2 * 6 * 132 * 128 * wide.layer_weights / (0.5 * 989e12))


@pytest.mark.parametrize(
    ("length", "forward", "backward"),
    [(2048, 484, 370), (4096, 591, 474), (8192, 644, 541), (16384, 673, 579), (32768, 688, 581)],
)
def test_attention_rates_are_the_measured_ones(length: int, forward: float, backward: float):
    found = attention_flops_per_s(length, 128, GPUS["h200"])
    assert found == (pytest.approx(forward * 1e12, rel=0.04), pytest.approx(backward * 1e12, rel=0.04))


@pytest.mark.parametrize(("pp", "vp", "micro_batches"), [(8, 1, 16), (8, 11, 64), (2, 4, 2)])
def test_bubble_fraction(pp: int, vp: int, micro_batches: int):
    # Hardly any head: all stages are alike.
    model = replace(STEP1_130B, vocab=8)
    found = step_time(model, Layout(4096, tp=8, pp=pp, vp=vp, micro_batches=micro_batches), H100, CONSTANTS)
    computed = found.matmul_s + found.attention_s + found.elementwise_s + found.head_s + found.tensor_comm_s
    assert found.bubble_s / computed == pytest.approx((pp - 1) / (micro_batches * vp), rel=0.01)


def test_the_last_stage_has_the_head_or_a_layer_less():
    layout = Layout(4096, tp=8, pp=8, micro_batches=8)
    found = step_time(STEP1_130B, layout, H100, CONSTANTS)
    alone = step_time(replace(STEP1_130B, layers=11), replace(layout, pp=1), H100, CONSTANTS)
    assert (found.matmul_s, found.head_s) == (pytest.approx(alone.matmul_s), pytest.approx(alone.head_s))
    # 86 + 2 places over 8 stages: eleven layers on the inner ones, ten and the head, which is less, on the last.
    even = step_time(replace(STEP1_130B, layers=86), replace(layout, ends_count_as_layers=True), H100, CONSTANTS)
    assert (even.matmul_s, even.head_s) == (pytest.approx(alone.matmul_s), 0)


def test_gradients_hide_behind_the_backward_as_far_as_it_lasts():
    layout = Layout(8192, tp=8, pp=8, dp=16, micro_rows=2, micro_batches=16, gradient_bytes=4)
    weights = (11 * STEP1_130B.layer_weights + 12288 * 74752) / 8
    reduce, gather = (size * weights * 15 / 16 / 45e9 for size in (4, 2))
    found = step_time(STEP1_130B, layout, H100, FITTED)
    # 0.18 s to reduce, 0.25 s of backward: the share of one of eleven layers is left.
    assert found.data_comm_s == pytest.approx((reduce + gather) / 11)
    short = step_time(STEP1_130B, replace(layout, sequence_length=64), H100, FITTED)
    assert (reduce + gather) * 0.7 < short.data_comm_s < reduce + gather


def test_what_helps_helps():
    layout = Layout(8192, tp=8, pp=8, vp=11, dp=4, micro_batches=64)

    def total_s(changed: Layout, gpu=H800) -> float:
        return step_time(STEP1_130B, changed, gpu, FITTED).total_s

    base = total_s(layout)
    assert total_s(replace(layout, vp=1)) > base
    assert total_s(layout, H100) < base and total_s(layout, GPUS["h200"]) < total_s(layout, H100)
    assert total_s(layout, GPUS["a100"]) > base
    assert total_s(replace(layout, document_tokens=800)) < base
    assert total_s(replace(layout, attention_share=0.5)) > base
    assert total_s(replace(layout, overlaps_tp=False)) > base < total_s(replace(layout, overlaps_pp=False))
    long = replace(layout, sequence_length=65536, micro_batches=8)
    assert total_s(replace(long, cp=2)) < total_s(replace(long, cp=2, overlaps_cp=False)) < total_s(long)
    recomputed = [total_s(replace(layout, recompute=kind)) for kind in ("none", "selective", "full")]
    assert recomputed == sorted(set(recomputed))
    # Half the micro-batches of twice the replicas: less than half the time is saved.
    assert base / 2 < total_s(replace(layout, dp=8, micro_batches=32)) < base


def test_layouts_of_the_figures_have_their_gpus_and_their_tokens():
    for figure in FIGURES:
        layout, layers = figure.layout, figure.sizes.layers
        assert layout.gpus == figure.gpus
        places = layers + (2 if layout.ends_count_as_layers else 0)
        assert places % (layout.pp * layout.vp) == 0
    # Tokens a second that the same files print.
    printed = {
        ("GPT3-175B", 128, 8.309): 63099,
        ("Nemotron-15B", 64, 2.845): 368568,
        ("Nemotron-15B", 16, 2.66): 98550,
        ("Nemotron-340B", 2048, 4.84): 433296,
        ("Nemotron-340B", 1024, 4.41): 237772,
        ("Llama-3.1-8B", 128, 12.33): 1360683,
        ("Llama-3.1-70B", 64, 14.61): 71756,
        ("Llama-3.1-405B", 576, 17.50): 117964,
        ("Llama-3.1-405B", 2048, 19.87): 422175,
        ("Llama-3.1-405B", 64, 10.1): 51910,
        ("Llama-3.1-405B", 96, 8.87): 116342,
    }
    rates = {(f.model, f.gpus, f.step_s): f.layout.step_tokens / f.step_s for f in FIGURES}
    for key, tokens_per_s in printed.items():
        assert rates[key] == pytest.approx(tokens_per_s, rel=2e-3), key


def test_constants_are_the_fit_of_the_figures():
    assert asdict(fit(FIGURES)) == pytest.approx(asdict(FITTED), rel=1e-3)


def test_fit_finds_constants_that_made_the_figures():
    true = Constants(matmul=0.61, memory=0.72, tensor_exposed=0.35)
    made = [replace(f, step_s=step_time(f.sizes, f.layout, H100, true).total_s) for f in FIGURES]
    assert asdict(fit(made)) == pytest.approx(asdict(true), rel=1e-4)


def test_models_held_out_are_predicted(checks: list[Check]):
    errors = [abs(check.held_out_error) for check in checks]
    assert len(errors) == len(FIGURES) == 64
    assert sum(errors) / len(errors) < 0.04 and max(errors) < 0.08
    # What is held out has no part in its prediction.
    falsified = [replace(f, step_s=3 * f.step_s) if f.model == "GPT3-175B" else f for f in FIGURES]
    for before, after in zip(checks, check_figures(falsified), strict=True):
        assert (before.held_out_s == after.held_out_s) == (before.figure.model == "GPT3-175B")


def test_the_table_in_the_documentation_is_what_is_checked(checks: list[Check]):
    layouts = defaultdict(list)
    for check in checks:
        layouts[check.figure.model, check.figure.sizes.layers, check.figure.source].append(check)
    expected = []
    for (model, layers, _), rows in layouts.items():
        layout, first, last = rows[0].figure.layout, rows[0], rows[-1]
        worst = max((check.held_out_error for check in rows), key=abs)
        expected.append(
            [model, str(layers), f"{layout.tp}/{layout.cp}/{layout.pp}/{layout.vp}"]
            + [" to ".join(dict.fromkeys(f(check) for check in (first, last))) for f in _RANGES]
            + [f"{100 * worst:+.1f}"]
        )
    lines = (ROOT / "docs/planner.md").read_text(encoding="utf-8").splitlines()
    told = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines if re.match(r"\| (GPT3|Nemotron|Llama)-", line)]
    assert told == expected, "\n".join(f"| {' | '.join(row)} |" for row in expected)


_RANGES = (
    lambda check: str(check.figure.gpus),
    lambda check: f"{check.figure.step_s:.2f}",
    lambda check: f"{check.held_out_s:.2f}",
)


def test_layouts_found_can_be_typed_and_fit():
    config, started = large(), time.process_time()
    found = search(config, Cluster(H800, 512, H800.memory_gib))
    # On 512 GPUs in seconds; others may be using the machine.
    assert time.process_time() - started < 20
    steps = [candidate.time.total_s for candidate in found.best]
    assert len(steps) > 3 and steps == sorted(steps)
    for candidate in found.best:
        changed = large(*overrides_between(config, candidate.config))
        assert changed == replace(candidate.config, data=changed.data)
        assert layout_problems(changed, 512) == []
        assert engine_layout(changed, 512) == candidate.layout and candidate.layout.gpus == 512
        assert candidate.layout.step_tokens == 1024 * 8192
        assert plan_run(changed, 512).peak == candidate.peak_bytes <= H800.memory_gib * 2**30
    for candidate in found.too_large:
        assert candidate.time.total_s < steps[0] and candidate.peak_bytes > H800.memory_gib * 2**30
    best, second = found.best[:2]
    assert sum(slower_by(second, best).values()) == pytest.approx(steps[1] - steps[0])
    # More memory is never worse.
    assert search(config, Cluster(H800, 512, 141)).best[0].time.total_s <= steps[0]
    # MFU by hand: 8.39e11 FLOPs a token at 8,192.
    flops = 8.39e11 * 1024 * 8192 / 512 / best.time.total_s
    assert best.flops_utilisation(H800) == pytest.approx(flops / 989e12, rel=2e-3)
    assert best.as_published(H800).total_s < steps[0]


def test_days_and_checkpoints_by_hand():
    config = large("training.async_checkpoint=false", "training.checkpoint_every=100")
    # 14 bytes of 131.9e9 weights at 100 GB/s.
    assert checkpoint_s(config, 100e9) == pytest.approx(18.5, abs=0.05)
    best = search(config, Cluster(GPUS["h200"], 64, 139.8)).best[0]
    steps = 3.3e12 / (1024 * 8192)
    days = steps * best.time.total_s / 86400
    assert training_days(best, 3.3e12, 0) == pytest.approx(days)
    assert training_days(best, 3.3e12, 60) == pytest.approx(days + steps / 100 * 60 / 86400)
    behind = replace(best, config=large("training.async_checkpoint=true", "training.checkpoint_every=100"))
    assert training_days(behind, 3.3e12, 60) == pytest.approx(days)


def test_command_prints_the_best_layouts_and_what_to_type(tmp_path, capsys):
    results = tmp_path / "layouts.json"
    arguments = [
        "plan",
        "experiment=pretrain_3b_stage1",
        "--gpus",
        "16",
        "--gpu",
        "h100",
        "--checkpoint-gb-per-s",
        "10",
    ]
    assert main([*arguments, "--tokens", "1e12", "--document-tokens", "800", "--json", str(results)]) == 0
    out = capsys.readouterr().out
    assert "MFU" in out and "A checkpoint takes 5 s" in out and "1e+12 tokens" in out
    written = json.loads(results.read_text())
    best = written["best"][0]
    assert "For the first, type: " + " ".join(best["overrides"]) in out
    assert sum(best["parts"].values()) == pytest.approx(best["step_s"])
    assert best["peak_bytes"] < 79.1 * 2**30 and written["cluster"]["gpus"] == 16
    # Nothing fits into so little.
    assert main([*arguments, "--memory-gib", "3"]) == 1
    assert "None fits" in capsys.readouterr().out


def test_impossible_questions_are_refused_with_every_reason(capsys):
    wrong = ["--gpus", "0", "--tokens", "0", "--document-tokens", "9000", "--memory-gib", "0"]
    assert main(["plan", *LARGE, *wrong, "--checkpoint-gb-per-s", "-1"]) == 2
    errors = capsys.readouterr().err
    for named in ("--gpus 0", "--tokens 0", "--document-tokens 9000", "--memory-gib 0", "--checkpoint-gb-per-s -1"):
        assert named in errors
    assert main(["plan", *LARGE, "--gpus", "1000"]) == 2
    assert "type training.global_batch_rows=1125" in capsys.readouterr().err
    assert main(["plan", *LARGE, "--gpus", "512", "--world-size", "512"]) == 2
    assert "type one of them" in capsys.readouterr().err


def test_options_of_the_command_are_the_dataclass():
    options = build_parser().parse_args(["plan", "--gpus", "8", "--gpu", "a100", "--tokens", "1e9"])
    typed_options = typed(PlanOptions, options)
    assert (typed_options.gpus, typed_options.gpu, typed_options.tokens) == (8, "a100", 1e9)
    commands = next(action for action in build_parser()._actions if isinstance(action.choices, dict)).choices
    known = {field.name: field.default for field in fields(PlanOptions)}
    told = {action.dest: action for action in commands["plan"]._actions if action.dest != "help"}
    assert told.keys() == known.keys()
    assert tuple(told["gpu"].choices) == get_args(GpuName) == tuple(GPUS) and "(default h800)" in told["gpu"].help
    assert known["gpu"] == "h800"


def test_figures_are_checked_without_torch(tmp_path):
    results = tmp_path / "figures.json"
    program = (
        "import sys; from stepaudio_train.cli import main;"
        f"code = main(['plan', '--check-figures', '--json', {str(results)!r}]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert "held out by model: mean error" in finished.stdout
    assert len(json.loads(results.read_text())["figures"]) == len(FIGURES)


def test_the_130b_of_the_documentation_is_what_is_predicted():
    config = large("training.global_batch_rows=2048")
    lines = (ROOT / "docs/planner.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines if re.match(r"\| \d+ h\d00 \|", line)]
    assert len(rows) == 4
    for row in rows:
        gpus, name = row[0].split()
        gpu = GPUS[name]
        best = search(config, Cluster(gpu, int(gpus), gpu.memory_gib)).best[0]
        layout, mfu = best.layout, best.flops_utilisation(gpu)
        published = mfu * best.time.total_s / best.as_published(gpu).total_s
        assert row[1:] == [
            *(f"{layout.tp}/{layout.cp}/{layout.pp}/{layout.vp}", str(layout.micro_rows), layout.recompute),
            *(f"{best.peak_bytes / 2**30:.1f}", f"{best.time.total_s:.2f}", f"{100 * mfu:.1f}"),
            *(f"{training_days(best, 3.3e12, 0):.1f}", f"{100 * published:.1f}"),
        ]
