"""Adapters: what is trained, merging, the PEFT directory, going on from a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import (
    EngineConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.data.synthetic import SyntheticLoader
from stepaudio_train.engines.build import build_engine
from stepaudio_train.engines.local import LocalEngine
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.lora import adapter_parameters, adapter_shapes, initial_adapter, write_adapters
from stepaudio_train.models.step1.modeling import Step1ForCausalLM
from stepaudio_train.models.step1.weight_map import num_parameters
from stepaudio_train.objectives.language_modelling import LanguageModelling
from stepaudio_train.tokenizers.vocabulary import Vocabulary
from stepaudio_train.training.loop import fit
from stepaudio_train.training.run_directory import RunDirectory

VOCABULARY = VocabularyConfig(text_size=345, linguistic_size=64, semantic_size=96, reserved_size=0)
MODEL = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_attention_groups=2,
    vocab_size=505,
)
LORA = LoraConfig(rank=3, alpha=12.0)
CONFIG = PretrainConfig(
    model=MODEL,
    vocabulary=VOCABULARY,
    engine=EngineConfig(device="cpu"),
    lora=LORA,
    optimizer=OptimizerConfig(learning_rate=1e-2),
    training=TrainingConfig(sequence_length=32, global_batch_rows=4),
)
IDS = torch.arange(24).view(2, 12) * 7 + 5


def build(config: PretrainConfig = CONFIG) -> tuple[LocalEngine, SyntheticLoader]:
    engine = LocalEngine(config)
    engine.load_weights(InitialWeights(MODEL, 0))
    return engine, SyntheticLoader(config.data, Vocabulary.from_config(VOCABULARY), 32, 4, 0, 0, 1)


def train(engine: LocalEngine, loader: SyntheticLoader, steps: int = 3) -> list[float]:
    objective = LanguageModelling(Vocabulary.from_config(VOCABULARY))
    return [engine.train_step([loader.next_batch()], objective, 1e-2).loss for _ in range(steps)]


def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = Step1ForCausalLM(MODEL)
    model.load_state_dict(weights)
    return model(IDS)


@pytest.fixture(scope="module")
def trained() -> LocalEngine:
    engine, loader = build()
    losses = train(engine, loader, 6)
    assert losses[-1] < losses[0]
    return engine


def test_an_untrained_adapter_changes_nothing():
    for name, tensor in build()[0].export_weights():
        assert torch.equal(tensor, InitialWeights(MODEL, 0)[name]), name


def test_first_values_come_from_seed_and_name_alone():
    shapes = adapter_shapes(MODEL, LORA)
    assert len(shapes) == 2 * 7 * MODEL.num_hidden_layers
    first = {name: initial_adapter(name, shape, 0) for name, shape in shapes.items()}
    assert all(torch.equal(first[name], tensor) for name, tensor in build()[0].adapters())
    matrices = [tensor for name, tensor in first.items() if "lora_A" in name]
    assert all(tensor.any() == ("lora_A" in name) for name, tensor in first.items())
    assert len({float(tensor[0, 0]) for tensor in matrices}) == len(matrices)
    name = next(iter(shapes))
    assert not torch.equal(first[name], initial_adapter(name, shapes[name], 1))


def test_names_and_shapes_are_those_in_the_model(trained):
    found = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(trained.model).items()}
    assert found == adapter_shapes(MODEL, LORA)
    assert trained.num_parameters() == num_parameters(MODEL)


def test_only_targets_get_an_adapter():
    shapes = adapter_shapes(MODEL, replace(LORA, targets=("v_proj",)))
    assert list(shapes) == [
        f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_{part}.weight" for i in range(2) for part in "AB"
    ]
    engine, _ = build(replace(CONFIG, lora=replace(LORA, targets=("v_proj",))))
    assert [name for name, _ in engine.adapters()] == list(shapes)


def test_the_weights_underneath_stay_as_they_are(trained):
    for name, parameter in trained.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, InitialWeights(MODEL, 0)[name.replace(".base_layer.", ".")]), name
    changed = {name for name, tensor in trained.export_weights() if not tensor.equal(InitialWeights(MODEL, 0)[name])}
    assert changed == {name for name in InitialWeights(MODEL, 0) if name.endswith("proj.weight")}


def test_merged_weights_compute_what_the_adapted_model_does(trained):
    before = logits(dict(InitialWeights(MODEL, 0)))
    adapted = trained.model(IDS)
    torch.testing.assert_close(logits(dict(trained.export_weights())), adapted, rtol=1e-5, atol=1e-6)
    assert (adapted - before).abs().max() > 1e-3


def test_peft_loads_the_directory_over_the_base_model(trained, tmp_path: Path):
    from peft import PeftModel

    write_adapters(tmp_path, dict(trained.adapters()), LORA, "somewhere")
    base = Step1ForCausalLM(MODEL)
    base.load_state_dict(dict(InitialWeights(MODEL, 0)))
    base.prepare_inputs_for_generation = None  # PEFT wraps it in causal language models; transformers' have it
    model = PeftModel.from_pretrained(base, str(tmp_path))
    assert model.peft_config["default"].base_model_name_or_path == "somewhere"
    torch.testing.assert_close(model.base_model(IDS), trained.model(IDS), rtol=0, atol=0)


def test_a_run_leaves_adapters_that_transformers_and_peft_load_and_goes_on_bit_for_bit(tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, straight, halves = (tmp_path / name for name in ("base", "straight", "halves"))
    fit_run(replace(CONFIG, lora=None), base, None, 1)
    expected = fit_run(CONFIG, straight, base, 4)
    fit_run(CONFIG, halves, base, 2)
    assert not (halves / "checkpoints/step_00000002/engine/model.safetensors").exists()
    assert fit_run(CONFIG, halves, base, 4) == expected
    written = [load_file(run / "adapters/adapter_model.safetensors") for run in (straight, halves)]
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())
    plain, merged = (
        AutoModelForCausalLM.from_pretrained(run / "export", trust_remote_code=True).eval() for run in (base, straight)
    )
    before = plain(IDS).logits
    adapted = PeftModel.from_pretrained(plain, str(straight / "adapters"))(input_ids=IDS).logits
    torch.testing.assert_close(adapted, merged(IDS).logits, rtol=1e-5, atol=1e-6)
    assert (adapted - before).abs().max() > 1e-3


def fit_run(config: PretrainConfig, run_dir: Path, init: Path | None, steps: int) -> list[float]:
    """Train to step `steps` with the loop; all losses so far."""
    model = replace(config.model, init=str(init) if init else None)
    logging = LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False)
    training = replace(config.training, max_steps=steps)
    config = replace(config, run_dir=str(run_dir), model=model, logging=logging, training=training)
    run = RunDirectory(run_dir)
    run.claim(config)
    vocabulary = Vocabulary.from_config(VOCABULARY)
    loader = build_train_loader(config.data, vocabulary, training.sequence_length, training.global_batch_rows, 0)
    try:
        fit(config, build_engine(config), loader, LanguageModelling(vocabulary), run)
    finally:
        run.release()
    return [json.loads(line)["loss"] for line in run.metrics_file.read_text().splitlines()]


def test_a_checkpoint_of_adapters_goes_on_bit_for_bit(tmp_path: Path):
    engine, loader = build()
    train(engine, loader)
    engine.save(tmp_path)
    stored = {name for file in tmp_path.glob("*.safetensors") for name in load_file(file)}
    assert stored and all("lora_" in name for name in stored)
    expected = train(engine, loader)
    other, _ = build(replace(CONFIG, training=replace(CONFIG.training, seed=3)))
    other.load(tmp_path)
    loader = build()[1]
    for _ in range(3):
        loader.next_batch()
    assert train(other, loader) == expected


def test_a_checkpoint_of_another_form_is_refused(tmp_path: Path):
    full = replace(CONFIG, lora=None)
    wide = replace(CONFIG, lora=replace(LORA, rank=5))
    for written, reading in ((CONFIG, full), (full, CONFIG), (CONFIG, wide)):
        build(written)[0].save(tmp_path)
        with pytest.raises(UserError, match="holds other adapters"):
            build(reading)[0].load(tmp_path)
        for file in tmp_path.iterdir():
            file.unlink()


def test_bf16_keeps_adapters_in_fp32_and_follows():
    engine, loader = build(replace(CONFIG, engine=EngineConfig(device="cpu", precision="bf16")))
    kinds = {("lora_" in name, parameter.dtype) for name, parameter in engine.model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert train(engine, loader) == pytest.approx(train(*build()), rel=0.02)
