"""When a run ends before its last step: held-out data has stopped getting better."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from stepaudio_train.config.errors import UserError
from stepaudio_train.config.schema import EarlyStopConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far."""

    metric: str
    step: int
    value: float
    num_worse: int = 0
    """Evaluations since then."""


class EarlyStop:
    """Follows one held-out metric. It goes by numbers that all ranks have alike, so that all decide alike."""

    def __init__(self, config: EarlyStopConfig | None, best: Best | None) -> None:
        """
        Args:
            config: None: nothing is followed.
            best: of the run that goes on; one of another metric says nothing about this one.
        """
        self._config = config
        self.best = best if config is not None and best is not None and best.metric == config.metric else None

    @property
    def reached(self) -> bool:
        """Whether the run has to end."""
        return self._config is not None and self.best is not None and self.best.num_worse >= self._config.patience

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in an evaluation.

        Raises:
            UserError: it did not measure the metric.
        """
        if self._config is None:
            return
        metric, best = self._config.metric, self.best
        if metric not in metrics:
            measured = ", ".join(sorted(metrics))
            raise UserError(
                f"training.early_stop.metric={metric}: the validation data does not measure it; type one of {measured}"
            )
        value = metrics[metric] if math.isfinite(metrics[metric]) else math.inf
        if best is None or value < best.value - self._config.min_delta:
            self.best = Best(metric, step, value)
        else:
            self.best = replace(best, num_worse=best.num_worse + 1)
        if self.reached:
            log.info("step %d ends the run: %s was best at step %d, %g", step, metric, self.best.step, self.best.value)
