"""The one place that knows which engines there are."""

from __future__ import annotations

import importlib.util

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import RunConfig
from stepaudio_train.engines.base import Engine


def build_engine(config: RunConfig) -> Engine:
    """The engine `config.engine.name` asks for, with uninitialised weights.

    Raises:
        UserError: it needs a package that is not installed.
    """
    if config.engine.name == "megatron":
        from stepaudio_train.engines.megatron.engine import MegatronEngine

        return MegatronEngine(config)
    if config.engine.name == "deepspeed":
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "engine=deepspeed: DeepSpeed is not installed; type pip install 'stepaudio-train[deepspeed]'"
            )
        from stepaudio_train.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from stepaudio_train.engines.local import LocalEngine

    return LocalEngine(config)
