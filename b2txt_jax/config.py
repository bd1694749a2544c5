"""Configuration: a Python file with `get_config()`, read once, checked, and frozen into
dataclasses.

`configs/nejm_baseline.py` lists every key with its unit. Other files change some of them. Keys are
overridden on the command line as `--config.section.key=value`. Nothing but this module touches a
`ConfigDict`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import io
import json
import math
import traceback
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from b2txt_jax.errors import UserError
from lm_server.files.atomic_file import replacing
from lm_server.protocol import CLASS_COUNT

CONFIG_FILE = "config.json"
"""Name of the written configuration in a run's folder."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used. The text names the key, what was found and what is
    needed."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    least: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] = (),
    resumable: bool = False,
) -> Any:
    """Declare a field of a section: everything about it stands here and nowhere else.

    Args:
      default: value of a file that leaves the key out. Without one the key is needed.
      help: what it means, with its unit. Part of the error where a value does not fit.
      least: smallest value.
      below: upper limit, itself excluded.
      choices: the allowed values. Empty: any.
      resumable: the value may change between the parts of one run, since it changes no result.
    """
    limits = {"least": least, "below": below, "choices": choices}
    metadata = {"help": help, "resumable": resumable, **limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the trials are and how batches are drawn from them."""

    root: str = setting(
        help="folder with one folder per session, or several with commas between them",
        resumable=True,
    )
    sessions: tuple[str, ...] = setting(help="in the order of the day index; (): all, by name")
    feature_count: int = setting(least=1, help="features per bin of 20 ms")
    days_per_batch: int = setting(least=1, help="different days in a batch")
    trials_per_day: int = setting(least=1, help="trials of each of them, drawn with replacement")
    buckets: tuple[tuple[int, int], ...] = setting(
        help="(bins, labels) shapes that batches are padded to; (): chosen from the data"
    )
    eval_batch_size: int = setting(least=1, help="trials", resumable=True)
    plan: str = setting(
        "days",
        choices=("days", "epochs"),
        help="days: as above; epochs: every trial once per epoch, shuffled over all days",
    )
    packing: str = setting(
        "auto",
        choices=("auto", "on", "off"),
        help="whether short trials share a row of a training batch; auto: where model and "
        "augmentations can and it saves work",
        resumable=True,
    )

    widths: tuple[int, ...] = setting(
        (),
        help="features of each session, the first of feature_count; (): as the data have them",
    )

    @property
    def batch_rows(self) -> int:
        """Trials of a training batch, in either plan."""
        return self.days_per_batch * self.trials_per_day


@dataclasses.dataclass(frozen=True)
class SignalConfig:
    """Augmentation (training only), normalisation and smoothing. Standard deviations in z-score
    units."""

    static_gain_std: float = setting(least=0)
    white_noise_std: float = setting(least=0)
    constant_offset_std: float = setting(least=0)
    random_walk_std: float = setting(least=0)
    random_cut: int = setting(least=1, help="a batch loses its first 0 .. random_cut - 1 bins")
    smooth_std: float = setting(least=0, help="of the Gaussian kernel, bins; 0: no smoothing")
    smooth_size: int = setting(least=1, help="window before small taps are dropped, bins")
    # 'valid' is what the published evaluation script does.
    eval_padding: str = setting(choices=("same", "valid"))
    augment: tuple[str, ...] = setting(
        ("static_gain", "white_noise", "constant_offset", "random_walk", "random_cut"),
        help="augmentations in their order: names, or 'package.module:function(setting=value)'",
    )
    smooth_kernel: str = setting(
        "symmetric",
        choices=("symmetric", "one_sided"),
        help="symmetric looks ahead (80 ms for a std of 2 bins), one_sided uses its past half",
    )
    log: bool = setting(False, help="sign(x) * log(1 + |x|) of raw features, before all else")
    rolling_seconds: float = setting(
        0.0,
        least=0,
        help="window of the rolling mean and deviation that raw features are normalised with; 0: "
        "features are used as they are",
    )
    rolling_clip: float = setting(
        5.0, least=0, help="largest size of a value normalised so, in deviations; 0: any"
    )
    # Of augmentations that are used where `augment` lists them.
    time_mask_spans: int = setting(20, least=0, help="of time_mask, per trial; they may overlap")
    time_mask_fraction: float = setting(
        0.05, least=0, below=1, help="of time_mask: longest span, as a share of the trial"
    )
    time_mask_patch: int = setting(4, least=1, help="of time_mask: spans are multiples of it, bins")
    speckle_rate: float = setting(0.2, least=0, below=1, help="share of features masked")
    channel_mask_rate: float = setting(0.1, least=0, below=1, help="share of channels masked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What the settings of every model have. Each model adds its own in a subclass."""

    name: str = setting("gru", help="'gru', 'triple_gru', or 'package.module:Class'")
    classes: int = setting(CLASS_COUNT, choices=(CLASS_COUNT,), help="blank, phonemes, silence")
    # Of matrix products; auto: bfloat16 off the CPU.
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"))

    @property
    def least_bins(self) -> int:
        """Fewest bins that give a frame. Trials with fewer are refused."""
        return 1

    @property
    def days_differ(self) -> bool:
        """Whether logits depend on the recording day."""
        return True


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and decay. The day layers have their own rates, steps and weight decay."""

    learning_rate: float = setting(least=0)
    learning_rate_min: float = setting(least=0)
    decay_steps: int = setting(least=1)
    warmup_steps: int = setting(least=0)
    day_learning_rate: float = setting(least=0)
    day_learning_rate_min: float = setting(least=0)
    day_decay_steps: int = setting(least=1)
    day_warmup_steps: int = setting(least=0)
    beta1: float = setting(least=0, below=1)
    beta2: float = setting(least=0, below=1)
    epsilon: float = setting(least=1e-12)
    weight_decay: float = setting(least=0)
    day_weight_decay: float = setting(least=0)
    clip_norm: float = setting(least=0, help="largest norm of the gradient; 0: no clipping")
    schedule: str = setting(
        "cosine",
        choices=("cosine", "steps"),
        help="cosine: to the *_min at *_decay_steps; steps: times decay_factor at each of decay_at",
    )
    decay_at: tuple[int, ...] = setting((), help="of schedule 'steps', ascending steps")
    decay_factor: float = setting(0.1, least=0, help="of schedule 'steps'")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and how often things happen, in steps."""

    seed: int = setting(least=0)
    steps: int = setting(least=1, resumable=True)
    log_every: int = setting(least=1, resumable=True)
    validate_every: int = setting(least=1, resumable=True)
    save_every: int = setting(least=1, resumable=True)
    save_seconds: float = setting(
        0.0,
        least=0,
        help="between two saves of the state at least: of the steps that save_every names, earlier "
        "ones are passed over",
        resumable=True,
    )
    # Validations in a row without a better PER after which training stops; 0: never.
    patience: int = setting(0, least=0, help="validations", resumable=True)
    # A step with a NaN or infinite loss or gradient changes no parameter. Then 'stop' ends the run
    # with an error, and 'skip' names the trials and goes on.
    on_nonfinite: str = setting("stop", choices=("stop", "skip"), resumable=True)
    ctc_per_label: bool = setting(False, help="divide each trial's CTC loss by its label's length")
    warm_start: str = setting(
        "", help="folder of a run whose weights a new run starts from, where they fit"
    )
    ema: float = setting(0.0, least=0, below=1, help="decay of the averaged weights; 0: none")
    validate_lm: str = setting(
        "", help="model folder of `lm-server build`, for the WER of validations", resumable=True
    )
    validate_lm_options: str = setting(
        "", help="further options of `lm-server score` in one text", resumable=True
    )


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How devices share the work. Changes no result, but for what reduce_dtype rounds."""

    # Devices over which large parameters are split; the others split a batch's rows.
    model_axis: int = setting(1, least=1, help="devices", resumable=True)
    # 'bfloat16' halves what devices send each other. It needs products in bfloat16.
    reduce_dtype: str = setting(
        "float32",
        choices=("float32", "bfloat16"),
        help="in which the devices' gradients of weights are added",
        resumable=True,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment. Keys with a default may be left out of a file."""

    data: DataConfig
    signal: SignalConfig
    model: Any
    """The settings of the model that `model.name` names, a subclass of ModelSettings."""
    optimizer: OptimizerConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()


MODELS = {
    "gru": "b2txt_jax.model.gru.baseline:GRU",
    "triple_gru": "b2txt_jax.model.triple_gru:TripleGRU",
    "transformer": "b2txt_jax.model.transformer:Transformer",
    "triple_transformer": "b2txt_jax.model.triple_transformer:TripleTransformer",
}
"""The models of this package by their short names."""
_OLD_NAMES = {"baseline": "gru"}
_OLD_ADVERSARY = {"noisy_weight": 1.0, "reversal": 1.0, "reversal_rate": 10.0}
"""The section `adversary` of older versions, with its defaults. They are the triple GRU's now."""
_REQUIRED = ("init", "apply", "frames")
_STRENGTHS = {
    "static_gain_std": "static_gain",
    "white_noise_std": "white_noise",
    "constant_offset_std": "constant_offset",
    "random_walk_std": "random_walk",
    "random_cut": "random_cut",
    "speckle_rate": "speckle",
    "channel_mask_rate": "channel_mask",
}
"""Keys of the section `signal` that say how much an augmentation of this name does."""


def imported(name: str, key: str) -> Any:
    """Import what `package.module:attribute` names.

    Raises:
      ConfigError: the module cannot be imported, or has no such attribute. The text starts with
        `key`, the configuration key that holds the name.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"configuration key {key} is {name!r}, whose module cannot be imported ({error}); "
            "needed package.module:NAME, with the package's folder on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(
            f"configuration key {key} is {name!r}; module {module} has no {attribute!r}"
        ) from error


def model_class(name: str) -> Any:
    """Return the class of the model that `model.name` names (see model/interface.py).

    Raises:
      ConfigError: no such model, or the class lacks something that a model needs.
    """
    name = _OLD_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or (name not in MODELS and not all(name.partition(":"))):
        raise ConfigError(
            f"configuration key model.name is {name!r}; needed one of {', '.join(MODELS)}, or "
            "my_package.my_module:MyModel"
        )
    found = imported(MODELS.get(name, name), "model.name")
    lacking = sorted(getattr(found, "__abstractmethods__", ()))
    lacking += [method for method in _REQUIRED if not callable(getattr(found, method, None))]
    settings = getattr(found, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, ModelSettings)):
        lacking.append("Settings, a frozen dataclass that extends ModelSettings")
    if lacking:
        raise ConfigError(
            f"configuration key model.name is {name!r}, which lacks {', '.join(lacking)}; needed a "
            "subclass of b2txt_jax.model.interface.Model: see docs/your_own_model.md"
        )
    return found


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
        config = module.get_config() if hasattr(module, "get_config") else None
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"configuration file {path} is not valid Python: {error}") from error
    # The file is a program of the user's, and fails in any way.
    except Exception as error:
        lines = [
            at.lineno
            for at in traceback.extract_tb(error.__traceback__)
            if at.filename == str(path)
        ]
        raise ConfigError(
            f"configuration file {path}{f' line {lines[-1]}' if lines else ''} fails with "
            f"{type(error).__name__}: {error}; correct it, or start from configs/nejm_baseline.py"
        ) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"configuration file {path} has no get_config() that returns a ConfigDict"
        )
    if "adversary" not in config and not config.is_locked:
        # Files of older versions that start from one of ours read and set keys of this section.
        config.adversary = ConfigDict(_OLD_ADVERSARY)
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply overrides such as `--config.model.units=512`.

    Raises:
      ConfigError: the file cannot be used, a key is unknown, or a value does not fit.
    """
    return with_overrides(freeze(read_config_file(path).to_dict()), overrides)


def with_overrides(
    config: Config, overrides: Sequence[str], allowed: Collection[str] | None = None
) -> Config:
    """Return a configuration with overrides such as `--config.data.root=DIR` applied.

    Another `model.name` keeps the settings that both models inherit from one class. The others
    start from the new model's defaults.

    Args:
      config: to start from. Unchanged.
      overrides: as on the command line.
      allowed: keys that may be changed. None: all.

    Raises:
      ConfigError: a key is unknown or may not be changed, or a value does not fit.
    """
    pairs = [_parsed(override) for override in overrides]
    changed = ConfigDict(dataclasses.asdict(config))
    for key, value in pairs:  # first, since it decides which other keys there are
        if key == "model.name":
            changed.model = ConfigDict(_settings_of(value, config.model))
    for key, value in pairs:
        _require_known(key, changed)
        if allowed is not None and key not in allowed:
            raise ConfigError(
                f"configuration key {key} belongs to the trained model and cannot be changed here; "
                f"these can: {', '.join(sorted(allowed))}"
            )
        _apply(changed, key, value)
    result = freeze(changed.to_dict())
    _check_used([key for key, _ in pairs], result.signal)
    return result


def _check_used(keys: Sequence[str], signal: SignalConfig) -> None:
    """Raise ConfigError where a key asks for an augmentation that is not listed: it would change
    nothing."""
    for key in keys:
        name = key.removeprefix("signal.")
        augmentation = _STRENGTHS.get(name)
        if augmentation is None or augmentation in signal.augment:
            continue
        value = getattr(signal, name)
        if value > (1 if name == "random_cut" else 0):
            raise ConfigError(
                f"configuration key {key} is {value}, and signal.augment does not list "
                f"{augmentation!r}, so that it would change nothing; needed "
                f'--config.signal.augment="{(*signal.augment, augmentation)}" besides'
            )


def _parsed(override: str) -> tuple[str, str]:
    """Split `--config.section.key=value`. Keys of older versions become today's."""
    key, separator, value = override.partition("=")
    if not separator or not key.startswith("--config."):
        raise ConfigError(
            f"argument {override!r} is not understood; needed --config.section.key=value"
        )
    key = key.removeprefix("--config.")
    if key == "model.kind":
        key = "model.name"
    if key == "model.name":
        value = _OLD_NAMES.get(value, value)
    if key.startswith("adversary."):
        key = "model." + key.removeprefix("adversary.")
    return key, value


def _settings_of(name: str, before: ModelSettings) -> dict[str, Any]:
    """Return the defaults of a model, with the settings that it inherits as `before` has them."""
    settings = model_class(name).Settings
    common = next(kind for kind in settings.__mro__ if isinstance(before, kind))
    values = {f.name: f.default for f in dataclasses.fields(settings) if f.default is not _NONE}
    shared = dataclasses.fields(common)
    return values | {f.name: getattr(before, f.name) for f in shared} | {"name": name}


def _apply(config: ConfigDict, key: str, value: str) -> None:
    from absl import flags
    from ml_collections import config_flags

    arguments = ["b2txt", f"--config.{key}={value}"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            values(arguments)
    except (flags.Error, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{arguments[1]!r} does not fit the key's type: {error}") from error


def _require_known(key: str, config: ConfigDict) -> None:
    known = [f"{section}.{name}" for section in config for name in config[section]]
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known keys: {', '.join(known)}"
    raise ConfigError(f"unknown configuration key {key!r}; {hint}")


def freeze(values: Mapping[str, Any]) -> Config:
    """Return the checked, frozen Config of a nested mapping (from a ConfigDict or config.json).

    Raises:
      ConfigError: a key is missing, unknown, of another type, or a value is out of range.
    """
    config: Config = _freeze(Config, _upgraded(values), "")
    _check(config)
    return config


def _upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename what older files call otherwise: `model.kind` and the section `adversary`.

    Every older file has all settings of the triple GRU, also for the baseline, which has none.
    """
    values = dict(_section(values, "top level"))
    section = _section(values.pop("adversary", {}), "adversary")
    unknown = [key for key in section if key not in _OLD_ADVERSARY]
    if unknown:
        raise ConfigError(
            f"configuration section 'adversary': unknown keys {unknown}; needed some of "
            f"{', '.join(_OLD_ADVERSARY)}, which are keys of the section 'model' now"
        )
    adversary = {key: value for key, value in section.items() if value != _OLD_ADVERSARY[key]}
    model = values.get("model")
    if not isinstance(model, Mapping):
        return values
    model = dict(model)
    older = bool(adversary) or "kind" in model
    name = model.pop("kind", model.get("name", "gru"))
    model["name"] = name = _OLD_NAMES.get(name, name) if isinstance(name, str) else name
    if not older:
        return values | {"model": model}
    if name == "gru":
        own = {field.name for field in dataclasses.fields(model_class(name).Settings)}
        others = {field.name for field in dataclasses.fields(model_class("triple_gru").Settings)}
        model = {key: value for key, value in model.items() if key in own or key not in others}
    else:
        model |= adversary
    return values | {"model": model}


def _section(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"configuration section {where!r} is {values!r}; needed keys and values")
    return values


_NONE = dataclasses.MISSING


def _freeze(kind: type, values: Any, where: str) -> Any:
    _section(values, where)
    hints = typing.get_type_hints(kind)
    declared = {field.name: field for field in dataclasses.fields(kind)}
    missing = sorted(n for n, f in declared.items() if f.default is _NONE and n not in values)
    unknown = sorted(set(values) - set(declared))
    if missing or unknown:
        raise ConfigError(
            f"configuration section {where or 'top level'!r}: missing keys {missing}, unknown keys "
            f"{unknown}; start from configs/nejm_baseline.py, which lists every key"
        )
    fields = {}
    for name in (one for one in declared if one in values):
        key, value, hint = f"{where}{name}", values[name], hints[name]
        if key == "model":
            chosen = value.get("name", "gru") if isinstance(value, Mapping) else "gru"
            fields[name] = _freeze(model_class(chosen).Settings, value, "model.")
        elif dataclasses.is_dataclass(hint):
            fields[name] = _freeze(typing.cast(type, hint), value, f"{key}.")
        elif typing.get_origin(hint) is tuple:
            fields[name] = _to_tuple(value, key)
        elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            fields[name] = _finite(value, key)
        elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            fields[name] = value
        else:
            raise ConfigError(
                f"configuration key {key} is {value!r}; needed a {getattr(hint, '__name__', hint)}"
            )
        _check_limits(key, fields[name], declared[name].metadata)
    return kind(**fields)


def _check_limits(key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise ConfigError where a value is outside what its declaration allows."""
    least, below, choices = (metadata.get(limit) for limit in ("least", "below", "choices"))
    needed = None
    if choices and value not in choices:
        needed = f"one of {', '.join(map(str, choices))}"
    elif below is not None and not (least or 0) <= value < below:
        needed = f"{least or 0} <= value < {below}"
    elif least is not None and not value >= least:
        needed = f"at least {least}"
    if needed:
        meaning = f" ({metadata['help']})" if metadata["help"] else ""
        raise ConfigError(f"configuration key {key} is {value!r}; needed {needed}{meaning}")


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


def _check(config: Config) -> None:
    """Check what no single field's limits can."""
    listed = {"data.sessions": config.data.sessions, "signal.augment": config.signal.augment}
    for key, names in listed.items():
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ConfigError(
                f"configuration key {key} is {names}; needed different names, each at its place in "
                "the order"
            )
    decay_at = config.optimizer.decay_at
    if not all(isinstance(step, int) and step > 0 for step in decay_at) or (
        sorted(set(decay_at)) != list(decay_at)
    ):
        raise ConfigError(
            f"configuration key optimizer.decay_at is {decay_at}; needed ascending steps above 0"
        )
    if decay_at and config.optimizer.schedule != "steps":
        raise ConfigError(
            f"configuration key optimizer.decay_at is {decay_at}, which schedule "
            f"{config.optimizer.schedule!r} does not use; needed optimizer.schedule 'steps', or ()"
        )
    buckets = config.data.buckets
    pairs = [
        bucket
        for bucket in buckets
        if isinstance(bucket, tuple)
        and len(bucket) == 2
        and all(isinstance(size, int) and size > 0 for size in bucket)
    ]
    labels = [labels for _, labels in pairs]
    if len(pairs) != len(buckets) or pairs != sorted(pairs) or labels != sorted(labels):
        raise ConfigError(
            f"configuration key data.buckets is {buckets}; needed ascending (bins, labels) pairs, "
            "a longer one with at least the labels of a shorter one, or () to have them chosen "
            "from the data"
        )


def write_config(config: Config, path: Path) -> None:
    """Write a Config as JSON, whole or not at all: the record of how a run was made."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_written_config(path: Path) -> Config:
    """Read what `write_config` wrote.

    Raises:
      ConfigError: the file is missing or broken.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: {path.parent} is not a run's folder; train first"
        )
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); restore it or train anew"
        ) from error
    try:
        return freeze(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the keys `section.key` whose values differ, with both values. None where a model has
    no such key."""
    found = {}
    for section, before in dataclasses.asdict(old).items():
        after = dataclasses.asdict(getattr(new, section))
        for name in before | after:
            pair = before.get(name), after.get(name)
            if pair[0] != pair[1]:
                found[f"{section}.{name}"] = pair
    return found


def resumable_keys(config: Config) -> set[str]:
    """Return the keys `section.key` that may change between the parts of one run."""
    return {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
        if field.metadata.get("resumable")
    }
