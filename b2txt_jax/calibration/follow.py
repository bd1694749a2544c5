"""Self-calibration: a sentence whose text is taken as known moves a small part of the model.

After CORP (Fan et al. 2023) and DietCORP (Feghhi et al. 2025): augmented copies of one sentence, a
few of the sentences before it among them, one or a few steps of AdamW. The change against the
trained values is bounded, and steps that raise the loss of the sentences before are taken back.
"""

from __future__ import annotations

import collections
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from b2txt_jax.calibration.moving import Moved, Moving, moving_of
from b2txt_jax.calibration.trials import Shape, Spoken, batch_of
from b2txt_jax.calibration.tune import Rates, Tuner
from b2txt_jax.config import ConfigError
from b2txt_jax.data.joint import with_zeros
from b2txt_jax.errors import DAMAGED_ARRAYS, UserError
from b2txt_jax.inference.run import Run
from b2txt_jax.model.interface import Params
from b2txt_jax.training.step import make_eval_step
from lm_server.files.atomic_file import replacing

LOG_FILE = "log.jsonl"
_KEPT = 10
"""Updates that can be taken back one by one. All of them together can always."""
_SHARE_OF_EARLIER = 0.4
_FRESH = 6
"""Sentences by which it is seen whether following helps with sentences that come after it."""
_FRESH_LEAST = 3
_BINS, _LABELS = 200, 64
"""Multiples that sentences are padded to where the configuration has no buckets."""


@dataclass(frozen=True)
class FollowSettings:
    """How a model follows."""

    adapt: str | None = None
    """What moves, `day` or `patch`. None: the day's layer where the model has one."""
    confidence: float = 0.9
    """Of the language model in a sentence, from which on its text is taken as known."""
    steps: int = 2
    """For each sentence."""
    rows: int = 8
    """Copies of the sentence, and earlier ones, of a step."""
    day_rate: float = 0.001
    shared_rate: float | None = None
    """None: 0.0003 where the patch embedding moves alone, 0.00003 beside a day's layer."""
    bound: float = 0.5
    """Largest norm of the change against the trained values, as a share of their norm."""
    remembered: int = 6
    """Earlier sentences whose loss must not rise."""
    seed: int = 0

    def rates_of(self, moving: Moving) -> Rates:
        """Return the learning rates."""
        shared = self.shared_rate
        if shared is None:
            shared = 0.00003 if moving.of_a_day else 0.0003
        return Rates(self.day_rate, shared)


@dataclass(frozen=True)
class Update:
    """What a sentence did."""

    kept: bool
    why: str
    """`lower loss`, whether it went half of the way back, or the reason why it was taken back."""
    loss_before: float
    """CTC loss (ln) of the sentence, for each label."""
    loss_after: float
    earlier_before: float | None
    """The same of the remembered sentences. None: there are none yet."""
    earlier_after: float | None
    change: float
    """Norm of the change against the trained values, as a share of their norm, of what is in use
    after it."""


class Follower:
    """The part of a model that follows, and what it learns from."""

    def __init__(self, run: Run, day: int, settings: FollowSettings) -> None:
        """Start from the trained values.

        Raises:
          ConfigError: a setting is out of range, or the model has no such part.
        """
        if settings.adapt in ("adapters", "all"):
            raise ConfigError("self-calibration moves the day's layer or the patch embedding")
        config = run.config
        self._settings, self._day = settings, day
        self._moving = moving_of(config, day, settings.adapt)
        self._params: Params = jax.device_put(run.params, jax.devices()[0])
        self.start = self._moving.taken(self._params)
        """The trained values of what moves, by path."""
        self.moved: Moved = self.start
        """The values in use."""
        self._size = optax.tree.norm(self.start)
        if self._moving.of_a_day and getattr(config.model, "day_change", False):
            # A day's change is none at first. What it is added to is the identity.
            self._size = jnp.hypot(self._size, math.sqrt(config.data.feature_count))
        rates = settings.rates_of(self._moving)
        self._tuner = Tuner(config, self._moving, rates, settings.seed, dropout=False)
        self._buckets, self._features = config.data.buckets, config.data.feature_count
        self._evaluate = jax.jit(make_eval_step(config, len(config.data.sessions)))
        self._earlier: collections.deque[Spoken] = collections.deque(maxlen=settings.remembered)
        self._fresh: collections.deque[float] = collections.deque(maxlen=_FRESH)
        """By how much the loss of a sentence that was not yet learned from is above that with the
        trained values."""
        self._updates = 0

    @property
    def params(self) -> Params:
        """All parameters, with the values in use."""
        return self._moving.placed(self._params, self.moved)

    @property
    def change(self) -> float:
        """Norm of the change against the trained values, as a share of their norm."""
        return self._change(self.moved)

    def update(self, features: np.ndarray, labels: np.ndarray, name: str = "") -> Update:
        """Take the steps of one sentence: normalised features [T, D], labels [L].

        D may be the day's own number of features. `name`: by which `forget` finds the sentence.
        """
        one = Spoken(self._day, with_zeros(features, self._features), labels, name)
        earlier = list(self._earlier)
        self._earlier.append(one)
        self._updates += 1
        before = self._loss(self.moved, [one])
        earlier_before = self._loss(self.moved, earlier) if earlier else None
        if not np.isfinite(before):
            self._earlier.pop()
            return Update(
                False,
                "too short for its text",
                before,
                before,
                earlier_before,
                earlier_before,
                self.change,
            )
        if self.change > 0:
            self._fresh.append(before - self._loss(self.start, [one]))
        moved = self._bounded(self._steps(one, earlier))
        after = self._loss(moved, [one])
        earlier_after = self._loss(moved, earlier) if earlier else None
        why = "lower loss"
        if not after < before:
            why = "the loss of the sentence did not fall"
        elif earlier_before is not None and not (earlier_after or 0.0) <= earlier_before:
            why = "the loss of the sentences before rose"
        kept = why == "lower loss"
        if kept and len(self._fresh) >= _FRESH_LEAST and float(np.mean(self._fresh)) > 0:
            # Nothing has drifted, or it was learned wrong: what was learned does not carry over.
            moved = {name: (self.start[name] + moved[name]) / 2 for name in moved}
            why += ", and half of the way back: following has not helped with new sentences"
        if kept:
            self.moved = moved
        return Update(kept, why, before, after, earlier_before, earlier_after, self.change)

    def forget(self, name: str) -> None:
        """Forget a sentence whose text was wrong, so that it is not replayed. The values in use
        stay."""
        kept = [one for one in self._earlier if one.name != name]
        self._earlier.clear()
        self._earlier.extend(kept)

    def _steps(self, one: Spoken, earlier: Sequence[Spoken]) -> Moved:
        settings = self._settings
        old = min(len(earlier), round(_SHARE_OF_EARLIER * settings.rows))
        moved, moments = self._tuner.begin(self.moved)
        for step in range(settings.steps):
            number = self._updates * settings.steps + step
            random = np.random.default_rng([0x666F6C, settings.seed, number])
            drawn: list[int] = (
                random.choice(len(earlier), old, replace=False).tolist() if old else []
            )
            rows = [*[one] * (settings.rows - old), *(earlier[i] for i in drawn)]
            batch = batch_of(rows, self._shape(rows))
            moved, moments, _ = self._tuner.step(moved, moments, self._params, batch, number, 1.0)
        return moved

    def _shape(self, trials: Sequence[Spoken]) -> Shape:
        """Return the shape of the first bucket that holds them."""
        bins = max(len(one.features) for one in trials)
        labels = max(len(one.labels) for one in trials)
        fits = [b for b in self._buckets if bins <= b[0] and labels <= b[1]]
        found = fits[0] if fits else (-(-bins // _BINS) * _BINS, -(-labels // _LABELS) * _LABELS)
        return self._settings.rows, *found

    def _loss(self, moved: Moved, trials: Sequence[Spoken]) -> float:
        """Return the mean CTC loss (ln) of a label, without augmentation."""
        some = list(trials)[-self._settings.rows :]
        params = self._moving.placed(self._params, moved)
        losses = np.asarray(self._evaluate(params, batch_of(some, self._shape(some))).loss)
        return float(losses[: len(some)].sum()) / max(1, sum(len(one.labels) for one in some))

    def _change(self, moved: Moved) -> float:
        difference = {name: moved[name] - self.start[name] for name in moved}
        return float(optax.tree.norm(difference) / jnp.maximum(self._size, 1e-9))

    def _bounded(self, moved: Moved) -> Moved:
        """Return the values, moved back towards the start where they are too far from it."""
        change, bound = self._change(moved), self._settings.bound
        if change <= bound:
            return moved
        share = bound / change
        return {name: self.start[name] + share * (moved[name] - self.start[name]) for name in moved}


class FollowError(UserError, ValueError):
    """What a model has learned while it decoded cannot be used."""


class Kept:
    """The folder of what a model has learned while it decoded: a file for each update that was
    kept, and a log of all of them. The run's checkpoint stays as it is."""

    def __init__(self, folder: Path, run: Run) -> None:
        """`folder`: of one recording day."""
        self._folder, self._fingerprint = folder, run.fingerprint

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.npz"))

    @property
    def updates(self) -> int:
        """How many updates are in use."""
        files = self._files()
        return int(files[-1].stem) if files else 0

    def load(self, start: Moved) -> Moved:
        """Return the values of the last update, `start` where there is none.

        Raises:
          FollowError: they are of another model, or damaged.
        """
        files = self._files()
        if not files:
            return start
        try:
            with np.load(files[-1]) as file:
                found = {name: jnp.asarray(file[name]) for name in file.files if name != "model"}
                same = str(file["model"]) == self._fingerprint
        except DAMAGED_ARRAYS as error:
            raise FollowError(
                f"{files[-1]} is damaged ({error}): take it back with `b2txt stream --undo`"
            ) from error
        shapes = {name: value.shape for name, value in start.items()}
        if not same or {name: value.shape for name, value in found.items()} != shapes:
            raise FollowError(
                f"{files[-1]} was learned by another model, or other parameters moved; needed this "
                "one's: take it back with `b2txt stream --undo all`, or remove the folder"
            )
        return found

    def save(self, moved: Moved) -> None:
        """Write the values of an update. Of older ones the last ten stay."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self.updates + 1:06d}.npz"
        values: dict[str, Any] = {name: np.asarray(value) for name, value in moved.items()}
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, model=np.asarray(self._fingerprint), **values)
        for old in self._files()[: -_KEPT - 1]:
            old.unlink()

    def write(self, **entry: Any) -> None:
        """Append a line to the log."""
        self._folder.mkdir(parents=True, exist_ok=True)
        line = {"time": round(time.time(), 3), **entry}
        with (self._folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def undo(self, count: int | None) -> int:
        """Take back the last updates, or all. Return how many are left.

        Raises:
          FollowError: so many cannot be taken back one by one.
        """
        files = self._files()
        # Of older updates there is no file any more: the oldest one stays, or all go.
        singly = len(files) - (self.updates > len(files))
        if count is not None and count > singly:
            raise FollowError(
                f"{count} updates are to be taken back, and {self._folder} has the last {singly}; "
                "needed at most so many, or all"
            )
        for path in files if count is None else files[len(files) - count :]:
            path.unlink()
        left = self.updates
        if files:
            self.write(event="undo", count="all" if count is None else count, left=left)
        return left


def adapted_folder(workdir: Path, day: str) -> Path:
    """Return where a run keeps what it has learned of a recording day while it decoded."""
    return workdir / "adapted" / day
