"""Validation: aggregate PER and loss over a labelled split, in all and per day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from b2txt_jax.data.loader import Batch, EvaluationData
from b2txt_jax.metrics import ErrorRate, error_rate, greedy_decode, total, total_by
from b2txt_jax.model.interface import Params
from b2txt_jax.training.step import EvalOutput


@dataclass(frozen=True)
class Validation:
    """Result over a split."""

    per: ErrorRate
    per_day: dict[str, ErrorRate]
    aux_per: dict[str, ErrorRate]
    """Of the further logits that the model has validated, by name."""
    loss: float
    """Mean CTC loss (ln) of the trials whose label can be aligned. NEJM: mean of the batches'
    means."""
    infeasible: int
    """Number of trials without an alignment. They count in the PER, not in the loss."""


def validate(
    eval_step: Callable[[Params, Batch], EvalOutput],
    params: Params,
    data: EvaluationData,
    rows: slice | None = None,
    keep: dict[int, np.ndarray] | None = None,
) -> Validation:
    """Greedy-decode every trial.

    Args:
      eval_step: returns the outputs of all rows of a batch for this host's rows of it.
      params: of the model.
      data: the split.
      rows: of each batch that this host reads. None: all. The result covers all trials, and is the
        same on every host and for any number of hosts.
      keep: receives the valid logits [frames, 41] of each trial, by its index in `data.refs`.

    Raises:
      DataError: a trial cannot be read.
    """
    rates: list[ErrorRate] = []
    days: list[str] = []
    losses: list[float] = []
    aux: dict[str, list[ErrorRate]] = {}
    for indices, (_, _, batch) in zip(data.groups, data.batches(rows), strict=True):
        output = jax.tree.map(np.asarray, eval_step(params, batch))
        for row in np.flatnonzero(output.rows.bins):
            labels = output.rows.labels[row, : output.rows.label_length[row]].tolist()
            frames = output.frames[row]
            rates.append(_rate(output.logits[row, :frames], labels))
            if keep is not None:
                keep[indices[row]] = output.logits[row, :frames].copy()
            for name, logits in output.aux.items():
                aux.setdefault(name, []).append(_rate(logits[row, :frames], labels))
            days.append(data.sessions[output.rows.day[row]])
            losses.append(float(output.loss[row]))
    if len(rates) != len(data.refs):
        raise RuntimeError(f"{len(rates)} trials came back of {len(data.refs)}: a fault of ours")
    finite = [loss for loss in losses if np.isfinite(loss)]
    return Validation(
        per=total(rates),
        per_day=total_by(days, rates),
        aux_per={name: total(found) for name, found in aux.items()},
        loss=float(np.mean(finite)) if finite else float("inf"),
        infeasible=len(losses) - len(finite),
    )


def _rate(logits: np.ndarray, labels: list[int]) -> ErrorRate:
    return error_rate(labels, greedy_decode(logits).tolist())
