"""A trained run, and its logits for arrays, for lists of arrays and for a split of its data."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike
from rich.console import Console
from rich.progress import track

from b2txt_jax.config import (
    CONFIG_FILE,
    Config,
    ConfigError,
    read_written_config,
    with_overrides,
)
from b2txt_jax.data.description import DataError
from b2txt_jax.data.joint import with_zeros
from b2txt_jax.data.loader import Batch, EvaluationData
from b2txt_jax.data.trial import SPLITS, Trial, TrialRef, too_short
from b2txt_jax.model.interface import Params
from b2txt_jax.quiet import other_libraries_quiet
from b2txt_jax.training.checkpoint import EMA, RAW, WEIGHTS, Checkpoints, has_checkpoint
from b2txt_jax.training.checksum import checksums, text_checksum
from b2txt_jax.training.metrics_log import (
    METRICS_FILE,
    mean_of_last,
    read_metrics,
    validation_pers,
)
from b2txt_jax.training.sharding import (
    DATA,
    abstract_state,
    jit_augmented_step,
    jit_eval_step,
    make_mesh,
    placement,
)
from b2txt_jax.training.step import EvalOutput
from b2txt_jax.training.tracker import PER_KEYS
from b2txt_jax.training.warm_start import check_not_pretrained

CHANGEABLE = frozenset(
    {
        "data.root",
        "data.buckets",
        "data.eval_batch_size",
        "model.dtype",
        "signal.eval_padding",
        "signal.rolling_clip",
        "signal.rolling_seconds",
        "signal.smooth_kernel",
    }
)
"""Keys of a run's configuration that may differ when its model is used. The others made it."""

AUGMENTING = frozenset(
    f"signal.{name}"
    for name in (
        *("augment", "static_gain_std", "white_noise_std", "constant_offset_std"),
        *("random_walk_std", "random_cut", "speckle_rate", "channel_mask_rate"),
        *("time_mask_spans", "time_mask_fraction", "time_mask_patch"),
    )
)
"""Keys that may differ where features are augmented as the model is used."""

_BUCKETS = ((512, 64),)
"""(bins, labels), for arrays given to a run without buckets of its own."""

SHARED_FILE = "model.safetensors"
"""Of a model that `b2txt export-model` wrote, which has no checkpoints."""


@dataclass(frozen=True)
class TrialLogits:
    """One trial's logits, float32 [frames, 41] in the RNN's class order, with its labels."""

    ref: TrialRef
    logits: np.ndarray
    labels: np.ndarray | None
    """int32 [L]. None without labels."""
    sentence: str | None


@dataclass(frozen=True, eq=False)
class Run:
    """A trained run: its configuration and its best parameters."""

    config: Config
    params: Params = field(repr=False)
    step: int
    """Optimizer step of the parameters."""
    weights: str = RAW
    """Which they are: "raw", as the optimizer left them, or "ema", their moving average."""
    workdir: Path | None = None
    """The run's folder, where it was read from one."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decoder settings are tuned for: step, weights, fingerprint of the parameters."""
        return {"step": self.step, "weights": self.weights, "parameters": self.fingerprint}

    @functools.cached_property
    def selection(self) -> dict[str, Any]:
        """How the checkpoint was chosen: `per`, the lowest of so many `validations` in the run's
        metrics.jsonl, and `per_last_ten`. Without that file there are 0 validations.

        Raises:
          MetricsError: the file cannot be read.
        """
        path = self.workdir and self.workdir / METRICS_FILE
        entries = read_metrics(path) if path and path.is_file() else []
        pers = validation_pers(entries, PER_KEYS[self.weights])
        return {
            "per": min(pers, default=None),
            "validations": len(pers),
            "per_last_ten": mean_of_last(pers),
        }

    @property
    def sessions(self) -> tuple[str, ...]:
        """Names of the recording days that the run has an input layer for, in their order."""
        return self.config.data.sessions

    @functools.cached_property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that are the same for equal parameters."""
        return f"{text_checksum(json.dumps(checksums(self.params), sort_keys=True)):08x}"

    @overload  # A str is an ArrayLike too, and the first signature that fits counts.
    def logits(
        self, trials: str, day: None = None, console: Console | None = None
    ) -> list[TrialLogits]: ...

    @overload
    def logits(
        self,
        trials: list[Any] | tuple[Any, ...],
        day: str | Sequence[str] | None = None,
        console: Console | None = None,
    ) -> list[np.ndarray]: ...

    @overload
    def logits(
        self, trials: np.ndarray | jax.Array, day: str | None = None, console: Console | None = None
    ) -> np.ndarray: ...

    def logits(
        self,
        trials: Any,
        day: str | Sequence[str] | None = None,
        console: Console | None = None,
    ) -> np.ndarray | list[np.ndarray] | list[TrialLogits]:
        """Return the logits of one trial, of several, or of a split, as `b2txt infer` does.

        Features are smoothed and padded here. Only a few shapes are computed, so that trials of
        other lengths compile nothing new. All devices share the trials.

        Args:
          trials: features [T, 512], z-scored, one row per 20 ms bin, or a list of such arrays, or
            "train", "val" or "test": every trial of that split in `config.data.root`.
          day: the name of the recording day that the features are from, such as
            "t15.2023.08.13", one of `sessions`. With a list also one name per array. Optional where
            the run has one day, or where all days share one input layer.
          console: shows the progress of a split.

        Returns:
          float32 [P, 41] in the RNN's class order (blank, 39 phonemes, silence), one row per 80 ms,
          or a list of them, or for a split one `TrialLogits` per trial, by session and trial.

        Raises:
          DataError: an unknown day or split, features of a wrong shape, too few bins, NaN, or a
            trial of the split cannot be read.
        """
        if isinstance(trials, str):
            if day is not None:
                raise DataError(f"found day={day!r} with a split, whose trials know their days")
            return self._of_split(trials, console)
        if isinstance(trials, list | tuple):
            days = [day] * len(trials) if day is None or isinstance(day, str) else list(day)
            if len(days) != len(trials):
                raise DataError(
                    f"found {len(days)} days for {len(trials)} trials; needed one for all, or one "
                    "for each"
                )
            return self._of_arrays(
                [
                    self._checked(one, f"trial {i}", self.day_index(name))
                    for i, (one, name) in enumerate(zip(trials, days, strict=True))
                ],
                [self.day_index(one) for one in days],
            )
        if day is not None and not isinstance(day, str):
            raise DataError(f"day is {day!r}; needed one name, for one trial")
        index = self.day_index(day)
        return self._of_arrays([self._checked(trials, "the trial", index)], [index])[0]

    def _of_split(self, split: str, console: Console | None) -> list[TrialLogits]:
        results: dict[int, TrialLogits] = {}
        for indices, trials, batch in self.batches(split, console):
            for index, trial, logits in zip(indices, trials, self.of_batch(batch), strict=False):
                results[index] = TrialLogits(trial.ref, logits, trial.labels, trial.sentence)
        return [results[index] for index in sorted(results)]

    def batches(
        self, split: str, console: Console | None = None
    ) -> Iterable[tuple[list[int], list[Trial], Batch]]:
        """Return the batches of a split in `config.data.root`, with their trials' places in it.

        Raises:
          DataError: an unknown split, or a trial cannot be read.
        """
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown; needed one of {', '.join(SPLITS)}")
        config = replace(self.config.data, eval_batch_size=self._rows)
        labels = split != "test"
        data = EvaluationData(
            config, self.sessions, split, self._min_bins, labels, self.config.signal
        )
        batches: Iterable[tuple[list[int], list[Trial], Batch]] = data.batches()
        if console is not None:
            batches = track(
                batches, total=data.batch_count, description=f"logits of {split}", console=console
            )
        return batches

    def _of_arrays(self, arrays: Sequence[np.ndarray], days: Sequence[int]) -> list[np.ndarray]:
        """Compute batches of one shape per bucket. Single trials have batches of their own."""
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for index, features in enumerate(arrays):
            by_bucket.setdefault(self._bucket(len(features)), []).append(index)
        size = self._rows if len(arrays) > 1 else self._mesh.shape[DATA]
        results: dict[int, np.ndarray] = {}
        for (bins, labels), group in by_bucket.items():
            for first in range(0, len(group), size):
                indices = group[first : first + size]
                features = np.zeros((size, bins, self.config.data.feature_count), np.float32)
                counts = np.zeros((3, size), np.int32)
                for row, index in enumerate(indices):
                    features[row, : len(arrays[index])] = arrays[index]
                    counts[:2, row] = len(arrays[index]), days[index]
                none = np.zeros((size, labels), np.int32)
                filled: Any = (features, counts[0], counts[1], none, counts[2])
                for index, logits in zip(indices, self.of_batch(Batch(*filled)), strict=False):
                    results[index] = logits
        return [results[index] for index in range(len(arrays))]

    def _bucket(self, bins: int) -> tuple[int, int]:
        """Return the first bucket for so many bins. Longer trials take multiples of the last."""
        buckets = self.config.data.buckets or _BUCKETS
        fits = [bucket for bucket in buckets if bins <= bucket[0]]
        if fits:
            return fits[0]
        longest, labels = buckets[-1]
        return -(-bins // longest) * longest, labels

    def _checked(self, trial: ArrayLike, name: str, day: int) -> np.ndarray:
        features = np.asarray(trial, np.float32)
        if features.ndim == 2 and features.shape[1] == self._width(day):
            features = with_zeros(features, self.config.data.feature_count)
        if features.ndim != 2 or features.shape[1] != self.config.data.feature_count:
            raise DataError(
                f"{name} is {list(features.shape)}; needed [T, {self.config.data.feature_count}], "
                "one row per 20 ms bin: several trials are a list, and the run was trained on so "
                "many features"
            )
        if len(features) < self._min_bins:
            raise too_short(name, len(features), self._min_bins)
        wrong = np.argwhere(~np.isfinite(features))
        if len(wrong):
            time, channel = (int(i) for i in wrong[0])
            raise DataError(
                f"{name} has {len(wrong)} NaN or infinite values, the first in bin {time}, feature "
                f"{channel}; needed finite numbers (a z-score over a silent channel gives NaN)"
            )
        return features

    def day_index(self, day: str | None) -> int:
        """Return the place of a recording day among `sessions`. None will do where days do not
        differ.

        Raises:
          DataError: the run has no such day.
        """
        if day in self.sessions:
            return self.sessions.index(day)
        if day is None and (len(self.sessions) == 1 or not self.config.model.days_differ):
            return 0
        near = difflib.get_close_matches(str(day), self.sessions, n=3, cutoff=0.3)
        shown = ", ".join(near or self.sessions[:3])
        raise DataError(
            f"the day is {day!r}; needed one of the {len(self.sessions)} that the run was trained "
            f"on, whose input layer is used; nearest: {shown}"
        )

    def width(self, day: str) -> int:
        """Return how many features a bin of a recording day has, before zeros.

        Raises:
          DataError: the run has no such day.
        """
        return self._width(self.day_index(day))

    def _width(self, day: int) -> int:
        data = self.config.data
        return data.widths[day] if data.widths else data.feature_count

    # What follows is all that this module knows of the model and its step.

    @property
    def _min_bins(self) -> int:
        return self.config.model.least_bins

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return make_mesh()

    @property
    def _rows(self) -> int:
        """`data.eval_batch_size`, rounded up so that the devices share the rows evenly."""
        shares: int = self._mesh.shape[DATA]
        return -(-self.config.data.eval_batch_size // shares) * shares

    @functools.cached_property
    def _eval_step(self) -> Callable[[Params, Batch], EvalOutput]:
        return jit_eval_step(self.config, len(self.sessions), self._mesh)

    @functools.cached_property
    def _augmented_step(self) -> Callable[[Params, Batch, jax.Array], EvalOutput]:
        return jit_augmented_step(self.config, len(self.sessions), self._mesh)

    @functools.cached_property
    def _placed_params(self) -> Params:
        state = abstract_state(self.config, len(self.sessions), self._mesh)
        params: Params = jax.device_put(self.params, placement(state.params))
        return params

    def of_batch(self, batch: Batch, key: jax.Array | None = None) -> Iterator[np.ndarray]:
        """Yield each row's valid logits, float32 [frames, 41]. With a key, of features augmented
        by the configuration's `signal`, which has as many frames."""
        if key is None:
            output = self._eval_step(self._placed_params, batch)
        else:
            output = self._augmented_step(self._placed_params, batch, key)
        logits, frames = np.asarray(output.logits), np.asarray(output.frames)
        for row, count in enumerate(frames):
            yield logits[row, :count].copy()


def load_run(
    workdir: Path | str,
    overrides: Sequence[str] = (),
    weights: str = RAW,
    changeable: Collection[str] = CHANGEABLE,
) -> Run:
    """Read a run's configuration and best parameters.

    Args:
      workdir: the run's folder, written by `b2txt train`, or by `b2txt export-model`.
      overrides: of the keys in `changeable`, such as "--config.data.root=DIR".
      weights: "raw", or "ema" for the moving average of a run with `train.ema`. Each are those of
        their own best validation.
      changeable: keys of the configuration that may be overridden.

    Raises:
      ConfigError: the folder holds no run, a pretrained one, or one without such weights.
      CheckpointError: the run has no best checkpoint yet, or it is damaged.
      ConversionError: the exported weights are damaged.
    """
    workdir = Path(workdir)
    if (workdir / SHARED_FILE).is_file() and not has_checkpoint(workdir):
        return _load_shared(workdir, overrides, weights, changeable)
    check_not_pretrained(workdir)
    config = with_overrides(read_written_config(workdir / CONFIG_FILE), overrides, changeable)
    if weights not in WEIGHTS:
        raise ConfigError(f"weights is {weights!r}; needed one of {', '.join(WEIGHTS)}")
    if weights == EMA and not config.train.ema:
        raise ConfigError(
            f"{workdir} has no averaged weights, since it was trained with train.ema = 0; needed "
            "weights 'raw', or a run with train.ema"
        )
    # Whole on every device of this mesh, however many devices trained them.
    like = abstract_state(config, len(config.data.sessions), make_mesh()).params
    ema = weights == EMA
    with other_libraries_quiet(), Checkpoints(workdir, read_only=True, ema=ema) as checkpoints:
        params, best = checkpoints.restore_best(like, weights)
    return Run(config, params, best.step, weights, workdir)


def _load_shared(
    workdir: Path, overrides: Sequence[str], weights: str, changeable: Collection[str]
) -> Run:
    from b2txt_jax.interop.safetensors_file import read_safetensors

    if weights != RAW:
        raise ConfigError(f"{workdir} was exported with one kind of weights; leave out {weights!r}")
    # Only to refuse what must not change. The weights have their configuration with them.
    with_overrides(read_written_config(workdir / CONFIG_FILE), overrides, changeable)
    found = read_safetensors(workdir / SHARED_FILE, overrides)
    return Run(found.config, found.state.params, int(found.state.step), weights, workdir)


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Add the choice of weights to a command that uses a run."""
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=RAW,
        help="raw: as the optimizer left them (the default); ema: their moving average",
    )
