"""A pretraining run of seconds: made-up data, one process, no logs but metrics.jsonl."""

from __future__ import annotations

from stepaudio_train.config.schema import (
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    TrainingConfig,
    VocabularyConfig,
)

VOCABULARY = VocabularyConfig(text_size=400, linguistic_size=64, semantic_size=96, reserved_size=8)
SMALL_RUN = PretrainConfig(
    model=ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_attention_groups=2,
        vocab_size=VOCABULARY.total_size,
    ),
    vocabulary=VOCABULARY,
    engine=EngineConfig(device="cpu"),
    optimizer=OptimizerConfig(learning_rate=3e-3, embedding_learning_rate_multiplier=2.0),
    training=TrainingConfig(max_steps=6, sequence_length=64, global_batch_rows=4, micro_batch_rows=4),
    logging=LoggingConfig(tensorboard=False, wandb="disabled", progress_bar=False),
)  # fmt: skip
