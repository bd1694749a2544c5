"""Parameters and optimizer state under the names of the published PyTorch model.

| Here                                  | There                                            |
|---------------------------------------|--------------------------------------------------|
| `day.weight [days, D, D]`             | `day_weights.N [D, D]`, one per day              |
| `day.bias [days, D]`                  | `day_biases.N [1, D]`, one per day               |
| `gru.weight_ih_lK`, `weight_hh_lK`    | the same                                         |
| `gru.bias_ih_lK`, `bias_hh_lK`        | the same                                         |
| `head.weight [C, H]`, `head.bias [C]` | `out.weight`, `out.bias`                         |
| `h0 [1, 1, H]`                        | `h0`                                             |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from b2txt_jax.config import Config
from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.model.interface import Params
from b2txt_jax.training.optimizer import AdamByDayState
from b2txt_jax.training.step import TrainState, init_state

Named = dict[str, np.ndarray]
"""Arrays by the published model's parameter names, in the order of its `named_parameters()`."""

_PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DataParallel put before every name."""


@dataclass(frozen=True)
class Moments:
    """AdamW's state, by parameter name. A parameter that was never updated is in none of the
    three.

    Day layers are only updated by batches that have their day, so that each has a count of its
    own.
    """

    mean: Named
    """exp_avg, the running mean of the gradient."""
    square: Named
    """exp_avg_sq, the running mean of its square."""
    steps: dict[str, int]
    """Updates that the parameter had."""


def parameter_names(layers: int, days: int) -> list[str]:
    """The published model's parameters in the order of its `named_parameters()`."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [
        "h0",
        *(f"day_weights.{day}" for day in range(days)),
        *(f"day_biases.{day}" for day in range(days)),
        *(f"gru.{kind}_l{layer}" for layer in range(layers) for kind in kinds),
        "out.weight",
        "out.bias",
    ]


def optimizer_groups(names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Biases, day layers, others: the published optimizer's groups, each in the published order."""
    biases = [name for name in names if name.startswith("gru.bias") or name == "out.bias"]
    day = [name for name in names if name.startswith("day_")]
    others = [name for name in names if name not in biases and name not in day]
    return biases, day, others


def day_layers(config: Config) -> int:
    """Number of input layers of a configured model."""
    return len(config.data.sessions) if config.model.day_layer else 1


def to_named(tree: Params) -> Named:
    """Our tree of parameters (or of moments) -> arrays by published name."""
    layers = sum(name.startswith("weight_ih_l") for name in tree["gru"])
    weight, bias = np.asarray(tree["day"]["weight"]), np.asarray(tree["day"]["bias"])
    named = {"h0": tree["h0"]}
    for day in range(len(weight)):
        named[f"day_weights.{day}"] = weight[day]
        named[f"day_biases.{day}"] = bias[day][None]
    named |= {f"gru.{name}": value for name, value in tree["gru"].items()}
    named |= {"out.weight": tree["head"]["weight"], "out.bias": tree["head"]["bias"]}
    return {name: np.asarray(named[name]) for name in parameter_names(layers, len(weight))}


def from_named(named: Mapping[str, np.ndarray], layers: int, days: int) -> Params:
    """Arrays by published name -> our tree, float32."""
    names = parameter_names(layers, days)
    found = {name: np.asarray(named[name], np.float32) for name in names}
    return {
        "day": {
            "weight": np.stack([found[f"day_weights.{day}"] for day in range(days)]),
            "bias": np.concatenate([found[f"day_biases.{day}"] for day in range(days)]),
        },
        "gru": {name.removeprefix("gru."): found[name] for name in names if "gru." in name},
        "head": {"weight": found["out.weight"], "bias": found["out.bias"]},
        "h0": found["h0"],
    }


def strip_prefixes(named: Mapping[str, Any]) -> dict[str, Any]:
    """Takes `_orig_mod.` and `module.` off the names, in any order and number.

    Raises:
      ConversionError: two names become the same one.
    """
    stripped: dict[str, Any] = {}
    for name, value in named.items():
        short = str(name)
        while short.startswith(_PREFIXES):
            for prefix in _PREFIXES:
                short = short.removeprefix(prefix)
        if short in stripped:
            raise ConversionError(
                f"the weights hold {short} twice, under different prefixes; needed each name once"
            )
        stripped[short] = value
    return stripped


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of each published parameter of a configured model.

    By arithmetic: settings that nothing was checked against yet may be too large for arrays.
    """
    model, features = config.model, config.data.feature_count
    units, days = model.units, day_layers(config)
    shapes: dict[str, tuple[int, ...]] = {"h0": (1, 1, units)}
    shapes |= {f"day_weights.{day}": (features, features) for day in range(days)}
    shapes |= {f"day_biases.{day}": (1, features) for day in range(days)}
    for layer in range(model.layers):
        inputs = units if layer else features * model.patching[0]
        shapes |= {
            f"gru.weight_ih_l{layer}": (3 * units, inputs),
            f"gru.weight_hh_l{layer}": (3 * units, units),
            f"gru.bias_ih_l{layer}": (3 * units,),
            f"gru.bias_hh_l{layer}": (3 * units,),
        }
    return shapes | {"out.weight": (model.classes, units), "out.bias": (model.classes,)}


def rounding_notes(named: Mapping[str, Any]) -> list[str]:
    """A line for the user when weights are of a type that float32 cannot hold exactly."""
    exact = {"float32", "float16", "bfloat16"}
    types = {str(value.dtype) for value in named.values() if isinstance(value, np.ndarray)}
    rounded = sorted(types - exact)
    return [f"weights in {', '.join(rounded)} were rounded to float32"] if rounded else []


def named_params(params: Params, config: Config) -> Named:
    """Return a model's parameters by published name, or by their own where there is none."""
    if config.model.name == "gru":
        return to_named(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(v) for p, v in leaves}


def _own_names(named: Mapping[str, Any], config: Config, source: str) -> Params:
    """Check weights under their own names and return them as our tree."""
    like = jax.eval_shape(lambda: init_state(config, len(config.data.sessions))).params
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    shapes = {jax.tree_util.keystr(p, simple=True, separator="."): v.shape for p, v in paths}
    _check_names(named, shapes, source, f"the model {config.model.name!r} as configured")
    for name, shape in shapes.items():
        _check_array(named[name], name, shape, source, "the section model, data.feature_count")
    arrays = [np.asarray(named[name], np.float32) for name in shapes]
    return jax.tree.unflatten(structure, arrays)


def checked_params(named: Mapping[str, Any], config: Config, source: str) -> Params:
    """Checks weights against the configuration and returns them as our tree.

    Args:
      named: arrays by published name, without prefixes.
      config: says which names and shapes are needed.
      source: names the file in errors.

    Raises:
      ConversionError: names are missing or unknown, a shape or type does not fit, a value is not
        finite.
    """
    if config.model.name != "gru":
        return _own_names(named, config, source)
    days = day_layers(config)
    found_days = sum(name.startswith("day_weights.") for name in named)
    if found_days != days and not config.model.day_layer:
        raise ConversionError(
            f"{source} has {found_days} day layers (day_weights.N), and model.day_layer is False, "
            f"which needs one that all days share; needed model.day_layer = True for these weights"
        )
    if found_days != days:
        raise ConversionError(
            f"{source} has {found_days} day layers (day_weights.N); its configuration lists "
            f"{len(config.data.sessions)} sessions, which need {days}. The list of sessions must "
            f"be the one that the model was trained with"
        )
    found_layers = sum(name.startswith("gru.weight_ih_l") for name in named)
    if found_layers != config.model.layers:  # told first: settings may ask for a million layers
        raise ConversionError(
            f"{source} has {found_layers} GRU layers (gru.weight_ih_lN); its configuration needs "
            f"{config.model.layers} (n_layers). Weights and settings must belong together"
        )
    shapes = expected_shapes(config)
    layers = config.model.layers
    _check_names(
        named, shapes, source, f"the published GRU decoder with {layers} layers and {days} days"
    )
    for name, shape in shapes.items():
        _check_array(named[name], name, shape, source)
    return from_named(named, config.model.layers, days)


def _check_names(
    named: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str, needed: str
) -> None:
    missing = [name for name in shapes if name not in named]
    unknown = [name for name in named if name not in shapes]
    if missing or unknown:
        raise ConversionError(
            f"{source}: missing weights {_listed(missing)}, unknown weights {_listed(unknown)}; "
            f"needed those of {needed}"
        )


_SETTINGS = "n_units, n_layers, patch_size, n_input_features, n_classes"


def _check_array(
    value: Any, name: str, shape: tuple[int, ...], source: str, settings: str = _SETTINGS
) -> None:
    found = value.shape if isinstance(value, np.ndarray) else type(value).__name__
    if found != shape:
        raise ConversionError(
            f"{source}: {name} is {found}; the configuration needs {shape}. Weights and settings "
            f"({settings}) must belong together"
        )
    if value.dtype.kind not in "fV":  # bfloat16 counts as V
        raise ConversionError(f"{source}: {name} holds {value.dtype}; needed floating point")
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite and is counted
        bad = int((~np.isfinite(value.astype(np.float32))).sum())
    if bad:
        raise ConversionError(
            f"{source}: {name} has {bad} values that are NaN, infinite or beyond float32; needed "
            f"finite weights: take an earlier checkpoint"
        )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:6]) or 'none'}{' ...' if len(names) > 6 else ''}"


_ADAM = (optax.ScaleByAdamState, AdamByDayState)


def _is_leaf(node: Any) -> bool:
    return isinstance(node, (*_ADAM, optax.ScaleByScheduleState, optax.MaskedNode))


def fresh_state(config: Config, params: Params, step: int) -> TrainState:
    """A training state at `step` of the schedule, with parameters but without moments."""
    shapes = jax.eval_shape(lambda: init_state(config, len(config.data.sessions)))

    def zero(leaf: Any) -> Any:
        if isinstance(leaf, optax.ScaleByScheduleState):
            return optax.ScaleByScheduleState(count=jnp.int32(step))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), leaf)

    return TrainState(
        step=jnp.int32(step),
        params=jax.tree.map(jnp.asarray, params),
        optimizer=jax.tree.map(zero, shapes.optimizer, is_leaf=_is_leaf),
        ema=jax.tree.map(jnp.asarray, params) if config.train.ema else None,
    )


def with_moments(state: TrainState, moments: Moments, config: Config, source: str) -> TrainState:
    """Puts AdamW's moments into a fresh state. Parameters without any have had no update.

    Raises:
      ConversionError: a shape does not fit, or parameters that are always updated together have
        had different numbers of updates.
    """
    layers, days = config.model.layers, day_layers(config)
    shapes = expected_shapes(config)
    steps = {name: moments.steps.get(name, 0) for name in shapes}
    shared = {steps[name] for name in shapes if not name.startswith("day_")}
    by_day = [{steps[f"day_weights.{day}"], steps[f"day_biases.{day}"]} for day in range(days)]
    for counts in (shared, *by_day):
        if len(counts) != 1:
            raise ConversionError(
                f"{source}: the optimizer counts {sorted(counts)} updates for parameters that are "
                f"updated together; needed one count. Convert the weights alone with --restart"
            )
    (count,) = shared

    def tree_of(found: Named) -> Params:
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for name, value in found.items():
            try:
                _check_array(value, name, shapes[name], f"{source}, optimizer state")
            except ConversionError as error:
                raise ConversionError(
                    f"{error}. Or convert the weights alone with --restart"
                ) from error
            arrays[name] = value
        return from_named(arrays, layers, days)

    mean, square = tree_of(moments.mean), tree_of(moments.square)
    negative = [name for name, value in moments.square.items() if (value < 0).any()]
    if negative:
        raise ConversionError(
            f"{source}, optimizer state: exp_avg_sq of {_listed(negative)} has values below 0; "
            f"needed means of squares. Convert the weights alone with --restart"
        )

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, optax.ScaleByAdamState):
            mu, nu = _masked_like(leaf.mu, mean), _masked_like(leaf.nu, square)
            return optax.ScaleByAdamState(count=jnp.int32(count), mu=mu, nu=nu)
        if isinstance(leaf, AdamByDayState):
            mu, nu = _masked_like(leaf.mu, mean), _masked_like(leaf.nu, square)
            return AdamByDayState(jnp.array([min(c) for c in by_day], jnp.int32), mu, nu)
        return leaf

    return state._replace(optimizer=jax.tree.map(fill, state.optimizer, is_leaf=_is_leaf))


def _masked_like(masked: Any, tree: Params) -> Any:
    def choose(leaf: Any, value: np.ndarray) -> Any:
        return leaf if isinstance(leaf, optax.MaskedNode) else jnp.asarray(value)

    return jax.tree.map(choose, masked, tree, is_leaf=_is_leaf)


def moments_of(state: TrainState) -> Moments:
    """AdamW's moments of a training state. Parameters without an update are left out."""
    adam = [
        leaf
        for leaf in jax.tree.leaves(state.optimizer, is_leaf=_is_leaf)
        if isinstance(leaf, _ADAM)
    ]
    mean = to_named(_merged([group.mu for group in adam]))
    square = to_named(_merged([group.nu for group in adam]))
    steps = {}
    for name in mean:
        if name.startswith("day_"):
            (day,) = (group for group in adam if isinstance(group, AdamByDayState))
            steps[name] = int(day.steps[int(name.rpartition(".")[2])])
        else:
            steps[name] = max(int(g.count) for g in adam if isinstance(g, optax.ScaleByAdamState))
    updated = [name for name in mean if steps[name] > 0]
    return Moments(
        {name: mean[name] for name in updated},
        {name: square[name] for name in updated},
        {name: steps[name] for name in updated},
    )


def _merged(groups: Sequence[Any]) -> Params:
    """One tree of the groups' trees, each of which has a MaskedNode where another has an array."""

    def pick(*leaves: Any) -> Any:
        (found,) = (leaf for leaf in leaves if not isinstance(leaf, optax.MaskedNode))
        return found

    tree: Params = jax.tree.map(pick, *groups, is_leaf=_is_leaf)
    return tree
