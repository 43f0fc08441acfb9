"""The one place that knows which engines there are."""

from __future__ import annotations

import importlib.util

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.engines.base import Engine, Judge


def build_engine(config: RunConfig) -> Engine:
    """The engine `config.engine.name` asks for, with uninitialised weights.

    Raises:
        UserError: it needs a package that is not installed.
    """
    return _built(config, trained=True)


def build_judge(config: RunConfig) -> Judge:
    """The model of `build_engine` alone, which does not learn. Raises what that does."""
    return _built(config, trained=False)


def _built(config: RunConfig, trained: bool) -> Engine:
    if config.engine.name == "megatron":
        from stepaudio_train.engines.megatron.engine import MegatronEngine

        return MegatronEngine(config, trained)
    if config.engine.name == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "engine=deepspeed: DeepSpeed is not installed; type pip install 'stepaudio-train[deepspeed]'"
            )
        from stepaudio_train.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, trained)
    from stepaudio_train.engines.local import LocalEngine

    # Gradients and Adam's states come with its first step.
    return LocalEngine(config)
