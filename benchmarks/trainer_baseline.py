"""The same language model as one would write it with transformers alone: a PreTrainedModel, trained by Trainer.

Started by benchmarks/training.py, as every rank of the baseline. Same sizes, initial weights, rows and optimizer as the
project's run: the losses must agree. Attention follows the released modelling code: the square-root ALiBi bias is
written out anew in every layer, keys and values are repeated for the query heads; the mask between packed documents,
which the released code lacks, is added to it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention, silu
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from stepaudio_train.config.compose import load_config
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.models.step1.attention import alibi_slopes
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.tokenizers.vocabulary import Vocabulary

_IGNORED = -100


class BaselineConfig(PretrainedConfig):
    """Sizes under their released names."""

    model_type = "step1_baseline"

    def __init__(self, sizes: dict[str, int | float] | None = None, **kwargs) -> None:
        super().__init__(tie_word_embeddings=False, **kwargs)
        self.sizes = sizes or {}


class _Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, hidden // heads
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (p(x).view(rows, length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=2) for t in (k, v))
        positions = torch.arange(length, device=x.device)
        distance = positions[:, None] - positions[None, :]
        slopes = alibi_slopes(self.heads).to(x.device)
        bias = -slopes[:, None, None] * distance.clamp(min=0).sqrt()
        visible = (distance >= 0) & (documents[:, :, None] == documents[:, None, :])
        bias = bias[None].masked_fill(~visible[:, None], float("-inf")).to(x.dtype)
        out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class _MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, sizes: dict) -> None:
        super().__init__()
        hidden, eps = sizes["hidden_size"], sizes["rms_norm_eps"]
        self.self_attn = _Attention(hidden, sizes["num_attention_heads"], sizes["num_attention_groups"])
        self.mlp = _MLP(hidden, sizes["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(nn.Module):
    def __init__(self, sizes: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes["vocab_size"], sizes["hidden_size"])
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes["num_hidden_layers"]))
        self.norm = nn.RMSNorm(sizes["hidden_size"], sizes["rms_norm_eps"])

    def forward(self, input_ids: Tensor, documents: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, documents)
        return self.norm(x)


class BaselineForCausalLM(PreTrainedModel):
    """Step-1's architecture, its parameters under their released names."""

    config_class = BaselineConfig
    accepts_loss_kwargs = True
    """Trainer then hands over the number of targets of the whole batch, and the loss is a mean over all of them."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.model = _Decoder(config.sizes)
        self.lm_head = nn.Linear(config.sizes["hidden_size"], config.sizes["vocab_size"], bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the weights are loaded."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        documents: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """All [R, T]; `labels` are the ids themselves, -100 where one is not to be predicted."""
        logits = self.lm_head(self.model(input_ids, documents))
        following = pad(labels, (0, 1), value=_IGNORED)[:, 1:]
        total = cross_entropy(logits.flatten(0, 1).float(), following.flatten(), ignore_index=_IGNORED, reduction="sum")
        count = (labels != _IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=total / count, logits=None)


class _Rows(Dataset):
    """The rows of the first steps of a run, in its order."""

    def __init__(self, config: PretrainConfig) -> None:
        training = config.training
        vocabulary = Vocabulary.from_config(config.vocabulary)
        loader = build_train_loader(
            config.data, vocabulary, training.sequence_length, training.global_batch_rows, training.seed
        )
        self.rows = []
        self.tokens_per_step = []
        for _ in range(training.max_steps):
            batch = loader.next_batch()
            targets = batch.targets.masked_fill(batch.loss_weights == 0, _IGNORED)
            labels = pad(targets, (1, 0), value=_IGNORED)[:, :-1]
            self.tokens_per_step.append(int((batch.input_ids != 0).sum()))
            for row in range(batch.num_rows):
                self.rows.append(
                    {"input_ids": batch.input_ids[row], "labels": labels[row], "documents": batch.documents[row]}
                )
        loader.close()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class _InOrderTrainer(Trainer):
    """Trainer that takes the rows as they come."""

    def _get_train_sampler(self, *args, **kwargs) -> None:
        return None


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def main() -> None:
    output, *overrides = sys.argv[1:]
    config = load_config("pretrain", PretrainConfig, overrides)
    model = BaselineForCausalLM(BaselineConfig(dict(vars(config.model))))
    model.load_state_dict(dict(InitialWeights(config.model, config.training.seed)))
    rows, watch = _Rows(config), _Watch()
    optimizer, training = config.optimizer, config.training
    arguments = TrainingArguments(
        output_dir=str(Path(output).with_suffix(".trainer")),
        per_device_train_batch_size=training.micro_batch_rows,
        max_steps=training.max_steps,
        gradient_accumulation_steps=1,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip_grad_norm,
        optim="adamw_torch_fused",
        bf16=config.engine.precision == "bf16",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=training.seed,
    )
    arguments.gradient_accumulation_steps = training.global_batch_rows // (
        training.micro_batch_rows * arguments.world_size
    )
    trainer = _InOrderTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[watch])
    trainer.train()
    if trainer.is_world_process_zero():
        durations = [end - start for start, end in zip(watch.ends, watch.ends[1:], strict=False)]
        speeds = [tokens / s for tokens, s in zip(rows.tokens_per_step[1:], durations, strict=True)]
        content = {"tokens_per_s": speeds, "loss": watch.losses}
        Path(output).write_text(json.dumps(content), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
