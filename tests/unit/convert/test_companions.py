import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import BlendEntry, DataConfig, PretrainConfig, RunConfig, Step1Config
from stepaudio_train.convert.companions import HUB, ModelCard, write_companions
from stepaudio_train.convert.text_files import audio_pieces
from stepaudio_train.models.step1.modeling import read_released_config
from stepaudio_train.tokenizers.text import train_text_tokenizer

MODEL = Step1Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=400)
CARD = ModelCard("Small one", {"training": {"seed": 3}}, {"speech": 3.0, "text": 1.0}, {"nll": 2.25})


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.model"
    train_text_tokenizer(["one two three", "four five six"], 352, path)
    return path


def test_files_and_fields(tmp_path, text_tokenizer):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_companions(tmp_path, MODEL, "bfloat16", text_tokenizer, add_bos=True, card=CARD)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "config.json", "configuration_step1.py", "generation_config.json", "model.safetensors",
        "modeling_step1.py", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "tokenizer.model").read_bytes() == text_tokenizer.read_bytes()
    for name in ("configuration_step1.py", "modeling_step1.py"):
        assert (tmp_path / name).read_bytes() == (HUB / name).read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        "architectures": ["Step1ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_step1.Step1Config",
            "AutoModelForCausalLM": "modeling_step1.Step1ForCausalLM",
        },
        "model_type": "step1",
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_attention_groups": 2,
        "num_hidden_layers": 2, "vocab_size": 400, "max_seq_len": 32768, "rms_norm_eps": 1e-05,
        "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 3,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert read_released_config(tmp_path) == MODEL
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": [3], "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.9,
    }  # fmt: skip


def test_written_twice_is_the_same(tmp_path, text_tokenizer):
    """Into a directory whose own tokenizer.model is given, as when a directory is mended."""
    write_companions(tmp_path, MODEL, "float32", text_tokenizer, add_bos=False, card=CARD)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_companions(tmp_path, MODEL, "float32", tmp_path / "tokenizer.model", add_bos=False, card=CARD)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_without_a_tokenizer(tmp_path):
    write_companions(tmp_path, MODEL, "float32", None, add_bos=True, card=None)
    assert not list(tmp_path.glob("tokenizer*"))
    assert "AutoTokenizer" not in (tmp_path / "README.md").read_text()


def test_a_tokenizer_that_is_too_large(tmp_path, text_tokenizer):
    with pytest.raises(UserError, match="has 352 pieces, but the model has vocab_size=350"):
        write_companions(tmp_path, replace(MODEL, vocab_size=350), "float32", text_tokenizer, add_bos=True, card=None)


def test_audio_pieces_are_counted_from_the_first(tmp_path, text_tokenizer):
    """Also where the file holds some of them already, as the released one holds all."""
    proto = ModelProto.FromString(text_tokenizer.read_bytes())
    assert audio_pieces(proto, 355) == ["<audio_0>", "<audio_1>", "<audio_2>"]
    proto.pieces.add(piece="<audio_0>", type=ModelProto.SentencePiece.USER_DEFINED)
    assert audio_pieces(proto, 355) == ["<audio_1>", "<audio_2>"]


def test_the_card_tells_how_to_load_and_what_it_was_made_of(tmp_path, text_tokenizer):
    write_companions(tmp_path, MODEL, "bfloat16", text_tokenizer, add_bos=True, card=CARD)
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert body.lstrip().startswith("# Small one\n")
    for part in ("--attention-backend TRITON_ATTN", "| speech | 75.0% |", "| text | 25.0% |", "| nll | 2.25 |"):
        assert part in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == {"training": {"seed": 3}}
    program = body.split("```python\n")[1].split("```")[0]
    compile(program, "README.md", "exec")


def test_the_card_of_a_run():
    blend = {"asr": BlendEntry("asr", "a", 2.0), "off": BlendEntry("tts", "b", 0.0)}
    config = PretrainConfig(run_dir="runs/stage1", data=DataConfig(source="shards", blend=blend))
    card = ModelCard.of_run(config, {"loss": 2.0})
    assert (card.title, card.blend, card.metrics) == ("stage1", {"asr": 2.0}, {"loss": 2.0})
    assert card.config["training"]["max_steps"] == 100
    assert ModelCard.of_run(RunConfig(), {}).blend == {}
