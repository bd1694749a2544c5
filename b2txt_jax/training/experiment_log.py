"""Metrics of a run in Weights & Biases or MLflow too (`--tracker`, extras `wandb` and `mlflow`).

Where they send to, and with which key, is in their own environment variables: WANDB_PROJECT,
WANDB_MODE=offline, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and others. The id of the run there
is kept in WORKDIR/tracker.json, so that a resumed training goes on with the same one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from b2txt_jax.config import Config
from b2txt_jax.errors import UserError
from lm_server.files.atomic_file import replacing

TRACKERS = ("wandb", "mlflow")
TRACKER_FILE = "tracker.json"
"""Name in a run's folder of the ids that trackers know it by."""
_NAME = "b2txt"
"""Of the project or experiment, where the environment names none."""
_MOST_PARAMS = 100
"""That MLflow takes at once."""


class TrackerError(UserError, RuntimeError):
    """A tracker that cannot be used. The message names what to install or to set."""


class Experiment(Protocol):
    """A run as a tracker knows it."""

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send numbers by their names, such as train/loss."""
        ...

    def close(self, failed: bool) -> None:
        """End the run there, for this call."""
        ...


def add_tracker_argument(parser: argparse.ArgumentParser) -> None:
    """Add --tracker."""
    parser.add_argument(
        "--tracker",
        choices=TRACKERS,
        help="send the metrics there too (default: to the run's folder alone); its environment "
        "variables say where, such as WANDB_MODE=offline or MLFLOW_TRACKING_URI",
    )


def check_tracker(name: str | None) -> None:
    """Raise before the work what `experiment` would raise for a package that is not there.

    Raises:
      TrackerError: the tracker is not installed.
    """
    if name is None:
        return
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise TrackerError(
            f"--tracker {name} needs the package {name}, which cannot be imported ({error}): from "
            f"the checkout: pip install '.[{name}]' -c constraints.txt"
        ) from error


@contextlib.contextmanager
def experiment(
    name: str | None, workdir: Path, config: Config, console: Console
) -> Iterator[Experiment | None]:
    """Yield the run in a tracker, or None without a name.

    Raises:
      TrackerError: it is not installed, or refuses the run.
    """
    if name is None:
        yield None
        return
    check_tracker(name)
    path = workdir / TRACKER_FILE
    ids: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
    kinds: Mapping[str, Callable[[Path, Config, str | None], Experiment]]
    kinds = {"wandb": _Wandb, "mlflow": _Mlflow}
    try:
        found = kinds[name](workdir, config, ids.get(name))
    # A tracker's library fails in any way: no key, no network, a server that refuses.
    except Exception as error:
        raise TrackerError(
            f"{name} does not begin a run ({str(error).strip() or type(error).__name__}): check "
            f"its environment variables ({_VARIABLES[name]}), or leave out --tracker"
        ) from error
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps({**ids, name: found.id}) + "\n")
    failed = True
    try:
        yield _Careful(found, name, console)
        failed = False
    finally:
        try:
            found.close(failed)
        # The training stands, whatever the tracker's library raises at the end.
        except Exception as error:
            console.print(
                f"warning: {name} did not take the end of the run ({error}); the run's folder has "
                "all metrics",
                style="yellow",
            )


_VARIABLES = {
    "wandb": "WANDB_API_KEY, WANDB_PROJECT, or WANDB_MODE=offline",
    "mlflow": "MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME",
}


class _Careful:
    """An experiment whose failures do not end the training. The first one ends the sending."""

    def __init__(self, inner: Experiment, name: str, console: Console) -> None:
        self.id, self._inner, self._name, self._console = inner.id, inner, name, console
        self._sending = True

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._sending:
            return
        try:
            self._inner.log(step, values)
        except Exception as error:
            self._sending = False
            self._console.print(
                f"warning: {self._name} failed at step {step} ({error}) and is sent nothing more; "
                "the run's folder has all metrics",
                style="yellow",
                soft_wrap=True,
                markup=False,
            )

    def close(self, failed: bool) -> None:
        self._inner.close(failed)


class _Wandb:
    def __init__(self, workdir: Path, config: Config, run_id: str | None) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _NAME),
            name=workdir.absolute().name,
            id=run_id,
            resume="allow",
            dir=str(workdir),
            config=flat(config),
            settings=wandb.Settings(console="off"),
        )
        self.id = str(self._run.id)
        # By a metric of ours: wandb drops steps that a resumed training repeats.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    def __init__(self, workdir: Path, config: Config, run_id: str | None) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        if run_id is None:
            run_id = self._begun(workdir, config)
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.id = str(run_id)

    def _begun(self, workdir: Path, config: Config) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _NAME)
        found = self._client.get_experiment_by_name(name)
        group = found.experiment_id if found else self._client.create_experiment(name)
        run_id = self._client.create_run(group, run_name=workdir.absolute().name).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in flat(config).items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _MOST_PARAMS])
        return str(run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


def flat(config: Config) -> dict[str, Any]:
    """Return a configuration as key -> value, such as "train.seed" -> 10. Tuples become texts."""
    sections = dataclasses.asdict(config)
    return {
        f"{section}.{key}": value if isinstance(value, int | float | str) else str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }
