"""Where arrays live: one mesh of devices with named axes, and declared rules for every parameter.

`data` splits the rows of a batch; `model` splits large parameters. What is split changes no result
but for the order of sums: random numbers are functions of (seed, step) and position.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from b2txt_jax.config import Config, ConfigError
from b2txt_jax.data.loader import Batch
from b2txt_jax.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
)

DATA, MODEL = "data", "model"

RULES: tuple[tuple[str, P], ...] = (
    # Up to 7168 wide, gates on an axis of their own: every device has all gates of its units.
    (r"noise/gru/weight_(ih|hh)_l\d+", P(None, MODEL)),
    (r"noise/gru/bias_(ih|hh)_l\d+", P(None, MODEL)),
    (r"noise/h0", P(None, None, MODEL)),
    (r"noise/out/weight", P(MODEL)),
    (r"noise/out/bias", P(MODEL)),
    # 45 days of 512 x 512 are a quarter of the parameters; each row of the batch needs one day.
    (r"day/weight", P(None, None, MODEL)),
    (r"day/bias", P(None, MODEL)),
    # 768 wide: splitting these would cost a transfer in every frame of the recurrence.
    (r"gru/(weight|bias)_(ih|hh)_l\d+", P()),
    (r"head/(weight|bias)", P()),
    (r"h0", P()),
    # Counters of the step and of the optimizer.
    (r"step|count|steps", P()),
)
"""(end of a parameter's path, axes it is split over); moments follow their parameter."""


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (of all hosts) as [data, model].

    Raises:
      ConfigError: `model` does not divide their number.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) % model:
        raise ConfigError(
            f"configuration key parallel.model_axis is {model}; needed a divisor of the "
            f"{len(devices)} devices"
        )
    shape = (len(devices) // model, model)
    mesh: Mesh = jax.make_mesh(
        shape, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices
    )
    return mesh


def rule_of(path: str) -> P:
    """The axes that a leaf of the state is split over, by its path such as `params/gru/h0`.

    Raises:
      KeyError: no rule names it: add one to RULES.
    """
    for pattern, spec in RULES:
        if re.search(rf"(^|/)({pattern})$", path):
            return spec
    raise KeyError(f"no sharding rule for {path}: add one to RULES in training/sharding.py")


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """A NamedSharding per leaf of a state of arrays or shapes.

    Raises:
      ConfigError: a dimension cannot be split evenly.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = rule_of(name)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"configuration key parallel.model_axis is {mesh.shape[axis]}; {name} has "
                    f"{size} columns: needed a divisor of them"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_shardings(mesh: Mesh) -> Batch:
    """The rows of every array of a batch over `data`."""
    rows: Any = NamedSharding(mesh, P(DATA))
    return Batch(*[rows] * len(Batch._fields))


def check_rows(rows: int, key: str, mesh: Mesh) -> None:
    """Raises ConfigError when the rows of a batch cannot be split evenly over the devices."""
    if rows % mesh.shape[DATA]:
        raise ConfigError(
            f"a batch has {rows} rows ({key}), which {mesh.shape[DATA]} devices cannot share "
            f"evenly: change {key}, or parallel.model_axis"
        )


def local_rows(rows: int, mesh: Mesh) -> slice:
    """The rows of a global batch that this host's devices hold.

    Raises:
      ConfigError: they are not neighbours.
    """
    sharding = NamedSharding(mesh, P(DATA))
    held = {
        index[0].indices(rows)[:2]
        for index in sharding.addressable_devices_indices_map((rows,)).values()
        if index is not None
    }
    first, last = min(held)[0], max(held)[1]
    if sum(stop - start for start, stop in held) != last - first:
        raise ConfigError(
            f"this host's devices hold rows {sorted(held)} of a batch, which are not neighbours: "
            "needed a parallel.model_axis that divides the devices of a host, or the reverse"
        )
    return slice(first, last)


def place(batch: Batch, mesh: Mesh, rows: int) -> Batch:
    """This host's rows of a batch of `rows` rows as global arrays on the devices."""
    arrays: Any = (
        jax.make_array_from_process_local_data(
            sharding, np.asarray(value), (rows, *np.shape(value)[1:])
        )
        for sharding, value in zip(batch_shardings(mesh), batch, strict=True)
    )
    return Batch(*arrays)


def abstract_state(config: Config, days: int) -> TrainState:
    """Shapes of the state; nothing is computed."""
    state: TrainState = jax.eval_shape(lambda: init_state(config, days))
    return state


def sharded_state(config: Config, days: int, mesh: Mesh) -> TrainState:
    """Fresh parameters and optimizer state, made where they will live."""
    shardings = state_shardings(abstract_state(config, days), mesh)
    state: TrainState = jax.jit(lambda: init_state(config, days), out_shardings=shardings)()
    return state


def _on(mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    """Tells the parts of a step that divide their own work which devices there are."""

    @functools.wraps(step)  # its name is the program's, in logs and profiles
    def on_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return on_mesh


def jit_train_step(config: Config, days: int, mesh: Mesh) -> Any:
    """The jitted (state, batch) -> (state, metrics) that `train` runs; the state is donated."""
    state = state_shardings(abstract_state(config, days), mesh)
    return jax.jit(
        _on(mesh, make_train_step(config, days)),
        in_shardings=(state, batch_shardings(mesh)),
        out_shardings=(state, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def jit_eval_step(config: Config, days: int, mesh: Mesh, adversary: bool = False) -> Any:
    """The jitted (params, batch) -> EvalOutput; every host gets all rows."""
    params = state_shardings(abstract_state(config, days), mesh).params
    return jax.jit(
        _on(mesh, make_eval_step(config, days, adversary)),
        in_shardings=(params, batch_shardings(mesh)),
        out_shardings=NamedSharding(mesh, P()),
    )
