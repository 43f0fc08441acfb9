"""Sizes of the speech decoder as `cosyvoice.yaml`, and back (formats.md 5.1 and 5.3).

`released_document` says what is written. What is read is compared with the document that its own sizes give: whatever
differs is another decoder than this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from stepaudio_train.config.compose import from_mapping
from stepaudio_train.config.decoder import FlowConfig, FlowSolverConfig, flow_problems
from stepaudio_train.config.errors import ConfigError
from stepaudio_train.config.vocoder import MelConfig, VocoderConfig, vocoder_problems
from stepaudio_train.models.decoder.flow_loss import CONDITION_DROPOUT, SIGMA_MIN
from stepaudio_train.models.decoder.released.hyperpyyaml import Tagged, dump_flat, read_flat
from stepaudio_train.models.decoder.weights import DecoderWeightError

YAML_FILE = "cosyvoice.yaml"
_HEADER = "# Speech decoder: what the weights beside this file are loaded into.\n"
_PARTS = ("feat_extractor", "flow", "hift")
_SEED = 1986
_FRAMES_AT = (22050, 256)
"""Hz and hop that the released programs count mel frames with, whatever the file says."""
_ENCODER, _CFM, _UNET = "flow.encoder", "flow.decoder.cfm_params", "flow.decoder.estimator"

_OF_TRAINING = frozenset(
    {
        "flow.only_mask_loss",
        f"{_ENCODER}.attention_dropout_rate",
        f"{_ENCODER}.gradient_checkpointing",
        f"{_ENCODER}.positional_dropout_rate",
        f"{_ENCODER}.static_chunk_size",
        f"{_ENCODER}.use_dynamic_chunk",
        f"{_ENCODER}.use_dynamic_left_chunk",
        f"{_CFM}.content.reg_loss_type",
        f"{_CFM}.content.sigma_min",
        f"{_CFM}.content.training_cfg_rate",
        f"{_UNET}.dropout",
    }
)
"""Keys that change nothing in what a trained decoder makes."""
_UNSAID = {
    "flow.output_type": "mel",
    f"{_ENCODER}.activation_type": "swish",
    f"{_ENCODER}.causal": False,
    f"{_ENCODER}.cnn_module_kernel": 15,
    f"{_ENCODER}.key_bias": True,
    f"{_ENCODER}.normalize_before": True,
    f"{_ENCODER}.positionwise_conv_kernel_size": 1,
    f"{_ENCODER}.selfattention_layer_type": "rel_selfattn",
    "flow.decoder.n_spks": 1,
    "flow.length_regulator.groups": 1,
    "feat_extractor.center": False,
}
"""What the released classes take where a file does not say it."""


class ReleasedSettings(NamedTuple):
    """What `cosyvoice.yaml` says."""

    flow: FlowConfig
    solver: FlowSolverConfig
    vocoder: VocoderConfig


def released_document(settings: ReleasedSettings) -> dict[str, Any]:
    """The feature extractor, flow and vocoder, flat as `hyperpyyaml` has it."""
    flow, solver, vocoder = settings
    mel, bins, kernels = vocoder.mel, flow.num_mel_bins, len(vocoder.resblock_kernels)
    return {
        # The released programs have this function under two names; both are read.
        "feat_extractor": "!name:cosyvoice.matcha.audio.mel_spectrogram",
        "feat_extractor.n_fft": mel.window_samples,
        "feat_extractor.num_mels": mel.num_bins,
        "feat_extractor.sampling_rate": mel.sample_rate_hz,
        "feat_extractor.hop_size": mel.hop_samples,
        "feat_extractor.win_size": mel.window_samples,
        "feat_extractor.fmin": mel.lowest_hz,
        "feat_extractor.fmax": mel.highest_hz,
        "feat_extractor.center": False,
        "flow": "!new:cosyvoice.flow.flow.MaskedDiffWithXvec",
        "flow.input_size": flow.hidden_size,
        "flow.output_size": bins,
        "flow.spk_embed_dim": flow.speaker_size,
        "flow.output_type": "mel",
        "flow.vocab_size": flow.vocab_size,
        "flow.input_frame_rate": flow.token_rate_hz,
        "flow.only_mask_loss": True,
        _ENCODER: "!new:cosyvoice.transformer.encoder.ConformerEncoder",
        f"{_ENCODER}.input_size": flow.hidden_size,
        f"{_ENCODER}.output_size": flow.hidden_size,
        f"{_ENCODER}.attention_heads": flow.num_heads,
        f"{_ENCODER}.linear_units": flow.ffn_size,
        f"{_ENCODER}.num_blocks": flow.num_blocks,
        f"{_ENCODER}.dropout_rate": flow.dropout,
        f"{_ENCODER}.positional_dropout_rate": flow.dropout,
        f"{_ENCODER}.attention_dropout_rate": flow.dropout,
        f"{_ENCODER}.normalize_before": True,
        f"{_ENCODER}.input_layer": "linear",
        f"{_ENCODER}.pos_enc_layer_type": "rel_pos_espnet",
        f"{_ENCODER}.selfattention_layer_type": "rel_selfattn",
        f"{_ENCODER}.use_cnn_module": False,
        f"{_ENCODER}.macaron_style": False,
        "flow.length_regulator": "!new:cosyvoice.flow.length_regulator.InterpolateRegulator",
        "flow.length_regulator.channels": bins,
        "flow.length_regulator.sampling_ratios": [1, 1, 1, 1],
        "flow.decoder": "!new:cosyvoice.flow.flow_matching.ConditionalCFM",
        "flow.decoder.in_channels": 3 * bins,
        "flow.decoder.n_spks": 1,
        "flow.decoder.spk_emb_dim": bins,
        _CFM: "!new:omegaconf.DictConfig",
        f"{_CFM}.content.sigma_min": SIGMA_MIN,
        f"{_CFM}.content.solver": "euler",
        f"{_CFM}.content.t_scheduler": "cosine",
        f"{_CFM}.content.training_cfg_rate": CONDITION_DROPOUT,
        f"{_CFM}.content.inference_cfg_rate": solver.guidance,
        f"{_CFM}.content.reg_loss_type": "l1",
        _UNET: "!new:cosyvoice.flow.decoder.ConditionalDecoder",
        f"{_UNET}.in_channels": 4 * bins,
        f"{_UNET}.out_channels": bins,
        f"{_UNET}.channels": [flow.decoder_channels] * 2,
        f"{_UNET}.dropout": 0.0,
        f"{_UNET}.attention_head_dim": flow.decoder_head_size,
        f"{_UNET}.n_blocks": flow.decoder_transformers,
        f"{_UNET}.num_mid_blocks": flow.decoder_mid_blocks,
        f"{_UNET}.num_heads": flow.decoder_heads,
        f"{_UNET}.act_fn": "gelu",
        "hift": "!new:cosyvoice.hifigan.generator.HiFTGenerator",
        "hift.in_channels": mel.num_bins,
        "hift.base_channels": vocoder.base_channels,
        "hift.nb_harmonics": vocoder.num_harmonics,
        "hift.sampling_rate": mel.sample_rate_hz,
        "hift.nsf_alpha": vocoder.sine_amplitude,
        "hift.nsf_sigma": vocoder.noise_std,
        "hift.nsf_voiced_threshold": vocoder.voiced_threshold_hz,
        "hift.upsample_rates": list(vocoder.upsample_rates),
        "hift.upsample_kernel_sizes": list(vocoder.upsample_kernels),
        "hift.istft_params.n_fft": vocoder.stft_samples,
        "hift.istft_params.hop_len": vocoder.stft_hop_samples,
        "hift.resblock_kernel_sizes": list(vocoder.resblock_kernels),
        "hift.resblock_dilation_sizes": [list(vocoder.dilations) for _ in range(kernels)],
        "hift.source_resblock_kernel_sizes": list(vocoder.source_kernels),
        "hift.source_resblock_dilation_sizes": [list(vocoder.dilations) for _ in vocoder.source_kernels],
        "hift.lrelu_slope": vocoder.leaky_slope,
        "hift.audio_limit": vocoder.audio_limit,
        "hift.f0_predictor": "!new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor",
        "hift.f0_predictor.num_class": 1,
        "hift.f0_predictor.in_channels": mel.num_bins,
        "hift.f0_predictor.cond_channels": vocoder.f0_channels,
    }


def write_settings(settings: ReleasedSettings, path: Path) -> None:
    """Write what StepFun's programs build the decoder from.

    Raises:
        ConfigError: sizes that these programs cannot have.
    """
    if problems := release_problems(settings):
        raise ConfigError(problems)
    flow = settings.flow
    seeds = {
        f"__seed_{name}": Tagged(f"!apply:{function}", [_SEED])
        for name, function in (
            ("python", "random.seed"),
            ("numpy", "numpy.random.seed"),
            ("torch", "torch.manual_seed"),
            ("cuda", "torch.cuda.manual_seed_all"),
        )
    }
    sizes = {"sample_rate": flow.sample_rate_hz, "spk_embed_dim": flow.speaker_size}
    path.write_text(_HEADER + dump_flat(seeds | sizes | released_document(settings)), encoding="utf-8")


def read_settings(path: Path) -> ReleasedSettings:
    """Read a released `cosyvoice.yaml`, or one that was written here. Nothing that it names is run.

    Raises:
        DecoderWeightError: a broken file, or another decoder; keys and values are named.
    """
    example = released_document(ReleasedSettings(FlowConfig.released(), FlowSolverConfig(), VocoderConfig.released()))
    # The released vocoder's class has the released sizes as its defaults.
    unsaid = {key: value for key, value in example.items() if key.startswith("hift.") and not _is_tag(value)}
    found = unsaid | _UNSAID | read_flat(path, _PARTS)
    _refuse(path, _other_classes(found, example))
    _refuse(path, _missing(found, example))
    try:
        settings = _sizes(found)
    except ConfigError as error:
        raise _refusal(path, error.problems) from None
    _refuse(path, flow_problems(settings.flow) + vocoder_problems(settings.vocoder))
    _refuse(path, _differences(found, released_document(settings)))
    _refuse(path, release_problems(settings))
    return settings


def release_problems(settings: ReleasedSettings) -> list[str]:
    """What StepFun's programs cannot have of sizes that are possible here, a line each."""
    flow, mel, problems = settings.flow, settings.vocoder.mel, []
    frames_at = (flow.sample_rate_hz, flow.hop_samples)
    if frames_at != _FRAMES_AT:
        problems.append(
            f"sample_rate_hz={frames_at[0]}, hop_samples={frames_at[1]}: released programs count frames with "
            f"{_FRAMES_AT[0]} and {_FRAMES_AT[1]}"
        )
    wanted = MelConfig(flow.sample_rate_hz, hop_samples=flow.hop_samples, num_bins=flow.num_mel_bins)
    if mel != wanted:
        problems.append(f"the vocoder takes the mel {mel}, and the flow makes {wanted}")
    if flow.start_time > 0:
        problems.append(f"start_time={flow.start_time}: released programs begin at noise; train with flow.start_time=0")
    return problems


def _sizes(found: Mapping[str, Any]) -> ReleasedSettings:
    """Raises:
    ConfigError: values of a wrong type.
    """
    mel = {
        "sample_rate_hz": found["feat_extractor.sampling_rate"],
        "window_samples": found["feat_extractor.n_fft"],
        "hop_samples": found["feat_extractor.hop_size"],
        "num_bins": found["feat_extractor.num_mels"],
        "lowest_hz": found["feat_extractor.fmin"],
        "highest_hz": found["feat_extractor.fmax"],
    }
    flow = {
        "vocab_size": found["flow.vocab_size"],
        "hidden_size": found[f"{_ENCODER}.output_size"],
        "num_heads": found[f"{_ENCODER}.attention_heads"],
        "ffn_size": found[f"{_ENCODER}.linear_units"],
        "num_blocks": found[f"{_ENCODER}.num_blocks"],
        "dropout": found[f"{_ENCODER}.dropout_rate"],
        "decoder_channels": found[f"{_UNET}.channels"][0],
        "decoder_heads": found[f"{_UNET}.num_heads"],
        "decoder_head_size": found[f"{_UNET}.attention_head_dim"],
        "decoder_transformers": found[f"{_UNET}.n_blocks"],
        "decoder_mid_blocks": found[f"{_UNET}.num_mid_blocks"],
        "speaker_size": found["flow.spk_embed_dim"],
        "num_mel_bins": found["flow.output_size"],
        "sample_rate_hz": mel["sample_rate_hz"],
        "hop_samples": mel["hop_samples"],
        "token_rate_hz": found["flow.input_frame_rate"],
        "start_time": 0.0,
    }
    vocoder = {
        "mel": mel,
        "base_channels": found["hift.base_channels"],
        "upsample_rates": found["hift.upsample_rates"],
        "upsample_kernels": found["hift.upsample_kernel_sizes"],
        "resblock_kernels": found["hift.resblock_kernel_sizes"],
        "source_kernels": found["hift.source_resblock_kernel_sizes"],
        "dilations": found["hift.resblock_dilation_sizes"][0],
        "stft_samples": found["hift.istft_params.n_fft"],
        "stft_hop_samples": found["hift.istft_params.hop_len"],
        "f0_channels": found["hift.f0_predictor.cond_channels"],
        "num_harmonics": found["hift.nb_harmonics"],
        "sine_amplitude": found["hift.nsf_alpha"],
        "noise_std": found["hift.nsf_sigma"],
        "voiced_threshold_hz": found["hift.nsf_voiced_threshold"],
        "leaky_slope": found["hift.lrelu_slope"],
        "audio_limit": found["hift.audio_limit"],
    }
    solver = {"guidance": found[f"{_CFM}.content.inference_cfg_rate"]}
    return ReleasedSettings(
        from_mapping(FlowConfig, flow), from_mapping(FlowSolverConfig, solver), from_mapping(VocoderConfig, vocoder)
    )


def _other_classes(found: Mapping[str, Any], example: Mapping[str, Any]) -> list[str]:
    """Tags of other classes than the decoder is made of. Where a class lies does not matter."""
    return [
        f"{key}: {found.get(key, 'is missing')}; only {wanted} is known"
        for key, wanted in example.items()
        if _is_tag(wanted) and _class_name(found.get(key)) != _class_name(wanted)
    ]


def _missing(found: Mapping[str, Any], example: Mapping[str, Any]) -> list[str]:
    """Keys that are not there, or hold another kind of value than the released one."""
    problems = []
    for key, wanted in example.items():
        if key in _OF_TRAINING:
            continue
        if key not in found:
            problems.append(f"{key} is missing; the released value is {wanted}")
        elif isinstance(wanted, list) and not (isinstance(found[key], list) and found[key]):
            problems.append(f"{key}={found[key]}: must be a list, such as {wanted}")
        elif isinstance(wanted, (int, float)) and not isinstance(found[key], (int, float, NoneType)):
            problems.append(f"{key}={found[key]}: must be a number, such as {wanted}")
    return problems


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    # The released flow has the mel's settings as an argument too; left out, they are the released ones.
    parts = {key.removeprefix("feat_extractor"): value for key, value in wanted.items()}
    allowed = {f"flow.mel_feat_conf{key}": value for key, value in parts.items() if key.startswith(".")}
    known = allowed | _UNSAID | dict(wanted)
    problems = []
    for key, value in found.items():
        if key in _OF_TRAINING or _is_tag(known.get(key)):
            continue
        if key not in known:
            problems.append(f"{key}={value}: this key is not known; take it out if the decoder does without")
        elif value != known[key]:
            problems.append(f"{key}={value}: must be {known[key]}")
    return problems


def _is_tag(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("!")


def _class_name(tag: Any) -> str:
    return str(tag).rsplit(".", 1)[-1]


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise _refusal(path, problems)


def _refusal(path: Path, problems: list[str]) -> DecoderWeightError:
    return DecoderWeightError("\n".join(f"{path}: {problem}" for problem in problems))
