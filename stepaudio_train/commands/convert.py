"""`stepaudio convert`: weights from any format to any other, or what a directory lacks to be servable."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.adapters import MergedAdapters
from stepaudio_train.convert.changes import AveragedWeights, CastWeights, ResizedVocabulary
from stepaudio_train.convert.check import check_directory
from stepaudio_train.convert.companions import ModelCard, write_companions
from stepaudio_train.convert.conversion import Destination, convert
from stepaudio_train.convert.megatron_files import Layout
from stepaudio_train.convert.sources import Format, Source, WeightReader, open_source
from stepaudio_train.convert.text_files import CHAT_TEMPLATES
from stepaudio_train.convert.verify import verify

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class ConvertOptions:
    """What `stepaudio convert` is asked."""

    source: Path | None = None
    destination: Path | None = None
    to: Format | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1
    zero_ranks: int | None = None
    """Ranks of a ZeRO-3 checkpoint; None: a universal one, which loads at any number of ranks and any stage."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """None: as the source is; of a DeepSpeed checkpoint, as the config.json beside it says."""
    vocab_size: int | None = None
    """Rows of the embedding and head that come out. None: as many as go in."""
    merge: Path | None = None
    """Folder of LoRA adapters to add to the weights."""
    average: tuple[Path, ...] = ()
    """Models of the same sizes, in any format: what is converted is the mean of the source and these."""
    config: Path | None = None
    """Folder with a config.json, for checkpoints that come without."""
    verify: bool = False
    check: Path | None = None


def run_conversion(options: ConvertOptions) -> int:
    """Convert, or check a directory. Exit status 1: the directory lacks something that it needs.

    Raises:
        UserError: it cannot be done; the message says why and what can.
    """
    if options.check is not None:
        return _check(options.check)
    if options.source is None or options.destination is None or options.to is None:
        raise ConfigError(["type SRC DST --to hf, megatron, deepspeed or plain; or --check DIR"])
    source, *others = (
        open_source(path, options.config, prefer_masters=options.dtype == "float32")
        for path in (options.source, *options.average)
    )
    reader, model = _changed(source, others, options)
    destination = Destination(
        options.destination,
        options.to,
        Layout(options.tensor_parallel, options.pipeline_parallel, options.virtual_pipeline),
        options.zero_ranks,
    )
    problems = destination.layout.problems(model) if options.to == "megatron" else []
    if problems:
        raise ConfigError(problems)
    changes = (options.vocab_size, options.merge, options.config)
    origin = " ".join(f"{s.path.resolve()} {_fingerprint(s.path)}" for s in (source, *others)) + f" {changes}"
    beside = _companions(source, model, reader.dtype)
    done = convert(reader, model, destination, beside, origin, progress=sys.stderr.isatty())
    rate = done.num_bytes / max(done.seconds, 1e-9) / 1e9
    print(
        f"{options.destination}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.3f} GB in {done.seconds:.1f} s "
        f"({rate:.2f} GB/s), {source.format} to {options.to}"
    )
    if options.verify:
        written = open_source(options.destination, options.config)
        verified = verify(reader, written.reader, model, progress=sys.stderr.isatty())
        print(
            f"verified: {verified.num_tensors} tensors equal bit for bit; logits differ by at most "
            f"{verified.logits_difference:g}"
        )
    return 0


def _changed(source: Source, others: list[Source], options: ConvertOptions) -> tuple[WeightReader, Step1Config]:
    """The source's weights with everything done to them that was asked for; `others` go into their mean."""
    reader, model = source.reader, source.model
    if reader.dtype == torch.float16 and options.dtype is None:
        raise UserError(
            f"{source.path}: holds fp16 weights, and Step-1 is released and trained in bf16, which they do not fit "
            "into unrounded; type --dtype bfloat16 or --dtype float32"
        )
    dtype = _DTYPES[options.dtype] if options.dtype else _natural_dtype(source)
    if others:
        reader = AveragedWeights([source, *others])
    if options.merge is not None:
        reader = MergedAdapters(reader, options.merge)
    if options.vocab_size is not None and options.vocab_size != model.vocab_size:
        _require_room_for_tokenizer(source, options.vocab_size)
        resized = ResizedVocabulary(reader, model, options.vocab_size, seed=0)
        reader, model = resized, resized.model
    return (reader if reader.dtype == dtype else CastWeights(reader, dtype)), model


def _natural_dtype(source: Source) -> torch.dtype:
    # DeepSpeed keeps fp32 copies of weights that were, and will be, bf16.
    if source.format == "deepspeed" and source.companions is not None:
        fields = json.loads((source.companions / "config.json").read_text(encoding="utf-8"))
        return _DTYPES.get(fields.get("torch_dtype"), source.reader.dtype)
    return source.reader.dtype


def _require_room_for_tokenizer(source: Source, vocab_size: int) -> None:
    if source.text_tokenizer is None:
        return
    from stepaudio_train.tokenizers.text import TextTokenizer

    pieces = TextTokenizer.from_file(source.text_tokenizer).size
    if vocab_size < pieces:
        raise UserError(f"--vocab-size {vocab_size}: the text tokenizer has {pieces} ids; type --vocab-size {pieces}")


def _companions(source: Source, model: Step1Config, dtype: torch.dtype) -> Callable[[Path], None]:
    """Writes what lies beside the weights, as it is beside the source's."""
    template, add_bos = _conversation(source.companions)
    name = str(dtype).removeprefix("torch.")
    title = source.path.resolve().name

    def write(folder: Path) -> None:
        card = ModelCard(title)
        write_companions(folder, model, name, source.text_tokenizer, chat_template=template, add_bos=add_bos, card=card)

    return write


def _conversation(companions: Path | None) -> tuple[str, bool]:
    """The source's own chat template, and whether its tokenizer puts <s> before a text."""
    path = companions / "tokenizer_config.json" if companions is not None else None
    if path is None or not path.is_file():
        return CHAT_TEMPLATES["chat"], True
    fields = json.loads(path.read_text(encoding="utf-8"))
    # Step-Audio-TTS-3B has no template. LlamaTokenizer, its class, adds <s> unless told otherwise.
    template = fields.get("chat_template") or CHAT_TEMPLATES["tts"]
    return template, bool(fields.get("add_bos_token", True))


def _fingerprint(folder: Path) -> str:
    """Changes when a file of the source does."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _check(directory: Path) -> int:
    findings = check_directory(directory)
    for finding in findings:
        print(f"{finding.severity}: {finding.file}: {finding.message}")
    errors = sum(finding.severity == "error" for finding in findings)
    if not findings:
        print(f"{directory}: complete")
    return 1 if errors else 0
