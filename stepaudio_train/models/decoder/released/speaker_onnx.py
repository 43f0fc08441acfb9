"""A speaker encoder as `campplus.onnx`: the interface by which the released programs take a voice.

Input: `speaker_features` [batch, frames, 80] float32; output: [batch, D] float32.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper, parser
from torch import Tensor

from stepaudio_train.models.decoder.flow_files import NoSpeaker
from stepaudio_train.models.decoder.speaker import NUM_MEL_BINS, VARIANCE_FLOOR, SmallSpeakerEncoder

# What StepFun's pinned ONNX Runtime (1.17) runs.
_OPSET, _IR_VERSION = 17, 9
# torch's `normalize` has it.
_NORM_FLOOR = 1e-12


def write_speaker_onnx(encoder: SmallSpeakerEncoder | NoSpeaker, path: Path) -> None:
    """Write an encoder of this project's own, or one that says the same of every voice."""
    if isinstance(encoder, NoSpeaker):
        nothing = {"nothing": torch.zeros(NUM_MEL_BINS, encoder.size)}
        lines = ["mean = ReduceMean<axes=[1], keepdims=0>(input)", "output = MatMul(mean, nothing)"]
        _write(lines, nothing, encoder.size, path)
    else:
        _write(*_graph(encoder), encoder.config.dimension, path)


def _graph(encoder: SmallSpeakerEncoder) -> tuple[list[str], dict[str, Tensor]]:
    """Nodes in ONNX's own notation, and the weights by their names there."""
    lines, x = ["x = Transpose<perm=[0, 2, 1]>(input)"], "x"
    layers = list(encoder.frames)
    for number, (conv, norm) in enumerate(zip(layers[::3], layers[2::3], strict=True)):
        w = f"frames_{3 * number}_"
        n = f"frames_{3 * number + 2}_"
        lines += [
            f"c{number} = Conv<dilations=[{conv.dilation[0]}], pads=[{conv.padding[0]}, {conv.padding[0]}]>"
            f"({x}, {w}weight, {w}bias)",
            f"r{number} = Relu(c{number})",
            f"x{number} = BatchNormalization<epsilon={norm.eps}>"
            f"(r{number}, {n}weight, {n}bias, {n}running_mean, {n}running_var)",
        ]
        x = f"x{number}"
    lines += [
        f"mean = ReduceMean<axes=[2], keepdims=1>({x})",
        f"centred = Sub({x}, mean)",
        "squares = Mul(centred, centred)",
        "variance = ReduceMean<axes=[2], keepdims=1>(squares)",
        "floored = Max(variance, variance_floor)",
        "deviation = Sqrt(floored)",
        "joined = Concat<axis=1>(mean, deviation)",
        "pooled = Flatten(joined)",
        "voice = Gemm<transB=1>(pooled, voice_weight, voice_bias)",
        "length = ReduceL2<axes=[1], keepdims=1>(voice)",
        "divisor = Max(length, norm_floor)",
        "output = Div(voice, divisor)",
    ]
    weights = {name.replace(".", "_"): w for name, w in encoder.state_dict().items() if w.is_floating_point()}
    floors = {"variance_floor": VARIANCE_FLOOR, "norm_floor": _NORM_FLOOR}
    return lines, weights | {name: torch.tensor(value) for name, value in floors.items()}


def _write(lines: list[str], weights: dict[str, Tensor], dimension: int, path: Path) -> None:
    model = parser.parse_model(
        f'<ir_version: {_IR_VERSION}, opset_import: ["" : {_OPSET}]>\n'
        f"speaker (float[batch, frames, {NUM_MEL_BINS}] input) => (float[batch, {dimension}] output)\n"
        "{\n" + "\n".join(lines) + "\n}"
    )
    model.graph.initializer.extend(numpy_helper.from_array(w.cpu().numpy(), name) for name, w in weights.items())
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, str(path))
