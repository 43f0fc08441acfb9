"""The same language model as one would train it with transformers alone, by its Trainer.

Started by benchmarks/training.py, as every rank of the baseline. Same sizes, initial weights, rows and optimizer as the
project's run: the losses must agree. The model is that of stepaudio_train/commands/bench/plain_model.py.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from stepaudio_train.commands.bench.plain_model import IGNORED, PlainConfig, PlainForCausalLM
from stepaudio_train.config.compose import load_config
from stepaudio_train.config.schema import PretrainConfig
from stepaudio_train.data.loader import build_train_loader
from stepaudio_train.models.step1.initialise import InitialWeights
from stepaudio_train.tokenizers.vocabulary import PAD_ID, Vocabulary


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
            targets = batch.targets.masked_fill(batch.loss_weights == 0, IGNORED)
            labels = pad(targets, (1, 0), value=IGNORED)[:, :-1]
            self.tokens_per_step.append(int((batch.input_ids != PAD_ID).sum()))
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
    model = PlainForCausalLM(PlainConfig(dict(vars(config.model))))
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
