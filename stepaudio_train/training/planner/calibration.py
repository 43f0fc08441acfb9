"""The cost model's constants: fitted on published step times, and checked on models that the fit has not seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from stepaudio_train.config.gpus import GPUS
from stepaudio_train.training.planner.cost import Constants, step_time
from stepaudio_train.training.planner.figures import FIGURES, Figure

_START = Constants(matmul=0.7, memory=0.5, tensor_exposed=0.5)

FITTED = Constants(matmul=0.6990, memory=0.4484, tensor_exposed=0.7432)
"""What `fit(FIGURES)` gives."""


@dataclass(frozen=True)
class Check:
    """A published figure beside what was predicted."""

    figure: Figure
    predicted_s: float
    """With the constants of all figures."""
    held_out_s: float
    """With constants fitted without any figure of this model."""

    @property
    def error(self) -> float:
        return self.predicted_s / self.figure.step_s - 1

    @property
    def held_out_error(self) -> float:
        return self.held_out_s / self.figure.step_s - 1


def fit(figures: Sequence[Figure]) -> Constants:
    """Least squares of log(predicted / published), every model of the same weight however many rows it has.

    Gauss-Newton with numerical derivatives, halving steps that make it worse.
    """
    rows = Counter(figure.model for figure in figures)
    weights = np.array([rows[figure.model] ** -0.5 for figure in figures])

    def residuals(values: np.ndarray) -> np.ndarray:
        constants = Constants(*values.tolist())
        ratios = [predicted_s(figure, constants) / figure.step_s for figure in figures]
        return weights * np.log(ratios)

    values, delta = np.array(astuple(_START)), 1e-5
    left = residuals(values)
    for _ in range(30):
        jacobian = np.stack([(residuals(values + delta * unit) - left) / delta for unit in np.eye(len(values))], axis=1)
        step = np.linalg.lstsq(jacobian, -left, rcond=None)[0]
        while np.abs(step).max() > 1e-6:
            # Shares stay shares, whatever the linear step says.
            tried = np.clip(values + step, 0.05, 1.0)
            found = residuals(tried)
            if found @ found < left @ left:
                values, left = tried, found
                break
            step = step / 2
        else:
            break
    return Constants(*values.tolist())


def predicted_s(figure: Figure, constants: Constants) -> float:
    """Seconds of the step that `figure` is about."""
    return step_time(figure.sizes, figure.layout, GPUS["h100"], constants).total_s


def check_figures(figures: Sequence[Figure] = FIGURES) -> list[Check]:
    """Every figure, predicted with and without its model among those fitted on."""
    checks = []
    constants = fit(figures)
    for model in dict.fromkeys(figure.model for figure in figures):
        without = fit([figure for figure in figures if figure.model != model])
        checks += [
            Check(figure, predicted_s(figure, constants), predicted_s(figure, without))
            for figure in figures
            if figure.model == model
        ]
    return checks
