"""A run that starts from another run's weights: a pretrained one, or one of other participants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from b2txt_jax.config import CONFIG_FILE, Config, ConfigError, read_written_config
from b2txt_jax.training.checkpoint import Checkpoints
from b2txt_jax.training.sharding import abstract_state, make_mesh
from b2txt_jax.training.step import TrainState, model_of

PRETRAINING_FILE = "pretraining.jsonl"
"""Name in the folder of a pretrained run: a line of step and error for each train.log_every steps.
"""
_DAY = "day"
"""Group of parameters [days, ...], which belong to sessions."""


def check_not_pretrained(workdir: Path) -> None:
    """Raise ConfigError where a folder of `b2txt train` is needed, and this is of a pretraining."""
    if (workdir / PRETRAINING_FILE).is_file():
        raise ConfigError(
            f"{workdir} holds a pretrained run, which has no map to phonemes; needed another "
            f"--workdir, of `b2txt train --config.train.warm_start={workdir}`"
        )


def warm_started(state: TrainState, config: Config) -> tuple[TrainState, str]:
    """Return a fresh state with the weights of the run `train.warm_start`, and what was used.

    An array is taken where the other run has one of the same name and shape. Of day layers, those
    of sessions that both runs have are taken, if they have as many features. The optimizer starts
    anew.

    Raises:
      ConfigError: the folder holds no run, or none of its weights fits.
      CheckpointError: its best weights cannot be read.
    """
    workdir = Path(config.train.warm_start)
    other = read_written_config(workdir / CONFIG_FILE)
    like = abstract_state(other, len(other.data.sessions), make_mesh()).params
    with Checkpoints(workdir, read_only=True) as checkpoints:
        theirs, _ = checkpoints.restore_best(like)
    sessions = config.data.sessions
    pairs = [
        (sessions.index(name), place)
        for place, name in enumerate(other.data.sessions)
        if name in sessions
    ]
    model = model_of(config, len(sessions))
    ours, found = _flat(state.params), _flat(theirs)
    used, kept = 0, []
    for path, leaf in ours.items():
        one = found.get(path)
        # Where all days share one layer, it is an array as any other.
        by_day = model.group(path, leaf) == _DAY and config.model.days_differ
        wanted = (len(other.data.sessions), *leaf.shape[1:]) if by_day else leaf.shape
        if one is None or one.shape != wanted or (by_day and not pairs):
            kept.append(path)
            continue
        if by_day:
            mine, their = (list(places) for places in zip(*pairs, strict=True))
            one = leaf.at[jax.numpy.array(mine)].set(one[jax.numpy.array(their)])
        ours[path] = jax.device_put(one, leaf.sharding)
        used += 1
    if not used:
        raise ConfigError(
            f"no array of {workdir} has a name and shape of this run's; needed a run of the same "
            f"model (it has {other.model.name!r}, this {config.model.name!r}) and settings"
        )
    params = unflatten_dict({tuple(path.split("/")): leaf for path, leaf in ours.items()})
    ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, params)
    said = f"{used} of {len(ours)} arrays from {workdir}, day layers of {len(pairs)} sessions"
    if kept:
        said += f"; fresh: {', '.join(kept)}"
    return state._replace(params=params, ema=ema), said


def _flat(params: Any) -> dict[str, Any]:
    return {"/".join(map(str, path)): leaf for path, leaf in flatten_dict(params).items()}
