"""What the commands do, for a program or a notebook: simulate, train, evaluate."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from b2txt_jax.config import Config, load_config, with_overrides
from b2txt_jax.evaluation.command import (
    Decoding,
    OptionsError,
    all_settings,
    check_decoders,
    check_replaceable,
    check_results,
    evaluate_run,
    language_model,
    print_origin,
    write_results,
)
from b2txt_jax.evaluation.decoder_settings import settings_in_use
from b2txt_jax.evaluation.evaluate import Evaluation
from b2txt_jax.inference.run import Run, load_run
from b2txt_jax.quiet import other_libraries_quiet
from b2txt_jax.simulation.plan import SimulationSettings
from b2txt_jax.simulation.write import simulate as write_sessions
from b2txt_jax.training.loop import TrainResult
from b2txt_jax.training.loop import train as train_run


def simulate(out: Path | str, *, force: bool = False, jobs: int = 1, **settings: Any) -> Path:
    """Write simulated sessions to folder `out`, as `b2txt simulate` does.

    Args:
      out: folder to write to. What an earlier call with the same settings wrote is kept.
      force: replaces sessions that were simulated there with other settings.
      jobs: processes for large sets. A script that asks for several needs the usual
        `if __name__ == "__main__":`.
      settings: of `SimulationSettings`, such as `sessions=6, train=120, val=30, seed=0`, or
        `preset="recordings"`.

    Returns:
      The folder of the sessions, for `data.root`.

    Raises:
      DataError: a setting is out of range, or `out` holds other data.
    """
    return write_sessions(out, SimulationSettings(**settings), force, jobs)


def train(
    config: Config | Path | str,
    workdir: Path | str,
    overrides: Sequence[str] = (),
    *,
    quiet: bool = False,
) -> TrainResult:
    """Train a decoder as `b2txt train` does. A run that `workdir` holds is resumed.

    Args:
      config: the name of a configuration of the package such as "demo", the path of a
        configuration file, or a `Config`.
      workdir: the run's folder.
      overrides: of keys of the configuration, such as "data.root=DIR". `--config.` before a key, as
        on the command line, is optional.
      quiet: prints nothing.

    Raises:
      UserError: the configuration, the data or the folder cannot be used, or a loss was not finite.
    """
    changes = [f"--config.{change.removeprefix('--config.')}" for change in overrides]
    if isinstance(config, Config):
        config = with_overrides(config, changes)
    else:
        config = load_config(config, changes)
    with other_libraries_quiet():
        return train_run(config, Path(workdir), Console(quiet=True) if quiet else None)


def evaluate(
    run: Run | Path | str,
    lm: Path | str | None = None,
    split: str = "val",
    *,
    redis: str | None = None,
    workers: int | None = None,
    options: Sequence[str] = (),
    out: Path | str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Decode a split of a run's data and score it, as `b2txt evaluate` does.

    Args:
      run: from `load_run`, or the run's folder.
      lm: model folder of `lm-server build`. A server is started for this call.
      split: "val", or "test", which has no labels and so no error rates.
      redis: URL of the Redis where a running server listens, instead of `lm`.
      workers: how many worker processes share the sentences. None: one server.
      options: of `lm-server serve` (with `workers`: of `lm-server worker`), such as
        `["--llm", "runs/smollm2"]`.
      out: folder for evaluation.json and submission.csv. None: nothing is written.
      force: replaces a result that other settings gave.
      quiet: prints nothing.

    Raises:
      UserError: the arguments do not go together, `out` holds the result of other settings, no
        language model server answers or starts, or the run or its data cannot be used.
    """
    console = Console(quiet=quiet)
    folder = None if lm is None else Path(lm)
    check_decoders(redis, folder, workers)
    if options and folder is None:
        raise OptionsError(
            f"found options {list(options)} without `lm`: they are for a server that is started "
            "here. A running server has its own"
        )
    if out is not None:
        check_results(Path(out))
    trained = run if isinstance(run, Run) else load_run(run)
    decoder = settings_in_use(trained, folder, options)
    with language_model(redis, folder, workers, decoder.options(options)) as (url, name):
        jobs = workers is not None
        given = {
            "language_model": name,
            "lm_settings": decoder.file and str(decoder.file),
            "lm_options": shlex.join(options) or None,
        }
        settings = all_settings(trained, given, url, folder, jobs)
        if out is not None:
            check_replaceable(Path(out), settings, force)
        trials = trained.logits(split, console=console)
        how = Decoding(split, url, settings, console, jobs, decoder)
        result = evaluate_run(trained, trials, how)
    if out is not None:
        write_results(Path(out), result)
    print_origin(trained, decoder, folder, split, console)
    return result
