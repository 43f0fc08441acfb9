"""Arguments of `stepaudio bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from stepaudio_train.cli.parsing import Command, command, group, typed


def add_bench(commands: argparse._SubParsersAction) -> None:
    actions = group(
        commands,
        "bench",
        "measure attention, head, training step, loader and conversion beside what one would run instead",
        needs="nothing: sizes, tokens and weights are made up.",
        example="stepaudio bench step --json step.json",
    )
    for name, run, summary in (
        ("attention", _attention, "one layer's attention, beside SDPA, FlexAttention and Megatron-Core's own"),
        ("head", _head, "log-probabilities and gradients of the head, beside logits and cross entropy"),
        ("step", _step, "a whole training step, beside plain transformers loops"),
    ):
        _add_model_bench(actions, name, run, summary)

    loader = command(
        actions,
        "loader",
        _loader,
        "tokens a second and packing fill of the loader",
        needs="nothing, or token shards of `stepaudio tokenize`.",
        example="stepaudio bench loader --shards corpora/tokens/train --text-tokenizer runs/tokenizer/text.model",
    )
    add = loader.add_argument
    add("--shards", type=Path, metavar="DIR", help="folder written by `stepaudio tokenize` (default: made up)")
    add("--text-tokenizer", type=Path, metavar="FILE", help="needed with --shards")
    add("--sequence-length", type=int, metavar="N", help="tokens of a row (default 4096)")
    add("--rows", type=int, metavar="N", help="rows of a batch (default 8)")
    add("--batches", type=int, metavar="N", help="batches that are timed (default 40)")
    _add_json(loader)

    convert = command(
        actions,
        "convert",
        _convert,
        "conversion between all formats and back, beside the disk alone",
        needs="disk space for six times the weights.",
        example="stepaudio bench convert model=step1_3b --folder /data",
    )
    convert.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="model (default model=step1_60m)"
    )
    convert.add_argument("--folder", type=Path, metavar="DIR", help="where to write (default: temporary files)")
    _add_json(convert)


def _add_model_bench(actions: argparse._SubParsersAction, name: str, run: Command, summary: str) -> None:
    parser = command(
        actions,
        name,
        run,
        summary,
        needs="nothing; slice_130b and 3b are for a GPU.",
        example=f"stepaudio bench {name} --size small --json {name}.json",
    )
    add = parser.add_argument
    sizes = ("small", "slice_130b", "3b")
    add("--size", choices=sizes, help="small, two layers of the 130B, or the whole 3B (default small)")
    add("--rounds", type=int, metavar="N", help="each way is timed so often, in turns (default 6)")
    add("--precision", choices=("auto", "fp32", "bf16"), help="default: bf16 where the device multiplies it")
    add("--device", choices=("auto", "cpu", "cuda"), help="where to compute (default auto)")
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")


def _attention(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.bench.attention import bench_attention

    return _measured(bench_attention, options)


def _head(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.bench.head import bench_head

    return _measured(bench_head, options)


def _step(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.bench.step import bench_step

    return _measured(bench_step, options)


def _measured(bench: Callable[..., int], options: argparse.Namespace) -> int:
    from stepaudio_train.commands.bench.cases import BenchOptions

    return bench(typed(BenchOptions, options))


def _loader(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.bench.loader import LoaderOptions, bench_loader

    return bench_loader(typed(LoaderOptions, options))


def _convert(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.bench.convert import ConvertBenchOptions, bench_convert

    return bench_convert(typed(ConvertBenchOptions, options))
