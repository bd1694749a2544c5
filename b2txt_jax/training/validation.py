"""Validation: aggregate PER and loss over a labelled split, in all and per day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from b2txt_jax.data.loader import Batch, EvaluationData
from b2txt_jax.metrics import ErrorRate, error_rate, greedy_decode, total, total_by
from b2txt_jax.model.decoder import Params
from b2txt_jax.training.step import EvalOutput


@dataclass(frozen=True)
class Validation:
    """Result over a split."""

    per: ErrorRate
    per_day: dict[str, ErrorRate]
    loss: float
    """Mean CTC loss (ln) of the trials whose label can be aligned; NEJM: mean of the batches'
    means."""
    infeasible: int
    """Trials without an alignment; they count in the PER, not in the loss."""


def validate(
    eval_step: Callable[[Params, Batch], EvalOutput],
    params: Params,
    data: EvaluationData,
    advance: Callable[[int], None] = lambda trials: None,
) -> Validation:
    """Greedy-decodes every trial; `advance` is told the number of trials done.

    Raises:
      DataError: a trial cannot be read.
    """
    rates: list[ErrorRate] = []
    days: list[str] = []
    losses: list[float] = []
    for indices, trials, batch in data.batches():
        output = eval_step(params, batch)
        logits, frames, loss = (np.asarray(value) for value in output)
        for row, trial in enumerate(trials):
            decoded = greedy_decode(logits[row, : frames[row]])
            labels = trial.labels if trial.labels is not None else np.zeros(0, np.int32)
            rates.append(error_rate(labels.tolist(), decoded.tolist()))
            days.append(trial.ref.session)
            losses.append(float(loss[row]))
        advance(len(indices))
    finite = [loss for loss in losses if np.isfinite(loss)]
    return Validation(
        per=total(rates),
        per_day=total_by(days, rates),
        loss=float(np.mean(finite)) if finite else float("inf"),
        infeasible=len(losses) - len(finite),
    )
