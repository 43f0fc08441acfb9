"""What a Hugging Face directory lacks to be served by transformers, vLLM and StepFun's inference code alike.

Only small files and the headers of the weights are read, so a model of any size is checked in seconds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import Step1Config
from stepaudio_train.convert.companions import AUTO_MAP, CODE_FILES, HUB
from stepaudio_train.convert.huggingface_files import INDEX_FILE
from stepaudio_train.convert.tensor_files import StoredTensor, WeightError, read_safetensors_header
from stepaudio_train.models.step1.modeling import RELEASED_FIELDS, model_of_fields, released_config
from stepaudio_train.models.step1.weight_map import hf_shapes
from stepaudio_train.tokenizers.text import read_text_tokenizer
from stepaudio_train.tokenizers.vocabulary import Special

_REWRITE = "`stepaudio convert DIR NEW --to hf` writes it (and wants --config DIR where config.json is gone)"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
_HEAD = "lm_head.weight"
_VOCABULARY = ("model.embed_tokens.weight", _HEAD)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with one file."""

    severity: Literal["error", "warning"]
    """error: some program does not load the directory, or computes something else with it."""
    file: str
    """Name in the directory."""
    message: str
    """What is wrong, why it matters, what to do."""


class _Findings(list[Finding]):
    def error(self, file: str, message: str) -> None:
        self.append(Finding("error", file, message))

    def warning(self, file: str, message: str) -> None:
        self.append(Finding("warning", file, message))


def check_directory(directory: Path) -> list[Finding]:
    """All that is wrong with a Hugging Face directory of a Step-1 model; empty where it can be served as it is.

    Raises:
        UserError: no such directory.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; type the export/ folder of a finished run")
    found = _Findings()
    fields = _read_json(directory, "config.json", found)
    model = _check_config(fields, found) if fields is not None else None
    _check_code(directory, found)
    _check_generation(directory, found)
    tensors = _check_files(directory, found)
    if model is not None and fields is not None:
        _check_tensors(tensors, model, fields, found)
    _check_tokenizer(directory, model, found)
    return list(found)


def _read_json(directory: Path, name: str, found: _Findings) -> dict[str, Any] | None:
    path = directory / name
    if not path.is_file():
        found.error(name, f"is missing; {_REWRITE}")
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        found.error(name, f"is not JSON ({error}); {_REWRITE}")
        return None
    if not isinstance(fields, dict):
        found.error(name, f"holds no mapping; {_REWRITE}")
        return None
    return fields


def _check_config(fields: dict[str, Any], found: _Findings) -> Step1Config | None:
    """The model's sizes, where they are all there."""
    name = "config.json"
    if fields.get("tie_word_embeddings") is not False:
        said = "true" if fields.get("tie_word_embeddings") else "absent, which vLLM and transformers 4.55 read as true"
        found.error(
            name, f"tie_word_embeddings is {said}: the head would be replaced by the embedding; set it to false"
        )
    if fields.get("auto_map") != AUTO_MAP:
        found.error(name, f"auto_map must be {json.dumps(AUTO_MAP)}: without it the model's code is not found; set it")
    if "torch_dtype" not in fields and "dtype" not in fields:
        found.warning(name, "torch_dtype is absent: some versions load float32; set it to that of the weights")
    lacking = [field for field in RELEASED_FIELDS if not _is_size(fields.get(field))]
    if lacking:
        found.error(name, f"{', '.join(lacking)}: absent, or no positive number; set what the model was made with")
        return None
    model = model_of_fields(fields)
    for field, wanted in released_config(model).items():
        if field not in RELEASED_FIELDS and field != "tie_word_embeddings" and fields.get(field) != wanted:
            found.error(name, f"{field} is {fields.get(field)!r}; set it to {json.dumps(wanted)}")
    if model.value_head:
        found.error(
            name, "value_head is true: transformers loads a reward model or critic, vLLM does not; serve the policy"
        )
    if model.hidden_size % model.num_attention_heads or model.num_attention_heads % model.num_attention_groups:
        found.error(
            name,
            f"hidden_size={model.hidden_size} must be a multiple of num_attention_heads={model.num_attention_heads}, "
            f"and that of num_attention_groups={model.num_attention_groups}; set what the model was made with",
        )
        return None
    return model


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _check_code(directory: Path, found: _Findings) -> None:
    for name in CODE_FILES:
        path = directory / name
        if not path.is_file():
            found.error(name, f"is missing; {_REWRITE}")
        elif path.read_bytes() != (HUB / name).read_bytes():
            found.warning(
                name,
                "is not the file that this version writes; the released one attends to padding, and transformers 5 "
                f"cannot save it again; {_REWRITE}",
            )


def _check_generation(directory: Path, found: _Findings) -> None:
    name = "generation_config.json"
    fields = _read_json(directory, name, found)
    if fields is None:
        return
    stops = fields.get("eos_token_id")
    if int(Special.EOT) not in (stops if isinstance(stops, list) else [stops]):
        found.error(name, f"eos_token_id is {stops}: answers end with <|EOT|>, id {int(Special.EOT)}; set it to [3]")


def _check_files(directory: Path, found: _Findings) -> dict[str, StoredTensor]:
    """Every tensor of the directory's safetensors files."""
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    for name in pickles:
        found.error(
            name, "is a pickle, which can run code when it is loaded; save the weights as safetensors, delete it"
        )
    if not shards:
        found.error("model.safetensors", "there are no weights; export the run again, or convert its checkpoint")
        return {}
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name in shards:
        try:
            headers[name] = read_safetensors_header(directory / name)
        except WeightError as error:
            found.error(name, str(error).removeprefix(f"{directory / name}: "))
    twice = [name for name, count in Counter(name for held in headers.values() for name in held).items() if count > 1]
    if twice:
        found.error(INDEX_FILE, f"{_listed(twice)} in more than one file; keep the files of one export only")
    if (directory / INDEX_FILE).is_file():
        _check_index(directory, headers, shards, found)
    elif shards != ["model.safetensors"]:
        found.error(INDEX_FILE, f"is missing, and {shards[0]} is not found without it; write the weights again")
    return {name: tensor for held in headers.values() for name, tensor in held.items()}


def _check_index(
    directory: Path, headers: Mapping[str, Mapping[str, StoredTensor]], shards: list[str], found: _Findings
) -> None:
    fields = _read_json(directory, INDEX_FILE, found)
    if fields is None:
        return
    listed, metadata = fields.get("weight_map"), fields.get("metadata")
    if not isinstance(listed, dict) or not isinstance(metadata, dict):
        found.error(INDEX_FILE, "needs the mappings metadata and weight_map; write the weights again")
        return
    for name in sorted(set(listed.values()) - set(shards)):
        found.error(name, f"is missing, but {INDEX_FILE} names it; copy or download it again")
    for name in sorted(set(shards) - set(listed.values())):
        found.error(name, f"is not in {INDEX_FILE}, and some programs read it all the same; delete it")
    for shard, held in headers.items():
        absent = [name for name, file in listed.items() if file == shard and name not in held]
        if absent:
            found.error(shard, f"lacks {_listed(absent)} that {INDEX_FILE} says it holds; write the weights again")
        unlisted = [name for name in held if listed.get(name) != shard]
        if unlisted and shard in listed.values():
            found.error(INDEX_FILE, f"does not say that {shard} holds {_listed(unlisted)}; write the weights again")
    if headers.keys() != set(shards):
        return  # what a broken file holds is not known
    total = sum(tensor.num_bytes for held in headers.values() for tensor in held.values())
    said = metadata.get("total_size")
    if said != total:
        found.error(INDEX_FILE, f"metadata.total_size is {said}, the tensors have {total} bytes; set it to that")


def _check_tensors(
    tensors: Mapping[str, StoredTensor], model: Step1Config, fields: Mapping[str, Any], found: _Findings
) -> None:
    if not tensors:
        return
    expected = hf_shapes(model)
    weights = "*.safetensors"
    if _HEAD not in tensors and _VOCABULARY[0] in tensors:
        found.error(
            weights,
            f"there is no {_HEAD}: the model was saved with its head tied to the embedding; Step-1's head is a matrix "
            "of its own, so save it again with tie_word_embeddings=false",
        )
    missing = [name for name in expected if name not in tensors and name != _HEAD]
    if missing:
        found.error(weights, f"{_listed(missing)} missing; copy the directory or write the weights again")
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        found.error(weights, f"{_listed(unknown)} unknown to a model of {model.num_hidden_layers} layers; leave it out")
    rows = {tensors[name].shape[0] for name in _VOCABULARY if name in tensors and tensors[name].shape}
    if rows - {model.vocab_size}:
        found.error(
            "config.json",
            f"vocab_size={model.vocab_size}, but embedding and head have {' and '.join(map(str, sorted(rows)))} rows; "
            "set the real number, and cut rows of padding off",
        )
    for name, shape in expected.items():
        held = tensors.get(name)
        if held is not None and held.shape != shape and not (name in _VOCABULARY and held.shape[1:] == shape[1:]):
            found.error(held.path.name, f"{name} has shape {list(held.shape)}, config.json asks for {list(shape)}")
    _check_dtypes(tensors, fields, found)


def _check_dtypes(tensors: Mapping[str, StoredTensor], fields: Mapping[str, Any], found: _Findings) -> None:
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(name)
    for dtype in sorted(names.keys() - {"bfloat16", "float32"}):
        found.error(
            "*.safetensors",
            f"{_listed(names[dtype])} of type {dtype}: weights are bfloat16 or float32 (float16's range is too small "
            "for a model trained in bfloat16); write them again as bfloat16",
        )
    said = fields.get("torch_dtype", fields.get("dtype"))
    if said is not None and names.keys() != {said}:
        held = " and ".join(sorted(names))
        found.warning("config.json", f"torch_dtype is {said}, the weights are {held}; set it to what they are")


def _check_tokenizer(directory: Path, model: Step1Config | None, found: _Findings) -> None:
    absent = [name for name in _TOKENIZER_FILES if not (directory / name).is_file()]
    if absent == list(_TOKENIZER_FILES):
        found.warning(
            "tokenizer.json",
            "there are no tokenizer files: the model takes and gives ids alone; export with "
            "vocabulary.text_tokenizer=FILE to serve text",
        )
        return
    _check_tokenizer_config(directory, found)
    fields = _read_json(directory, "tokenizer.json", found)
    names = _token_names(fields, found) if fields is not None else None
    if names is not None and model is not None and names.keys() != set(range(model.vocab_size)):
        found.error(
            "tokenizer.json",
            f"has {len(names)} ids, config.json has vocab_size={model.vocab_size}; write the tokenizer that the model "
            "was trained with",
        )
    _check_pieces(directory, names, found)


def _check_tokenizer_config(directory: Path, found: _Findings) -> None:
    name = "tokenizer_config.json"
    fields = _read_json(directory, name, found)
    if fields is None:
        return
    kind = fields.get("tokenizer_class")
    if kind != "PreTrainedTokenizerFast":
        reason = {
            "LlamaTokenizer": "transformers 5 makes a BPE tokenizer of it, which gives wrong ids",
            "LlamaTokenizerFast": "transformers 5 makes a BPE tokenizer of it, which gives wrong ids",
            "TokenizersBackend": "transformers 4 does not know it",
        }.get(str(kind), "it does not read tokenizer.json as it stands in every version")
        found.error(name, f'tokenizer_class is {kind}: {reason}; set it to "PreTrainedTokenizerFast"')
    if "chat_template" not in fields and not (directory / "chat_template.jinja").is_file():
        found.warning(name, f"has no chat_template: chats cannot be served; {_REWRITE}")


def _token_names(fields: Mapping[str, Any], found: _Findings) -> dict[int, str] | None:
    """Id -> token of a tokenizer.json."""
    name, model = "tokenizer.json", fields.get("model", {})
    if model.get("type") != "Unigram":
        found.error(name, f"its model is {model.get('type')}, must be Unigram: others give wrong ids; {_REWRITE}")
        return None
    names = {index: piece for index, (piece, _) in enumerate(model["vocab"])}
    return names | {token["id"]: token["content"] for token in fields.get("added_tokens", [])}


def _check_pieces(directory: Path, names: Mapping[int, str] | None, found: _Findings) -> None:
    path = directory / "tokenizer.model"
    if not path.is_file():
        found.warning(
            path.name, "is missing; programs that read SentencePiece files, this project's too, need it: copy it"
        )
        return
    try:
        pieces = [piece.piece for piece in read_text_tokenizer(path).pieces]
    except ValueError as error:
        found.error(path.name, f"{str(error).removeprefix(f'{path}: ')}; copy it again")
        return
    if names is None:
        return
    differing = [index for index, piece in enumerate(pieces) if names.get(index) != piece]
    if differing:
        found.error(
            path.name, f"id {differing[0]} is another piece than in tokenizer.json; keep the two files of one export"
        )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensor(s)"
