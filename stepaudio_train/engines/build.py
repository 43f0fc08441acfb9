"""The one place that knows which engines there are."""

from __future__ import annotations

from stepaudio_train.config.schema import RunConfig
from stepaudio_train.engines.base import Engine


def build_engine(config: RunConfig) -> Engine:
    """The engine `config.engine.name` asks for, with uninitialised weights."""
    if config.engine.name == "megatron":
        from stepaudio_train.engines.megatron.engine import MegatronEngine

        return MegatronEngine(config)
    from stepaudio_train.engines.local import LocalEngine

    return LocalEngine(config)
