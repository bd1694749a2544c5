"""Trials of a calibration: in batches of one shape, so that each program is compiled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.config import Config
from b2txt_jax.data.loader import Batch
from b2txt_jax.metrics import ErrorRate, error_rate, greedy_decode, total_by
from b2txt_jax.model.interface import Params
from b2txt_jax.training.step import make_eval_step

Shape = tuple[int, int, int]
"""Rows, bins, labels."""
_BIN_STEP, _LABEL_STEP = 20, 8
_EVALUATED_ROWS = 8


@dataclass(frozen=True, eq=False)
class Spoken:
    """A trial whose text is known."""

    day: int
    """Index of its recording day."""
    features: np.ndarray
    """Float [T, D], normalised."""
    labels: np.ndarray
    """int32 [L]."""
    name: str = ""


def shape_for(trials: Sequence[Spoken], rows: int) -> Shape:
    """Return a shape that holds all trials."""
    bins = max(len(one.features) for one in trials)
    labels = max(len(one.labels) for one in trials)
    return rows, -(-bins // _BIN_STEP) * _BIN_STEP, -(-labels // _LABEL_STEP) * _LABEL_STEP


def batch_of(trials: Sequence[Spoken], shape: Shape) -> Batch:
    """Return a batch of trials, one a row. Further rows are zeros."""
    rows, bins, labels = shape
    features = np.zeros((rows, bins, trials[0].features.shape[1]), np.float32)
    counts, ids = np.zeros((3, rows), np.int32), np.zeros((rows, labels), np.int32)
    for row, one in enumerate(trials):
        features[row, : len(one.features)] = one.features
        ids[row, : len(one.labels)] = one.labels
        counts[:, row] = len(one.features), one.day, len(one.labels)
    arrays: Any = (features, counts[0], counts[1], ids, counts[2])
    return Batch(*arrays)


class Scorer:
    """Scores trials of known text, with one program for all of them."""

    def __init__(self, config: Config, trials: Sequence[Spoken]) -> None:
        """`trials`: all that will be scored."""
        self._shape = shape_for(trials, min(_EVALUATED_ROWS, len(trials)))
        self._step = jax.jit(make_eval_step(config, len(config.data.sessions)))

    def _outputs(
        self, params: Params, trials: Sequence[Spoken], day: int | None
    ) -> Iterator[tuple[Spoken, np.ndarray, float]]:
        """Yield each trial with its logits [frames, 41] and its CTC loss (ln)."""
        rows = self._shape[0]
        for first in range(0, len(trials), rows):
            some = trials[first : first + rows]
            batch = batch_of(some, self._shape)
            if day is not None:
                batch = batch._replace(day=jnp.full(rows, day, jnp.int32))
            found = jax.tree.map(np.asarray, self._step(params, batch))
            for row, one in enumerate(some):
                yield one, found.logits[row, : found.frames[row]], float(found.loss[row])

    def rates(self, params: Params, trials: Sequence[Spoken]) -> dict[int, ErrorRate]:
        """Return the phoneme errors by day."""
        found = [
            (one.day, error_rate(one.labels.tolist(), greedy_decode(logits).tolist()))
            for one, logits, _ in self._outputs(params, trials, None)
        ]
        return total_by([day for day, _ in found], [rate for _, rate in found])

    def loss(self, params: Params, trials: Sequence[Spoken], day: int | None = None) -> float:
        """Return the mean CTC loss (ln) of a label, with one day's layer for all where given."""
        found = [(len(one.labels), loss) for one, _, loss in self._outputs(params, trials, day)]
        return sum(loss for _, loss in found) / max(1, sum(labels for labels, _ in found))


Read = Callable[[], Spoken]


@dataclass(frozen=True)
class Mixture:
    """New trials, and replayed ones of other days, of which each step draws some."""

    new: Sequence[Spoken]
    days: Sequence[Sequence[Read]]
    """Of each day that is replayed, what reads a trial."""
    replay: float
    """Share of a batch."""

    def rows(self, seed: int, step: int, rows: int) -> list[Spoken]:
        """Return the trials of one batch, a function of (seed, step).

        New ones come in shuffled epochs. Replayed ones are drawn from days that are drawn first.
        """
        random = np.random.default_rng([0x63616C, seed, step])
        old = round(self.replay * rows) if self.days else 0
        fresh = rows - old
        found = []
        for place in range(step * fresh, (step + 1) * fresh):
            epoch, at = divmod(place, len(self.new))
            order = np.random.default_rng([0x65706F, seed, epoch]).permutation(len(self.new))
            found.append(self.new[order[at]])
        for _ in range(old):
            day = self.days[int(random.integers(len(self.days)))]
            found.append(day[int(random.integers(len(day)))]())
        return found
