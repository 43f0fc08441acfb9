"""A FunASR model directory: config.yaml, model.pt, am.mvn, and what FunASR's loader asks for beside."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from stepaudio_train.config.tokenizer import LinguisticConfig
from stepaudio_train.tokenizers.linguistic import LinguisticTokenizer
from stepaudio_train.tokenizers.weight_files import TokenizerError

FUNASR_DIRECTORY = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
CONFIG_FILE, WEIGHTS_FILE, CMVN_FILE = "config.yaml", "model.pt", "am.mvn"
_PREFIX = "encoder."
_TAKEN_OVER = (CONFIG_FILE, "configuration.json", "tokens.json", "tokens.txt", "seg_dict")
_REQUIRED = {
    "encoder": "SANMEncoderChunkOpt",
    "encoder_conf.input_layer": "pe_online",
    "encoder_conf.selfattention_layer_type": "sanm",
    "encoder_conf.normalize_before": True,
    "encoder_conf.sanm_shfit": 0,
    "frontend": "WavFrontendOnline",
    "frontend_conf.fs": 16000,
    "frontend_conf.window": "hamming",
    "frontend_conf.frame_length": 25,
    "frontend_conf.frame_shift": 10,
}
"""What the encoder and front end here are; a directory that asks for others is refused."""
_STREAMED = {"chunk_frames": 4, "overlap_frames": 5, "look_back_chunks": 4}
"""StepFun's code calls the encoder with these, whatever the directory says."""


def read_funasr(directory: Path, codebook_size: int) -> LinguisticTokenizer:
    """Encoder and normalisation of a FunASR directory; centroids are left at zero.

    Raises:
        TokenizerError: a file is missing or broken, a setting is not supported, or weights do not fit the settings.
    """
    config = _read_config(directory / CONFIG_FILE, codebook_size)
    tokenizer = LinguisticTokenizer(config)
    path = directory / WEIGHTS_FILE
    weights = {
        name.removeprefix(_PREFIX): value for name, value in _read_weights(path).items() if name.startswith(_PREFIX)
    }
    try:
        tokenizer.encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise TokenizerError(f"{path}: does not fit {CONFIG_FILE}: {error}") from error
    shift, scale = _read_cmvn(directory / CMVN_FILE, config.input_size)
    tokenizer.cmvn_shift.copy_(shift)
    tokenizer.cmvn_scale.copy_(scale)
    return tokenizer


def write_funasr(tokenizer: LinguisticTokenizer, directory: Path, source: Path | None) -> None:
    """Write the directory.

    Args:
        source: a FunASR directory with the same encoder sizes; its other files and its model's other parts are kept.

    Raises:
        TokenizerError: FunASR's streaming as StepFun calls it is not what this tokenizer does, or `source` has other
            sizes.
    """
    config = tokenizer.config
    for name, value in _STREAMED.items():
        found = asdict(config)[name]
        if found != value:
            raise TokenizerError(
                f"linguistic.{name}={found}: StepFun's code streams with {value}, so this tokenizer cannot be exported"
            )
    directory.mkdir(parents=True)
    others: dict[str, Tensor] = {}
    if source is None:
        _write_settings(config, directory)
    else:
        if _read_config(source / CONFIG_FILE, config.codebook_size) != config:
            raise TokenizerError(f"{source / CONFIG_FILE}: is of another size than the tokenizer")
        others = {n: v for n, v in _read_weights(source / WEIGHTS_FILE).items() if not n.startswith(_PREFIX)}
        for name in _TAKEN_OVER:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
    own = {f"{_PREFIX}{n}": v.float().cpu() for n, v in tokenizer.encoder.state_dict().items()}
    torch.save(own | others, directory / WEIGHTS_FILE)
    _write_cmvn(directory / CMVN_FILE, tokenizer.cmvn_shift, tokenizer.cmvn_scale)


def _read_config(path: Path, codebook_size: int) -> LinguisticConfig:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
    for key, wanted in _REQUIRED.items():
        found = _look_up(settings, key, path)
        if found != wanted:
            raise TokenizerError(f"{path}: {key} is {found!r}; only {wanted!r} is supported")
    encoder, frontend = settings["encoder_conf"], settings["frontend_conf"]
    try:
        return LinguisticConfig(
            num_mel_bins=int(frontend["n_mels"]),
            lfr_window=int(frontend["lfr_m"]),
            lfr_stride=int(frontend["lfr_n"]),
            hidden_size=int(encoder["output_size"]),
            num_heads=int(encoder["attention_heads"]),
            ffn_size=int(encoder["linear_units"]),
            num_blocks=int(encoder["num_blocks"]),
            kernel_size=int(encoder["kernel_size"]),
            codebook_size=codebook_size,
        )
    except KeyError as error:
        raise TokenizerError(f"{path}: has no {error}") from error


def _look_up(settings: Any, key: str, path: Path) -> Any:
    value = settings
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise TokenizerError(f"{path}: has no {key}; it is no streaming Paraformer's")
        value = value[name]
    return value


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise TokenizerError(f"{path}: cannot be read as a state dict: {error}") from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise TokenizerError(f"{path}: holds no state dict")
    return weights


def _read_cmvn(path: Path, size: int) -> tuple[Tensor, Tensor]:
    """Shift and scale of Kaldi's nnet text: x' = (x + shift) * scale."""
    try:
        words = path.read_text(encoding="utf-8").split()
        found = []
        for name in ("<AddShift>", "<Rescale>"):
            start = words.index("[", words.index(name)) + 1
            values = [float(word) for word in words[start : words.index("]", start)]]
            if len(values) != size:
                raise TokenizerError(f"{path}: {name} has {len(values)} numbers, the front end gives {size}")
            found.append(torch.tensor(values))
    except (OSError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: is no Kaldi normalisation with <AddShift> and <Rescale>: {error}") from error
    return found[0], found[1]


def _write_cmvn(path: Path, shift: Tensor, scale: Tensor) -> None:
    size = len(shift)
    lines = ["<Nnet>", f"<Splice> {size} {size}", "[ 0 ]"]
    for name, values in (("<AddShift>", shift), ("<Rescale>", scale)):
        # Nine digits bring every float32 back to the bit.
        numbers = " ".join(f"{value:.9g}" for value in values.tolist())
        lines += [f"{name} {size} {size}", f"<LearnRateCoef> 0 [ {numbers} ]"]
    path.write_text("\n".join([*lines, "</Nnet>"]) + "\n", encoding="utf-8")


def _write_settings(config: LinguisticConfig, directory: Path) -> None:
    """Settings for FunASR, with the smallest decoder and predictor that its loader builds and nothing here uses."""
    tokens = ["<blank>", "<s>", "</s>", "<unk>"]
    settings = {
        "model": "ParaformerStreaming",
        "model_conf": {"ctc_weight": 0.0, "lsm_weight": 0.1, "length_normalized_loss": True, "predictor_weight": 1.0},
        "encoder": "SANMEncoderChunkOpt",
        "encoder_conf": {
            "output_size": config.hidden_size,
            "attention_heads": config.num_heads,
            "linear_units": config.ffn_size,
            "num_blocks": config.num_blocks,
            "dropout_rate": 0.1,
            "positional_dropout_rate": 0.1,
            "attention_dropout_rate": 0.1,
            "input_layer": "pe_online",
            "pos_enc_class": "SinusoidalPositionEncoder",
            "normalize_before": True,
            "kernel_size": config.kernel_size,
            "sanm_shfit": 0,
            "selfattention_layer_type": "sanm",
            "chunk_size": [12, 15],
            "stride": [8, 10],
            "pad_left": [0, 0],
            "encoder_att_look_back_factor": [4, 4],
            "decoder_att_look_back_factor": [1, 1],
        },
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {
            "attention_heads": config.num_heads,
            "linear_units": config.hidden_size,
            "num_blocks": 1,
            "att_layer_num": 1,
            "kernel_size": config.kernel_size,
            "sanm_shfit": config.kernel_size // 2,
        },
        "predictor": "CifPredictorV2",
        "predictor_conf": {
            "idim": config.hidden_size,
            "threshold": 1.0,
            "l_order": 1,
            "r_order": 1,
            "tail_threshold": 0.45,
        },
        "frontend": "WavFrontendOnline",
        "frontend_conf": {
            "fs": 16000,
            "window": "hamming",
            "n_mels": config.num_mel_bins,
            "frame_length": 25,
            "frame_shift": 10,
            "lfr_m": config.lfr_window,
            "lfr_n": config.lfr_stride,
            # Without it, FunASR adds noise and the same audio gives other ids each time.
            "dither": 0.0,
        },
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True},
    }
    files = {
        "init_param": WEIGHTS_FILE,
        "config": CONFIG_FILE,
        "tokenizer_conf": {"token_list": "tokens.json", "seg_dict_file": "seg_dict"},
        "frontend_conf": {"cmvn_file": CMVN_FILE},
    }
    configuration = {"framework": "pytorch", "task": "auto-speech-recognition", "file_path_metas": files}
    (directory / CONFIG_FILE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (directory / "configuration.json").write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
    (directory / "tokens.json").write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8")
    (directory / "tokens.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (directory / "seg_dict").write_text("", encoding="utf-8")
