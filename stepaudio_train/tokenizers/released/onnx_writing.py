"""The semantic tokenizer as speech_tokenizer_v1.onnx: the graph that StepFun's and CosyVoice's code run.

Inputs: log-mel `feats` [1, mel bins, T] float32, normalised as Whisper does, and `feats_length` [1] int32; output:
`indices` [1, T'] int32. Nodes and weights carry the names by which readers of the released file find them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from stepaudio_train.tokenizers.released.onnx_reading import CODEBOOK_NODE, HEADS_KEY
from stepaudio_train.tokenizers.semantic import SemanticTokenizer

# What StepFun's pinned ONNX Runtime (1.17) runs.
_OPSET, _IR_VERSION = 17, 9
_NORM_FLOOR = 1e-12
_END = np.iinfo(np.int64).max


class _Graph:
    """Nodes and weights in the order they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._number = 0

    def weight(self, name: str, value: Tensor) -> str:
        """Store a weight; returns its name."""
        self.weights.append(numpy_helper.from_array(value.detach().float().cpu().contiguous().numpy(), name))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """A number or a shape. No weight: readers take every weight for the tokenizer's own."""
        self._number += 1
        output = f"constant_{self._number}"
        self.nodes.append(helper.make_node("Constant", [], [output], value=numpy_helper.from_array(value)))
        return output

    def shape(self, *sizes: int) -> str:
        return self.constant(np.array(sizes, dtype=np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def add(self, kind: str, *inputs: str, name: str = "", output: str = "", **attributes: Any) -> str:
        """Add a node of one output; returns the output's name."""
        self._number += 1
        name = name or f"/{kind}_{self._number}"
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def linear(self, x: str, name: str, layer: nn.Linear) -> str:
        product = self.add("MatMul", x, self.weight(f"{name}.weight", layer.weight.T), name=f"{name}/MatMul")
        if layer.bias is None:
            return product
        return self.add("Add", product, self.weight(f"{name}.bias", layer.bias), name=f"{name}/Add")

    def layer_norm(self, x: str, name: str, norm: nn.LayerNorm) -> str:
        weights = (self.weight(f"{name}.weight", norm.weight), self.weight(f"{name}.bias", norm.bias))
        return self.add(
            "LayerNormalization", x, *weights, name=f"{name}/LayerNormalization", axis=-1, epsilon=float(norm.eps)
        )

    def gelu(self, x: str) -> str:
        error = self.add("Erf", self.add("Div", x, self.number(2**0.5)))
        return self.add("Mul", self.add("Mul", x, self.add("Add", error, self.number(1.0))), self.number(0.5))

    def first(self, x: str, length: str, axis: int) -> str:
        """The first `length` (a [1] int64 tensor) of `x` along an axis."""
        return self.add("Slice", x, self.shape(0), length, self.shape(axis))


def write_semantic_onnx(tokenizer: SemanticTokenizer, path: Path) -> None:
    """Write the tokenizer; weights in float32."""
    graph = _Graph()
    length = graph.add("Cast", "feats_length", to=TensorProto.INT64)
    hidden = _encoder(graph, tokenizer, graph.first("feats", length, axis=2))
    _codes(graph, tokenizer, hidden)
    bins = tokenizer.config.num_mel_bins
    proto = helper.make_graph(
        graph.nodes,
        "speech_tokenizer_v1",
        [
            helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, bins, "num_frames"]),
            helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1]),
        ],
        [helper.make_tensor_value_info("indices", TensorProto.INT32, [1, "num_tokens"])],
        graph.weights,
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    helper.set_model_props(model, {HEADS_KEY: str(tokenizer.config.num_heads)})
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path))


def _encoder(graph: _Graph, tokenizer: SemanticTokenizer, x: str) -> str:
    """Mel [1, M, T] -> hidden frames [1, T', D]."""
    encoder = tokenizer.encoder
    for name, layer in (("conv1", encoder.conv1), ("conv2", encoder.conv2)):
        weights = [
            graph.weight(f"encoders.{name}.weight", layer.weight),
            graph.weight(f"encoders.{name}.bias", layer.bias),
        ]
        x = graph.gelu(graph.add("Conv", x, *weights, name=f"/{name}/Conv", strides=[2], pads=[1, 1]))
    x = graph.add("Transpose", x, perm=[0, 2, 1])
    positions = graph.weight("encoders.positional_embedding", encoder.positional_embedding)
    count = graph.add("Slice", graph.add("Shape", x), graph.shape(1), graph.shape(2))
    x = graph.add("Add", x, graph.first(positions, count, axis=0), name="/Add")
    heads, size = tokenizer.config.num_heads, tokenizer.config.hidden_size
    for index, block in enumerate(encoder.blocks):
        name = f"/blocks.{index}"
        normed = graph.layer_norm(x, f"{name}/attn_ln", block.attn_ln)
        split: dict[str, str] = {}
        for part, layer in (("query", block.attn.query), ("key", block.attn.key), ("value", block.attn.value)):
            projected = graph.linear(normed, f"{name}/attn/{part}", layer)
            rows = graph.add("Reshape", projected, graph.shape(0, -1, heads, size // heads))
            split[part] = graph.add("Transpose", rows, perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3])
        scores = graph.add("MatMul", split["query"], split["key"])
        scaled = graph.add("Mul", scores, graph.number((size // heads) ** -0.5))
        context = graph.add("MatMul", graph.add("Softmax", scaled, axis=-1), split["value"])
        joined = graph.add("Reshape", graph.add("Transpose", context, perm=[0, 2, 1, 3]), graph.shape(0, -1, size))
        x = graph.add("Add", x, graph.linear(joined, f"{name}/attn/out", block.attn.out))
        inner = graph.linear(graph.layer_norm(x, f"{name}/mlp_ln", block.mlp_ln), f"{name}/mlp/mlp.0", block.mlp[0])
        x = graph.add("Add", x, graph.linear(graph.gelu(inner), f"{name}/mlp/mlp.2", block.mlp[2]))
    return x


def _codes(graph: _Graph, tokenizer: SemanticTokenizer, hidden: str) -> None:
    """Frames to unit length, then the nearest code: the largest of -(|x|^2 - 2 x.e + |e|^2)."""
    norm = graph.add("ReduceL2", hidden, axes=[-1], keepdims=1)
    unit = graph.add("Div", hidden, graph.add("Max", norm, graph.number(_NORM_FLOOR)))
    codes = graph.weight("quantizer.codebook", tokenizer.quantizer.codes.T)
    prefix = CODEBOOK_NODE.rsplit("/", 1)[0]
    product = graph.add("MatMul", unit, codes, name=f"{prefix}/MatMul")
    own = graph.add("ReduceSum", graph.add("Pow", unit, graph.number(2.0)), graph.shape(-1), keepdims=1)
    squares = graph.add("Pow", codes, graph.number(2.0), name=CODEBOOK_NODE)
    theirs = graph.add("ReduceSum", squares, graph.shape(0), keepdims=1)
    distance = graph.add("Add", graph.add("Sub", own, graph.add("Mul", product, graph.number(2.0))), theirs)
    nearest = graph.add("ArgMax", graph.add("Neg", distance), axis=-1, keepdims=0)
    graph.add("Cast", nearest, output="indices", to=TensorProto.INT32)
