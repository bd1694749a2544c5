"""Validation: aggregate PER and loss over a labelled split, in all and per day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from b2txt_jax.data.loader import Batch, EvaluationData
from b2txt_jax.metrics import ErrorRate, error_rate, greedy_decode, total, total_by
from b2txt_jax.model.gru.baseline import Params
from b2txt_jax.training.step import EvalOutput


@dataclass(frozen=True)
class Validation:
    """Result over a split."""

    per: ErrorRate
    per_day: dict[str, ErrorRate]
    noisy_per: ErrorRate | None
    """Of what the triple GRU's adversary reads from the noise; near 1 when there is no speech in
    it."""
    loss: float
    """Mean CTC loss (ln) of the trials whose label can be aligned; NEJM: mean of the batches'
    means."""
    infeasible: int
    """Trials without an alignment; they count in the PER, not in the loss."""


def validate(
    eval_step: Callable[[Params, Batch], EvalOutput],
    params: Params,
    data: EvaluationData,
    rows: slice | None = None,
) -> Validation:
    """Greedy-decodes every trial.

    Args:
      eval_step: of this host's rows of a batch to the outputs of all of its rows.
      params: of the model.
      data: the split.
      rows: of each batch, those that this host reads; None: all. The result is of all trials, the
        same on every host and for any number of them.

    Raises:
      DataError: a trial cannot be read.
    """
    rates: list[ErrorRate] = []
    days: list[str] = []
    losses: list[float] = []
    noisy: list[ErrorRate] = []
    for _, _, batch in data.batches(rows):
        output = jax.tree.map(np.asarray, eval_step(params, batch))
        for row in np.flatnonzero(output.rows.bins):
            decoded = greedy_decode(output.logits[row, : output.frames[row]])
            labels = output.rows.labels[row, : output.rows.label_length[row]]
            rates.append(error_rate(labels.tolist(), decoded.tolist()))
            if output.noisy_logits is not None:
                decoded = greedy_decode(output.noisy_logits[row, : output.frames[row]])
                noisy.append(error_rate(labels.tolist(), decoded.tolist()))
            days.append(data.sessions[output.rows.day[row]])
            losses.append(float(output.loss[row]))
    if len(rates) != len(data.refs):
        raise RuntimeError(f"{len(rates)} trials came back of {len(data.refs)}: a fault of ours")
    finite = [loss for loss in losses if np.isfinite(loss)]
    return Validation(
        per=total(rates),
        per_day=total_by(days, rates),
        noisy_per=total(noisy) if noisy else None,
        loss=float(np.mean(finite)) if finite else float("inf"),
        infeasible=len(losses) - len(finite),
    )
