"""How long a training step takes, from sizes alone: a closed form with few constants, fitted on published step times.

A step is what the slowest pipeline stage does. For each micro-batch it computes

    matmuls      6 FLOPs a weight and token, at the data sheet's rate times `matmul` (fitted) times what whole waves of
                 output tiles lose (128 x 256 a multiprocessor)
    attention    causal, over the documents of a row: forward 2 and backward 5 FLOPs a channel and pair, at measured
                 rates that rise with length
    elementwise  bytes that norms, residuals, the gate, queries and keys move, at `memory` (fitted) of the memory's rate
    head         its matmul, and the logits through memory
    TP           with sequence parallelism, all-gathers and reduce-scatters of a micro-batch's hidden states: four a
                 layer in the forward, six in the backward, two of which gather again what weights' gradients need
                 (Korthikanti et al. 2022, arXiv 2205.05198). Of their time `tensor_exposed` (fitted) is not hidden
                 where they are cut up to run beside the matmuls; all of it where they are not
    CP           a ring of keys and values, hidden behind attention as far as that lasts (Liu et al. 2023, arXiv
                 2310.01889); or keys and values gathered before attention, and their gradients scattered after it, not
                 hidden
    PP           sends of hidden states: hidden where the interleaved schedule overlaps them, else one each way a chunk

and once a step

    bubble       (pp - 1) / vp micro-batches of an average stage (Narayanan et al. 2021, arXiv 2104.04473)
    DP           the distributed optimizer's reduce-scatter behind the last backward and all-gather behind the first
                 forward: what does not fit there, and one layer's share of each
    update       Adam through memory
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from stepaudio_train.config.gpus import Gpu

_TILE_ROWS, _TILE_COLUMNS = 128, 256
"""Output tile of a Hopper or Ampere matmul kernel on one multiprocessor."""
_UPDATE_BYTES = 30
"""An Adam update moves a weight: gradient, masters and moments (fp32) in, masters, moments and bf16 weight out."""
_LOGIT_BYTES = 16
"""The loss moves a logit: bf16 out of the matmul, in and out of a softmax in fp32, its gradient out and in twice."""


@dataclass(frozen=True)
class ModelSizes:
    """A dense decoder."""

    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    """Key/value heads."""
    vocab: int
    gated: bool = True
    """SwiGLU's third matrix."""

    @property
    def key_value_width(self) -> int:
        return self.groups * self.hidden // self.heads

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        projections = 2 * self.hidden * (self.hidden + self.key_value_width)
        return projections + (3 if self.gated else 2) * self.hidden * self.inner

    def step_flops(self, tokens: float, document_tokens: float) -> float:
        """Model FLOPs, counted as `training/throughput.py` does: causal, no recomputation."""
        weights = self.layers * self.layer_weights + self.hidden * self.vocab
        return 6.0 * tokens * (weights + self.layers * self.hidden * document_tokens)


@dataclass(frozen=True)
class Layout:
    """A batch and how it is cut."""

    sequence_length: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vp: int = 1
    dp: int = 1
    micro_rows: int = 1
    micro_batches: int = 1
    """A step, on one model replica."""
    recompute: str = "none"
    document_tokens: int | None = None
    """Length of the documents in a row; None: one fills it."""
    overlaps_tp: bool = True
    """Collectives cut up to run beside the matmuls."""
    overlaps_cp: bool = True
    """A ring of keys and values behind attention."""
    overlaps_pp: bool = True
    """Sends behind the computation, where the schedule is interleaved."""
    ends_count_as_layers: bool = False
    """Embedding and head take the place of a layer each, so that their stages have one layer less."""
    gradient_bytes: int = 2
    """Of a gradient when it is reduced."""
    attention_share: float = 1.0
    """Of the rates of `attention_flops_per_s`, where another kernel computes attention."""

    @property
    def gpus(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def step_tokens(self) -> int:
        return self.dp * self.micro_batches * self.micro_rows * self.sequence_length

    def on(self, gpus: int) -> Layout:
        """As many replicas as `gpus` hold."""
        return replace(self, dp=gpus // (self.tp * self.cp * self.pp))


@dataclass(frozen=True)
class Constants:
    """What sizes do not tell: fitted on published step times (calibration.py)."""

    matmul: float
    """Of the data sheet's FLOP/s, in matmuls whose tiles fill the GPU."""
    memory: float
    """Of the memory's bytes/s, in everything between the matmuls."""
    tensor_exposed: float
    """Of TP's communication where it is overlapped."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, on the slowest pipeline stage."""

    matmul_s: float
    attention_s: float
    elementwise_s: float
    head_s: float
    recompute_s: float
    tensor_comm_s: float
    context_comm_s: float
    pipeline_comm_s: float
    bubble_s: float
    data_comm_s: float
    update_s: float

    @property
    def total_s(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def step_time(model: ModelSizes, layout: Layout, gpu: Gpu, constants: Constants) -> StepTime:
    """Predicted time of one optimizer step."""
    micro_batches, pp = layout.micro_batches, layout.pp
    layer = _Layer(model, layout, gpu, constants)
    head_s = _head_s(model, layout, gpu, constants)
    layers, stage_head_s = _slowest_stage(model, layout, layer.total_s, head_s)
    average_s = (model.layers * layer.total_s + head_s) / pp
    update_bytes = _UPDATE_BYTES * _rank_weights(model, layout) / (layout.dp * layout.cp)
    return StepTime(
        matmul_s=micro_batches * layers * layer.matmul_s,
        attention_s=micro_batches * layers * layer.attention_s,
        elementwise_s=micro_batches * layers * layer.elementwise_s,
        head_s=micro_batches * stage_head_s,
        recompute_s=micro_batches * layers * layer.recompute_s,
        tensor_comm_s=micro_batches * layers * layer.tensor_comm_s,
        context_comm_s=micro_batches * layers * layer.context_comm_s,
        pipeline_comm_s=_pipeline_comm_s(model, layout, gpu),
        bubble_s=(pp - 1) / layout.vp * average_s,
        data_comm_s=_data_comm_s(model, layout, gpu, backward_s=2 / 3 * layers * layer.total_s),
        update_s=update_bytes / (gpu.memory_bytes_per_s * constants.memory),
    )


def _slowest_stage(model: ModelSizes, layout: Layout, layer_s: float, head_s: float) -> tuple[float, float]:
    """Layers of the stage that takes longest, and the seconds of its head: the last one has it."""
    if layout.pp == 1:
        return float(model.layers), head_s
    ends = 2 if layout.ends_count_as_layers else 0
    inner = (model.layers + ends) / layout.pp
    last = inner - ends / 2
    return (last, head_s) if last * layer_s + head_s >= inner * layer_s else (inner, 0.0)


def collective_s(total_bytes: float, ranks: int, bytes_per_s: float) -> float:
    """An all-gather or a reduce-scatter in a ring, of `total_bytes` over all ranks together."""
    return total_bytes * (ranks - 1) / ranks / bytes_per_s


class _Layer:
    """Seconds that one layer of one rank takes for one micro-batch, forward and backward."""

    def __init__(self, model: ModelSizes, layout: Layout, gpu: Gpu, constants: Constants) -> None:
        self._model, self._layout, self._gpu, self._constants = model, layout, gpu, constants
        self._tokens = layout.micro_rows * layout.sequence_length // layout.cp
        self.matmul_s = self._matmul_s()
        forward, backward = self._attention_s()
        self.attention_s = forward + backward
        self.elementwise_s = self._elementwise_s()
        comm = self._tensor_collective_s()
        self.tensor_comm_s = 10 * comm
        self.context_comm_s = self._context_comm_s(forward, backward)
        self.recompute_s = 0.0
        if layout.recompute == "selective":
            self.recompute_s = forward
        elif layout.recompute == "full":
            self.recompute_s = self.matmul_s / 3 + forward + self.elementwise_s / 3 + 4 * comm
        self.total_s = self.matmul_s + self.attention_s + self.elementwise_s + self.recompute_s
        self.total_s += self.tensor_comm_s + self.context_comm_s

    def _matmul_s(self) -> float:
        """Forward, and the gradients of input and weight, of the layer's matrices."""
        model, tp = self._model, self._layout.tp
        h, kv, inner = model.hidden, model.key_value_width, model.inner
        shapes = [(h, (h + 2 * kv) // tp), (h // tp, h), (h, (2 if model.gated else 1) * inner // tp), (inner // tp, h)]
        return sum(matmuls_s(self._tokens, k, n, self._gpu, self._constants.matmul) for k, n in shapes)

    def _attention_s(self) -> tuple[float, float]:
        layout, model = self._layout, self._model
        length = layout.document_tokens or layout.sequence_length
        pairs = self._tokens * length / 2
        # A step of the ring sees a part of the keys.
        forward, backward = attention_flops_per_s(length / layout.cp, model.hidden // model.heads, self._gpu)
        flops = 4 * pairs * model.hidden / layout.tp / layout.attention_share
        return flops / forward, 2.5 * flops / backward

    def _elementwise_s(self) -> float:
        """Bytes a token. Forward: two norms and two residual sums (8h + 12h), queries and keys turned or scaled
        (4(h + kv)), gate (6i, or 4i without a gate). Backward: norms 12h, residuals 12h, queries and keys as before,
        gate 10i (6i). Weights' gradients are added up in fp32 within the matmuls."""
        model = self._model
        width = 44 * model.hidden + 8 * (model.hidden + model.key_value_width)
        moved = width + (16 if model.gated else 10) * model.inner
        rate = self._gpu.memory_bytes_per_s * self._constants.memory
        return self._tokens * moved / self._layout.tp / rate

    def _tensor_collective_s(self) -> float:
        layout = self._layout
        exposed = self._constants.tensor_exposed if layout.overlaps_tp else 1.0
        hidden_bytes = self._tokens * self._model.hidden * 2
        return exposed * collective_s(hidden_bytes, layout.tp, self._gpu.nvlink_bytes_per_s)

    def _context_comm_s(self, forward_s: float, backward_s: float) -> float:
        """In a ring keys and values go round once in the forward; they and their gradients in the backward. Gathered,
        they stay until the backward, and the gradients alone go back."""
        layout = self._layout
        if layout.cp == 1:
            return 0.0
        once = self._tokens * 2 * self._model.key_value_width / layout.tp * 2 * (layout.cp - 1)
        once /= _link(layout.tp * layout.cp, self._gpu)
        if not layout.overlaps_cp:
            return 2 * once
        return max(0.0, once - forward_s) + max(0.0, 2 * once - backward_s)


def matmuls_s(tokens: int, inputs: int, outputs: int, gpu: Gpu, efficiency: float) -> float:
    """A linear layer's forward and both gradients, [tokens, inputs] x [inputs, outputs], in whole waves of tiles."""
    flops = 2.0 * tokens * inputs * outputs
    sides = ((tokens, outputs), (tokens, inputs), (inputs, outputs))
    return sum(flops / (gpu.flops_per_s * efficiency * wave_fill(rows, columns, gpu)) for rows, columns in sides)


def wave_fill(rows: int, columns: int, gpu: Gpu) -> float:
    """Share of the multiprocessors' time that a [rows, columns] product's tiles fill."""
    tiles = (rows / _TILE_ROWS) * (columns / _TILE_COLUMNS)
    return tiles / (math.ceil(tiles / gpu.multiprocessors) * gpu.multiprocessors)


def attention_flops_per_s(length: float, head_dim: int, gpu: Gpu) -> tuple[float, float]:
    """Forward and backward rate of causal attention.

    708 / (1 + 947 / length) and 604 / (1 + 1295 / length) TFLOP/s go through the ends of cuDNN 9.19's measurements on
    an H200 with heads of 128 (484 and 370 at 2,048 tokens, 688 and 581 at 32,768), and miss those between by at most 4%
    (NVIDIA/cudnn-frontend 3929da2, benchmark/sdpa_benchmark_training). Heads of 64 have 0.72 of it, as the same
    benchmark's 349 with a window of 1,024 against the 484. Other GPUs: in proportion to their matmuls.
    """
    share = (1.0 if head_dim >= 128 else 0.72) * gpu.flops_per_s / 989e12
    return share * 708e12 / (1 + 947 / length), share * 604e12 / (1 + 1295 / length)


def _head_s(model: ModelSizes, layout: Layout, gpu: Gpu, constants: Constants) -> float:
    tokens = layout.micro_rows * layout.sequence_length // layout.cp
    columns = math.ceil(model.vocab / layout.tp)
    logits = tokens * columns * _LOGIT_BYTES / (gpu.memory_bytes_per_s * constants.memory)
    return matmuls_s(tokens, model.hidden, columns, gpu, constants.matmul) + logits


def _pipeline_comm_s(model: ModelSizes, layout: Layout, gpu: Gpu) -> float:
    if layout.pp == 1:
        return 0.0
    tokens = layout.micro_rows * layout.sequence_length / layout.cp
    send = tokens * model.hidden * 2 / layout.tp / _link(layout.gpus, gpu)
    if layout.vp > 1 and layout.overlaps_pp:
        # While the pipeline fills and drains there is nothing to hide them behind.
        return 2 * (layout.pp - 1) * send
    return 2 * layout.micro_batches * layout.vp * send


def _data_comm_s(model: ModelSizes, layout: Layout, gpu: Gpu, backward_s: float) -> float:
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    weights = _rank_weights(model, layout)
    link = _link(layout.gpus // layout.pp, gpu)
    reduce = collective_s(layout.gradient_bytes * weights, ranks, link)
    gather = collective_s(2 * weights, ranks, link)
    # One layer's share of each has nothing to hide behind.
    first = 1 / max(1.0, model.layers / layout.pp)
    return max(first * reduce, reduce - backward_s) + max(first * gather, gather - backward_s / 2)


def _rank_weights(model: ModelSizes, layout: Layout) -> float:
    """Weights that a rank of the fullest stage holds."""
    layers = model.layers / layout.pp
    ends = model.hidden * model.vocab * (2 if layout.pp == 1 else 1)
    return (layers * model.layer_weights + ends) / layout.tp


def _link(ranks: int, gpu: Gpu) -> float:
    """Bytes a second among `ranks` neighbours: within a machine, or over the network."""
    return gpu.nvlink_bytes_per_s if ranks <= gpu.gpus_per_machine else gpu.network_bytes_per_s
