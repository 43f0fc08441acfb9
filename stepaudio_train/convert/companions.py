"""Everything but the weights that transformers, vLLM and StepFun's inference code need in an exported directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stepaudio_train.config.compose import to_mapping
from stepaudio_train.config.schema import PretrainConfig, RunConfig, Step1Config
from stepaudio_train.convert.text_files import CHAT_TEMPLATES, write_text_files
from stepaudio_train.models.step1.modeling import released_config
from stepaudio_train.models.step1.weight_map import num_parameters

CODE_FILES = ("configuration_step1.py", "modeling_step1.py")
"""Copied as they are into every directory, for `trust_remote_code=True`."""
AUTO_MAP = {
    "AutoConfig": "configuration_step1.Step1Config",
    "AutoModelForCausalLM": "modeling_step1.Step1ForCausalLM",
}
HUB = Path(__file__).with_name("hub")


@dataclass(frozen=True)
class ModelCard:
    """What the model card says beyond how to load the model."""

    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration, as plain data."""
    blend: Mapping[str, float] = field(default_factory=dict)
    """Source of data -> its share of the tokens, relative to the others'."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_run(cls, config: RunConfig, metrics: Mapping[str, float]) -> ModelCard:
        """The card of a run's export, titled with the name of its directory."""
        entries = config.data.blend if isinstance(config, PretrainConfig) else {}
        blend = {name: entry.weight for name, entry in entries.items() if entry.weight > 0}
        return cls(Path(config.run_dir).name, to_mapping(config), blend, metrics)


def write_companions(
    directory: Path,
    model: Step1Config,
    dtype: str,
    text_tokenizer: Path | None,
    *,
    chat_template: str = CHAT_TEMPLATES["chat"],
    add_bos: bool,
    card: ModelCard | None,
) -> None:
    """Write all files of a Hugging Face directory except its weights, which stay as they are.

    Args:
        directory: exists already.
        dtype: of the weights, such as "bfloat16" or "float32".
        text_tokenizer: SentencePiece unigram file; None writes no tokenizer files.
        chat_template: Jinja text of how conversations are written.
        add_bos: whether the tokenizer puts `<s>` before every text.
        card: what README.md tells of the training; None for how to load the model alone.

    Raises:
        UserError: the tokenizer has more pieces than the model has ids.
        ValueError: `text_tokenizer` is not a SentencePiece unigram file.
    """
    _write_json(directory / "config.json", {**released_config(model), "auto_map": AUTO_MAP, "torch_dtype": dtype})
    for name in CODE_FILES:
        shutil.copyfile(HUB / name, directory / name)
    _write_json(directory / "generation_config.json", _generation_config(model))
    if text_tokenizer is not None:
        write_text_files(directory, text_tokenizer, model.vocab_size, model.max_seq_len, chat_template, add_bos)
    text = _card_text(card or ModelCard("Step-1"), model, dtype, text_tokenizer is not None)
    (directory / "README.md").write_text(text, encoding="utf-8")


def _generation_config(model: Step1Config) -> dict[str, Any]:
    """The stop id is that of <|EOT|>, as in config.json: the tokenizer's eos, </s>, ends documents, not turns."""
    fields = released_config(model)
    return {
        "bos_token_id": fields["bos_token_id"],
        "eos_token_id": [fields["eos_token_id"]],
        "pad_token_id": fields["pad_token_id"],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    }


def _card_text(card: ModelCard, model: Step1Config, dtype: str, has_tokenizer: bool) -> str:
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["step1", "speech", "custom_code"],
    }
    prompt = (
        'inputs = AutoTokenizer.from_pretrained(folder)("Hello", return_tensors="pt")'
        if has_tokenizer
        else 'inputs = {"input_ids": torch.tensor([[1]])}  # there is no text tokenizer in this directory'
    )
    imports = "AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {card.title}\n",
        "A language model of one vocabulary for text and speech tokens: Step-1, a decoder with square-root ALiBi and "
        "grouped-query attention (Step-Audio, arXiv 2502.11946). Trained with stepaudio-train.\n",
        f"{num_parameters(model):,} parameters in {dtype}, {model.num_hidden_layers} layers of {model.hidden_size}, "
        f"{model.vocab_size} ids, sequences of up to {model.max_seq_len} tokens. Audio is written `<audio_k>`, five "
        "tokens for 0.12 s: two linguistic, three semantic.\n",
        "## With transformers (4.48 and later)\n",
        "```python\nimport torch\n"
        f"from transformers import {imports}\n\n"
        'folder = "."\n'
        'model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", trust_remote_code=True)\n'
        f"{prompt}\n"
        "with torch.inference_mode():\n    ids = model.generate(**inputs, max_new_tokens=64)\n```\n",
        "## With vLLM (0.16 and later)\n",
        "Only its Triton backend knows square-root ALiBi.\n",
        "```bash\nvllm serve . --trust-remote-code --attention-backend TRITON_ATTN\n```\n",
    ]
    if card.blend:
        total = sum(card.blend.values())
        rows = "".join(f"| {name} | {weight / total:.1%} |\n" for name, weight in card.blend.items())
        parts.append(f"## Training data\n\n| source | share of the tokens |\n|---|---|\n{rows}")
    if card.metrics:
        rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in card.metrics.items())
        parts.append(f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}")
    if card.config:
        listed = yaml.safe_dump(dict(card.config), sort_keys=False, allow_unicode=True)
        parts.append(f"## Configuration of the run\n\n```yaml\n{listed}```\n")
    return "\n".join(parts)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
