"""Where arrays live: one mesh of devices with named axes, and the model's rules for parameters.

`data` splits the rows of a batch, and the optimizer's moments: each device updates its share of the
parameters (ZeRO-1, Rajbhandari et al. 2020). `model` splits large parameters. What is split changes
no result but for the order of sums: random numbers are functions of (seed, step) and position.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from b2txt_jax.config import Config, ConfigError
from b2txt_jax.data.loader import Batch
from b2txt_jax.model.interface import DATA, MODEL, Model
from b2txt_jax.training.step import (
    TrainState,
    init_state,
    make_augmented_step,
    make_eval_step,
    make_train_step,
    model_of,
)


def make_mesh(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return all devices (of all hosts) as a mesh [data, model].

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


def state_shardings(state: TrainState, mesh: Mesh, model: Model) -> Any:
    """Return a NamedSharding per leaf of a state of arrays or shapes, by the model's rules.

    Raises:
      ConfigError: a dimension cannot be split evenly.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = model.spec(name)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise ConfigError(
                    f"configuration key parallel.model_axis is {mesh.shape[axis]}; {name} has "
                    f"{size} columns: needed a divisor of them"
                )
        if name.startswith("optimizer/"):
            spec = _shared(spec, leaf.shape, mesh.shape[DATA])
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def _shared(spec: P, shape: tuple[int, ...], devices: int) -> P:
    """Split also over `data`, by the first dimension of a matrix that this is possible for.

    The last one lies across a TPU's tiles. Vectors are too small to gain.
    """
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    for at, size in enumerate(shape[:-1]):
        if devices > 1 and axes[at] is None and size % devices == 0:
            return P(*axes[:at], DATA, *axes[at + 1 :])
    return spec


def batch_shardings(mesh: Mesh) -> Batch:
    """Return shardings that split the rows of every array of a batch over `data`."""
    rows: Any = NamedSharding(mesh, P(DATA))
    return Batch(*[rows] * len(Batch._fields))


def check_rows(rows: int, key: str, mesh: Mesh) -> None:
    """Raise ConfigError when the rows of a batch cannot be split evenly over the devices."""
    if rows % mesh.shape[DATA]:
        raise ConfigError(
            f"a batch has {rows} rows ({key}), which {mesh.shape[DATA]} devices cannot share "
            f"evenly: change {key}, or parallel.model_axis"
        )


def local_rows(rows: int, mesh: Mesh) -> slice:
    """Return the rows of a global batch that this host's devices hold.

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


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Put this host's share of a batch on its devices, as global arrays."""
    shares = mesh.shape[DATA]
    mine = local_rows(shares, mesh)
    arrays: Any = (
        None
        if value is None
        else jax.make_array_from_process_local_data(
            sharding,
            np.asarray(value),
            (len(value) * shares // (mine.stop - mine.start), *np.shape(value)[1:]),
        )
        for sharding, value in zip(batch_shardings(mesh), batch, strict=True)
    )
    return Batch(*arrays)


def abstract_state(config: Config, days: int, mesh: Mesh | None = None) -> TrainState:
    """Return the shapes of the state, on a mesh with their placement. Nothing is computed.

    Raises:
      ConfigError: a dimension cannot be split evenly.
    """
    state: TrainState = jax.eval_shape(lambda: init_state(config, days))
    if mesh is not None:
        state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            state,
            state_shardings(state, mesh, model_of(config, days)),
        )
    return state


def placement(state: Any) -> Any:
    """Return the shardings of a tree of arrays or placed shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def sharded_state(config: Config, days: int, mesh: Mesh) -> TrainState:
    """Return fresh parameters and optimizer state, made where they will live."""
    shardings = placement(abstract_state(config, days, mesh))
    state: TrainState = jax.jit(lambda: init_state(config, days), out_shardings=shardings)()
    return state


def _on(mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    """Set the mesh for the parts of a step that divide their own work."""

    @functools.wraps(step)  # its name is the program's, in logs and profiles
    def on_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return on_mesh


def jit_train_step(config: Config, days: int, mesh: Mesh) -> Any:
    """Return the jitted (state, batch) -> (state, metrics) that `train` runs. The state is
    donated."""
    state = placement(abstract_state(config, days, mesh))
    return jax.jit(
        _on(mesh, make_train_step(config, days)),
        in_shardings=(state, batch_shardings(mesh)),
        out_shardings=(state, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def jit_eval_step(config: Config, days: int, mesh: Mesh, validating: bool = False) -> Any:
    """Return the jitted (params, batch) -> EvalOutput. Every host gets all rows."""
    params = placement(abstract_state(config, days, mesh).params)
    return jax.jit(
        _on(mesh, make_eval_step(config, days, validating)),
        in_shardings=(params, batch_shardings(mesh)),
        out_shardings=NamedSharding(mesh, P()),
    )


def jit_augmented_step(config: Config, days: int, mesh: Mesh) -> Any:
    """Return the jitted (params, batch, key) -> EvalOutput of augmented features."""
    params = placement(abstract_state(config, days, mesh).params)
    whole = NamedSharding(mesh, P())
    return jax.jit(
        _on(mesh, make_augmented_step(config, days)),
        in_shardings=(params, batch_shardings(mesh), whole),
        out_shardings=whole,
    )
