"""`b2txt convert`: weights, recipe and optimizer state from and to other formats."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

import jax
from rich.console import Console

from b2txt_jax.config import CONFIG_FILE, ConfigError, read_written_config, write_config
from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.interop.nejm import (
    ARGS_FILE,
    CHECKPOINT_FILE,
    COMPILED_PREFIX,
    Run,
    read_nejm,
    write_nejm,
)
from b2txt_jax.interop.nejm_args import recipe_notes
from b2txt_jax.interop.safetensors_file import config_path, read_safetensors, write_safetensors
from b2txt_jax.interop.weights import fresh_state
from b2txt_jax.model.interface import parameter_count
from b2txt_jax.training.checkpoint import BestScore, CheckpointError, Checkpoints
from b2txt_jax.training.step import init_state
from lm_server.files.atomic_file import require_writable

CHECKPOINTS = "checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt convert`."""
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    published = "published checkpoint folder (checkpoint/best_checkpoint, checkpoint/args.yaml)"
    what("--from-nejm", type=Path, metavar="DIR", help=published)
    what("--to-nejm", type=Path, metavar="OUT", help="write such a folder from --workdir")
    what("--from-safetensors", type=Path, metavar="FILE", help="weights, with a .json beside them")
    what("--to-safetensors", type=Path, metavar="FILE", help="write such a file from --workdir")
    option = parser.add_argument
    workdir = "the run's folder: --from writes it, --to reads it"
    option("--workdir", required=True, type=Path, help=workdir)
    option("--root", type=Path, help="--from: folder of session folders (data.root)")
    restart = "--from: the weights alone; training restarts at step 0 (fine-tuning)"
    option("--restart", action="store_true", help=restart)
    ignore = "--from-nejm: leave out a setting of args.yaml that has no equivalent"
    option("--ignore", action="append", default=[], metavar="SETTING", help=ignore)
    which = "--to: the best checkpoint, or the latest with its optimizer state (default: best)"
    option("--which", choices=("best", "latest"), help=which)
    names = f"begin with {COMPILED_PREFIX}, as the published trainer needs to continue"
    option("--compiled-names", action="store_true", help=f"--to-nejm: names {names}")
    option("--force", action="store_true", help="replace existing files")
    parser.epilog = (
        "Any key of a converted configuration can be changed: --config.section.key=value. "
        "docs/convert.md has the names, the formats and what is left out."
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt convert`."""
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    _require_applicable(args)
    # Orbax warns about checkpoints that are only read, which is intended here.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if args.from_nejm or args.from_safetensors:
        return _run_from(args, console)
    return _run_to(args, console)


_APPLIES = {
    "root": ("from_nejm", "from_safetensors"),
    "restart": ("from_nejm", "from_safetensors"),
    "ignore": ("from_nejm",),
    "which": ("to_nejm", "to_safetensors"),
    "compiled_names": ("to_nejm",),
}
"""Options that apply to some directions only."""


def _require_applicable(args: argparse.Namespace) -> None:
    for option, directions in _APPLIES.items():
        if getattr(args, option) and not any(getattr(args, name) for name in directions):
            needed = " or ".join(map(_flag, directions))
            raise ConversionError(f"{_flag(option)} does not apply here; it goes with {needed}")
    if args.overrides and (args.to_nejm or args.to_safetensors):
        raise ConfigError(f"{args.overrides[0]}: configuration keys can be changed by --from only")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run_from(args: argparse.Namespace, console: Console) -> int:
    overrides = list(args.overrides)
    if args.root is not None:
        overrides.append(f"--config.data.root={args.root.absolute()}")
    _require_free(args.workdir, args.force)
    if args.from_nejm:
        source = args.from_nejm
        run = read_nejm(source, overrides, args.ignore, args.restart)
    else:
        source = args.from_safetensors
        run = read_safetensors(source, overrides, args.restart)
    for note in run.notes:
        console.print(note)
    step, steps = int(run.state.step), run.config.train.steps
    if step >= steps:
        console.print(
            f"step {step} is the last of {steps}, so train has nothing to do: raise "
            f"--config.train.steps to continue, or convert with --restart"
        )
    root = Path(run.config.data.root)
    if not root.is_dir():
        console.print(f"data.root {root} is not here: give --config.data.root=DIR when it is used")
    write_workdir(args.workdir, run, restart=args.restart)
    print(f"{args.workdir}: {_description(run)}, from {source}")
    return 0


def _run_to(args: argparse.Namespace, console: Console) -> int:
    if args.to_nejm:
        folder = args.to_nejm / "checkpoint"
        targets = [folder / CHECKPOINT_FILE, folder / ARGS_FILE]
    else:
        targets = [args.to_safetensors, config_path(args.to_safetensors)]
        if targets[0] == targets[1]:
            raise ConversionError(
                f"{targets[0]} ends in {targets[0].suffix}, the suffix of the configuration beside "
                f"the weights; needed a name such as {targets[0].with_suffix('.safetensors')}"
            )
    _require_new(targets, args.force)
    run = read_workdir(args.workdir, args.which or "best", published=bool(args.to_nejm))
    for note in (*run.notes, *(recipe_notes(run.config) if args.to_nejm else ())):
        console.print(note)
    if args.to_nejm:
        write_nejm(args.to_nejm, run, COMPILED_PREFIX if args.compiled_names else "")
        if run.config.model.dtype == "float32":
            console.print(
                "use_amp: true is written, without which the published evaluate_model.py fails: it "
                "computes in bfloat16, and this run computed in float32"
            )
    else:
        write_safetensors(args.to_safetensors, run)
    print(f"{targets[0]}: {_description(run)}")
    return 0


def _description(run: Run) -> str:
    score = f", validation PER {100 * run.best.per:.2f} %" if math.isfinite(run.best.per) else ""
    return (
        f"{parameter_count(run.state.params):,} parameters, {len(run.config.data.sessions)} "
        f"sessions, step {int(run.state.step)}{score}"
    )


def _require_folder(path: Path) -> None:
    """Raise if the path, or its nearest existing parent, is not a folder."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConversionError(f"{there} is a file; needed a folder to write, give another one")


def _require_free(workdir: Path, force: bool) -> None:
    _require_folder(workdir)
    if not workdir.exists():
        require_writable(workdir.absolute(), "--workdir", make=False)
        return
    if any(workdir.iterdir()) and not force:
        raise ConversionError(
            f"{workdir} is not empty; needed a new or empty folder: give another --workdir, or "
            f"--force to replace the run's {CONFIG_FILE} and {CHECKPOINTS} in it"
        )


def _require_new(paths: list[Path], force: bool) -> None:
    for path in paths:
        _require_folder(path.parent)
        if path.is_dir():
            raise ConversionError(f"{path} is a folder; needed the name of a file to write")
    there = [str(path) for path in paths if path.exists()]
    if there and not force:
        raise ConversionError(
            f"{', '.join(there)} exists; give another place, or --force to replace it"
        )
    for path in paths:
        require_writable(path, "the file", make=False)


def write_workdir(workdir: Path, run: Run, restart: bool = False) -> None:
    """Write config.json, checkpoints/best and checkpoints/latest, each atomically.

    With `restart`, the first validation of the next training replaces the best checkpoint whatever
    its score.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{workdir.name}.", dir=workdir.parent))
    try:
        with Checkpoints(building) as checkpoints:
            step = int(run.state.step)
            checkpoints.save_best(step, run.state.params, run.best)
            checkpoints.save_latest(step, run.state, None if restart else run.best)
            checkpoints.wait()
        write_config(run.config, building / CONFIG_FILE)
        workdir.mkdir(exist_ok=True)
        for name in (CHECKPOINTS, CONFIG_FILE):
            if (workdir / name).is_dir():
                shutil.rmtree(workdir / name)
            os.replace(building / name, workdir / name)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def read_workdir(workdir: Path, which: str, published: bool = True) -> Run:
    """Read a run: the `best` parameters or the `latest` state.

    The best checkpoint has parameters only. To be `published`, they get the optimizer state of the
    latest one if it is of the same step and can be read. Otherwise the optimizer state is fresh.

    Raises:
      ConfigError: the folder holds no run.
      CheckpointError: the checkpoint does not exist.
      ConversionError: the latest state cannot be read, or the model has no published format.
    """
    config = read_written_config(workdir / CONFIG_FILE)
    if published and config.model.name != "gru":
        raise ConversionError(
            f"{workdir} holds a model {config.model.name!r}; needed 'gru': only that has a "
            "published format. Any model can be written by --to-safetensors"
        )
    like = jax.eval_shape(lambda: init_state(config, len(config.data.sessions)))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        if which == "latest":
            try:
                state, best = checkpoints.restore_latest(like)
            except CheckpointError as error:
                raise ConversionError(
                    f"the latest state cannot be read; leave out --which latest to convert the "
                    f"best parameters: {_first_line(error)}"
                ) from error
            score = best if best and best.step == int(state.step) else None
            return Run(config, state, score or BestScore(math.inf, math.inf, int(state.step)))
        params, best = checkpoints.restore_best(like.params)
        notes = []
        if published and checkpoints.latest_step() == best.step:
            try:
                state, _ = checkpoints.restore_latest(like)
                return Run(config, state._replace(params=params), best)
            except CheckpointError as error:
                notes.append(
                    f"the optimizer's running means are left out, since the latest state cannot be "
                    f"read: {_first_line(error)}"
                )
        elif published:
            notes.append(
                f"the best checkpoint (step {best.step}) has no optimizer state, and the latest is "
                f"of another step: its running means are left out. To continue training elsewhere, "
                f"use --which latest"
            )
    return Run(config, fresh_state(config, params, best.step), best, tuple(notes))


def _first_line(error: Exception) -> str:
    """Shorten an error. Orbax describes a wrong structure in thousands of characters."""
    line = str(error).strip().splitlines()[0]
    return line if len(line) <= 300 else f"{line[:240]} ..."
