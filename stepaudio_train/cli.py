"""The `stepaudio` command. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from stepaudio_train.config.errors import UserError

T = TypeVar("T")

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. 2: what was asked for cannot be done, and the message says what can."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positionals behind options; Hydra overrides may stand anywhere.
    if rest and not (hasattr(options, "overrides") and not any(word.startswith("-") for word in rest)):
        options.parser.error(f"unknown: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    command: Command = options.command
    try:
        return command(options)
    except (UserError, OSError) as error:
        print(f"stepaudio {options.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="stepaudio",
        description="Train unified speech-text language models: recordings in, a pretrained model out.",
        epilog="`stepaudio COMMAND --help` says what a command needs and gives an example.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_run,
        _add_prepare,
        _add_tokenize,
        _add_data,
        _add_generate,
        _add_evaluate,
        _add_convert,
        _add_export,
        _add_plan,
        _add_doctor,
    ):
        add(commands)
    return parser


def _add_run(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "run",
        _run,
        "run a recipe (a training stage), in one process or several",
        needs="a recipe's name, and whatever its configuration asks for (`experiment=debug` asks for nothing).",
        example="stepaudio run pretrain experiment=debug engine=megatron engine.tensor_parallel=2 --nproc 2",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a program in recipes/, such as pretrain or quickstart")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to configs/RECIPE.yaml")
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine (default 1; one per GPU); several machines: see launch/",
    )


def _add_prepare(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "prepare",
        _prepare,
        "recordings and transcripts to shards of 16 kHz FLAC",
        needs="a folder of audio (a transcript beside each, listed in it, or in the files' names), or a manifest.",
        example="stepaudio prepare recordings corpora/prepared --heldout-speaker theo",
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder of audio, or manifest (.jsonl, .tsv, .csv)")
    add("output", type=Path, metavar="OUTPUT", help="folder to write, one sub-folder a split")
    add("--test-percent", type=int, metavar="N", help="recordings kept for the test split (default 10)")
    add("--validation-percent", type=int, metavar="N", help="the same for validation (default 10)")
    add("--heldout-speaker", metavar="NAME", help="all of this speaker's recordings become a split of their own")
    add("--min-duration-s", type=float, metavar="S", help="shorter recordings are refused (default 0.1)")
    add("--max-duration-s", type=float, metavar="S", help="longer recordings are refused (default 60.0)")
    add("--join-max", type=int, metavar="N", help="training also joins 2 to N recordings of a speaker (default 1)")
    add("--speed-copies", type=_numbers, metavar="X,Y", help="training also gets copies at these speeds")
    add("--allow-untranscribed", action="store_true", help="keep recordings without a transcript")
    add("--num-workers", type=int, metavar="N", help="processes (default: by cores and amount of work)")


def _add_tokenize(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "tokenize",
        _tokenize,
        "recordings of any kind, or plain text, to shards of tokens",
        needs="recordings or text, and the tokenizers: trained by `stepaudio run tokenizer`, or released ones.",
        example="stepaudio tokenize corpora/prepared corpora/tokens --speech-tokenizer runs/tokenizer "
        "--text-tokenizer runs/tokenizer/text.model\n"
        "  stepaudio tokenize recordings tokens --speech-tokenizer Step-Audio-Tokenizer "
        "--text-tokenizer Step-Audio-TTS-3B/tokenizer.model --num-workers 8 --verify 1",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        metavar="SOURCE",
        help="prepared folder, folder of audio, manifest (.jsonl, .tsv, .csv), WebDataset .tar or a folder of them, "
        "Hugging Face dataset (saved folder, .parquet, hf:NAME:SPLIT); or .txt, .jsonl with {'text': ...}, or a folder "
        "of those",
    )
    add("output", type=Path, metavar="OUTPUT", help="folder to write")
    add("--text-tokenizer", type=Path, required=True, metavar="FILE", help="SentencePiece file")
    add("--speech-tokenizer", type=Path, metavar="DIR", help="speech tokenizer; needed for recordings")
    add("--batch-audio-s", type=float, metavar="S", help="seconds of audio encoded at once (default 120.0)")
    add("--max-text-tokens", type=int, metavar="N", help="longer texts are divided (default 4096)")
    add("--device", choices=("auto", "cpu", "cuda"), help="where the speech tokenizer runs (default auto)")
    add("--precision", choices=("fp32", "bf16"), help="of its matrix products (default fp32)")
    add("--num-workers", type=int, metavar="N", help="processes that encode (default 1)")
    add("--ray", metavar="ADDRESS", help="encode on a ray cluster (auto, or its address; local: start one here)")
    add(
        "--verify",
        type=float,
        dest="verify_percent",
        metavar="PERCENT",
        help="encode this share of the recordings again, one by one, and compare",
    )


def _add_data(commands: argparse._SubParsersAction) -> None:
    group = commands.add_parser("data", help="conversations: show, check, import and process them")
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    needs = "a JSONL file of conversations (docs/fine_tuning.md) and the model's text tokenizer."
    show = _command(
        actions,
        "show",
        _data_show,
        "conversations as the model sees them: ids, text, and in colour what teaches",
        needs=needs,
        example="stepaudio data show my.jsonl --text-tokenizer Step-Audio-TTS-3B/tokenizer.model --first 12 --count 1",
    )
    add = show.add_argument
    add("--speech-tokenizer", type=Path, metavar="DIR", help="encodes recordings; without it their length is shown")
    add("--first", type=int, metavar="LINE", help="line to begin with (default 1)")
    add("--count", type=int, metavar="N", help="conversations to show (default 3)")
    add("--ids", action="store_true", help="every id with its piece")
    check = _command(
        actions,
        "check",
        _data_check,
        "every line of a file: what would be refused, and why",
        needs=needs,
        example="stepaudio data check my.jsonl --text-tokenizer Step-Audio-TTS-3B/tokenizer.model",
    )
    check.add_argument("--sequence-length", type=int, metavar="N", help="longer ones are refused (default 4096)")
    imported = _command(
        actions,
        "import",
        _data_import,
        "conversations of other formats (ShareGPT, OpenAI, Kimi-Audio, Step-Audio-EditX, Kaldi, Hugging Face)",
        needs="a file or folder in one of the formats (docs/importing.md).",
        example="stepaudio data import their.jsonl my.jsonl --from sharegpt",
    )
    add = imported.add_argument
    formats = ("sharegpt", "openai", "kimi", "editx", "kaldi", "hf")
    add("source", type=Path, metavar="SOURCE", help="file, Kaldi data directory, dataset, .parquet or hf:NAME:SPLIT")
    add("output", type=Path, metavar="OUT", help="JSONL file to write")
    add("--from", dest="format", choices=formats, help="its format (default: guessed)")
    tasks = ("asr", "tts", "tqta", "aqta", "taqta", "aqaa", "edit", "tool", "role_play")
    add("--task", choices=tasks, help="what the conversations teach, where the format leaves it open")
    processed = _command(
        actions,
        "process",
        _data_process,
        "make conversations fit for a chat model: length, spoken style, recognition, history as text",
        needs="a JSONL file of conversations; for --spoken-style endpoint an OpenAI-compatible server.",
        example="stepaudio data process chat.jsonl spoken.jsonl --max-input-words 300 --spoken-style rules",
    )
    add = processed.add_argument
    add("source", type=Path, metavar="FILE", help="conversations")
    add("output", type=Path, metavar="OUT", help="JSONL file to write")
    add("--max-input-words", type=int, metavar="N", help="refuse longer questions; a Chinese character is a word")
    add("--max-input-s", type=float, metavar="S", help="refuse more seconds of recordings in the questions")
    add("--max-answer-words", type=int, metavar="N", help="refuse longer last answers")
    add("--spoken-style", choices=("rules", "endpoint"), help="rewrite answers as they would be spoken")
    add("--max-answer-sentences", type=int, metavar="N", help="keep the first sentences of a rewritten answer")
    add("--language", metavar="CODE", help="of the answers, such as en or zh (default: told by the characters)")
    add("--endpoint", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1")
    add("--endpoint-model", metavar="NAME", help="model to ask there")
    add("--endpoint-key-env", metavar="NAME", help="environment variable with its key (default OPENAI_API_KEY)")
    add("--endpoint-workers", type=int, metavar="N", help="requests at a time (default 8)")
    add("--asr-copies", type=float, metavar="SHARE", help="add recognition of this share of recordings (default 0.0)")
    add("--history", choices=("text", "audio"), help="earlier recordings as text, or as they are (default audio)")
    add("--seed", type=int, metavar="N", help="of the choice of copies (default 0)")
    for parser in (show, check):
        add = parser.add_argument
        add("file", type=Path, metavar="FILE", help="conversations")
        add("--text-tokenizer", type=Path, required=True, metavar="FILE", help="SentencePiece file")
        add("--template", choices=("tts", "chat"), help="how turns are opened (default tts)")
        add("--loss", choices=("last", "all"), help="which answers teach (default last)")
        add("--history", choices=("text", "audio"), help="earlier recordings of a dialogue (default text)")
        add("--own-tags", nargs="+", metavar="TAG", help="instruction tags besides the paper's")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    group = commands.add_parser("evaluate", help="a fine-tuned model: its answers, and whether it does as told")
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    answers = _command(
        actions,
        "answers",
        _evaluate_answers,
        "answer held-out conversations, and score what is written, beside exchanged recordings",
        needs="a finished run of `stepaudio run sft`, and conversations that it was not trained on.",
        example="stepaudio evaluate answers runs/sft held_out.jsonl --output runs/sft/answers",
    )
    add = answers.add_argument
    add("model", type=Path, metavar="RUN", help="run directory")
    add("file", type=Path, metavar="FILE", help="conversations with their answers")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--reference", type=Path, metavar="FILE", help="conversations of the training, for `evaluate control`")
    add("--max-new-tokens", type=int, metavar="N", help="at most this many tokens an answer (default 512)")
    add("--temperature", type=float, metavar="T", help="of spoken answers (default 0.7)")
    add("--top-k", type=int, metavar="K", help="draw among the K most likely (default 50)")
    add("--seed", type=int, metavar="N", help="of the drawing (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), help="where the model runs (default auto)")

    control = _command(
        actions,
        "control",
        _evaluate_control,
        "does generated speech do what its instruction tags ask: speed, mood, language, melody, rhythm",
        needs="spoken answers: those of `stepaudio evaluate answers`, or recordings with their tags (docs/control.md).",
        example="stepaudio evaluate control runs/sft/answers/answers.jsonl --output runs/sft/control "
        "--reference runs/sft/answers/reference.jsonl --truth runs/sft/answers/truth.jsonl",
    )
    add = control.add_argument
    add("answers", type=Path, metavar="FILE", help="JSONL of spoken answers")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--reference", type=Path, metavar="FILE", help="spoken answers of the training, with recordings and codes")
    add("--truth", type=Path, metavar="FILE", help="true recordings of what was asked for")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "generate",
        _generate,
        "ask a trained model: speech to text, text to speech tokens, continuations",
        needs="a finished pretraining run, and for recordings the speech tokenizer it was trained with.",
        example="stepaudio generate runs/pretrain --task asr --speech-tokenizer runs/tokenizer --audio hello.wav",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="RUN", help="run directory, or its export/ folder")
    add("--task", choices=("asr", "tts", "continuation", "text"), required=True, help="what to do with the prompts")
    add("--audio", type=Path, nargs="+", metavar="FILE", help="recordings (asr, continuation)")
    add("--text", nargs="+", metavar="TEXT", help="texts (tts, text)")
    add("--records", type=Path, metavar="FILE", help="JSONL of records, each one recording or one text")
    add("--speech-tokenizer", type=Path, metavar="DIR", help="needed for recordings")
    add("--output", type=Path, metavar="FILE", help="JSONL to write (default: the terminal)")
    add("--max-new-tokens", type=int, metavar="N", help="at most this many tokens a prompt (default 256)")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token (default 0.0)")
    add("--top-k", type=int, metavar="K", help="draw among the K most likely (default 0: all)")
    add("--top-p", type=float, metavar="P", help="draw among those that make up P (default 1.0)")
    add("--seed", type=int, metavar="N", help="of the drawing (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), help="where the model runs (default auto)")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "convert",
        _convert,
        "weights from any format to any other; what a directory lacks to be served",
        needs="a Hugging Face directory, a run directory, or a checkpoint of Megatron-Core or DeepSpeed.",
        example="stepaudio convert runs/sft exported --to hf --dtype bfloat16 --verify\n"
        "  stepaudio convert Step-Audio-TTS-3B step1_3b --to megatron --tensor-parallel 4 --pipeline-parallel 2\n"
        "  stepaudio convert --check exported",
    )
    add = parser.add_argument
    add("source", type=Path, nargs="?", metavar="SRC", help="folder with weights, of any format")
    add("destination", type=Path, nargs="?", metavar="DST", help="folder to write; must not be there yet")
    add("--to", choices=("hf", "megatron", "deepspeed", "plain"), help="format to write (plain: one safetensors file)")
    add("--tensor-parallel", type=int, metavar="N", help="megatron: ranks that share a matrix (default 1)")
    add("--pipeline-parallel", type=int, metavar="N", help="megatron: stages (default 1)")
    add("--virtual-pipeline", type=int, metavar="N", help="megatron: chunks a stage (default 1)")
    add("--zero-ranks", type=int, metavar="N", help="deepspeed: ZeRO-3 over N ranks (default: a universal checkpoint)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the weights written (default: as they are)")
    add("--vocab-size", type=int, metavar="N", help="grow the vocabulary to N rows, or cut off padding behind them")
    add("--merge", type=Path, metavar="DIR", help="add these LoRA adapters to the weights")
    add("--average", type=Path, nargs="+", metavar="DIR", help="write the mean of the weights of SRC and of these")
    add("--config", type=Path, metavar="DIR", help="folder with a config.json, for checkpoints that come without")
    add("--verify", action="store_true", help="compare every tensor bit for bit afterwards, and a forward pass")
    add("--check", type=Path, metavar="DIR", help="say what a Hugging Face directory lacks, and convert nothing")


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "the speech tokenizer as the directory that StepFun's code takes",
        needs="a speech tokenizer: a run_dir of `stepaudio run tokenizer`, or a copy of Step-Audio-Tokenizer.",
        example="stepaudio export tokenizer runs/tokenizer exported",
    )
    add = parser.add_argument
    add("what", choices=("tokenizer",), help="what to export")
    add("source", type=Path, metavar="SRC", help="directory with a speech tokenizer")
    add("destination", type=Path, metavar="DST", help="directory to write; must not be there yet")
    add("--released", type=Path, metavar="DIR", help="released directory, whose decoder and token list are taken over")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "plan",
        _plan,
        "memory of a run on each rank, before it is started",
        needs="nothing but a configuration: no GPU, no data, no weights.",
        example="stepaudio plan model=step1_130b vocabulary=released engine=megatron engine.tensor_parallel=8 "
        "engine.pipeline_parallel=8 --world-size 512 --memory-gib 80\n"
        "  stepaudio plan --recipe sft experiment=sft_3b_lora --world-size 1 --memory-gib 80",
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to configs/RECIPE.yaml")
    parser.add_argument("--recipe", choices=("pretrain", "sft"), help="whose configuration (default pretrain)")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks in all (default: one model replica)")
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of a device; says whether it fits")
    parser.add_argument("--write-config", type=Path, metavar="FILE", help="write the resolved configuration as YAML")
    parser.add_argument("--parameters-json", type=Path, metavar="FILE", help="write every weight's name and shape")


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands,
        "doctor",
        _doctor,
        "check this machine and this installation",
        needs="nothing.",
        example="stepaudio doctor --run-dir /data/runs",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs will be written (default runs)")


def _command(
    commands: argparse._SubParsersAction, name: str, command: Command, summary: str, needs: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"needs: {needs}\nexample:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Defaults are the options' dataclass's; what is not typed is not there.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(command=command, name=name, parser=parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.run import run_recipe_command

    return run_recipe_command(options.recipe, options.overrides, options.nproc)


def _prepare(options: argparse.Namespace) -> int:
    from stepaudio_train.data.prepare import PrepareOptions, prepare

    print(prepare(_typed(PrepareOptions, options)).summary(), end="")
    return 0


def _tokenize(options: argparse.Namespace) -> int:
    from stepaudio_train.data.tokenize import TokenizeOptions, tokenize, verify

    typed = _typed(TokenizeOptions, options)
    for split, stats in tokenize(typed).items():
        hours, left_out = stats.duration_s / 3600, len(stats.refused)
        print(f"{split or options.output}: {stats.num_samples} samples, {hours:.2f} h of audio, {left_out} left out")
    agrees = True
    if typed.verify_percent:
        for split, found in verify(typed).items():
            print(
                f"{split or options.output}: {found.num_recordings} recordings encoded again, {found.num_different} of "
                f"{found.num_tokens} tokens differ"
            )
            # One token in a thousand may be a close choice that rounding decides; with bf16, more.
            agrees = agrees and (typed.precision != "fp32" or found.num_different <= found.num_tokens / 1000)
    return 0 if agrees else 1


def _data_show(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.data import DataOptions, show

    return show(_typed(DataOptions, options))


def _data_check(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.data import DataOptions, check

    return check(_typed(DataOptions, options))


def _data_import(options: argparse.Namespace) -> int:
    from stepaudio_train.data.importers.run import ImportOptions, import_conversations

    print(import_conversations(_typed(ImportOptions, options)).summary(), end="")
    return 0


def _data_process(options: argparse.Namespace) -> int:
    from stepaudio_train.data.chat_processing import ProcessOptions, process

    print(process(_typed(ProcessOptions, options)).summary(), end="")
    return 0


def _evaluate_answers(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.evaluate import AnswersOptions, evaluate_answers, summary

    print(summary(evaluate_answers(_typed(AnswersOptions, options))), end="")
    return 0


def _evaluate_control(options: argparse.Namespace) -> int:
    from stepaudio_train.evaluation.control import ControlOptions, measure_control

    print(measure_control(_typed(ControlOptions, options)).summary(), end="")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.generate import GenerateOptions, run_generation

    return run_generation(_typed(GenerateOptions, options))


def _convert(options: argparse.Namespace) -> int:
    # Before torch is imported: with huge pages, filling the memory of a large tensor is seven times as fast.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from stepaudio_train.commands.convert import ConvertOptions, run_conversion

    return run_conversion(_typed(ConvertOptions, options))


def _export(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.export import ExportOptions, export_tokenizer

    return export_tokenizer(_typed(ExportOptions, options))


def _plan(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.plan import PlanOptions, show_plan

    return show_plan(_typed(PlanOptions, options))


def _typed(options_type: type[T], options: argparse.Namespace) -> T:
    """The dataclass of a command's options out of what was typed."""
    names = {field.name for field in fields(options_type)}  # type: ignore[arg-type]
    typed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name in names
    }
    return options_type(**typed)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _doctor(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.doctor import examine

    return examine(options.run_dir)


if __name__ == "__main__":
    sys.exit(main())
