"""Every trap of an exported directory is named, with what to do about it; a whole one gives nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.check import INDEX_FILE, Finding, check_directory
from stepaudio_train.convert.companions import write_companions
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.models.step1.weight_map import hf_shapes
from stepaudio_train.tokenizers.text import train_text_tokenizer

MODEL = Step1Config(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_attention_groups=2,
    vocab_size=380,
)  # fmt: skip
SHARDS = ("model-00001.safetensors", "model-00002.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two shards in bfloat16 with an index, and all that goes with them."""
    directory = tmp_path_factory.mktemp("whole")
    train_text_tokenizer(["one two three", "four five six"], 352, directory / "tokenizer.model")
    write_companions(directory, MODEL, "bfloat16", directory / "tokenizer.model", add_bos=True, card=None)
    names, weights = list(hf_shapes(MODEL)), InitialWeights(MODEL, seed=0)
    parts = dict(zip(SHARDS, (names[:7], names[7:]), strict=True))
    for shard, held in parts.items():
        save_file({name: weights[name].bfloat16() for name in held}, directory / shard, metadata={"format": "pt"})
    total = 2 * sum(torch.Size(shape).numel() for shape in hf_shapes(MODEL).values())
    places = {name: shard for shard, held in parts.items() for name in held}
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})
    return directory


@pytest.fixture
def directory(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields), encoding="utf-8")


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(path.read_text(encoding="utf-8"))
    change(fields)
    write_json(path, fields)


def change_shard(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def only(found: list[Finding], severity: str, file: str) -> str:
    assert [(f.severity, f.file) for f in found] == [(severity, file)], found
    return found[0].message


def test_a_whole_directory_has_nothing_wrong(whole):
    assert check_directory(whole) == []


def test_one_file_needs_no_index(directory):
    tensors = {name: tensor for shard in SHARDS for name, tensor in load_file(directory / shard).items()}
    for name in (*SHARDS, INDEX_FILE):
        (directory / name).unlink()
    save_file(tensors, directory / "model.safetensors")
    assert check_directory(directory) == []


@pytest.mark.parametrize(
    "file", ["config.json", "configuration_step1.py", "modeling_step1.py", "generation_config.json"]
)
def test_missing_companions(directory, file):
    (directory / file).unlink()
    assert "stepaudio convert" in only(check_directory(directory), "error", file)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tie_word_embeddings", None, "absent"),
        ("tie_word_embeddings", True, "is true"),
        ("auto_map", None, "auto_map must be"),
        ("architectures", ["LlamaForCausalLM"], "Step1ForCausalLM"),
        ("num_attention_groups", None, "num_attention_groups: absent"),
        ("hidden_size", "32", "hidden_size: absent, or no positive number"),
        ("num_attention_groups", 3, "must be a multiple"),
        ("eos_token_id", 2, "set it to 3"),
    ],
)
def test_fields_of_the_configuration(directory, field, value, said):
    def change(fields: dict[str, Any]) -> None:
        del fields[field]
        if value is not None:
            fields[field] = value

    change_json(directory / "config.json", change)
    assert said in only(check_directory(directory), "error", "config.json")


def test_a_value_head_is_known_but_not_to_vllm(directory):
    change_json(directory / "config.json", lambda fields: fields.update(value_head=True))
    errors = {finding.file: finding.message for finding in check_directory(directory)}
    assert "vLLM does not" in errors["config.json"]
    assert "value_head.weight and 1 more tensor(s) missing" in errors["*.safetensors"]


def test_a_dtype_that_is_not_that_of_the_weights(directory):
    change_json(directory / "config.json", lambda fields: fields.update(torch_dtype="float32"))
    assert "the weights are bfloat16" in only(check_directory(directory), "warning", "config.json")


def test_foreign_code_is_pointed_out(directory):
    (directory / "modeling_step1.py").write_text("class Step1ForCausalLM: ...\n")
    assert "attends to padding" in only(check_directory(directory), "warning", "modeling_step1.py")


def test_a_shard_that_is_cut_short(directory):
    path = directory / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-100])
    found = check_directory(directory)
    assert found[0].file == SHARDS[1] and "cut short" in found[0].message
    assert all(finding.severity == "error" for finding in found)


def test_missing_shards_and_tensors(directory):
    (directory / SHARDS[1]).unlink()
    messages = {finding.file: finding.message for finding in check_directory(directory)}
    assert "names it" in messages[SHARDS[1]] and "missing" in messages["*.safetensors"]


def test_a_tensor_that_the_index_promises(directory):
    name = "model.layers.1.mlp.up_proj.weight"
    change_shard(directory / SHARDS[1], lambda tensors: tensors.pop(name))
    messages = {finding.file: finding.message for finding in check_directory(directory)}
    assert name in messages[SHARDS[1]] and name in messages["*.safetensors"] and "total_size" in messages[INDEX_FILE]


def test_a_wrong_total_and_a_stray_file(directory):
    change_json(directory / INDEX_FILE, lambda fields: fields["metadata"].update(total_size=5))
    save_file({"more": torch.zeros(2, dtype=torch.bfloat16)}, directory / "old.safetensors")
    messages = [(finding.file, finding.message) for finding in check_directory(directory)]
    assert any(file == INDEX_FILE and "total_size is 5" in message for file, message in messages)
    assert any(file == "old.safetensors" and "delete it" in message for file, message in messages)


def test_shards_without_an_index(directory):
    (directory / INDEX_FILE).unlink()
    assert "is missing" in only(check_directory(directory), "error", INDEX_FILE)


def test_a_tied_head(directory):
    change_shard(directory / SHARDS[1], lambda tensors: tensors.pop("lm_head.weight"))
    found = [finding for finding in check_directory(directory) if finding.file == "*.safetensors"]
    assert "tied to the embedding" in only(found, "error", "*.safetensors")


def test_shapes(directory):
    name = "model.layers.1.mlp.up_proj.weight"
    change_shard(directory / SHARDS[1], lambda tensors: tensors.update({name: tensors[name][:40]}))
    messages = {finding.file: finding.message for finding in check_directory(directory)}
    assert f"{name} has shape [40, 32], config.json asks for [48, 32]" in messages[SHARDS[1]]


def test_half_precision(directory):
    for shard in SHARDS:
        change_shard(directory / shard, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    change_json(directory / "config.json", lambda fields: fields.update(torch_dtype="float16"))
    assert "as bfloat16" in only(check_directory(directory), "error", "*.safetensors")


def test_pickles(directory):
    for name in (*SHARDS, INDEX_FILE):
        (directory / name).unlink()
    torch.save({}, directory / "pytorch_model.bin")
    messages = {finding.file: finding.message for finding in check_directory(directory)}
    assert "save the weights as safetensors" in messages["pytorch_model.bin"]
    assert "no weights" in messages["model.safetensors"]


def test_vocabularies_that_do_not_fit(directory):
    change_json(directory / "config.json", lambda fields: fields.update(vocab_size=376))
    messages = {finding.file: finding.message for finding in check_directory(directory)}
    assert "have 380 rows" in messages["config.json"] and "has 380 ids" in messages["tokenizer.json"]


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "TokenizersBackend", "BertTokenizer"])
def test_tokenizer_classes(directory, kind):
    change_json(directory / "tokenizer_config.json", lambda fields: fields.update(tokenizer_class=kind))
    assert 'set it to "PreTrainedTokenizerFast"' in only(check_directory(directory), "error", "tokenizer_config.json")


def test_tokenizer_files(directory, tmp_path):
    (directory / "tokenizer.model").unlink()
    only(check_directory(directory), "warning", "tokenizer.model")
    train_text_tokenizer(["another text"], 352, directory / "tokenizer.model")
    assert "another piece" in only(check_directory(directory), "error", "tokenizer.model")
    (directory / "tokenizer.model").write_bytes(b"\xff\xff\xff\xff")
    assert "not a SentencePiece" in only(check_directory(directory), "error", "tokenizer.model")
    (directory / "tokenizer.model").unlink()
    (directory / "tokenizer_config.json").unlink()
    (directory / "tokenizer.json").unlink()
    assert "no tokenizer files" in only(check_directory(directory), "warning", "tokenizer.json")


def test_a_tokenizer_that_was_made_a_bpe(directory):
    change_json(directory / "tokenizer.json", lambda fields: fields["model"].update(type="BPE"))
    assert "must be Unigram" in only(check_directory(directory), "error", "tokenizer.json")


def test_where_generation_ends(directory):
    change_json(directory / "generation_config.json", lambda fields: fields.update(eos_token_id=2))
    assert "set it to [3]" in only(check_directory(directory), "error", "generation_config.json")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_files_that_are_no_mapping(directory, content):
    (directory / "generation_config.json").write_text(content)
    only(check_directory(directory), "error", "generation_config.json")


def test_no_directory(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        check_directory(tmp_path / "nowhere")
