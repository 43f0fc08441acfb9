"""Arguments of the commands that make data: prepare, tokenize, data."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepaudio_train.cli.parsing import command, group, typed


def add_prepare(commands: argparse._SubParsersAction) -> None:
    parser = command(
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


def add_tokenize(commands: argparse._SubParsersAction) -> None:
    parser = command(
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


def add_data(commands: argparse._SubParsersAction) -> None:
    actions = group(
        commands,
        "data",
        "conversations: show, check, import and process them; answers: judge, rate and mine them",
        needs="conversations in a file, of this project's format or another one; prompts with several answers.",
        example="stepaudio data check my.jsonl --text-tokenizer Step-Audio-TTS-3B/tokenizer.model",
    )
    needs = "a JSONL file of conversations (docs/fine_tuning.md) and the model's text tokenizer."
    show = command(
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
    check = command(
        actions,
        "check",
        _data_check,
        "every line of a file: what would be refused, and why",
        needs=needs,
        example="stepaudio data check my.jsonl --text-tokenizer Step-Audio-TTS-3B/tokenizer.model",
    )
    check.add_argument("--sequence-length", type=int, metavar="N", help="longer ones are refused (default 4096)")
    imported = command(
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
    processed = command(
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
    _add_preferences(actions)
    for parser in (show, check):
        add = parser.add_argument
        add("file", type=Path, metavar="FILE", help="conversations")
        add("--text-tokenizer", type=Path, required=True, metavar="FILE", help="SentencePiece file")
        add("--template", choices=("tts", "tts_bos", "chat"), help="how turns are opened (default tts)")
        add("--loss", choices=("last", "all"), help="which answers teach (default last)")
        add("--history", choices=("text", "audio"), help="earlier recordings of a dialogue (default text)")
        add("--own-tags", nargs="+", metavar="TAG", help="instruction tags besides the paper's")


def _add_preferences(actions: argparse._SubParsersAction) -> None:
    judged = command(
        actions,
        "judge",
        _data_judge,
        "answers to prompts rated by rules, or by a model behind an endpoint",
        needs="a JSONL file of prompts with answers (docs/preferences.md); for endpoint:URL a server.",
        example="stepaudio data judge answers.jsonl preferences.jsonl --judge endpoint:http://localhost:8000/v1 "
        "--endpoint-model NAME",
    )
    add = judged.add_argument
    add("source", type=Path, metavar="FILE", help="prompts with answers")
    add("output", type=Path, metavar="OUT", help="JSONL file to write")
    add(
        "--judge",
        required=True,
        metavar="JUDGE",
        help="rules, or endpoint:URL such as endpoint:http://localhost:8000/v1",
    )
    add("--min-words", type=int, metavar="N", help="rules: of an answer; a Chinese character is a word (default 0)")
    add("--max-words", type=int, metavar="N", help="rules: of an answer")
    add("--language", choices=("en", "zh"), help="rules: of an answer")
    add("--reference-weight", type=float, metavar="X", help="rules: of being right word for word (default 1.0)")
    add("--length-weight", type=float, metavar="X", help="rules: of the length (default 1.0)")
    add("--language-weight", type=float, metavar="X", help="rules: of the language (default 1.0)")
    add("--compare", action="store_true", help="endpoint: compare each two answers, in both orders")
    add("--endpoint-model", metavar="NAME", help="model to ask there")
    add("--endpoint-key-env", metavar="NAME", help="environment variable with its key (default OPENAI_API_KEY)")
    add("--endpoint-workers", type=int, metavar="N", help="requests at a time (default 8)")
    rated = command(
        actions,
        "rate",
        _data_rate,
        "a page on this machine where people listen to answers and rate them",
        needs="a JSONL file of prompts with answers (docs/preferences.md), and a browser.",
        example="stepaudio data rate answers.jsonl --output ratings.jsonl",
    )
    add = rated.add_argument
    add("file", type=Path, metavar="FILE", help="prompts with answers")
    add("--output", type=Path, required=True, metavar="OUT", help="JSONL file that ratings are added to")
    add("--criteria", nargs="+", metavar="NAME", help="what is rated (default: the paper's three); one may be enough")
    add("--port", type=int, metavar="N", help="of the page; 0: any that is free (default 8765)")
    mined = command(
        actions,
        "mine-deaf",
        _data_mine_deaf,
        "preferences against a policy that says it did not hear what is clear",
        needs="answers of `stepaudio evaluate answers` or `generate`, and preferences with meta.condition "
        "(docs/deaf_hacking.md).",
        example="stepaudio data mine-deaf answers.jsonl preferences.jsonl mined.jsonl",
    )
    add = mined.add_argument
    add("source", type=Path, metavar="ANSWERS", help="the policy's answers")
    add("preferences", type=Path, metavar="PREFERENCES", help="preferences that hold their prompts")
    add("output", type=Path, metavar="OUT", help="JSONL file to write")
    add("--detector", metavar="DETECTOR", help="phrases, or endpoint:URL of a model to ask (default phrases)")
    add("--endpoint-model", metavar="NAME", help="model to ask there")
    add("--endpoint-key-env", metavar="NAME", help="environment variable with its key (default OPENAI_API_KEY)")
    add("--endpoint-workers", type=int, metavar="N", help="requests at a time (default 8)")


def _prepare(options: argparse.Namespace) -> int:
    from stepaudio_train.data.prepare import PrepareOptions, prepare

    print(prepare(typed(PrepareOptions, options)).summary(), end="")
    return 0


def _tokenize(options: argparse.Namespace) -> int:
    from stepaudio_train.data.tokenize import TokenizeOptions, tokenize, verify

    asked = typed(TokenizeOptions, options)
    for split, stats in tokenize(asked).items():
        hours, left_out = stats.duration_s / 3600, len(stats.refused)
        print(f"{split or options.output}: {stats.num_samples} samples, {hours:.2f} h of audio, {left_out} left out")
    agrees = True
    if asked.verify_percent:
        for split, found in verify(asked).items():
            print(
                f"{split or options.output}: {found.num_recordings} recordings encoded again, {found.num_different} of "
                f"{found.num_tokens} tokens differ"
            )
            # One token in a thousand may be a close choice that rounding decides; with bf16, more.
            agrees = agrees and (asked.precision != "fp32" or found.num_different <= found.num_tokens / 1000)
    return 0 if agrees else 1


def _data_show(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.data import DataOptions, show

    return show(typed(DataOptions, options))


def _data_check(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.data import DataOptions, check

    return check(typed(DataOptions, options))


def _data_import(options: argparse.Namespace) -> int:
    from stepaudio_train.data.importers.run import ImportOptions, import_conversations

    print(import_conversations(typed(ImportOptions, options)).summary(), end="")
    return 0


def _data_process(options: argparse.Namespace) -> int:
    from stepaudio_train.data.chat_processing import ProcessOptions, process

    print(process(typed(ProcessOptions, options)).summary(), end="")
    return 0


def _data_judge(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.judge import PreferenceJudgeOptions, judge_preferences

    report = judge_preferences(typed(PreferenceJudgeOptions, options))
    print(report.summary(), end="")
    return 1 if report.refused else 0


def _data_rate(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.rate import RateOptions, rate

    return rate(typed(RateOptions, options))


def _data_mine_deaf(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.mine_deaf import MineDeafOptions, mine_deaf

    report = mine_deaf(typed(MineDeafOptions, options))
    print(report.summary(), end="")
    return 1 if report.refused else 0


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))
