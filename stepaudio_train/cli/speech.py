"""Arguments of the commands that make sound: synthesize, decode, resynthesize."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepaudio_train.cli.parsing import command, typed


def add_synthesize(commands: argparse._SubParsersAction) -> None:
    parser = command(
        commands,
        "synthesize",
        _synthesize,
        "text to sound, in the voice of a recording",
        needs="a model that speaks (runs of `sft` or `pretrain`, or Step-Audio-TTS-3B) and a speech decoder.",
        example='stepaudio synthesize runs/sft "(fast 2)seven two" --voice theo.wav --voice-text "one two" '
        "--decoder runs/flow --vocoder runs/vocoder --output heard\n"
        "  stepaudio synthesize Step-Audio-TTS-3B --records texts.jsonl --speakers speakers --speaker Tingting "
        "--speech-tokenizer Step-Audio-Tokenizer --decoder Step-Audio-TTS-3B/CosyVoice-300M-25Hz "
        "--music-decoder Step-Audio-TTS-3B/CosyVoice-300M-25Hz-Music --output heard",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="run directory, its export/ folder, or a Hugging Face directory")
    told = "texts, right behind MODEL; instruction tags may stand before them"
    add("texts", nargs="*", default=argparse.SUPPRESS, metavar="TEXT", help=told)
    add("--records", type=Path, metavar="FILE", help="JSONL of id, text and, if need be, voice, voice_text, speaker")
    _add_decoder(parser)
    add("--music-decoder", type=Path, metavar="DIR", help="decoder for RAP and singing (default: the same)")
    add("--voice", type=Path, metavar="FILE", help="recording of the voice")
    add("--voice-text", metavar="TEXT", help="what it says")
    add("--speakers", type=Path, metavar="DIR", help="folder of speakers_info.json and NAME_prompt.wav")
    add("--speaker", metavar="NAME", help="one of --speakers, or a name that the model was trained with")
    add("--speech-tokenizer", type=Path, metavar="DIR", help="encodes the voice (default: the fine-tuned run's own)")
    add("--template", choices=("tts", "tts_bos", "chat"), help="how turns are opened (default: the run's, or tts)")
    add("--system", metavar="TEXT", help="system prompt, {speaker} in it, for models not tuned with recordings first")
    add("--max-new-tokens", type=int, metavar="N", help="at most this many tokens a text (default 2048)")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token (default 0.7)")
    add("--top-k", type=int, metavar="K", help="draw among the K most likely (default 50)")
    add("--seed", type=int, metavar="N", help="of the first text's drawing; the next one's is one more (default 0)")
    _add_output(parser)


def add_decode(commands: argparse._SubParsersAction) -> None:
    parser = command(
        commands,
        "decode",
        _decode,
        "speech tokens to sound",
        needs="tokens, as `stepaudio generate` writes them, and a speech decoder.",
        example="stepaudio decode spoken.jsonl --voice theo.wav --decoder runs/flow --vocoder runs/vocoder "
        "--output heard",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="JSONL of id, audio_tokens and, if need be, voice")
    _add_decoder(parser)
    add("--voice", type=Path, metavar="FILE", help="recording of the voice")
    add(
        "--speech-tokenizer",
        type=Path,
        metavar="DIR",
        help="encodes the voice, to go on from it (default: voice alone)",
    )
    _add_output(parser)


def add_resynthesize(commands: argparse._SubParsersAction) -> None:
    parser = command(
        commands,
        "resynthesize",
        _resynthesize,
        "recordings to speech tokens and back to sound",
        needs="a speech decoder (runs of `flow` and `vocoder`) and the speech tokenizer it was trained with.",
        example="stepaudio resynthesize hello.wav --decoder runs/flow --vocoder runs/vocoder "
        "--speech-tokenizer runs/tokenizer --output heard",
    )
    add = parser.add_argument
    add("sources", type=Path, nargs="+", metavar="FILE", help="recordings, and folders of them")
    _add_decoder(parser)
    add("--speech-tokenizer", type=Path, required=True, metavar="DIR", help="speech tokenizer")
    _add_output(parser)


def _add_decoder(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    told = "run directory of `stepaudio run flow`, or a CosyVoice-300M-25Hz directory"
    add("--decoder", type=Path, required=True, metavar="DIR", help=told)
    add("--vocoder", type=Path, metavar="DIR", help="run directory of `stepaudio run vocoder` (default: the decoder's)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    add("--format", choices=("wav", "flac"), help="of the files (default wav)")
    add(
        "--sample-rate",
        type=int,
        choices=(22050, 24000),
        dest="sample_rate_hz",
        help="of the files, in Hz (default: the decoder's)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), help="where the models run (default auto)")


def _synthesize(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.synthesize import SynthesizeOptions, run_synthesis

    return run_synthesis(typed(SynthesizeOptions, options))


def _decode(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.decode import DecodeOptions, run_decoding

    return run_decoding(typed(DecodeOptions, options))


def _resynthesize(options: argparse.Namespace) -> int:
    from stepaudio_train.commands.resynthesize import ResynthesizeOptions, run_resynthesis

    return run_resynthesis(typed(ResynthesizeOptions, options))
