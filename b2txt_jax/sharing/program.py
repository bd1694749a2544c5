"""The streaming step of a model as programs that plain JAX can run (`jax.export`)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from b2txt_jax.config import Config
from b2txt_jax.errors import UserError
from b2txt_jax.inference.run import Run
from b2txt_jax.interop.weights import named_params
from b2txt_jax.sharing import streaming
from b2txt_jax.signal.smooth import taps_of
from b2txt_jax.training.step import model_of

TOLERANCE = 1e-5
"""Of the exported program's logits, relative to the largest one."""
_MOST_PROGRAMS = 64
_PLATFORMS = ("cpu", "cuda")


class ExportError(UserError, RuntimeError):
    """A model that cannot be exported as asked."""


def export_stream(run: Run, folder: Path, platforms: Sequence[str] = _PLATFORMS) -> float:
    """Write the programs, their description and the file that runs them. Return how much their
    logits differ from those of the model on a whole recording.

    Products are in float32, whatever the run used, so that every machine computes the same.

    Raises:
      ConfigError: the model does not decode chunk by chunk.
      ExportError: it needs more programs than are reasonable, or the logits differ too much.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ExportError(
            "flatbuffers is not installed, which programs for plain JAX are written with; needed "
            "pip install -e '.[share]' -c constraints.txt, or --no-stream"
        )
    settings = dataclasses.replace(run.config.model, dtype="float32")
    config = dataclasses.replace(run.config, model=settings)
    days, features = len(run.sessions), config.data.feature_count
    model = model_of(config, days)
    stream, chunk = model.stream(), _chunk(config)
    params, structure = jax.tree.flatten(jax.tree.map(np.asarray, run.params))
    state = stream.start(run.params, 1)
    first, shape_of = jax.tree.flatten(state)
    programs: list[jax.export.Exported] = []
    seen: list[list[tuple[int, ...]]] = []

    def step(params: Any, x: Any, day: Any, leaves: Any) -> Any:
        logits, after = stream.step(
            jax.tree.unflatten(structure, params), x, day, jax.tree.unflatten(shape_of, leaves)
        )
        return logits, jax.tree.leaves(after)

    x = jax.ShapeDtypeStruct((1, chunk, features), np.float32)
    day = jax.ShapeDtypeStruct((1,), np.int32)
    shapes = jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype), (params, first))
    while True:
        sizes = [leaf.shape for leaf in shapes[1]]
        if seen and sizes == seen[-1]:
            break
        if len(seen) > _MOST_PROGRAMS:
            raise ExportError(
                f"after {_MOST_PROGRAMS} chunks of {chunk} bins the state still grows; needed a "
                "stream of fixed size: leave it out with --no-stream"
            )
        seen.append(sizes)
        exported = jax.export.export(jax.jit(step), platforms=list(platforms))(
            shapes[0], x, day, shapes[1]
        )
        programs.append(exported)
        after = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in exported.out_avals[1:]]
        shapes = (shapes[0], after)
    names = [f"streaming_{number}.jax" for number in range(len(programs))]
    for name, program in zip(names, programs, strict=True):
        (folder / name).write_bytes(program.serialize())
    starts: Any = {str(number): np.asarray(one) for number, one in enumerate(first)}
    np.savez(folder / "streaming_start.npz", **starts)
    about = {
        "programs": names,
        "chunk": chunk,
        "features": features,
        "classes": config.model.classes,
        "bin_seconds": 0.02,
        "smoothing": list(taps_of(config.signal)[0]),
        "days": list(run.sessions),
        "days_differ": bool(config.model.days_differ),
        "platforms": list(platforms),
        "parameters": _leaves(run, config),
    }
    (folder / "streaming.json").write_text(json.dumps(about, indent=1) + "\n")
    shutil.copyfile(streaming.__file__, folder / "streaming.py")
    return _checked(run, config, folder)


def _chunk(config: Config) -> int:
    """Return bins that give whole frames: the stride of the patches."""
    patching = getattr(config.model, "patching", None)
    if patching is None:
        return 4
    size, stride = patching
    return int(stride) if stride <= size else int(size)


def _leaves(run: Run, config: Config) -> list[dict[str, Any]]:
    """Return for each parameter the arrays of model.safetensors that it is stacked of.

    They are found by writing parameters that hold their own number.
    """
    leaves, structure = jax.tree.flatten(run.params)
    numbered = [np.full(leaf.shape, n, np.float32) for n, leaf in enumerate(leaves)]
    found: list[dict[str, Any]] = [{"names": [], "shape": list(leaf.shape)} for leaf in leaves]
    for name, value in named_params(jax.tree.unflatten(structure, numbered), config).items():
        found[int(np.asarray(value).flat[0])]["names"].append(name)
    return found


def _checked(run: Run, config: Config, folder: Path) -> float:
    """Return the largest difference on random bins, in chunks of random lengths.

    Raises:
      ExportError: it is above the tolerance.
    """
    rng = np.random.default_rng(0)
    bins = 40 + 4 * _chunk(config) + config.model.least_bins
    x = rng.normal(size=(bins, config.data.feature_count)).astype(np.float32)
    padded = dataclasses.replace(config.signal, eval_padding="valid")
    whole = dataclasses.replace(run, config=dataclasses.replace(config, signal=padded))
    day = run.sessions[-1]
    expected = whole.logits(x, day=day)
    stream = streaming.Stream(folder, day)
    cuts = np.sort(rng.choice(bins, 6, replace=False))
    logits = np.concatenate([stream.push(part) for part in np.split(x, cuts)])
    frames = min(len(logits), len(expected))
    if not frames or len(expected) - frames > 1:
        raise ExportError(f"the exported step gives {len(logits)} frames; needed {len(expected)}")
    difference = float(np.abs(logits[:frames] - expected[:frames]).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ExportError(
            f"the exported step's logits differ by {difference:.2g}; needed {TOLERANCE:g} of the "
            "largest: this is a fault of the model's stream, or of this machine's JAX"
        )
    return difference
