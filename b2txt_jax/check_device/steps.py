"""Training steps of the device at hand against those of the CPU, and how fast they are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from b2txt_jax.check_device.limits import product_flops, seconds_of
from b2txt_jax.config import Config, load_config, with_overrides
from b2txt_jax.data.loader import TrainingData, configured_sessions
from b2txt_jax.data.typical import write_typical
from b2txt_jax.training.sharding import (
    DATA,
    abstract_state,
    jit_train_step,
    make_mesh,
    place,
    placement,
    sharded_state,
)
from b2txt_jax.training.step import TrainState, model_of, packing_rules

BOUNDS = {"float32": 2e-4, "bfloat16": 0.05}
"""Of losses and norms of gradients, relative to the CPU's in float32. From the third step on, they
contain updates: the first has a learning rate of 0."""
STEPS = 4


class Recipe(NamedTuple):
    """A model, and trials for it."""

    config: str
    trials: int
    """Of each day, at least: as many more as the devices can share."""
    bins: tuple[int, int]
    """Fewest and most of a trial."""
    keys: tuple[str, ...] = ()


SMALL = Recipe("demo", 2, (60, 240))
FULL = (Recipe("nejm_baseline", 2, (400, 1000)), Recipe("transformer", 2, (400, 1000)))
TIMED = (Recipe("nejm_baseline", 16, (400, 1200)), Recipe("transformer", 16, (400, 1200)))


class Steps(NamedTuple):
    """The same steps on two devices."""

    dtype: str
    found: dict[str, list[float]]
    """Losses and norms of gradients, by name."""
    wanted: dict[str, list[float]]
    bound: float

    @property
    def error(self) -> float:
        """The largest difference, relative. NaN where a value is not finite."""
        found, wanted = (np.array(list(of.values())) for of in (self.found, self.wanted))
        return float(np.max(np.abs(found - wanted) / np.abs(wanted)))

    @property
    def agrees(self) -> bool:
        """Whether all differences are within the bound."""
        return self.error <= self.bound


@contextmanager
def made_up(recipe: Recipe, mesh: Mesh) -> Iterator[tuple[Config, TrainingData]]:
    """Yield a configuration with sessions of noise in a temporary folder, and their batches as the
    devices of `mesh` share them."""
    config = load_config(recipe.config, [f"--config.{key}" for key in recipe.keys])
    days, groups = config.data.days_per_batch, mesh.shape[DATA]
    trials = next(n for n in itertools.count(recipe.trials) if days * n % groups == 0)
    with TemporaryDirectory(prefix="b2txt-check-") as folder:
        write_typical(Path(folder), "float32", days, 8, recipe.bins)
        keys = [f"data.root={folder}", "data.sessions=()", "data.buckets=()"]
        keys += [f"data.trials_per_day={trials}", f"train.steps={STEPS}"]
        # A long warm-up would hide a wrong gradient in the first steps.
        keys += ["optimizer.warmup_steps=1", "optimizer.day_warmup_steps=1"]
        config = with_overrides(config, [f"--config.{key}" for key in keys])
        sessions = configured_sessions(config.data)
        yield (
            config,
            TrainingData(
                config.data,
                sessions,
                config.model.least_bins,
                model_of(config, days).frames,
                packing_rules(config, days, groups),
                (config.train.seed, STEPS),
            ),
        )


def first_state(config: Config, days: int, mesh: Mesh) -> TrainState:
    """Return the state before the first step, made by the CPU: the devices' own factorisations
    round otherwise."""
    cpu = make_mesh(1, jax.devices("cpu")[:1])
    state = jax.tree.map(np.asarray, sharded_state(config, days, cpu))
    placed: TrainState = jax.device_put(state, placement(abstract_state(config, days, mesh)))
    return placed


def with_dtype(config: Config, dtype: str) -> Config:
    """Return the configuration with products in `dtype`."""
    return with_overrides(config, [f"--config.model.dtype={dtype}"])


def compared_steps(
    recipe: Recipe, devices: list[jax.Device], dtypes: Sequence[str]
) -> Iterator[Steps]:
    """Yield some steps on the devices, in each dtype, beside those of one CPU.

    Float32 is multiplied as float32, also on devices that round it otherwise.
    """
    mesh, cpu = make_mesh(1, devices), make_mesh(1, jax.devices("cpu")[:1])
    with made_up(recipe, mesh) as (config, data):
        batches = [data.batch(config.train.seed, step) for step in range(STEPS)]
        days = len(data.refs_of_day)

        def run(mesh: Mesh, dtype: str) -> dict[str, list[float]]:
            chosen = with_dtype(config, dtype)
            step, state = jit_train_step(chosen, days, mesh), first_state(chosen, days, mesh)
            found: dict[str, list[float]] = {"losses": [], "gradient norms": []}
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                for batch in batches:
                    state, metrics = step(state, place(batch, mesh))
                    found["losses"].append(float(metrics.loss))
                    found["gradient norms"].append(float(metrics.gradient_norm))
            return found

        wanted = run(cpu, "float32")
        for dtype in dtypes:
            yield Steps(dtype, run(mesh, dtype), wanted, BOUNDS[dtype])


class Speed(NamedTuple):
    """The time of one training step."""

    rows: int
    bins: int
    seconds: float
    compile_seconds: float
    flops: int
    """Of its products, on all devices."""


def speed(recipe: Recipe, devices: list[jax.Device], dtype: str) -> Speed:
    """Return the time of a training step on the devices, and what it computes."""
    mesh = make_mesh(1, devices)
    with made_up(recipe, mesh) as (config, data):
        config, days = with_dtype(config, dtype), len(data.refs_of_day)
        batch = place(data.batch(config.train.seed, 0), mesh)
        step, state = jit_train_step(config, days, mesh), first_state(config, days, mesh)
        started = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - started
        flops = product_flops(step, state, batch)

        def run() -> jax.Array:
            nonlocal state
            state, metrics = compiled(state, batch)
            loss: jax.Array = metrics.loss
            return loss

        seconds = seconds_of(run)
    rows, bins, _ = batch.features.shape
    return Speed(rows, bins, seconds, compile_seconds, flops)
