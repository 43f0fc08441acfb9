"""The text tokenizer's files of an exported directory.

transformers 5 rebuilds a `LlamaTokenizer` as a BPE model, which gives wrong ids for this unigram vocabulary. So the
directory holds tokenizer.json, read as it stands under the class `PreTrainedTokenizerFast` by 4.48 and 5 alike.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import processors

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.sft import ChatTemplate
from stepaudio_train.tokenizers.text import FIRST_AUDIO_PIECE, build_tokenizer, read_text_tokenizer
from stepaudio_train.tokenizers.vocabulary import Special

_TURNS = (
    "{{- '<s>' -}}"
    "{%- for turn in messages -%}"
    # Tools stand behind the system's turn, or first.
    "{%- if tools and loop.index0 == (1 if messages[0]['role'] == 'system' else 0) -%}"
    "{{- '<|BOT|>SPACEtool_json_schemas\n' + (tools | tojson) + '<|EOT|>' -}}"
    "{%- endif -%}"
    "{%- set speaker = 'human' if turn['role'] == 'user' else turn['role'] -%}"
    "{{- '<|BOT|>SPACE' + speaker + '\n' + (turn['content'] or '') -}}"
    "{%- for call in turn['tool_calls'] or [] -%}"
    "{%- set given = call['function']['arguments'] -%}"
    "{{- '<|CALL_START|> function\n' + call['function']['name'] + '\n' -}}"
    "{{- (given if given is string else given | tojson) + '<|CALL_END|>' -}}"
    "{%- endfor -%}"
    "{{- '<|EOT|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|BOT|>SPACEassistant\n' -}}{%- endif -%}"
)
CHAT_TEMPLATES: dict[ChatTemplate, str] = {
    name: _TURNS.replace("SPACE", opening) for name, opening in {"chat": "", "tts": " ", "tts_bos": "<s> "}.items()
}
"""What fine-tuning renders (data/chat.py), so that a model is served with the ids it was trained on. The released
templates differ from how the released models were served: they leave out `<s>`, and Chat's adds a system turn."""


def write_text_files(
    directory: Path,
    text_tokenizer: Path,
    vocab_size: int,
    max_seq_len: int,
    chat_template: str,
    add_bos: bool,
) -> None:
    """Write tokenizer.model (as it is), tokenizer.json and tokenizer_config.json.

    Args:
        chat_template: Jinja text, such as one of CHAT_TEMPLATES.
        text_tokenizer: SentencePiece unigram file. Ids behind its pieces become `<audio_k>`, as in the released file.
        add_bos: whether encoding puts `<s>` before a text.

    Raises:
        UserError: more pieces than the model has ids.
        ValueError: not a SentencePiece unigram file.
    """
    proto = read_text_tokenizer(text_tokenizer)
    if len(proto.pieces) > vocab_size:
        raise UserError(
            f"{text_tokenizer}: has {len(proto.pieces)} pieces, but the model has vocab_size={vocab_size}; give the "
            "tokenizer that the model was trained with"
        )
    tokenizer = build_tokenizer(proto, audio_pieces(proto, vocab_size))
    bos = "<s>"
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, int(Special.BOS))]
        )
    else:
        # Not left out: without any, transformers 5 would put one of its own making.
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save(str(directory / "tokenizer.json"))
    target = directory / "tokenizer.model"
    if not (target.exists() and target.samefile(text_tokenizer)):
        shutil.copyfile(text_tokenizer, target)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "padding_side": "left",
        "add_bos_token": add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "chat_template": chat_template,
    }
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def audio_pieces(proto: ModelProto, vocab_size: int) -> list[str]:
    """`<audio_k>` of every id behind the file's own pieces; k counts from the file's `<audio_0>`, or its end."""
    pieces = [piece.piece for piece in proto.pieces]
    text_size = pieces.index(FIRST_AUDIO_PIECE) if FIRST_AUDIO_PIECE in pieces else len(pieces)
    return [f"<audio_{index - text_size}>" for index in range(len(pieces), vocab_size)]
