"""The published `args.yaml`, read to a configuration and written from one.

`_SAME` names the settings that both sides have. Other settings without effect here are listed and
left out. One that would change training is an error, unless `ignore` names it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from b2txt_jax.config import Config, SignalConfig, freeze
from b2txt_jax.interop.errors import ConversionError, shortened
from b2txt_jax.model.gru.baseline import GRUSettings
from b2txt_jax.signal.smooth import gaussian_taps


class _UniqueLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, as the published scripts do."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} is given twice: leave one out")
        return super().construct_mapping(node, deep)


def load_args(path: Path) -> dict[str, Any]:
    """Read args.yaml as `section.name` -> value, with the text `None` as None.

    Raises:
      ConversionError: the file is missing, is not plain YAML, or has OmegaConf interpolations.
    """
    if not path.is_file():
        raise ConversionError(
            f"{path} does not exist; needed the args.yaml that the published trainer writes beside "
            f"its checkpoint: it has the model's sizes and the list of sessions"
        )
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _UniqueLoader)
        flat = _flatten(loaded) if isinstance(loaded, dict) else {}
    # Beside its own errors the library raises those of Python's numbers, dates and stack.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path} is not plain YAML ({' '.join(str(error).split())}); save it again with "
            f"OmegaConf.save(OmegaConf.create(OmegaConf.to_container(args, resolve=True)), FILE)"
        ) from error
    if not flat:
        raise ConversionError(f"{path} holds no settings; needed `model:`, `dataset:` and others")
    for key, value in flat.items():
        if isinstance(value, str) and "${" in value:
            raise ConversionError(
                f"{path}: {key} is {value!r}, an OmegaConf reference; save the file with its "
                f"references resolved: OmegaConf.to_container(args, resolve=True)"
            )
    return flat


def _flatten(values: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{where}{name}"
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{key}.")
        else:
            empty = isinstance(value, str) and value.strip().lower() in ("none", "null")
            flat[key] = None if empty else value
        if len(flat) > _MOST_SETTINGS:  # as aliases of aliases make of a few lines
            raise ValueError(f"more than {_MOST_SETTINGS} settings")
    return flat


_MOST_SETTINGS = 10_000


# Readers of one setting. They raise ValueError with the needed form.


def _number(value: Any) -> float:
    """Read a number, also as text, because OmegaConf and YAML 1.1 leave `1e-4` as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("needed a number")
    try:
        found = float(value)
    except OverflowError:  # an integer beyond floating point
        found = math.inf
    if not math.isfinite(found):
        raise ValueError("needed a finite number")
    return found


def _whole(value: Any) -> int:
    found = _number(value)
    if found != int(found):
        raise ValueError("needed a whole number")
    return int(found)


def _truth(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("needed true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("needed text")
    return value


def _names(value: Any) -> tuple[str, ...]:
    """Read the names of different sessions, each of which is the name of a folder."""
    if not isinstance(value, list) or not value:
        raise ValueError("needed a list of session names")
    for name in value:
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise ValueError(f"session {shortened(name)} is not the name of a folder")
    if len(set(value)) < len(value):
        twice = sorted({name for name in value if value.count(name) > 1})
        raise ValueError(f"sessions are listed twice: {', '.join(twice)}")
    return tuple(value)


def _numbers(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError("needed a list of numbers")
    return tuple(map(_number, value))


_BUCKETS = ((600, 64), (800, 80), (1000, 100), (1200, 120), (1600, 160), (2560, 500))
"""(bins, labels), as in configs/nejm_baseline.py. They fit every published trial."""
_SAVE_EVERY, _SAVE_SECONDS = 1_000, 60.0
"""Steps between latest checkpoints. The published trainer keeps none."""


_REQUIRED = object()
"""Instead of a default, for settings that logits depend on."""

_MOST_SETTINGS = 10_000
"""More than a file of settings has. References within a file can stand for any number."""
_SEED, _NO_SEED, _RECIPE_SEED = "seed", -1, 10
"""The published trainer is unseeded if its seed is -1."""
_DT = "dataset.data_transforms."
# (published setting, key here, value in the published recipe)
_SAME: tuple[tuple[str, str, Any], ...] = (
    ("model.n_input_features", "data.feature_count", _REQUIRED),
    ("model.n_units", "model.units", _REQUIRED),
    ("model.n_layers", "model.layers", _REQUIRED),
    ("model.patch_size", "model.patch_size", _REQUIRED),
    ("model.patch_stride", "model.patch_stride", _REQUIRED),
    ("model.rnn_dropout", "model.rnn_dropout", 0.4),
    ("model.input_network.input_layer_dropout", "model.input_dropout", 0.2),
    ("dataset.n_classes", "model.classes", _REQUIRED),
    ("dataset.sessions", "data.sessions", _REQUIRED),
    ("dataset.dataset_dir", "data.root", "data/hdf5_data_final"),
    ("dataset.days_per_batch", "data.days_per_batch", 4),
    (_DT + "smooth_kernel_std", "signal.smooth_std", _REQUIRED),
    (_DT + "smooth_kernel_size", "signal.smooth_size", _REQUIRED),
    (_DT + "static_gain_std", "signal.static_gain_std", 0.0),
    (_DT + "white_noise_std", "signal.white_noise_std", 1.0),
    (_DT + "constant_offset_std", "signal.constant_offset_std", 0.2),
    (_DT + "random_walk_std", "signal.random_walk_std", 0.0),
    (_DT + "random_cut", "signal.random_cut", 3),
    ("lr_max", "optimizer.learning_rate", 0.005),
    ("lr_min", "optimizer.learning_rate_min", 0.0001),
    ("lr_decay_steps", "optimizer.decay_steps", 120_000),
    ("lr_warmup_steps", "optimizer.warmup_steps", 1_000),
    ("lr_max_day", "optimizer.day_learning_rate", 0.005),
    ("lr_min_day", "optimizer.day_learning_rate_min", 0.0001),
    ("lr_decay_steps_day", "optimizer.day_decay_steps", 120_000),
    ("lr_warmup_steps_day", "optimizer.day_warmup_steps", 1_000),
    ("beta0", "optimizer.beta1", 0.9),
    ("beta1", "optimizer.beta2", 0.999),
    ("epsilon", "optimizer.epsilon", 0.1),
    ("weight_decay", "optimizer.weight_decay", 0.001),
    ("weight_decay_day", "optimizer.day_weight_decay", 0.0),
    ("grad_norm_clip_value", "optimizer.clip_norm", 10.0),
    (_SEED, "train.seed", _RECIPE_SEED),
    ("num_training_batches", "train.steps", 120_000),
    ("batches_per_train_log", "train.log_every", 200),
    ("batches_per_val_step", "train.validate_every", 2_000),
)
_SMOOTH, _AMP, _BATCH = _DT + "smooth_data", "use_amp", "dataset.batch_size"
_WALK_AXIS = _DT + "random_walk_axis"
_VALIDATED = "dataset.dataset_probability_val"
# Settings from which `_as_config` derives keys.
_OTHERS: tuple[tuple[str, Callable[[Any], Any], Any], ...] = (
    (_SMOOTH, _truth, True),
    (_AMP, _truth, True),
    (_BATCH, _whole, 64),
    (_WALK_AXIS, _whole, -1),
)

# Published settings without effect here, with the values that are written: those of the published
# rnn_args.yaml. The comment is the reason why they are left out on reading.
_WITHOUT_EFFECT: dict[str, Any] = {
    "gpu_number": "0",  # the device is JAX's
    "mode": "train",  # chosen by the command
    "output_dir": "trained_models/from_b2txt_jax",  # --workdir
    "checkpoint_dir": "trained_models/from_b2txt_jax/checkpoint",  # --workdir
    "init_from_checkpoint": False,  # origin of the run
    "init_checkpoint_path": "None",  # origin of the run
    "save_best_checkpoint": True,  # the best is always saved
    "save_all_val_steps": False,  # the best and the latest are saved
    "save_final_model": False,  # the latest is always saved
    "save_val_metrics": True,  # metrics are always saved
    "save_val_logits": True,  # `b2txt infer` writes logits
    "save_val_data": False,  # the data is not copied
    "log_individual_day_val_PER": True,  # always logged
    "log_val_skip_logs": False,  # only a message
    "batches_per_save": 0,  # not read by published code
    "early_stopping_val_steps": 20,  # only read with early_stopping
    "dataset.seed": 1,  # batches are drawn from `seed`
    "dataset.num_dataloader_workers": 4,  # the loader has its own threads
    "dataset.loader_shuffle": False,  # batches are random either way
    "dataset.max_seq_elements": 500,  # data.buckets limit labels
    "dataset.test_percentage": 0.1,  # not read by published code: splits are files
    "dataset.bad_trials_dict": None,  # not read by published code
    "dataset.must_include_days": None,  # not read by published code
    "dataset.neural_dim": None,  # not read by published code: model.n_input_features counts
    "model.input_network.n_input_layers": 1,  # not read by published code
    "model.input_network.input_layer_sizes": None,  # not read by published code
}

_LOGGING = re.compile(r"(.*[._])?(wandb|tensorboard|mlflow|comet|neptune)(_.*)?")
"""Settings that forks add for their logging."""

_FIXED: dict[str, tuple[Any, str]] = {
    "model.rnn_trainable": (True, "the GRU is always trained here"),
    "model.input_network.input_trainable": (True, "the day layers are always trained here"),
    "early_stopping": (False, "training runs for train.steps here"),
    "dataset.feature_subset": (None, "all features of the files are used here"),
    "lr_scheduler_type": ("cosine", "the schedule is warm-up and cosine here"),
}
"""Settings of which only one value can be converted, with the reason."""
_NOT_IGNORABLE = frozenset({"dataset.feature_subset"})
"""Settings that change logits and therefore cannot be ignored."""


@dataclass(frozen=True)
class ReadArgs:
    """A converted args.yaml."""

    config: Config
    notes: tuple[str, ...]
    """Lines about settings that were left out or filled in."""
    not_validated: tuple[str, ...] = ()
    """Sessions that the published trainer left out of its validation."""


def read_args(flat: Mapping[str, Any], source: str, ignore: Collection[str] = ()) -> ReadArgs:
    """Convert settings of args.yaml to the configuration that trains and decodes equally.

    Args:
      flat: result of `load_args`.
      source: name of the file in errors.
      ignore: settings without an equivalent that are left out nevertheless.

    Raises:
      ConversionError: a setting is missing, cannot be read or has no equivalent, or an ignored
        setting does not exist.
    """
    absent = sorted(key for key in ignore if key not in flat)
    if absent:
        raise ConversionError(
            f"--ignore {absent[0]}: {source} has no such setting; needed the name with its "
            f"sections, such as dataset.batch_size"
        )
    readers = [(path, _reader(key), default) for path, key, default in _SAME]
    values: dict[str, Any] = {}
    filled = []
    for path, read, default in (*readers, *_OTHERS):
        if flat.get(path) is not None:
            values[path] = _read(flat[path], read, path, source)
        elif default is _REQUIRED:
            raise ConversionError(f"{source} lacks {path}; needed, since logits depend on it")
        else:
            values[path] = default
            filled.append(f"{path} = {default}")
    notes = []
    if filled:
        notes.append(f"not in args.yaml, taken from the published recipe: {', '.join(filled)}")
    if values[_SEED] == _NO_SEED:
        values[_SEED] = _RECIPE_SEED
        notes.append(
            f"seed {_NO_SEED} means unseeded in the published trainer; training is always seeded "
            f"here, with the published recipe's {_RECIPE_SEED}"
        )
    unused = [key for key in flat if key in _WITHOUT_EFFECT or _LOGGING.fullmatch(key)]
    left_out = [key for key in unused if flat[key] is not None]
    if left_out:
        notes.append(f"left out, without effect here: {', '.join(sorted(left_out))}")
    refused = _without_equivalent(flat, values, source)
    needless = sorted({*ignore} - {key for key, _, _ in refused})
    if needless:
        notes.append(f"--ignore {', '.join(needless)}: had no effect, there was nothing to ignore")
    texts = {
        key: f"{key} is {shortened(value)}, which has no equivalent: {reason}"
        for key, value, reason in refused
    }
    never = [text for key, text in texts.items() if key in _NOT_IGNORABLE]
    if never:
        raise ConversionError(
            f"{source}: {never[0]}. Logits depend on it, so this model cannot be converted"
        )
    left = [key for key in texts if key not in ignore]
    if left:
        options = " ".join(f"--ignore {key}" for key in left)
        raise ConversionError(
            f"{source}: {'; '.join(texts[key] for key in left)}. Training may differ; `{options}` "
            "converts nevertheless"
        )
    notes += [f"ignored: {text}" for text in texts.values()]
    try:
        config = freeze(_as_config(values))
        _check_taps(config)
    except ValueError as error:  # ConfigError is one
        raise ConversionError(f"{source} gives no usable configuration: {error}") from error
    return ReadArgs(config, tuple(notes), _not_validated(flat, config.data.sessions, source))


def check_changed(config: Config) -> None:
    """Check a configuration after overrides, like `read_args`.

    Raises:
      ConfigError: the smoothing kernel has no taps.
      ConversionError: a session is not the name of a folder.
    """
    _check_taps(config)
    try:
        _names(list(config.data.sessions))
    except ValueError as error:
        raise ConversionError(f"configuration key data.sessions: {error}") from error


def _check_taps(config: Config) -> None:
    if config.signal.smooth_std > 0:
        gaussian_taps(config.signal.smooth_std, config.signal.smooth_size)


def _not_validated(
    flat: Mapping[str, Any], sessions: tuple[str, ...], source: str
) -> tuple[str, ...]:
    """Return the sessions with the probability 0. Sessions beyond the list have none."""
    if flat.get(_VALIDATED) is None:
        return ()
    given = _read(flat[_VALIDATED], _numbers, _VALIDATED, source)
    return tuple(name for name, number in zip(sessions, given, strict=False) if number == 0)


def _reader(key: str) -> Callable[[Any], Any]:
    """Return the reader of a published setting, by the type of its key here."""
    section, name = key.split(".")
    sections = typing.get_type_hints(Config) | {"model": GRUSettings}
    kind = typing.get_type_hints(sections[section])[name]
    return {int: _whole, float: _number, str: _text}.get(kind, _names)


def _read(value: Any, read: Callable[[Any], Any], path: str, source: str) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise ConversionError(f"{source}: {path} is {shortened(value)}; {error}") from error


def _without_equivalent(
    flat: Mapping[str, Any], values: Mapping[str, Any], source: str
) -> list[tuple[str, Any, str]]:
    """Return (setting, value, reason) of every setting without an equivalent."""
    found = []
    for key, (needed, reason) in _FIXED.items():
        value = flat.get(key)
        if isinstance(needed, bool) and value is not None:
            value = _read(value, _truth, key, source)
        if value not in (needed, None, []):
            found.append((key, value, reason))
    if values[_DT + "random_walk_std"] > 0 and values[_WALK_AXIS] not in (-1, 2):
        found.append((_WALK_AXIS, values[_WALK_AXIS], "the walk runs over channels (-1) here"))
    days, batch = values["dataset.days_per_batch"], values[_BATCH]
    if min(days, batch) < 1:
        raise ConversionError(
            f"{source}: {_BATCH} is {batch}, dataset.days_per_batch {days}; needed at least 1"
        )
    if batch % days:
        found.append((_BATCH, batch, f"each of {days} days gives as many trials here"))
    known = {*values, *_WITHOUT_EFFECT, *_FIXED, _VALIDATED}
    unknown = "the published code has no such setting"
    found += [
        (key, value, unknown)
        for key, value in flat.items()
        if key not in known and value is not None and not _LOGGING.fullmatch(key)
    ]
    return found


def _as_config(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    config: dict[str, dict[str, Any]] = {
        "data": {
            "trials_per_day": math.ceil(values[_BATCH] / values["dataset.days_per_batch"]),
            "eval_batch_size": values[_BATCH],
            "buckets": _BUCKETS,
        },
        "signal": {"eval_padding": "same"},
        "model": {"day_layer": True, "dtype": "auto" if values[_AMP] else "float32"},
        "optimizer": {},
        "train": {"save_every": _SAVE_EVERY, "save_seconds": _SAVE_SECONDS},
    }
    for path, key, _ in _SAME:
        section, name = key.split(".")
        config[section][name] = values[path]
    if not values[_SMOOTH]:
        config["signal"]["smooth_std"] = 0.0
    # 0 and 1 both mean no cut. Without patches the stride is unused and may be 0.
    config["signal"]["random_cut"] = max(config["signal"]["random_cut"], 1)
    if config["model"]["patch_size"] == 0:
        config["model"]["patch_stride"] = 1
    return config


def recipe_notes(config: Config) -> tuple[str, ...]:
    """Return a note where the published trainer cannot continue with this run's recipe."""
    published: tuple[str, ...] = SignalConfig.augment  # the default
    without = {
        "data.plan": config.data.plan != "days",
        "signal.augment": not set(config.signal.augment) <= set(published),
        "optimizer.schedule": config.optimizer.schedule != "cosine",
        "train.ctc_per_label": config.train.ctc_per_label,
        "train.ema": config.train.ema > 0,
    }
    found = ", ".join(key for key, differs in without.items() if differs)
    if not found:
        return ()
    return (f"the published trainer has no {found}: training on there is another recipe",)


def args_from_config(config: Config, validated: Collection[str]) -> dict[str, Any]:
    """Return all settings of a published args.yaml, nested, for a configuration.

    Args:
      config: configuration of the run.
      validated: sessions that the published trainer validates on.

    Raises:
      ConversionError: the published code cannot build such a model.
    """
    if not config.model.day_layer:
        raise ConversionError(
            "model.day_layer is False; the published model has one input layer per session. Use "
            "--to-safetensors to take these weights elsewhere"
        )
    sections = dataclasses.asdict(config)
    flat: dict[str, Any] = {}
    for path, key, _ in _SAME:
        section, name = key.split(".")
        flat[path] = sections[section][name]
    sessions, features = config.data.sessions, config.data.feature_count
    flat |= _WITHOUT_EFFECT | {key: value for key, (value, _) in _FIXED.items()}
    flat |= {
        _WALK_AXIS: -1,
        "dataset.sessions": list(sessions),
        _VALIDATED: [int(name in validated) for name in sessions],
        "dataset.neural_dim": features,
        "model.input_network.input_layer_sizes": [features],
        _BATCH: config.data.batch_rows,
        # The published evaluation script feeds bfloat16, and works with autocast alone.
        _AMP: True,
        _SMOOTH: config.signal.smooth_std > 0,
        # The published evaluation script always smooths, which fails with 0.
        _DT + "smooth_kernel_std": config.signal.smooth_std or 2.0,
    }
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return nested
