"""What `stepaudio plan` counts of the batch: activations, the head's working memory, gradients as they are made."""

from __future__ import annotations

import math

from stepaudio_train.config.schema import RunConfig
from stepaudio_train.models.step1.vocab_parallel import KEPT_BYTES, chunk_tokens
from stepaudio_train.training.plan_states import States, compute_bytes, is_mixed, largest_embedding, trained_elements


def activation_bytes(config: RunConfig, stage: int, micro_batches: int, states: States) -> int:
    """What the fullest moment of a step holds beyond `states`.

    Three moments can be the fullest: the loss, when all activations are there; the end of the backward, when the
    embedding's gradient is made; the update. Gradients that come with the backward are not there at the first loss,
    and activations take their place; from the second micro-batch on, both are there.
    """
    kept = kept_bytes(config, stage, micro_batches)
    last, others = stage == config.engine.pipeline_parallel - 1, kept - kept_bytes(config, stage, 1)
    absent = states.late_gradients if micro_batches == 1 else 0
    loss = kept + _layer_backward_bytes(config)
    if last:
        loss = max(kept + _head_forward_bytes(config), kept + _head_backward_bytes(config), loss)
    made = 0
    if stage == 0 and config.lora is None:
        # Of the first micro-batch it becomes the gradient itself.
        made = (
            largest_embedding(config) * _gradient_bytes(config) if micro_batches > 1 or not states.late_gradients else 0
        )
    return max(loss - absent, others + made, states.update, 0)


def kept_bytes(config: RunConfig, stage: int, micro_batches: int) -> int:
    """Activations of all micro-batches in flight at a stage."""
    model, engine = config.model, config.engine
    layer = layer_activation_bytes(config)
    if _recomputes(config):
        total = layer + (0 if _offloads(config) else _layer_inputs_bytes(config, stage, micro_batches))
    else:
        total = _layers_in_flight(config, stage, micro_batches) * layer
    if engine.device == "cpu":
        heads, cp = model.num_attention_heads // engine.tensor_parallel, engine.context_parallel
        # Biases of all pairs; of a row that is cut, of a rank's two pieces with the keys up to their ends.
        seen = 1.0 if cp == 1 else (2 * cp + 1) / (4 * cp * cp)
        total += int(seen * heads * config.training.sequence_length**2) * compute_bytes(config)
    return total


def offloaded_bytes(config: RunConfig, stage: int, micro_batches: int) -> int:
    """Activations of all micro-batches in flight at a stage that lie in host memory."""
    return _layer_inputs_bytes(config, stage, micro_batches) if _offloads(config) else 0


def _layer_inputs_bytes(config: RunConfig, stage: int, micro_batches: int) -> int:
    """What layers that are computed again keep of all micro-batches in flight."""
    one = _tokens(config) * _residual_bytes(config) * config.model.hidden_size // config.engine.tensor_parallel
    return _layers_in_flight(config, stage, micro_batches) * one


def _layers_in_flight(config: RunConfig, stage: int, micro_batches: int) -> int:
    pp, vp = config.engine.pipeline_parallel, config.engine.virtual_pipeline
    in_flight = pp - stage if vp == 1 else 2 * (pp - stage - 1) + (vp - 1) * pp + 1
    return min(micro_batches * vp, in_flight) * (config.model.num_hidden_layers // (pp * vp))


def layer_activation_bytes(config: RunConfig) -> int:
    """What one layer of one rank keeps of a micro-batch for its backward, without recomputation."""
    model, engine = config.model, config.engine
    h, kv, inner = model.hidden_size, model.num_attention_groups * model.head_dim, model.intermediate_size
    on_cpu = engine.device == "cpu"
    low_rank = config.lora.rank * len(config.lora.targets) if config.lora is not None else 0
    tokens, size, norms = _tokens(config), compute_bytes(config), 2 * _norm_copies(config) * h
    # On a CPU attention goes document by document, and joins the outputs.
    joined = h if on_cpu else 0
    if is_mixed(config) and config.lora is not None:
        return tokens * size * (10 * h + norms + 2 * kv + 4 * inner + low_rank)
    if is_mixed(config):
        return tokens * (4 * (2 * h + norms) + size * (7 * h + joined + 2 * kv + 4 * inner))
    unfused = inner if on_cpu or engine.name != "megatron" else 0
    # Keys and values of whole rows, gathered.
    gathered = 2 * kv * engine.context_parallel if engine.context_parallel > 1 else 0
    elements = 6 * h + 2 * kv + 3 * inner + norms + joined + unfused + low_rank + gathered
    return tokens * size * elements // engine.tensor_parallel


def _norm_copies(config: RunConfig) -> int:
    """What a norm keeps beside its input, in such inputs, where it is not one kernel, which is on a CPU: the input in
    fp32, and in fp32 the normalised one, which the gradient of its weight needs."""
    if config.engine.device != "cpu":
        return 0
    in_fp32 = 1 if _residual_bytes(config) == 4 else 2
    return (in_fp32 - 1) + (in_fp32 if config.lora is None else 0)


def _layer_backward_bytes(config: RunConfig) -> int:
    """Gradients of activations while one layer's backward runs, beyond what it has given back by then."""
    return _tokens(config) * compute_bytes(config) * 2 * config.model.intermediate_size // config.engine.tensor_parallel


def _head_forward_bytes(config: RunConfig) -> int:
    """The final norm, the head's input, and what the logits take; in mixed precision the cast weights of all layers."""
    width, tokens, size = config.model.hidden_size, _tokens(config), compute_bytes(config)
    total = _norm_bytes(config) + tokens * width * size
    if config.engine.name == "megatron":
        # Gathered over the tensor-parallel ranks, then the wanted tokens of it.
        total += tokens * width * size
    elif is_mixed(config):
        total += size * (trained_elements(config, 0) - (largest_embedding(config) if config.lora is None else 0))
        total += size * largest_embedding(config) if config.lora is not None else 0
    # The product, and the exponentials in its place or, of a lower precision, in an fp32 copy.
    return total + _kept_exponentials_bytes(config) + _chunk_logits(config) * (4 + _beside_fp32(size))


def _head_backward_bytes(config: RunConfig) -> int:
    """The head's input and its gradient, the exponentials, a chunk's own gradient, and the weight's in fp32 with a
    chunk's share of it (where it is trained)."""
    rows, width, tokens, size = _vocab_rows(config), config.model.hidden_size, _tokens(config), compute_bytes(config)
    total = _norm_bytes(config) + 2 * tokens * width * size
    weight = rows * width * (4 + _beside_fp32(size)) if config.lora is None else 0
    if config.engine.name == "megatron":
        # Afterwards once of the real rows, once with the vocabulary's padding.
        weight = max(weight, 2 * rows * width * size)
        total += tokens * width * size
    elif is_mixed(config):
        cast = 0 if _recomputes(config) else trained_elements(config, 0)
        total += size * max(cast - (largest_embedding(config) if config.lora is None else 0), rows * width)
    kept = _kept_exponentials_bytes(config)
    again = 0 if kept else _chunk_logits(config) * 4
    return total + weight + kept + again + _chunk_logits(config) * (4 + _beside_fp32(size))


def _kept_exponentials_bytes(config: RunConfig) -> int:
    """What the head keeps of the logits between forward and backward: nothing where it is much."""
    size = _tokens(config) * _vocab_rows(config) * compute_bytes(config)
    return size if size <= KEPT_BYTES else 0


def _chunk_logits(config: RunConfig) -> int:
    """Logits that the head works on at a time."""
    rows = _vocab_rows(config)
    return min(_tokens(config), chunk_tokens(rows, on_gpu=config.engine.device != "cpu")) * rows


def _beside_fp32(size: int) -> int:
    """Bytes of what is made in the compute type beside an fp32 copy of it."""
    return size if size < 4 else 0


def _norm_bytes(config: RunConfig) -> int:
    """The final norm's input; on a CPU its normalised input too; its output, of which the head takes what it wants."""
    copies = 2 + _norm_copies(config)
    return (
        copies * _tokens(config) * config.model.hidden_size * _residual_bytes(config) // config.engine.tensor_parallel
    )


def _gradient_bytes(config: RunConfig) -> int:
    """Bytes of a number of a weight's gradient as the backward makes it."""
    return 4 if is_mixed(config) else compute_bytes(config)


def _residual_bytes(config: RunConfig) -> int:
    """Autocast keeps what is added to in the embedding's type."""
    return 4 if is_mixed(config) and config.lora is None else compute_bytes(config)


def _recomputes(config: RunConfig) -> bool:
    """Only Megatron knows `selective`, which gives back nothing that counts here: attention keeps no scores."""
    recompute = config.engine.recompute
    return recompute in ("full", "offload") if config.engine.name == "megatron" else recompute != "none"


def _offloads(config: RunConfig) -> bool:
    """On a CPU, host memory is the device's."""
    return config.engine.recompute == "offload" and config.engine.device != "cpu"


def _tokens(config: RunConfig) -> int:
    """Of a micro-batch, on one rank of those that share its rows."""
    return config.training.micro_batch_rows * config.training.sequence_length // config.engine.context_parallel


def _vocab_rows(config: RunConfig) -> int:
    return math.ceil(config.model.vocab_size / config.engine.tensor_parallel)
