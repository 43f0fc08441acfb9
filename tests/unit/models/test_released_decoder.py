"""The released decoder's directory: what is written is read, what others write is read, and nothing in it is run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from torch import Tensor

from stepaudio_train.audio.speech_like import speech_like
from stepaudio_train.config.decoder import FlowConfig, FlowSolverConfig
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.speaker import SpeakerEncoderConfig
from stepaudio_train.config.vocoder import MelConfig, VocoderConfig
from stepaudio_train.models.decoder.flow import FlowMatching
from stepaudio_train.models.decoder.flow_files import NoSpeaker
from stepaudio_train.models.decoder.released import is_released_decoder, writing_released_decoder
from stepaudio_train.models.decoder.released.hyperpyyaml import dump_flat, read_flat
from stepaudio_train.models.decoder.released.settings import (
    ReleasedSettings,
    read_settings,
    released_document,
    write_settings,
)
from stepaudio_train.models.decoder.released.speaker_onnx import write_speaker_onnx
from stepaudio_train.models.decoder.speaker import CamPlusEmbedding, SmallSpeakerEncoder, SpeakerError
from stepaudio_train.models.decoder.speech_decoder import SpeechDecoder
from stepaudio_train.models.decoder.vocoder import HiFTGenerator
from stepaudio_train.models.decoder.vocoder_files import load_vocoder_weights
from stepaudio_train.models.decoder.weights import DecoderWeightError
from stepaudio_train.tokenizers.speech import SpeechTokens

RELEASED = ReleasedSettings(FlowConfig.released(), FlowSolverConfig(), VocoderConfig.released())
SMALL = ReleasedSettings(
    FlowConfig(
        hidden_size=32,
        ffn_size=32,
        num_blocks=1,
        decoder_channels=32,
        decoder_head_size=16,
        decoder_mid_blocks=1,
        start_time=0.0,
    ),
    FlowSolverConfig(guidance=0.3),
    VocoderConfig(base_channels=16, f0_channels=16, resblock_kernels=(3,), num_harmonics=2),
)
RELEASED_YAML = """
# Written as the released file is: references, words in quotes, parts that a decoder has no use for.
__set_seed1: !apply:random.seed [1986]
sample_rate: 22050
spk_embed_dim: 192
flow: !new:cosyvoice.flow.flow.MaskedDiffWithXvec
    input_size: 512
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: 5120
    input_frame_rate: 41.667
    only_mask_loss: True
    encoder: !new:cosyvoice.transformer.encoder.ConformerEncoder
        output_size: 512
        attention_heads: 8
        linear_units: 2048
        num_blocks: 6
        dropout_rate: 0.01
        positional_dropout_rate: 0.1
        attention_dropout_rate: 0.1
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: 512
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: 1
    length_regulator: !new:cosyvoice.flow.length_regulator.InterpolateRegulator
        channels: 80
        sampling_ratios: [1, 1, 1, 1]
    decoder: !new:cosyvoice.flow.flow_matching.ConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 7e-1
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.decoder.ConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: [256, 256]
            dropout: 0
            attention_head_dim: 64
            n_blocks: 4
            num_mid_blocks: 12
            num_heads: 8
            act_fn: 'gelu'
    mel_feat_conf: {n_fft: 1024, num_mels: 80, sampling_rate: !ref <sample_rate>, hop_size: 256, win_size: 1024}
hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: 512
    sampling_rate: !ref <sample_rate>
    istft_params:
        n_fft: 16
        hop_len: 4
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: 512
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1024
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 256
    win_size: 1024
    fmin: 0
    fmax: 8000
    center: False
parquet_opener: !name:cosyvoice.dataset.processor.parquet_opener
compute_fbank: !name:cosyvoice.dataset.processor.compute_fbank
    feat_extractor: !ref <feat_extractor>
data_pipeline: [!ref <parquet_opener>, !ref <compute_fbank>]
"""


def written(folder: Path, text: str = RELEASED_YAML) -> Path:
    path = folder / "cosyvoice.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def trained_encoder() -> SmallSpeakerEncoder:
    torch.manual_seed(1)
    encoder = SmallSpeakerEncoder(SpeakerEncoderConfig(channels=16))
    encoder(3 * torch.randn(4, 30, 80) + 1)  # running statistics of its own
    return encoder.eval()


def export(folder: Path, speaker: Path | SmallSpeakerEncoder | NoSpeaker) -> SpeechDecoder:
    torch.manual_seed(0)
    flow, vocoder = FlowMatching(SMALL.flow), HiFTGenerator(SMALL.vocoder)
    with writing_released_decoder(flow, SMALL.solver, vocoder, speaker, folder):
        pass
    return SpeechDecoder(flow, vocoder, NoSpeaker(192), SMALL.solver, "cpu")


def sound(decoder: SpeechDecoder, voice: Tensor) -> Tensor:
    codes = SpeechTokens(np.arange(8, dtype=np.int32), np.arange(12, dtype=np.int32))
    return decoder.decode([codes], [replace(decoder.prompt(speech_like(16000)), speaker=voice)])[0]


# Settings


@pytest.mark.parametrize("settings", [RELEASED, SMALL], ids=["released", "small"])
def test_settings_return(tmp_path, settings):
    write_settings(settings, tmp_path / "cosyvoice.yaml")
    assert read_settings(tmp_path / "cosyvoice.yaml") == settings


def test_a_file_written_as_the_released_one_gives_the_released_sizes(tmp_path):
    assert read_settings(written(tmp_path)) == RELEASED


def test_another_reader_finds_every_class_and_argument(tmp_path):
    """As hyperpyyaml does: a tag's class, called with the mapping under it."""
    write_settings(SMALL, tmp_path / "cosyvoice.yaml")

    class Reader(yaml.SafeLoader):
        pass

    def called(loader, name, node):
        sequence = isinstance(node, yaml.SequenceNode)
        return name, loader.construct_sequence(node) if sequence else loader.construct_mapping(node, deep=True)

    for kind in ("new", "name", "apply"):
        Reader.add_multi_constructor(f"!{kind}:", called)
    document = yaml.load((tmp_path / "cosyvoice.yaml").read_text(), Reader)
    name, flow = document["flow"]
    assert name == "cosyvoice.flow.flow.MaskedDiffWithXvec"
    assert (flow["vocab_size"], flow["input_frame_rate"]) == (5120, 41.667)
    name, params = flow["decoder"][1]["cfm_params"]
    assert name == "omegaconf.DictConfig" and params["content"]["inference_cfg_rate"] == 0.3
    assert params["content"]["sigma_min"] == 1e-6
    name, vocoder = document["hift"]
    assert vocoder["istft_params"] == {"n_fft": 16, "hop_len": 4}
    assert vocoder["resblock_dilation_sizes"] == [[1, 3, 5]]
    assert vocoder["source_resblock_dilation_sizes"] == [[1, 3, 5]] * 2
    assert document["feat_extractor"][1]["fmax"] == 8000
    assert document["__seed_torch"] == ("torch.manual_seed", [1986])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("flow.flow.MaskedDiffWithXvec", "flow.flow.CausalMaskedDiffWithXvec", "flow: !new:.*CausalMasked.*only"),
        ("!new:cosyvoice.hifigan.generator.HiFTGenerator", "", "hift: is missing; only !new:.*HiFTGenerator is known"),
        ("solver: 'euler'", "solver: midpoint", "flow.decoder.cfm_params.content.solver=midpoint: must be euler"),
        ("t_scheduler: 'cosine'", "t_scheduler: linear", "t_scheduler=linear: must be cosine"),
        ("act_fn: 'gelu'", "act_fn: 'snake'", "estimator.act_fn=snake: must be gelu"),
        ("channels: [256, 256]", "channels: [256, 128]", r"estimator.channels=\[256, 128\]: must be \[256, 256\]"),
        ("channels: [256, 256]", "channels: 256", r"estimator.channels=256: must be a list, such as \[256, 256\]"),
        ("in_channels: 320", "in_channels: 240", "estimator.in_channels=240: must be 320"),
        ("        num_blocks: 6\n", "", "flow.encoder.num_blocks is missing; the released value is 6"),
        ("num_blocks: 6", "num_blocks: six", "flow.encoder.num_blocks=six: must be a number, such as 6"),
        ("num_blocks: 6", "num_blocks: 6.5", "num_blocks: input should be a valid integer"),
        ("attention_heads: 8", "attention_heads: 7", "num_heads=7"),
        ("use_cnn_module: False", "use_cnn_module: True", "flow.encoder.use_cnn_module=True: must be False"),
        ("macaron_style: False", "macaron: False", "macaron_style is missing"),
        ("static_chunk_size: 1", "lookahead: 3", "flow.encoder.lookahead=3: this key is not known"),
        ("sample_rate: 22050", "sample_rate: 24000", "sample_rate_hz=24000.*count frames with 22050 and 256"),
        ("fmax: 8000", "fmax: null", "vocoder takes the mel"),
        ("hop_size: 256, win", "hop_size: 480, win", "flow.mel_feat_conf.hop_size=480: must be 256"),
        ("vocab_size: 5120", "vocab_size: !ref <size>", "flow.vocab_size=!ref <size>: must be a value"),
        ("vocab_size: 5120", "vocab_size: !ref <sample_rate> * 2", r"flow.vocab_size=!ref <sample_rate> \* 2"),
        ("input_size: 512", "input_size: &a [*a]", "aliases"),
        ("sample_rate: 22050", "sample_rate: [", "cannot be read as YAML"),
    ],
)
def test_what_is_another_decoder_is_refused_by_its_key(tmp_path, old, new, message):
    assert old in RELEASED_YAML
    with pytest.raises(DecoderWeightError, match=f"cosyvoice.yaml: .*{message}"):
        read_settings(written(tmp_path, RELEASED_YAML.replace(old, new, 1)))


def test_every_problem_is_told(tmp_path):
    text = RELEASED_YAML.replace("'euler'", "midpoint").replace("'gelu'", "snake")
    with pytest.raises(DecoderWeightError, match="(?s)solver=midpoint.*act_fn=snake"):
        read_settings(written(tmp_path, text))
    for text in ("", "- 1", "a: !!python/object/apply:os.system [ls]"):
        with pytest.raises(DecoderWeightError, match="cosyvoice.yaml"):
            read_settings(written(tmp_path, text))


def test_nothing_that_a_file_names_is_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    monkeypatch.setattr(os, "system", lambda command: ran.touch())
    harm = f"!apply:os.system ['touch {ran}']"
    assert read_settings(written(tmp_path, RELEASED_YAML + f"more: {harm}\n")) == RELEASED
    for place in (
        "vocab_size: 5120",
        "'euler'",
        "f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor",
    ):
        key = place.split(":")[0] + ": " if ":" in place else ""
        with pytest.raises(DecoderWeightError):
            read_settings(written(tmp_path, RELEASED_YAML.replace(place, key + harm)))
    assert not ran.exists()


def test_a_flat_document_returns(tmp_path):
    document = released_document(RELEASED)
    path = written(tmp_path, dump_flat(document))
    assert read_flat(path, ("feat_extractor", "flow", "hift")) == document


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SMALL._replace(flow=replace(SMALL.flow, sample_rate_hz=16000)), "count frames with 22050 and 256"),
        (SMALL._replace(flow=replace(SMALL.flow, start_time=0.5)), "train with flow.start_time=0"),
        (SMALL._replace(vocoder=replace(SMALL.vocoder, mel=MelConfig(highest_hz=None))), "the vocoder takes the mel"),
    ],
)
def test_sizes_that_the_released_programs_cannot_have_are_not_written(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        write_settings(settings, tmp_path / "cosyvoice.yaml")
    assert not list(tmp_path.iterdir())


# The directory


def test_an_exported_decoder_makes_the_same_sound(tmp_path):
    made = export(tmp_path / "out", trained_encoder())
    assert is_released_decoder(tmp_path / "out")
    names = ["VERSION_Vq0206Vocoder_1202", "campplus.onnx", "cosyvoice.yaml", "flow.pt", "hift.pt"]
    assert sorted(path.name for path in tmp_path.joinpath("out").iterdir()) == names
    read = SpeechDecoder.from_directory(tmp_path / "out", device="cpu")
    assert (read.flow.config, read.solver, read.vocoder.config) == SMALL
    voice = torch.randn(192, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sound(made, voice), sound(read, voice))
    own = FlowSolverConfig(num_steps=1)
    assert SpeechDecoder.from_directory(tmp_path / "out", tmp_path / "out", own, "cpu").solver == own


def test_names_and_shapes_are_those_of_the_released_classes(tmp_path):
    export(tmp_path / "out", NoSpeaker(192))
    weights = torch.load(tmp_path / "out" / "hift.pt", weights_only=True)
    assert {"ups.0.weight_g", "ups.0.weight_v", "f0_predictor.condnet.0.weight_g"} <= weights.keys()
    assert not any("parametrizations" in name for name in weights)
    flow = torch.load(tmp_path / "out" / "flow.pt", weights_only=True)
    assert flow["decoder.estimator.down_blocks.0.0.block1.block.0.weight"].shape == (32, 320, 3)


def test_a_directory_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(FileNotFoundError):
        export(tmp_path / "out", tmp_path / "no.onnx")
    assert not list(tmp_path.iterdir())
    export(tmp_path / "out", NoSpeaker(192))
    with pytest.raises(UserError, match="out: exists already"):
        export(tmp_path / "out", NoSpeaker(192))


def test_missing_and_foreign_files_are_named(tmp_path):
    export(tmp_path / "out", NoSpeaker(192))
    for name in ("campplus.onnx", "hift.pt", "flow.pt"):
        (tmp_path / "out" / name).rename(tmp_path / name)
        with pytest.raises(DecoderWeightError, match=name):
            SpeechDecoder.from_directory(tmp_path / "out", device="cpu")
        (tmp_path / name).rename(tmp_path / "out" / name)
    write_speaker_onnx(NoSpeaker(64), tmp_path / "out" / "campplus.onnx")
    with pytest.raises(SpeakerError, match="gives vectors of 64"):
        SpeechDecoder.from_directory(tmp_path / "out", device="cpu")


def test_checkpoints_of_upstreams_training_are_taken(tmp_path):
    """With counters among the tensors, discriminators beside the generator and the newer names of weight norm."""
    vocoder = HiFTGenerator(SMALL.vocoder)
    newer = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor
        for name, tensor in vocoder.state_dict().items()
    }
    checkpoint = {f"generator.{name}": tensor for name, tensor in newer.items()}
    checkpoint["discriminator.mpd.discriminators.0.convs.0.bias"] = torch.zeros(32)
    torch.save(checkpoint | {"epoch": 3, "step": 100}, tmp_path / "hift.pt")
    read = HiFTGenerator(SMALL.vocoder)
    load_vocoder_weights(read, tmp_path / "hift.pt")
    assert all(torch.equal(tensor, vocoder.state_dict()[name]) for name, tensor in read.state_dict().items())


# The speaker encoder


def test_the_encoders_onnx_gives_its_vectors(tmp_path):
    encoder = trained_encoder()
    write_speaker_onnx(encoder, tmp_path / "campplus.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "campplus.onnx"), providers=["CPUExecutionProvider"])
    # Of one frame there is no deviation, and the vector depends on the variance's floor.
    for num_clips, num_frames, scale in ((1, 9, 1.0), (3, 200, 4.0), (2, 1, 1.0), (2, 50, 0.0)):
        features = scale * torch.randn(num_clips, num_frames, 80)
        (found,) = session.run(None, {session.get_inputs()[0].name: features.numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(found, encoder(features).numpy(), atol=2e-6)
    clip = speech_like(12000)
    found = CamPlusEmbedding(tmp_path / "campplus.onnx").embed(clip)
    np.testing.assert_allclose(found.numpy(), encoder.embed(clip).numpy(), atol=2e-6)


def test_no_speaker_is_no_voice(tmp_path):
    write_speaker_onnx(NoSpeaker(192), tmp_path / "campplus.onnx")
    assert torch.equal(CamPlusEmbedding(tmp_path / "campplus.onnx").embed(speech_like(4000)), torch.zeros(192))
