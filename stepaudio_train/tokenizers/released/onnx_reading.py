"""Weights of the semantic tokenizer out of speech_tokenizer_v1.onnx.

The file keeps most weights under numbers, so they are found by the names of the nodes that use them, which are those of
the PyTorch modules that the graph was traced from.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from stepaudio_train.config.tokenizer import SemanticConfig
from stepaudio_train.tokenizers.semantic import SemanticTokenizer
from stepaudio_train.tokenizers.weight_files import TokenizerError

HEADS_KEY = "num_heads"
"""Metadata entry of files that this project writes. The released file has heads of 64 numbers."""
_RELEASED_HEAD_SIZE = 64
CODEBOOK_NODE = "/quantizer/rq/model/layers.0/_codebook/Pow_1"
_NORM = re.compile(r"/blocks\.(\d+)/(attn_ln|mlp_ln)/(LayerNormalization|Mul|Add_1)")
_LINEAR = re.compile(r"/blocks\.(\d+)/(?:(attn)/(query|key|value|out)|(mlp)/mlp\.(0|2))/(MatMul|Add)")


def read_semantic_onnx(path: Path) -> SemanticTokenizer:
    """The tokenizer, sizes and weights from the file, on the CPU.

    Raises:
        TokenizerError: no ONNX file, or not this tokenizer's.
    """
    try:
        model = onnx.load(path)
    except (OSError, DecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read as an ONNX model: {error}") from error
    weights = _weights(model.graph)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    del model
    try:
        config = _config(weights, metadata)
        tokenizer = SemanticTokenizer(config)
        tokenizer.load_state_dict(weights)
    except (KeyError, RuntimeError, ValueError) as error:
        raise TokenizerError(f"{path}: is no CosyVoice 25 Hz tokenizer: {error}") from error
    return tokenizer


def _config(weights: dict[str, Tensor], metadata: dict[str, str]) -> SemanticConfig:
    hidden_size, num_mel_bins = weights["encoder.conv1.weight"].shape[:2]
    return SemanticConfig(
        num_mel_bins=num_mel_bins,
        hidden_size=hidden_size,
        num_heads=int(metadata.get(HEADS_KEY, hidden_size // _RELEASED_HEAD_SIZE)),
        num_blocks=len({name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")}),
        codebook_size=len(weights["quantizer._codebook.embed"]),
        max_positions=len(weights["encoder.positional_embedding"]),
    )


def _weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """State dict of `SemanticTokenizer`."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            stored |= {output: field.t for output in node.output for field in node.attribute if field.name == "value"}
    weights: dict[str, NDArray[np.float32]] = {}
    for node in graph.node:
        constants = [numpy_helper.to_array(stored[name]) for name in node.input if name in stored]
        if constants:
            weights |= _of_node(node, constants)
    for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "positional_embedding"):
        if f"encoders.{name}" in stored:
            weights[f"encoder.{name}"] = numpy_helper.to_array(stored[f"encoders.{name}"])
    return {name: torch.from_numpy(np.array(value, dtype=np.float32, order="C")) for name, value in weights.items()}


def _of_node(node: onnx.NodeProto, constants: list[NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The weights that a node holds, by their names here; none for other nodes."""
    if node.name == CODEBOOK_NODE and constants[0].ndim == 2:
        return {"quantizer._codebook.embed": constants[0].T}
    if found := _NORM.fullmatch(node.name):
        block, part, kind = found.groups()
        prefix = f"encoder.blocks.{block}.{part}"
        if kind == "LayerNormalization":
            return {f"{prefix}.weight": constants[0], f"{prefix}.bias": constants[1]}
        return {f"{prefix}.{'weight' if kind == 'Mul' else 'bias'}": constants[0]}
    if found := _LINEAR.fullmatch(node.name):
        block, attention, projection, mlp, index, kind = found.groups()
        name = f"encoder.blocks.{block}.{attention or mlp}.{projection or index}"
        return {f"{name}.weight": constants[0].T} if kind == "MatMul" else {f"{name}.bias": constants[0]}
    return {}
