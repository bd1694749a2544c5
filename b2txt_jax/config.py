"""Configuration: a Python file with `get_config()`, read once, checked, and frozen into
dataclasses.

`configs/nejm_baseline.py` lists every key with its unit; other files change some of them. Keys are
overridden on the command line as `--config.section.key=value`. Nothing but this module touches a
`ConfigDict`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import math
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from b2txt_jax.errors import UserError
from lm_server.atomic_file import replacing
from lm_server.protocol import CLASS_COUNT

CONFIG_FILE = "config.json"
"""Name of the written configuration in a run's folder."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; its text names the key, what was found and what is
    needed."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the trials are and how batches are drawn from them."""

    root: str
    """Folder that holds one folder per session (the published `hdf5_data_final`)."""
    sessions: tuple[str, ...]
    """Sessions in the order of the day index; empty: every session found, sorted by name."""
    feature_count: int
    days_per_batch: int
    trials_per_day: int
    buckets: tuple[tuple[int, int], ...]
    """(bins, labels) shapes, ascending: a batch is padded to the first that holds all its
    trials; (): chosen from the lengths of the data."""
    eval_batch_size: int


@dataclasses.dataclass(frozen=True)
class SignalConfig:
    """Augmentation (training only) and smoothing; standard deviations in z-score units."""

    static_gain_std: float
    white_noise_std: float
    constant_offset_std: float
    random_walk_std: float
    random_cut: int
    """One cut of 0 .. random_cut - 1 bins from the start, the same for the whole batch."""
    smooth_std: float
    """Standard deviation of the Gaussian kernel, bins; 0 turns smoothing off."""
    smooth_size: int
    """Window of the kernel before small taps are dropped, bins."""
    eval_padding: str
    """'same' (as in training) or 'valid' (as the published evaluation script)."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The GRU decoder, alone or as a part of the triple GRU."""

    day_layer: bool
    """True: one input layer per day; False: one input layer that all days share."""
    units: int
    layers: int
    patch_size: int
    """Bins in a patch; 0: no patches, one frame per bin."""
    patch_stride: int
    input_dropout: float
    rnn_dropout: float
    classes: int
    dtype: str
    """Of matrix products: 'float32', 'bfloat16', or 'auto' (bfloat16 off the CPU)."""
    recurrence: str = "auto"
    """'scan', 'pallas' (a TPU kernel that keeps the weights in fast memory), or 'auto' (Pallas on a
    TPU when the weights fit)."""
    kind: str = "baseline"
    """'baseline', or 'triple_gru': the decoder above reads what a noise model leaves of the
    patches, and another decoder tries to read the noise."""
    noise_units: int = 0
    """Of the noise model's GRU; 0: as wide as a patch, its states are the noise; otherwise a
    projection makes the noise of them."""
    noise_layers: int = 2
    noisy_layers: int = 2
    """Of the decoder that reads the noise."""
    recompute_frames: int = 0
    """Frames between the states that the noise model keeps for the backward pass, which computes
    the others again; 0 keeps all."""


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """How the triple GRU's parts are trained against each other."""

    noisy_weight: float = 1.0
    """Of the noise decoder's CTC loss in the sum; the clean one has 1."""
    reversal: float = 1.0
    """Largest factor lambda of the reversed gradient that the noise model gets of it."""
    reversal_rate: float = 10.0
    """lambda = reversal * (2 / (1 + exp(-reversal_rate * progress)) - 1), progress from 0 to 1 over
    train.steps (Ganin and Lempitsky 2015)."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay; the day layers have their own settings. Times in
    steps."""

    learning_rate: float
    learning_rate_min: float
    decay_steps: int
    warmup_steps: int
    day_learning_rate: float
    day_learning_rate_min: float
    day_decay_steps: int
    day_warmup_steps: int
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    day_weight_decay: float
    clip_norm: float
    """Largest global norm of the gradient; 0 turns clipping off."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and how often things happen, in steps."""

    seed: int
    steps: int
    log_every: int
    validate_every: int
    save_every: int
    patience: int = 0
    """Validations in a row without a better PER after which training stops; 0: never."""
    on_nonfinite: str = "stop"
    """What a step with a NaN or infinite loss or gradient does, after leaving the parameters as
    they were: 'stop' the run with an error, or 'skip' the step, naming its trials."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How devices share the work; changes no result."""

    model_axis: int = 1
    """Devices over which large parameters are split; the others split the rows of a batch."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Keys with a default may be left out of a file."""

    data: DataConfig
    signal: SignalConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    adversary: AdversaryConfig = AdversaryConfig()


def find_config_file(config: str | Path) -> Path:
    """Return the file of a configuration: a path, or a name of the package's such as "demo".

    Raises:
      ConfigError: there is none.
    """
    package = Path(__file__).parent
    folder = package / "configs"  # where it is installed
    if not folder.is_dir():
        folder = package.parent / "configs"  # in a checkout
    name = str(config)
    is_name = name == Path(name).stem
    path = folder / f"{name}.py" if is_name else Path(config)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.py")))
        raise ConfigError(
            f"the configuration {name} does not exist; needed the path of a Python file, or one of "
            f"the names {known}"
        )
    return path


def read_config_file(path: str | Path) -> ConfigDict:
    """Run `get_config()` of a configuration file, also for files that start from another one.

    Args:
      path: of the file, or a name as in `find_config_file`.

    Raises:
      ConfigError: no such file, or it has no `get_config()`.
    """
    path = find_config_file(path)
    spec = importlib.util.spec_from_file_location(f"b2txt_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"configuration file {path} is not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"configuration file {path} is not valid Python: {error}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(
            f"configuration file {path} has no get_config() that returns a ConfigDict"
        )
    config: ConfigDict = module.get_config()
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration file and applies overrides such as `--config.model.units=512`.

    Raises:
      ConfigError: the file cannot be used, a key is unknown, or a value does not fit.
    """
    config = read_config_file(path)
    freeze(config.to_dict())  # the file's own mistakes are told first
    for override in overrides:
        _apply(config, override)
    return freeze(config.to_dict())


def with_overrides(
    config: Config, overrides: Sequence[str], allowed: Collection[str] | None = None
) -> Config:
    """A frozen configuration with overrides such as `--config.data.root=DIR` applied.

    Args:
      config: to start from; unchanged.
      overrides: as on the command line.
      allowed: keys that may be changed; None: all.

    Raises:
      ConfigError: a key is unknown or may not be changed, or a value does not fit.
    """
    changed = ConfigDict(dataclasses.asdict(config))
    for override in overrides:
        _apply(changed, override)
        key = override.partition("=")[0].removeprefix("--config.")
        if allowed is not None and key not in allowed:
            raise ConfigError(
                f"configuration key {key} belongs to the trained model and cannot be changed here; "
                f"these can: {', '.join(sorted(allowed))}"
            )
    return freeze(changed.to_dict())


def _apply(config: ConfigDict, override: str) -> None:
    from absl import flags
    from ml_collections import config_flags

    key, separator, _ = override.partition("=")
    key = key.removeprefix("--config.")
    if not separator or not override.startswith("--config."):
        raise ConfigError(
            f"argument {override!r} is not understood; needed --config.section.key=value"
        )
    _require_known(key, config)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=["b2txt", override]
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            values(["b2txt", override])
    except (flags.Error, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{override!r} does not fit the key's type: {error}") from error


def _require_known(key: str, config: ConfigDict) -> None:
    known = [f"{section}.{name}" for section in config for name in config[section]]
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known keys: {', '.join(known)}"
    raise ConfigError(f"unknown configuration key {key!r}; {hint}")


def freeze(values: Mapping[str, Any]) -> Config:
    """Nested mapping (from a ConfigDict or config.json) -> checked, frozen Config.

    Raises:
      ConfigError: a key is missing, unknown, of another type, or a value is out of range.
    """
    config: Config = _freeze(Config, values, "")
    _check(config)
    return config


_NONE = dataclasses.MISSING


def _freeze(kind: type, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    optional = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not _NONE}
    missing = sorted(set(hints) - set(values) - set(optional))
    unknown = sorted(set(values) - set(hints))
    if missing or unknown:
        raise ConfigError(
            f"configuration section {where or 'top level'!r}: missing keys {missing}, unknown keys "
            f"{unknown}; start from configs/nejm_baseline.py, which lists every key"
        )
    fields = {}
    for name, hint in hints.items():
        if name not in values:
            fields[name] = optional[name]
            continue
        key, value = f"{where}{name}", values[name]
        if dataclasses.is_dataclass(hint):
            fields[name] = _freeze(typing.cast(type, hint), value, f"{key}.")
        elif typing.get_origin(hint) is tuple:
            fields[name] = _to_tuple(value, key)
        elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            fields[name] = _finite(value, key)
        elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            fields[name] = value
        else:
            raise ConfigError(f"configuration key {key} is {value!r}; needed a {hint.__name__}")
    return kind(**fields)


def _finite(value: int | float, key: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        # An infinite rate makes every parameter infinite at the first step.
        raise ConfigError(f"configuration key {key} is {number}; needed a finite number")
    return number


def _to_tuple(value: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"configuration key {key} is {value!r}; needed a tuple")
    return tuple(_to_tuple(item, key) if isinstance(item, list | tuple) else item for item in value)


# Smallest values; whole numbers and rates alike.
_LEAST: dict[str, float] = {
    "data.feature_count": 1,
    "data.days_per_batch": 1,
    "data.trials_per_day": 1,
    "data.eval_batch_size": 1,
    "signal.static_gain_std": 0,
    "signal.white_noise_std": 0,
    "signal.constant_offset_std": 0,
    "signal.random_walk_std": 0,
    "signal.random_cut": 1,
    "signal.smooth_std": 0,
    "signal.smooth_size": 1,
    "model.units": 1,
    "model.layers": 1,
    "model.patch_size": 0,
    "model.patch_stride": 1,
    "model.noise_units": 0,
    "model.noise_layers": 1,
    "model.noisy_layers": 1,
    "model.recompute_frames": 0,
    "adversary.noisy_weight": 0,
    "adversary.reversal": 0,
    "adversary.reversal_rate": 0,
    "optimizer.learning_rate": 0,
    "optimizer.learning_rate_min": 0,
    "optimizer.decay_steps": 1,
    "optimizer.warmup_steps": 0,
    "optimizer.day_learning_rate": 0,
    "optimizer.day_learning_rate_min": 0,
    "optimizer.day_decay_steps": 1,
    "optimizer.day_warmup_steps": 0,
    "optimizer.epsilon": 1e-12,
    "optimizer.weight_decay": 0,
    "optimizer.day_weight_decay": 0,
    "optimizer.clip_norm": 0,
    "train.seed": 0,
    "train.steps": 1,
    "train.log_every": 1,
    "train.validate_every": 1,
    "train.save_every": 1,
    "train.patience": 0,
    "parallel.model_axis": 1,
}
_SHARES = ("model.input_dropout", "model.rnn_dropout", "optimizer.beta1", "optimizer.beta2")


def _check(config: Config) -> None:
    values = {
        f"{section.name}.{field.name}": getattr(getattr(config, section.name), field.name)
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }
    for key, least in _LEAST.items():
        if not values[key] >= least:
            raise ConfigError(f"configuration key {key} is {values[key]}; needed at least {least}")
    for key in _SHARES:
        if not 0 <= values[key] < 1:
            raise ConfigError(f"configuration key {key} is {values[key]}; needed 0 <= value < 1")
    _check_choice("signal.eval_padding", config.signal.eval_padding, ("same", "valid"))
    _check_choice("model.dtype", config.model.dtype, ("auto", "float32", "bfloat16"))
    _check_choice("model.kind", config.model.kind, ("baseline", "triple_gru"))
    _check_choice("model.recurrence", config.model.recurrence, ("auto", "scan", "pallas"))
    _check_choice("train.on_nonfinite", config.train.on_nonfinite, ("stop", "skip"))
    if config.model.classes != CLASS_COUNT:
        raise ConfigError(
            f"configuration key model.classes is {config.model.classes}; needed {CLASS_COUNT}: "
            f"blank, "
            "39 phonemes and silence"
        )
    sessions, buckets = config.data.sessions, config.data.buckets
    if len(set(sessions)) != len(sessions) or not all(isinstance(name, str) for name in sessions):
        raise ConfigError(
            f"configuration key data.sessions is {sessions}; needed different names: each session "
            f"has "
            "one place in the day index"
        )
    pairs = [
        bucket
        for bucket in buckets
        if isinstance(bucket, tuple)
        and len(bucket) == 2
        and all(isinstance(size, int) and size > 0 for size in bucket)
    ]
    if len(pairs) != len(buckets) or pairs != sorted(pairs):
        raise ConfigError(
            f"configuration key data.buckets is {buckets}; needed ascending (bins, labels) pairs, "
            "or () to have them chosen from the data"
        )


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(
            f"configuration key {key} is {value!r}; needed one of {', '.join(choices)}"
        )


def write_config(config: Config, path: Path) -> None:
    """Writes a Config as JSON, whole or not at all, so that a run's folder says how it was made."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_written_config(path: Path) -> Config:
    """Reads what `write_config` wrote.

    Raises:
      ConfigError: the file is missing or broken.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: {path.parent} is not a run's folder; train first"
        )
    try:
        return freeze(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); restore it or train anew"
        ) from error


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Keys `section.key` whose values differ, with both values."""
    found = {}
    for section in dataclasses.fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in dataclasses.fields(before):
            pair = getattr(before, field.name), getattr(after, field.name)
            if pair[0] != pair[1]:
                found[f"{section.name}.{field.name}"] = pair
    return found
