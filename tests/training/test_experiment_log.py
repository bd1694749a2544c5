"""Claims about `--tracker`: what is sent, what a failure does, that a resumed run is one run."""

import io
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from b2txt_jax.config import Config
from b2txt_jax.training.experiment_log import (
    TRACKER_FILE,
    TRACKERS,
    TrackerError,
    check_tracker,
    experiment,
    flat,
)
from b2txt_jax.training.metrics_log import MetricsLog


class Recorder:
    id = "0"

    def __init__(self) -> None:
        self.sent: list[tuple[int, dict[str, float]]] = []

    def log(self, step, values) -> None:
        self.sent.append((step, dict(values)))

    def close(self, failed: bool) -> None:
        self.closed = failed


def test_every_number_of_the_file_is_sent_by_its_name_and_nothing_else(tmp_path: Path) -> None:
    recorder = Recorder()
    with MetricsLog(tmp_path, 0, recorder) as log:
        log.write("val", 5, {"per": 0.25, "per_day": {"a": 0.5, "b": None}, "name": "x"})
        log.write("skipped", 6, {"loss": "nan"})
    assert recorder.sent == [(5, {"val/per": 0.25, "val/per_day/a": 0.5})]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(name: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackerError, match=rf"--tracker {name} needs .* pip install '\.\[{name}\]"):
        check_tracker(name)


class Stand(Recorder):
    """Of a tracker's place in `experiment`, that fails at its second value."""

    made: ClassVar[list["Stand"]] = []

    def __init__(self, workdir: Path, config: Config, run_id: str | None) -> None:
        super().__init__()
        self.id = run_id or "fresh"
        self.made.append(self)

    def log(self, step, values) -> None:
        if self.sent:
            raise ConnectionError("no network")
        super().log(step, values)


def test_a_failure_is_printed_once_and_ends_the_sending_not_the_training(
    tmp_path: Path, tiny_config: Config, monkeypatch
) -> None:
    monkeypatch.setattr("b2txt_jax.training.experiment_log.check_tracker", lambda name: None)
    monkeypatch.setattr("b2txt_jax.training.experiment_log._Wandb", Stand)
    said = io.StringIO()
    for _ in range(2):
        with experiment("wandb", tmp_path, tiny_config, Console(file=said, width=500)) as found:
            assert found is not None
            for step in range(4):
                found.log(step, {"a": 1.0})
    assert [one.sent for one in Stand.made] == [[(0, {"a": 1.0})]] * 2
    assert [one.closed for one in Stand.made] == [False, False]
    lines = said.getvalue().splitlines()
    assert len(lines) == 2
    assert "wandb failed at step 1 (no network) and is sent nothing more" in lines[0]
    assert json.loads((tmp_path / TRACKER_FILE).read_text()) == {"wandb": "fresh"}


@pytest.mark.slow
def test_mlflow_has_one_run_with_the_metrics_of_both_calls(
    tmp_path: Path, tiny_config: Config, monkeypatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    call("mlflow", tmp_path / "run", tiny_config)
    client = mlflow.MlflowClient()
    (group,) = [one for one in client.search_experiments() if one.name == "b2txt"]
    (run,) = client.search_runs([group.experiment_id])
    history = client.get_metric_history(run.info.run_id, "val/per")
    assert [(one.step, one.value) for one in history] == [(1, 0.5), (2, 0.25)]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {key: str(value) for key, value in flat(tiny_config).items()}


@pytest.mark.slow
def test_wandb_has_one_run_with_the_metrics_of_both_calls(
    tmp_path: Path, tiny_config: Config, monkeypatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    call("wandb", tmp_path / "run", tiny_config)
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    run_id = json.loads((tmp_path / "run" / TRACKER_FILE).read_text())["wandb"]
    assert {file.stem for file in files} == {f"run-{run_id}"}
    content = b"".join(file.read_bytes() for file in files)
    assert b"val/per" in content
    assert b"optimizer.learning_rate" in content or b"learning_rate" in content


def call(name: str, workdir: Path, config: Config) -> None:
    """Write a metric in each of two calls of a training."""
    workdir.mkdir()
    for step, per in ((1, 0.5), (2, 0.25)):
        with (
            experiment(name, workdir, config, Console(quiet=True)) as found,
            MetricsLog(workdir, step - 1, found) as log,
        ):
            log.write("val", step, {"per": per})


def test_a_run_that_a_tracker_refuses_is_an_error_that_names_its_variables(
    tmp_path: Path, tiny_config: Config, monkeypatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no API key")

    monkeypatch.setattr("b2txt_jax.training.experiment_log.check_tracker", lambda name: None)
    monkeypatch.setattr("b2txt_jax.training.experiment_log._Mlflow", refuse)
    with (
        pytest.raises(TrackerError, match=r"mlflow does not begin a run \(no API key\): check its"),
        experiment("mlflow", tmp_path, tiny_config, Console(quiet=True)),
    ):
        pass
