"""Arguments of the commands that take a model: run, generate, evaluate, convert, export, plan; and doctor."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from stepaudio_train.cli.parsing import command, group, typed


def add_run(commands: argparse._SubParsersAction) -> None:
    parser = command(
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


def add_generate(commands: argparse._SubParsersAction) -> None:
    parser = command(
        commands,
        "generate",
        _generate,
        "ask a trained model: speech to text, text to speech tokens, continuations, conversations",
        needs="a finished run, for chat a fine-tuning one; for recordings the speech tokenizer it was trained with.",
        example="stepaudio generate runs/pretrain --task asr --speech-tokenizer runs/tokenizer --audio hello.wav\n"
        "  stepaudio generate runs/sft --task chat --records asked.jsonl",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="RUN", help="run directory, or its export/ folder")
    add(
        "--task",
        choices=("asr", "tts", "continuation", "text", "chat"),
        required=True,
        help="what to do with the prompts",
    )
    add("--audio", type=Path, nargs="+", metavar="FILE", help="recordings (asr, continuation, chat)")
    add("--text", nargs="+", metavar="TEXT", help="texts (tts, text, chat)")
    add(
        "--records",
        type=Path,
        metavar="FILE",
        help="JSONL of records of one recording or text; chat: conversations",
    )
    add("--speech-tokenizer", type=Path, metavar="DIR", help="needed for recordings")
    add("--output", type=Path, metavar="FILE", help="JSONL to write (default: the terminal)")
    add("--max-new-tokens", type=int, metavar="N", help="at most this many tokens a prompt (default 256)")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token (default 0.0)")
    add("--top-k", type=int, metavar="K", help="draw among the K most likely (default 0: all)")
    add("--top-p", type=float, metavar="P", help="draw among those that make up P (default 1.0)")
    add("--seed", type=int, metavar="N", help="of the drawing (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), help="where the model runs (default auto)")


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    actions = group(
        commands,
        "evaluate",
        "a fine-tuned model: its answers, and whether it does as told; how made speech sounds",
        needs="a finished run of `stepaudio run sft`, or what it answered; sound files.",
        example="stepaudio evaluate answers runs/sft held_out.jsonl --output runs/sft/answers",
    )
    answers = command(
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
    add("--written-temperature", type=float, metavar="T", help="of written ones (default 0.0: the most likely tokens)")
    add("--top-k", type=int, metavar="K", help="draw among the K most likely (default 50; 0: all)")
    add("--seed", type=int, metavar="N", help="of the drawing (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), help="where the model runs (default auto)")

    deafness = command(
        actions,
        "deafness",
        _evaluate_deafness,
        "how often a policy says that it did not hear, of recordings that are clear and of others",
        needs="a finished run of `stepaudio run sft`, dpo, ppo or grpo, and conversations with meta.condition "
        "(docs/deaf_hacking.md).",
        example="stepaudio evaluate deafness runs/ppo corpora/hearing/conversations.jsonl --output runs/ppo/heard",
    )
    add = deafness.add_argument
    add("model", type=Path, metavar="RUN", help="run directory")
    add("file", type=Path, metavar="FILE", help="conversations with meta.condition and a written answer")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--checkpoints", action="store_true", help="measure every checkpoint that is there, too")
    add("--conditions", nargs="+", choices=("clear", "noisy", "cut", "silent"), help="ask about these alone")
    add("--max-new-tokens", type=int, metavar="N", help="at most this many tokens an answer (default 128)")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token (default 1.0)")
    add("--seed", type=int, metavar="N", help="of the drawing (default 0)")
    add("--device", choices=("auto", "cpu", "cuda"), help="where the model runs (default auto)")

    control = command(
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

    speech = command(
        actions,
        "speech",
        _evaluate_speech,
        "judge sound files: words that are heard, voice, quality, pitch and pace",
        needs="sound files and their texts as lines of JSON (docs/speech_decoder.md), and judges: "
        "pip install 'stepaudio-train[judges]'",
        example="stepaudio evaluate speech heard/lines.jsonl --output heard/scores --references --words words.txt",
    )
    add = speech.add_argument
    add("file", type=Path, metavar="FILE", help='JSONL: {"id", "text", "speech", "reference", "voice"}')
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--references", action="store_true", help="judge the references too, and write their scores beside")
    add("--recogniser", metavar="NAME", help="or whisper:FOLDER, endpoint:URL, none (default pocketsphinx)")
    add("--speaker", metavar="NAME", help="or campplus:FILE.onnx, eres2net:FILE.onnx, none (default resemblyzer)")
    add("--quality", metavar="NAME", help="or none (default dnsmos)")
    add("--words", nargs="+", metavar="WORD", help="pocketsphinx hears these alone: words, or files of words")
    add("--language", metavar="CODE", help="as en, for whisper and endpoint (default: they guess)")
    add("--endpoint-model", metavar="NAME", help="what the endpoint calls its model (default whisper-1)")
    add("--endpoint-key-env", metavar="NAME", help="environment variable with its key (default OPENAI_API_KEY)")
    add("--num-workers", type=int, metavar="N", help="processes (default: by cores and number of files)")


def add_convert(commands: argparse._SubParsersAction) -> None:
    parser = command(
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


def add_export(commands: argparse._SubParsersAction) -> None:
    actions = group(
        commands,
        "export",
        "speech tokenizer and speech decoder as the directories that StepFun's code takes",
        needs="a finished run of `stepaudio run tokenizer`, or of `flow` and `vocoder`.",
        example="stepaudio export tokenizer runs/tokenizer exported\n"
        "  stepaudio export decoder runs/flow CosyVoice-300M-25Hz --vocoder runs/vocoder",
    )
    tokenizer = command(
        actions,
        "tokenizer",
        _export_tokenizer,
        "the speech tokenizer as the directory that StepFun's code takes",
        needs="a speech tokenizer: a run_dir of `stepaudio run tokenizer`, or a copy of Step-Audio-Tokenizer.",
        example="stepaudio export tokenizer runs/tokenizer exported",
    )
    add = tokenizer.add_argument
    add("source", type=Path, metavar="SRC", help="directory with a speech tokenizer")
    add("destination", type=Path, metavar="DST", help="directory to write; must not be there yet")
    add("--released", type=Path, metavar="DIR", help="released directory, whose decoder and token list are taken over")

    decoder = command(
        actions,
        "decoder",
        _export_decoder,
        "the speech decoder as the directory that StepFun's code takes",
        needs="runs of `stepaudio run flow` and `stepaudio run vocoder`, or a copy of CosyVoice-300M-25Hz.",
        example="stepaudio export decoder runs/flow CosyVoice-300M-25Hz --vocoder runs/vocoder "
        "--speech-tokenizer runs/tokenizer",
    )
    add = decoder.add_argument
    add("source", type=Path, metavar="SRC", help="run directory of `stepaudio run flow`")
    add("destination", type=Path, metavar="DST", help="directory to write; must not be there yet")
    add("--vocoder", type=Path, metavar="DIR", help="run directory of `stepaudio run vocoder` (default: SRC)")
    add("--speech-tokenizer", type=Path, metavar="DIR", help="speech tokenizer, of which StepFun's code opens a part")


def add_plan(commands: argparse._SubParsersAction) -> None:
    parser = command(
        commands,
        "plan",
        _plan,
        "memory of a run on each rank, before it is started; the fastest layout on a cluster",
        needs="nothing but a configuration: no GPU, no data, no weights.",
        example="stepaudio plan model=step1_130b vocabulary=released engine=megatron engine.tensor_parallel=8 "
        "engine.pipeline_parallel=8 --world-size 512 --memory-gib 80\n"
        "  stepaudio plan --recipe sft experiment=sft_3b_lora --world-size 1 --memory-gib 80\n"
        "  stepaudio plan experiment=pretrain_130b_stage1 --gpus 2048 --gpu h800",
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes to configs/RECIPE.yaml")
    recipes = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")
    parser.add_argument("--recipe", choices=recipes, help="whose configuration (default pretrain)")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks in all (default: one model replica)")
    parser.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of a device; says whether it fits")
    parser.add_argument("--write-config", type=Path, metavar="FILE", help="write the resolved configuration as YAML")
    parser.add_argument("--parameters-json", type=Path, metavar="FILE", help="write every weight's name and shape")
    add = parser.add_argument
    add("--gpus", type=int, metavar="N", help="search the fastest layout on N GPUs (docs/planner.md)")
    add("--gpu", choices=("a100", "h100", "h200", "h800"), help="which GPUs those are (default h800)")
    add("--tokens", type=float, metavar="N", help="--gpus: trained on so many (default: the paper's 3.3e12)")
    add("--document-tokens", type=int, metavar="N", help="--gpus: mean length of documents (default: a whole row)")
    add("--checkpoint-gb-per-s", type=float, metavar="RATE", help="--gpus: count checkpoints, written at this rate")
    add("--json", type=Path, metavar="FILE", help="write what --gpus or --check-figures prints")
    add("--check-figures", action="store_true", help="compare the predictions of --gpus with published figures")


def add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = command(
        commands,
        "doctor",
        _doctor,
        "check this machine and this installation",
        needs="nothing.",
        example="stepaudio doctor --run-dir /data/runs",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs will be written (default runs)")


def _run(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.run import run_recipe_command

    return run_recipe_command(options.recipe, options.overrides, options.nproc)


def _evaluate_answers(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.evaluate import AnswersOptions, evaluate_answers, summary

    print(summary(evaluate_answers(typed(AnswersOptions, options))), end="")
    return 0


def _evaluate_deafness(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.evaluate_deafness import DeafnessOptions, deafness_summary, evaluate_deafness

    print(deafness_summary(evaluate_deafness(typed(DeafnessOptions, options))), end="")
    return 0


def _evaluate_control(options: argparse.Namespace) -> int:
    from stepaudio_train.evaluation.control import ControlOptions, measure_control

    print(measure_control(typed(ControlOptions, options)).summary(), end="")
    return 0


def _evaluate_speech(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.evaluate_speech import SpeechOptions, evaluate_speech, speech_summary
    from stepaudio_train.config.judges import JudgeOptions

    result = evaluate_speech(typed(SpeechOptions, options), typed(JudgeOptions, options))
    print(speech_summary(result), end="")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.generate import GenerateOptions, run_generation

    return run_generation(typed(GenerateOptions, options))


def _convert(options: argparse.Namespace) -> int:
    # Before torch is imported: with huge pages, filling the memory of a large tensor is seven times as fast.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from stepaudio_train.commands.convert import ConvertOptions, run_conversion

    return run_conversion(typed(ConvertOptions, options))


def _export_tokenizer(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.export import ExportOptions, export_tokenizer

    return export_tokenizer(typed(ExportOptions, options))


def _export_decoder(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.export_decoder import DecoderExportOptions, export_decoder

    return export_decoder(typed(DecoderExportOptions, options))


def _plan(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.plan import PlanOptions, show_plan

    return show_plan(typed(PlanOptions, options))


def _doctor(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.doctor import examine

    return examine(options.run_dir)
