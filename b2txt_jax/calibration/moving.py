"""Which parameters a calibration moves. All others stay as they are and cost no gradient.

Parameters are named by their paths such as `day/weight`. Of an array with one row per recording
day one row moves alone: no other day is changed by it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.config import Config, ConfigError
from b2txt_jax.model.interface import Params
from b2txt_jax.training.sharding import abstract_state
from b2txt_jax.training.step import model_of

ADAPTS = ("day", "patch", "adapters", "all")
"""What moves: the day's own layer, and beside it the patch embedding, every matrix by a change of
low rank, everything."""
Moved = dict[str, jax.Array]
"""Values of the parameters that move, by path. Of a day's layer its row, of an adapted matrix two
factors, `PATH:left` and `PATH:right`."""
_LEFT, _RIGHT = ":left", ":right"
RANK = 4
"""Of the change of a matrix, where nothing else is given."""


@dataclass(frozen=True)
class Moving:
    """The parameters that move."""

    rows: Mapping[str, int | None]
    """By path, the row that moves. None: the whole array, which all days share."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By path of a matrix [O, I] that all days share, the rank of its change."""
    everything: bool = False
    """Whether nothing stays as it is, other days' layers apart."""

    @property
    def of_a_day(self) -> bool:
        """Whether a layer moves that no other day uses."""
        return any(row is not None for row in self.rows.values())

    @property
    def shared(self) -> bool:
        """Whether something moves that other days use too."""
        return None in self.rows.values() or bool(self.ranks)

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors of changes of low rank."""
        return tuple(name + side for name in self.ranks for side in (_LEFT, _RIGHT))

    def taken(self, params: Params) -> Moved:
        """Return the values that move.

        A change of rank R begins as the product of zeros [O, R] and of random numbers [R, I], a
        function of the path (LoRA, Hu et al. 2021). So it begins as none.
        """
        leaves = named(params)
        found = {
            name: leaves[name] if row is None else leaves[name][row]
            for name, row in self.rows.items()
        }
        for name, rank in self.ranks.items():
            outputs, inputs = leaves[name].shape
            key = jax.random.key(zlib.crc32(name.encode()))
            found[f"{name}{_LEFT}"] = jnp.zeros((outputs, rank))
            found[f"{name}{_RIGHT}"] = jax.random.normal(key, (rank, inputs)) / math.sqrt(inputs)
        return found

    def placed(self, params: Params, moved: Moved) -> Params:
        """Return the parameters with other values of those that move. Changes of low rank are
        added to their matrices."""

        def of(name: str, leaf: jax.Array) -> jax.Array:
            if name in self.ranks:
                return leaf + moved[f"{name}{_LEFT}"] @ moved[f"{name}{_RIGHT}"]
            if name not in moved:
                return leaf
            row = self.rows[name]
            return moved[name] if row is None else jnp.asarray(leaf).at[row].set(moved[name])

        return _mapped(of, params)


def named(params: Params) -> dict[str, Any]:
    """Return the leaves by path."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _name(path: tuple[Any, ...]) -> str:
    name: str = jax.tree_util.keystr(path, simple=True, separator="/")
    return name


def _mapped(function: Callable[[str, Any], Any], params: Params) -> Params:
    found: Params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(_name(path), leaf), params
    )
    return found


def day_paths(config: Config) -> tuple[str, ...]:
    """Return the parameters with one row per recording day, none of a model without day layers."""
    days = len(config.data.sessions)
    one_more = named(abstract_state(config, days + 1).params)
    now = named(abstract_state(config, days).params)
    return tuple(name for name, leaf in now.items() if leaf.shape != one_more[name].shape)


def with_day(params: Params, paths: tuple[str, ...], rows: Sequence[int]) -> Params:
    """Return parameters with one more day, which begins as the mean of the days `rows`."""

    def of(name: str, leaf: jax.Array) -> jax.Array:
        if name not in paths:
            return leaf
        leaf = jnp.asarray(leaf)
        new = leaf[np.array(rows)].mean(axis=0, keepdims=True)
        return jnp.concatenate([leaf, new])

    return _mapped(of, params)


def moving_of(config: Config, day: int, adapt: str | None = None, rank: int = RANK) -> Moving:
    """Return what moves for a recording day of a configured model.

    Args:
      config: of the model.
      day: index of the recording day.
      adapt: one of ADAPTS. None: the day's layer where the model has one, else the patch
        embedding where it has one, else everything.
      rank: of the change of each matrix, for `adapters`.

    Raises:
      ConfigError: the model has no such part.
    """
    rows = day_paths(config)
    model = model_of(config, len(config.data.sessions))
    leaves = named(abstract_state(config, len(config.data.sessions)).params)
    shared = [name for name in leaves if name not in rows]
    patch = [name for name in shared if model.is_embedding(name)]
    adapt = adapt or ("day" if rows else "patch" if patch else "all")
    if adapt not in ADAPTS:
        raise ConfigError(f"--adapt is {adapt!r}; needed one of {', '.join(ADAPTS)}")
    others = {"patch": patch, "all": shared}.get(adapt, [])
    if (adapt == "day" and not rows) or (adapt == "patch" and not patch):
        lacking = "layer of a day's own" if adapt == "day" else "patch embedding that is known"
        instead = "--adapt patch or all" if patch else "--adapt all"
        raise ConfigError(f"the model {config.model.name!r} has no {lacking}; needed {instead}")
    matrices = [
        name
        for name in shared
        if leaves[name].ndim == 2 and model.group(name, leaves[name]) == "weights"
    ]
    ranks = dict.fromkeys(matrices, rank) if adapt == "adapters" else {}
    if adapt == "adapters" and not matrices:
        raise ConfigError(
            f"the model {config.model.name!r} has no matrix that all days share; needed --adapt all"
        )
    return Moving({**dict.fromkeys(rows, day), **dict.fromkeys(others)}, ranks, adapt == "all")
