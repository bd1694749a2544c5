"""Conversion of AdamW's and LambdaLR's state_dicts in the published checkpoint.

The optimizer has three groups: biases, day layers, others. Parameters are numbered group by group,
in the model's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from b2txt_jax.config import Config
from b2txt_jax.interop.errors import ConversionError, shortened
from b2txt_jax.interop.weights import Moments, moments_of, optimizer_groups
from b2txt_jax.training.optimizer import warmup_cosine
from b2txt_jax.training.step import TrainState

RESTART = "Convert the weights alone with --restart"
MOST_STEPS = 2**31 - 1
"""Steps are counted in int32."""


def scheduler_step(checkpoint: Mapping[str, Any], source: str) -> int:
    """Return the steps done according to `scheduler_state_dict`, 0 without one.

    Raises:
      ConversionError: `last_epoch` is not such a number.
    """
    scheduler = checkpoint.get("scheduler_state_dict") or {}
    step = scheduler.get("last_epoch", 0) if isinstance(scheduler, dict) else None
    if type(step) is not int or not 0 <= step <= MOST_STEPS:
        raise ConversionError(
            f"{source}: scheduler_state_dict has last_epoch {shortened(step)}; needed the number "
            f"of steps done. {RESTART}"
        )
    return step


def read_moments(optimizer: Any, order: Sequence[str], source: str) -> Moments | None:
    """Return AdamW's state by parameter name, or None without one.

    Args:
      optimizer: `optimizer_state_dict`.
      order: names of the parameters, in the model's order.
      source: name of the file in errors.

    Raises:
      ConversionError: the state is not that of AdamW with the published groups.
    """
    if not isinstance(optimizer, dict) or not optimizer.get("state"):
        return None
    state, groups = optimizer["state"], optimizer.get("param_groups")
    indices = _indices(groups, source)
    if not isinstance(state, dict) or not all(isinstance(e, dict) for e in state.values()):
        raise ConversionError(
            f"{source}: the state in optimizer_state_dict is not AdamW's; needed one dictionary "
            f"per parameter. {RESTART}"
        )
    expected = optimizer_groups(order)
    numbers = [len(group) for group in indices]
    if numbers != [len(group) for group in expected]:
        raise ConversionError(
            f"{source}: the optimizer has groups of {numbers} parameters; needed "
            f"{[len(group) for group in expected]} (biases, day layers, others). {RESTART}"
        )
    mean, square, steps = {}, {}, {}
    for group, names in zip(indices, expected, strict=True):
        for index, name in zip(group, names, strict=True):
            entry = state.get(index)
            if entry is None:  # a day without a batch so far
                continue
            missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in entry]
            if missing:
                raise ConversionError(
                    f"{source}: the optimizer state of {name} lacks {', '.join(missing)}; needed "
                    f"AdamW's. {RESTART}"
                )
            mean[name], square[name] = entry["exp_avg"], entry["exp_avg_sq"]
            steps[name] = _updates(entry["step"], name, source)
    return Moments(mean, square, steps)


def has_amsgrad(optimizer: Any) -> bool:
    """Return whether an optimizer_state_dict holds AMSGrad's largest squares."""
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    entries = state.values() if isinstance(state, dict) else ()
    return any(isinstance(entry, dict) and "max_exp_avg_sq" in entry for entry in entries)


def _indices(groups: Any, source: str) -> list[list[int]]:
    """Return the numbers of the parameters in each group."""
    found = []
    for group in groups if isinstance(groups, list) else [None]:
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise ConversionError(
                f"{source}: optimizer_state_dict has param_groups that are not AdamW's; needed "
                f"groups with lists of numbers as `params`. {RESTART}"
            )
        found.append(numbers)
    every = [number for group in found for number in group]
    if len(set(every)) != len(every):
        raise ConversionError(
            f"{source}: param_groups of optimizer_state_dict name a parameter twice. {RESTART}"
        )
    return found


def _updates(value: Any, name: str, source: str) -> int:
    """Read a count of updates, a number or a tensor with one element."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = float(value.reshape(()))
    if not isinstance(value, int | float) or not (0 <= value <= MOST_STEPS and value == int(value)):
        text = " ".join(repr(value).split())
        raise ConversionError(
            f"{source}: the optimizer state of {name} has step {text[:60]}; needed the number of "
            f"updates. {RESTART}"
        )
    return int(value)


def _rates(config: Config, step: int) -> list[float]:
    """Return the learning rate of the next step, per published group."""
    o = config.optimizer
    main = warmup_cosine(o.learning_rate, o.learning_rate_min, o.warmup_steps, o.decay_steps)
    day = warmup_cosine(
        o.day_learning_rate, o.day_learning_rate_min, o.day_warmup_steps, o.day_decay_steps
    )
    return [float(jnp.asarray(rate(jnp.int32(step)))) for rate in (main, day, main)]


def _base_rates(config: Config) -> list[float]:
    main, day = config.optimizer.learning_rate, config.optimizer.day_learning_rate
    return [main, day, main]


_ADAMW = dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False) | {
    "foreach": None,
    "fused": True,
    "decoupled_weight_decay": True,
}
"""Options of the published torch.optim.AdamW that are the same in every group."""


def optimizer_dict(state: TrainState, config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Return torch.optim.AdamW's state_dict with the published groups."""
    settings, moments = config.optimizer, moments_of(state)
    own = {"betas": (settings.beta1, settings.beta2), "eps": settings.epsilon}
    groups: list[dict[str, Any]] = []
    entries: dict[int, Any] = {}
    kinds = zip(
        optimizer_groups(names),
        ("bias", "day_layer", "other"),
        (0.0, settings.day_weight_decay, settings.weight_decay),
        _rates(config, int(state.step)),
        _base_rates(config),
        strict=True,
    )
    first = 0
    for group, kind, decay, rate, base in kinds:
        numbers = list(range(first, first + len(group)))
        first += len(group)
        varied = {"group_type": kind, "weight_decay": decay, "lr": rate, "initial_lr": base}
        groups.append({**varied, **own, **_ADAMW, "params": numbers})
        for number, name in zip(numbers, group, strict=True):
            if name in moments.steps:
                entries[number] = {
                    "step": np.array(moments.steps[name], np.float32),
                    "exp_avg": moments.mean[name],
                    "exp_avg_sq": moments.square[name],
                }
    return {"state": entries, "param_groups": groups}


def scheduler_dict(config: Config, step: int) -> dict[str, Any]:
    """Return torch.optim.lr_scheduler.LambdaLR's state_dict."""
    return {
        "base_lrs": _base_rates(config),
        "last_epoch": step,
        "_step_count": step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": _rates(config, step),
        "lr_lambdas": [None, None, None],
    }
