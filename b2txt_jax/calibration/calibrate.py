"""A new recording day for a trained model: where its layer starts, and a few steps of fine-tuning
with trials of the old days among those of the new one."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from b2txt_jax.calibration.moving import RANK, Moved, Moving, day_paths, moving_of, with_day
from b2txt_jax.calibration.trials import Mixture, Scorer, Spoken, batch_of, shape_for
from b2txt_jax.calibration.tune import Rates, Tuner, cosine
from b2txt_jax.config import Config, ConfigError
from b2txt_jax.data.description import DataError
from b2txt_jax.data.trial import Reader, TrialRef, frames_needed
from b2txt_jax.inference.run import Run
from b2txt_jax.metrics import ErrorRate, total
from b2txt_jax.model.interface import Params
from b2txt_jax.training.step import model_of

STARTS = ("nearest", "mean", "last")
_CHOSEN_BY = 10
"""Sentences by which the nearest day is found."""
_OLD_SCORED = 200
"""Most validation trials of old days that are scored, spread evenly over them."""
_LOOKS = 4
"""Times that the PER is measured in the course of the steps."""
_KEPT_OUT = 48
"""Most training trials of old days that are not replayed, to see what they lose."""
_PARTS = 8
"""Of the way from the trained values, at whose ends that is looked at."""
_LONG = 90
"""Percentile of the old days' lengths up to which trials are replayed."""


@dataclass(frozen=True)
class Settings:
    """How a calibration is done."""

    start: str = "nearest"
    adapt: str | None = None
    """See `moving_of`."""
    rank: int = RANK
    """Of the changes of matrices, for `adapters`."""
    steps: int = 40
    rows: int = 16
    replay: float | None = None
    """Share of old days' trials in a batch. None: 0.4, and 0.6 where days have no layers of their
    own, so that whatever moves is theirs too."""
    day_rate: float = 0.001
    shared_rate: float | None = None
    """None: 0.0001, and 0.001 where the patch embedding moves alone."""
    adapter_rate: float = 0.01
    old_rise: float = 0.15
    """Most that the loss of old days' sentences may rise, as a share. Infinite: no bound."""
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError where a setting is out of range."""
        limits = {
            **dict.fromkeys(("rank", "steps", "rows"), 1),
            **dict.fromkeys(("replay", "day_rate", "shared_rate", "adapter_rate"), 0),
            **dict.fromkeys(("old_rise", "seed"), 0),
        }
        for name, least in limits.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not value >= least or (name == "replay" and value >= 1):
                needed = "0 to below 1" if name == "replay" else f"at least {least}"
                raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; needed {needed}")

    def replay_of(self, moving: Moving) -> float:
        """Return the share of old days' trials in a batch."""
        if self.replay is not None:
            return self.replay
        return 0.4 if moving.of_a_day else 0.6

    def rates_of(self, moving: Moving) -> Rates:
        """Return the first learning rates."""
        shared = self.shared_rate
        if shared is None:
            shared = 0.0001 if moving.of_a_day or moving.everything else 0.001
        return Rates(self.day_rate, shared, self.adapter_rate)


@dataclass(frozen=True, eq=False)
class Material:
    """What a calibration works with. Days count as in the run, and the new day is the next."""

    new: list[Spoken]
    """To learn from, in the order of recording."""
    val: list[Spoken] = field(default_factory=list)
    """Of the new day, to score."""
    old: list[tuple[Reader, list[TrialRef]]] = field(default_factory=list)
    """To replay, by old day."""
    old_val: list[Spoken] = field(default_factory=list)
    """Of the old days, to score."""
    width: int | None = None
    """Features of the new day, before zeros. None: as many as the model reads."""
    peers: Sequence[int] | None = None
    """Old days whose layers the new day's may start from. None: all."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model with one more day."""

    config: Config
    params: Params
    report: dict[str, Any]


def separated(run: Run, adapt: str | None) -> Run:
    """Return the run with rows of each day's own, where `adapt` asks for a day's layer and days
    share all that they have. No day is decoded otherwise than before.

    Args:
      run: the trained run.
      adapt: as of `moving_of`.
    """
    if adapt not in (None, "day"):
        return run
    found = model_of(run.config, len(run.sessions)).separated(run.params)
    if found is None:
        return run
    model, params = found
    config = dataclasses.replace(run.config, model=model)
    return dataclasses.replace(run, config=config, params=params)


def spoken(reader: Reader, refs: Sequence[TrialRef], day: int) -> list[Spoken]:
    """Read trials of a day, which must have labels.

    Raises:
      DataError: a trial cannot be read or has no label.
    """
    found = []
    for ref in refs:
        trial = reader.read(ref)
        if trial.labels is None or not len(trial.labels):
            raise DataError(
                f"{ref.path} {ref.key} has no label; needed `seq_class_ids` and `seq_len`, since "
                "calibration learns from sentences that are known"
            )
        found.append(Spoken(day, np.asarray(trial.features), trial.labels, ref.name))
    return found


def evenly(by_day: Sequence[Sequence[TrialRef]], most: int = _OLD_SCORED) -> list[list[TrialRef]]:
    """Return at most so many trials of all days, the first ones of each."""
    counts = [len(refs) for refs in by_day]
    limit = max(counts, default=0)
    while sum(min(limit, count) for count in counts) > most and limit > 1:
        limit -= 1
    return [list(refs[:limit]) for refs in by_day]


def extended(
    config: Config, session: str, trials: Sequence[Spoken], width: int | None = None
) -> Config:
    """Return the configuration with one more day, and a bucket for its trials if they need one.

    Args:
      config: of the run.
      session: name of the day.
      trials: its trials.
      width: its features, before zeros. None: as many as the model reads.
    """
    data = config.data
    buckets = data.buckets
    _, bins, labels = shape_for(trials, 1)
    if buckets and (bins > buckets[-1][0] or labels > buckets[-1][1]):
        buckets = (*buckets, (max(bins, buckets[-1][0]), max(labels, buckets[-1][1])))
    width = data.feature_count if width is None else width
    widths = (*(data.widths or (data.feature_count,) * len(data.sessions)), width)
    if min(widths) == data.feature_count:
        widths = ()
    sessions = (*data.sessions, session)
    data = dataclasses.replace(data, sessions=sessions, widths=widths, buckets=buckets)
    # The averaged weights of the training are not those that are written.
    train = dataclasses.replace(config.train, ema=0.0)
    return dataclasses.replace(config, data=data, train=train)


def calibrate(
    run: Run,
    session: str,
    material: Material,
    settings: Settings,
    counts: Sequence[int] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Calibrated:
    """Add a recording day to a trained model.

    Args:
      run: the trained run.
      session: name of the new day.
      material: its trials, and those of old days.
      settings: how it is done.
      counts: numbers of sentences for which it is done as well, each from the start. They are taken
        from one random order, so that fewer are a part of more.
      progress: called with what is done, how much of it, and of how much.

    Raises:
      ConfigError: a setting does not fit, or the model has no part that could move.
      DataError: a trial is too short for its label.
    """
    settings.check()
    began = time.monotonic()
    given, run = run, separated(run, settings.adapt)
    day = len(run.sessions)
    config = extended(run.config, session, [*material.new, *material.val], material.width)
    _check_alignable(config, material.new)
    moving = moving_of(config, day, settings.adapt, settings.rank)
    watched: list[Spoken] = []
    if moving.shared and math.isfinite(settings.old_rise):
        material, watched = kept_out(config, material)
    scorer = Scorer(config, [*material.new, *material.val, *material.old_val, *watched])
    order = np.random.default_rng([0x6F7264, settings.seed]).permutation(len(material.new))
    shuffled = [material.new[i] for i in order]
    trained = jax.device_put(run.params, jax.devices()[0])
    peers = range(len(run.sessions)) if material.peers is None else material.peers

    def started(new: Sequence[Spoken]) -> tuple[Params, dict[str, Any]]:
        if run is not given:
            # The rows of all days are alike: there is nothing to choose between.
            paths = day_paths(run.config)
            return with_day(trained, paths, peers[-1:]), {"kind": "shared"}
        return _started(run, peers, trained, new, scorer, settings, progress)

    params, start = started(shuffled)
    replay, rates = settings.replay_of(moving), settings.rates_of(moving)
    mixture = _mixture(material, shuffled, replay if moving.shared else 0.0)
    tuner = Tuner(config, moving, rates, settings.seed)
    shape = _shape(material, settings, mixture)

    def old_rates(params: Params) -> dict[int, ErrorRate]:
        return scorer.rates(params, material.old_val) if material.old_val else {}

    def val_rate(params: Params) -> float | None:
        return _rate(scorer.rates(params, material.val)) if material.val else None

    def tuned(
        params: Params, new: list[Spoken], what: str, look: bool
    ) -> tuple[Params, list[dict[str, Any]], float]:
        drawn = dataclasses.replace(mixture, new=new)
        begun = moving.taken(params)
        (moved, moments), seen = tuner.begin(begun), []
        for step in range(settings.steps):
            batch = batch_of(drawn.rows(settings.seed, step, settings.rows), shape)
            share = cosine(step, settings.steps)
            moved, moments, loss = tuner.step(moved, moments, params, batch, step, share)
            done = step + 1
            progress(what, done, settings.steps)
            if look and (done * _LOOKS) % settings.steps < _LOOKS and done < settings.steps:
                per = val_rate(moving.placed(params, moved))
                seen.append({"step": done, "loss": loss, "per": per})
        share = 1.0
        if watched:
            moved, share = shortened(
                begun,
                moved,
                lambda values: scorer.loss(moving.placed(params, values), watched),
                settings.old_rise,
            )
        return moving.placed(params, moved), seen, share

    # Before the first sentence nobody knows which day is the nearest.
    before, old_before = val_rate(started([])[0]), old_rates(params)
    after_params, during, share = tuned(params, shuffled, "calibrating", True)
    curve = [{"sentences": 0, "per": before}]
    for count in sorted({n for n in counts if 0 < n < len(shuffled)}):
        few = shuffled[:count]
        some, _, _ = tuned(started(few)[0], few, f"with {count} sentences", False)
        curve.append({"sentences": count, "per": val_rate(some)})
    after = val_rate(after_params)
    curve.append({"sentences": len(shuffled), "per": after})
    old_after = old_rates(after_params) if moving.shared else old_before
    names = run.sessions
    report = {
        "session": session,
        "settings": dataclasses.asdict(settings)
        | {
            "replay": replay,
            "shared_rate": rates.shared,
            "old_rise": settings.old_rise if math.isfinite(settings.old_rise) else None,
        },
        "start": start,
        "moved": {
            name: "the new day" if row is not None else "all days"
            for name, row in moving.rows.items()
        }
        | {name: f"all days, by a change of rank {rank}" for name, rank in moving.ranks.items()},
        "replayed_days": len(mixture.days),
        "sentences": {"new": len(material.new), "val": len(material.val),
                      "old_val": len(material.old_val)},
        "per": {"before": before, "during": during, "after": after},
        "curve": curve if counts else [],
        "old_days": {
            "before": _rate(old_before),
            "after": _rate(old_after),
            "kept_share": share,
            "per_session": {
                names[one]: {"before": old_before[one].rate, "after": old_after[one].rate}
                for one in sorted(old_before)
            },
        },
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return Calibrated(config, after_params, report)


def _rate(rates: dict[int, ErrorRate]) -> float | None:
    return total(rates.values()).rate


def _check_alignable(config: Config, trials: Sequence[Spoken]) -> None:
    model = model_of(config, len(config.data.sessions))
    for one in trials:
        frames, needed = model.frames(len(one.features)), frames_needed(one.labels)
        if needed > frames:
            raise DataError(
                f"trial {one.name} has a label of {len(one.labels)} phonemes, which needs {needed} "
                f"frames, but its {len(one.features)} bins give {frames}: leave the trial out or "
                "correct its label"
            )


def _started(
    run: Run,
    peers: Sequence[int],
    params: Params,
    shuffled: Sequence[Spoken],
    scorer: Scorer,
    settings: Settings,
    progress: Callable[[str, int, int], None],
) -> tuple[Params, dict[str, Any]]:
    """Return the parameters with the new day, and where its layer starts: at those of `peers`.

    Without a sentence of the new day, `nearest` is the last day.
    """
    if settings.start not in STARTS:
        raise ConfigError(f"--start is {settings.start!r}; needed one of {', '.join(STARTS)}")
    paths, names = day_paths(run.config), run.sessions
    if not paths:
        return params, {"kind": "none", "why": "days have no layers of their own"}
    if settings.start == "mean":
        return with_day(params, paths, peers), {"kind": "mean"}
    with_last = with_day(params, paths, peers[-1:])
    if settings.start == "last" or len(peers) == 1 or not shuffled:
        return with_last, {"kind": "last", "day": names[peers[-1]]}
    losses = []
    for done, day in enumerate(peers, start=1):
        losses.append(scorer.loss(with_last, shuffled[:_CHOSEN_BY], day))
        progress("nearest day", done, len(peers))
    nearest = peers[int(np.argmin(losses))]
    found = {
        "kind": "nearest",
        "day": names[nearest],
        "losses": dict(zip((names[day] for day in peers), losses, strict=True)),
    }
    return with_day(params, paths, [nearest]), found


def _mixture(material: Material, shuffled: list[Spoken], replay: float) -> Mixture:
    """Return what batches are drawn of. `replay`: share of old days' trials."""
    longest = _longest(material)

    def read(reader: Reader, ref: TrialRef, day: int) -> Spoken:
        return spoken(reader, [ref], day)[0]

    days = []
    if replay > 0:
        for day, (reader, refs) in enumerate(material.old):
            fits = [ref for ref in refs if ref.bins <= longest and ref.label_length]
            days.append([functools.partial(read, reader, ref, day) for ref in fits])
    return Mixture(shuffled, [day for day in days if day], replay)


def kept_out(config: Config, material: Material) -> tuple[Material, list[Spoken]]:
    """Take some training trials of old days out of what is replayed: at most a fifth of a day's."""
    model = model_of(config, len(config.data.sessions))
    longest = _longest(material)
    fits = [
        [ref for ref in refs if ref.bins <= longest and ref.label_length]
        for _, refs in material.old
    ]
    chosen = evenly([refs[4::5] for refs in fits], _KEPT_OUT)
    old, watched = [], []
    for day, ((reader, refs), some) in enumerate(zip(material.old, chosen, strict=True)):
        old.append((reader, [ref for ref in refs if ref not in some]))
        watched += [
            one
            for one in spoken(reader, some, day)
            if frames_needed(one.labels) <= model.frames(len(one.features))
        ]
    return dataclasses.replace(material, old=old), watched


def shortened(
    start: Moved, moved: Moved, loss_of: Callable[[Moved], float], most: float
) -> tuple[Moved, float]:
    """Return values on the straight way from the trained ones, and how far they are, 0 to 1.

    They are as far as the loss allows, looked at from the end on in eighths of the way. Along such
    a way between trained and fine-tuned weights, the fine-tuned task gains early and the old one
    loses late (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").

    Args:
      start: the trained values.
      moved: the fine-tuned ones.
      loss_of: returns the loss of values on the way.
      most: that it may be above that of `start`, as a share of it.
    """
    bound = (1 + most) * loss_of(start)
    for part in range(_PARTS, 0, -1):
        share = part / _PARTS
        values = {name: start[name] + share * (moved[name] - start[name]) for name in start}
        if loss_of(values) <= bound:
            return values, share
    return start, 0.0


def _longest(material: Material) -> int:
    """Return the bins of the longest trial of a batch."""
    old = [ref.bins for _, refs in material.old for ref in refs]
    new = max(len(one.features) for one in material.new)
    return max(new, int(np.percentile(old, _LONG))) if old else new


def _shape(material: Material, settings: Settings, mixture: Mixture) -> tuple[int, int, int]:
    rows, bins, labels = shape_for(material.new, settings.rows)
    if not mixture.days:
        return rows, bins, labels
    longest = _longest(material)
    refs = [ref for _, refs in material.old for ref in refs if ref.bins <= longest]
    needed = max([labels, *(ref.label_length for ref in refs)])
    return rows, max(bins, -(-longest // 20) * 20), -(-needed // 8) * 8
