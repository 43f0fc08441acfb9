"""Weights come out of every chain of conversions as they went in, and what cannot be converted is named."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepaudio_train.commands.convert import ConvertOptions, run_conversion
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.errors import ConfigError, UserError
from stepaudio_train.config.schema import PretrainConfig, Step1Config
from stepaudio_train.convert.companions import write_companions
from stepaudio_train.convert.conversion import Destination, convert
from stepaudio_train.convert.huggingface_files import SafetensorsWriter, make_index, plan_shards
from stepaudio_train.convert.sources import open_source
from stepaudio_train.convert.tensor_files import WeightError
from stepaudio_train.convert.verify import verify
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.weight_map import entries, hf_shapes

# An odd vocabulary: neither four tensor-parallel nor three ZeRO ranks share it evenly.
MODEL = Step1Config(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=8, num_attention_groups=4,
    vocab_size=505,
)  # fmt: skip


def make_directory(path: Path, model: Step1Config = MODEL, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A Hugging Face directory with random weights."""
    writer = SafetensorsWriter(path, model, dtype)
    fresh = InitialWeights(model, seed)
    for entry in entries(model).values():
        # Norms would be all ones, which proves nothing.
        tensors = {name: (fresh[name] + torch.randn(hf_shapes(model)[name]) * 0.1).to(dtype) for name in entry.hf}
        writer.write(entry, tensors)
    writer.finish()
    write_companions(path, model, str(dtype).removeprefix("torch."), None, add_bos=True, card=None)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return make_directory(tmp_path_factory.mktemp("hf") / "model")


def run(source: Path, destination: Path, to: str, **options: object) -> Path:
    assert run_conversion(ConvertOptions(source, destination, to, **options)) == 0  # type: ignore[arg-type]
    return destination


def weight_bytes(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors*"))}


def test_every_byte_returns_from_megatron_and_deepspeed(directory, tmp_path):
    layout = {"tensor_parallel": 4, "pipeline_parallel": 2}
    run(directory, tmp_path / "megatron", "megatron", **layout, verify=True)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) == 8
    run(tmp_path / "megatron", tmp_path / "hf1", "hf", verify=True)
    run(tmp_path / "hf1", tmp_path / "zero3", "deepspeed", zero_ranks=3, verify=True)
    run(tmp_path / "zero3", tmp_path / "hf2", "hf", verify=True)
    run(tmp_path / "hf2", tmp_path / "universal", "deepspeed", verify=True)
    run(tmp_path / "universal", tmp_path / "plain", "plain", verify=True)
    run(tmp_path / "plain", tmp_path / "hf3", "hf", verify=True)
    for name in ("hf1", "hf2", "hf3"):
        assert weight_bytes(tmp_path / name) == weight_bytes(directory), name
    assert (tmp_path / "hf3" / "config.json").read_text() == (directory / "config.json").read_text()


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2), (1, 4, 1), (4, 1, 1)])
def test_any_megatron_layout(directory, tmp_path, layout):
    tensor, pipeline, virtual = layout
    options = {"tensor_parallel": tensor, "pipeline_parallel": pipeline, "virtual_pipeline": virtual}
    run(directory, tmp_path / "megatron", "megatron", **options)
    run(tmp_path / "megatron", tmp_path / "hf", "hf")
    assert weight_bytes(tmp_path / "hf") == weight_bytes(directory)


def test_a_value_head_goes_through_every_format(tmp_path):
    torch.manual_seed(0)
    directory = make_directory(tmp_path / "critic", replace(MODEL, value_head=True))
    assert json.loads((directory / "config.json").read_text())["value_head"] is True
    run(directory, tmp_path / "megatron", "megatron", tensor_parallel=2, pipeline_parallel=2, verify=True)
    run(tmp_path / "megatron", tmp_path / "zero3", "deepspeed", zero_ranks=3, verify=True)
    run(tmp_path / "zero3", tmp_path / "plain", "plain", verify=True)
    run(tmp_path / "plain", tmp_path / "hf", "hf", verify=True)
    assert weight_bytes(tmp_path / "hf") == weight_bytes(directory)
    assert (tmp_path / "hf" / "config.json").read_text() == (directory / "config.json").read_text()
    assert load_file(tmp_path / "hf" / "model-00001.safetensors")["value_head.weight"].shape == (1, 32)


def test_layouts_that_cannot_be_are_told_all_at_once(directory, tmp_path):
    with pytest.raises(ConfigError) as error:
        run(directory, tmp_path / "x", "megatron", tensor_parallel=16, pipeline_parallel=3)
    assert "num_attention_heads=8" in str(error.value) and "num_hidden_layers=4" in str(error.value)
    assert not list(tmp_path.iterdir())


class Interrupted(Exception):
    """Stands for a kill."""


class FailingReader:
    """Reads `at_most` entries, then fails; knows which were asked for."""

    def __init__(self, reader, at_most: int) -> None:
        self.reader, self.at_most, self.dtype, self.asked = reader, at_most, reader.dtype, []

    def read(self, entry):
        if len(self.asked) == self.at_most:
            raise Interrupted
        self.asked.append(entry.megatron)
        return self.reader.read(entry)


@pytest.mark.parametrize("to", ["hf", "megatron", "deepspeed"])
def test_a_stopped_conversion_goes_on_where_it_was(directory, tmp_path, to):
    source = open_source(directory)
    destination = Destination(tmp_path / "out", to, zero_ranks=2)

    def go(reader, origin="same"):
        return convert(reader, source.model, destination, lambda folder: None, origin, progress=False)

    with pytest.raises(Interrupted):
        go(FailingReader(source.reader, 11))
    assert not destination.path.exists()
    if to == "megatron":
        # What was being written when it stopped is half there.
        with (tmp_path / "out.partial" / "__0_0.distcp").open("ab") as file:
            file.write(b"half a tensor")
    second = FailingReader(source.reader, 1000)
    done = go(second)
    names = list(entries(source.model))
    assert second.asked == names[names.index(second.asked[0]) :]
    # All that was read was written before the failure was met.
    assert names.index(second.asked[0]) == 11
    assert done.num_tensors == sum(len(entries(source.model)[name].hf) for name in second.asked)
    assert not (tmp_path / "out.partial").exists()
    verify(source.reader, open_source(destination.path, directory).reader, source.model, progress=False)


def test_another_source_is_not_mixed_in(directory, tmp_path):
    source = open_source(directory)
    destination = Destination(tmp_path / "out", "hf")
    with pytest.raises(Interrupted):
        convert(FailingReader(source.reader, 5), source.model, destination, lambda folder: None, "one", False)
    second = FailingReader(source.reader, 1000)
    convert(second, source.model, destination, lambda folder: None, "another", False)
    assert second.asked == list(entries(source.model))
    with pytest.raises(UserError, match="is there already"):
        convert(source.reader, source.model, destination, lambda folder: None, "one", False)


def test_verify_names_a_flipped_bit(directory, tmp_path):
    other = shutil.copytree(directory, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, file)
    with pytest.raises(WeightError, match=r"layers\.2\.mlp\.up_proj\.weight: 1 of 1,536 values differ"):
        verify(open_source(directory).reader, open_source(other).reader, MODEL, progress=False)


def test_vocabularies_grow_and_shrink(directory, tmp_path):
    run(directory, tmp_path / "grown", "hf", vocab_size=520)
    old = open_source(directory).reader
    grown = open_source(tmp_path / "grown")
    assert grown.model.vocab_size == 520
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        (before,), (after,) = old.read(entries(MODEL)[name]).values(), grown.reader.read(entries(MODEL)[name]).values()
        assert torch.equal(after[:505], before)
        new = after[505:].float()
        # Near the mean of the old rows, and not all alike.
        assert (new - before.float().mean(0)).abs().max() < 6 * MODEL.init_std
        assert new.std(0).min() > 0.2 * MODEL.init_std
    run(tmp_path / "grown", tmp_path / "shrunk", "hf", vocab_size=505)
    assert weight_bytes(tmp_path / "shrunk") == weight_bytes(directory)


def test_fp32_is_rounded_once_when_asked(tmp_path):
    source = make_directory(tmp_path / "fp32", dtype=torch.float32)
    run(source, tmp_path / "bf16", "hf", dtype="bfloat16")
    (before,), (after,) = (list(p.glob("*.safetensors")) for p in (source, tmp_path / "bf16"))
    expected = {name: tensor.bfloat16() for name, tensor in load_file(before).items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(after).items())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_adapters_are_merged(directory, tmp_path):
    torch.manual_seed(1)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    a, b = torch.randn(2, 32), torch.randn(48, 2)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    save_file({key.format("A"): a, key.format("B"): b}, adapters / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (adapters / "adapter_config.json").write_text(json.dumps(settings))
    run(directory, tmp_path / "merged", "hf", merge=adapters)
    (before,), (after,) = (list(p.glob("*.safetensors")) for p in (directory, tmp_path / "merged"))
    old, new = load_file(before), load_file(after)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(new.pop(name), (old.pop(name).float() + 3.0 * (b @ a)).bfloat16())
    assert all(torch.equal(tensor, old[other]) for other, tensor in new.items())
    (adapters / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(WeightError, match="use_dora"):
        run(directory, tmp_path / "dora", "hf", merge=adapters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_mean_is_taken_in_fp32_over_models_of_any_format(directory, tmp_path, dtype):
    torch.manual_seed(2)
    second, third = (make_directory(tmp_path / f"hf{seed}", seed=seed) for seed in (1, 2))
    megatron = run(second, tmp_path / "megatron", "megatron", tensor_parallel=2)
    zero = run(third, tmp_path / "zero", "deepspeed", zero_ranks=2)
    name = str(dtype).removeprefix("torch.")
    mean = run(directory, tmp_path / "mean", "hf", average=(megatron, zero), dtype=name, verify=True)
    models = [load_file(next(path.glob("*.safetensors"))) for path in (directory, second, third)]
    found = load_file(next(mean.glob("*.safetensors")))
    assert found.keys() == models[0].keys()
    for key, tensor in found.items():
        expected = torch.stack([model[key].float() for model in models]).mean(0).to(dtype)
        assert torch.equal(tensor, expected), key


def test_models_that_cannot_be_averaged_are_named(directory, tmp_path):
    torch.manual_seed(3)
    wide = make_directory(tmp_path / "wide", replace(MODEL, intermediate_size=64, vocab_size=510))
    with pytest.raises(WeightError, match=r"wide: has intermediate_size=64, vocab_size=510 where .*model has .*=48"):
        run(directory, tmp_path / "mean", "hf", average=(wide,))
    incomplete = make_directory(tmp_path / "incomplete")
    file = next(incomplete.glob("*.safetensors"))
    weights = load_file(file)
    weights.pop("model.norm.weight")
    save_file(weights, file)
    with pytest.raises(WeightError, match=r"model\.norm\.weight"):
        run(directory, tmp_path / "mean", "hf", average=(incomplete,))
    assert not (tmp_path / "mean").exists()


@pytest.fixture
def broken(directory, tmp_path) -> Path:
    return shutil.copytree(directory, tmp_path / "broken")


def test_a_truncated_shard_is_named(broken, tmp_path):
    (file,) = broken.glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    with pytest.raises(WeightError, match=r"model-00001\.safetensors: is cut short"):
        run(broken, tmp_path / "out", "megatron")


def test_a_missing_tensor_is_named(broken, tmp_path):
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.3.self_attn.k_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(WeightError, match=r"lacks 1 tensor\(s\), such as model\.layers\.3\.self_attn\.k_proj"):
        run(broken, tmp_path / "out", "megatron")


def test_a_wrong_vocabulary_is_named(broken, tmp_path):
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**fields, "vocab_size": 500}))
    with pytest.raises(WeightError, match=r"embed_tokens\.weight has shape \[505, 32\], config\.json says \[500, 32\]"):
        run(broken, tmp_path / "out", "megatron")


def test_tied_weights_are_named(broken, tmp_path):
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(WeightError, match=r"head is tied"):
        run(broken, tmp_path / "out", "megatron")
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    with pytest.raises(WeightError, match=r"tie_word_embeddings=true"):
        run(broken, tmp_path / "out", "megatron")


def test_an_fp16_file_is_named(tmp_path):
    source = make_directory(tmp_path / "fp16", dtype=torch.float16)
    with pytest.raises(UserError, match="holds fp16 weights.*--dtype bfloat16"):
        run(source, tmp_path / "out", "megatron")
    run(source, tmp_path / "out", "hf", dtype="bfloat16", verify=True)


def test_a_pickle_is_named(broken, tmp_path):
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, broken / "pytorch_model.bin")
    with pytest.raises(WeightError, match=r"pytorch_model\.bin is a pickle"):
        run(broken, tmp_path / "out", "megatron")


def test_an_index_cannot_run_code(directory, tmp_path):
    out = run(directory, tmp_path / "megatron", "megatron")
    with (out / ".metadata").open("wb") as file:
        pickle.dump(print, file)
    with pytest.raises(WeightError, match=r"asks for builtins\.print"):
        run(out, tmp_path / "hf", "hf")


def test_a_lost_rank_is_named(directory, tmp_path):
    out = run(directory, tmp_path / "zero", "deepspeed", zero_ranks=2)
    (out / "global_step0" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(WeightError, match="2 ranks wrote it, and files of 1 are there"):
        run(out, tmp_path / "hf", "hf")


def test_a_checkpoint_of_another_model_is_named(directory, tmp_path):
    out = run(directory, tmp_path / "megatron", "megatron")
    other = make_directory(tmp_path / "other", replace(MODEL, intermediate_size=64))
    with pytest.raises(WeightError, match=r"linear_fc1\.weight has shape \[96, 32\], the model needs \[128, 32\]"):
        run(out, tmp_path / "hf", "hf", config=other)


SHAPES = Path(__file__).resolve().parents[4] / "shared" / "reference" / "shapes"


@pytest.mark.parametrize(
    "preset, file, total_bytes",
    [
        ("step1_3b", "step_audio_tts_3b.json", 7_059_412_992),
        ("step1_130b", "step_audio_chat_130b.json", 263_893_180_416),
    ],
)
def test_exported_names_shapes_and_sizes_are_the_released_ones(preset, file, total_bytes):
    model = load_config("pretrain", PretrainConfig, [f"model={preset}", "vocabulary=released"]).model
    shards = plan_shards(hf_shapes(model), torch.bfloat16)
    assert make_index(shards, torch.bfloat16)["metadata"]["total_size"] == total_bytes
    assert list(shards)[:2] == ["model-00001.safetensors", "model-00002.safetensors"]
    if not (SHAPES / file).is_file():
        pytest.skip("needs the released shapes in ../shared/reference/shapes")
    released = json.loads((SHAPES / file).read_text())
    assert {name: list(shape) for shapes in shards.values() for name, shape in shapes.items()} == released
