"""Claims about averaged logits: the mean of what each run says, of the same trials."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from b2txt_jax.cli import main
from b2txt_jax.config import Config
from b2txt_jax.data.description import DataError
from b2txt_jax.inference.ensemble import average, ensemble_logits
from b2txt_jax.inference.run import Run
from b2txt_jax.interop.convert import write_workdir
from b2txt_jax.interop.nejm import Run as Weights
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.step import init_state


@pytest.fixture(scope="module")
def runs(tiny_config: Config, simulated: Path) -> list[Run]:
    """Two runs with fresh parameters of other seeds."""
    days = sorted(path.name for path in (simulated / "hdf5_data_final").iterdir())
    config = replace(tiny_config, data=replace(tiny_config.data, sessions=tuple(days)))
    seeds = (replace(config, train=replace(config.train, seed=seed)) for seed in (1, 2))
    return [Run(one, init_state(one, len(days)).params, 0) for one in seeds]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def test_a_mean_is_of_normalised_scores_so_that_no_run_weighs_more() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, 41)).astype(np.float32) * 3
    shifted = average([a + 100, b])
    np.testing.assert_allclose(shifted, average([a, b]), atol=1e-4)
    geometric = log_softmax((log_softmax(a) + log_softmax(b)) / 2)
    np.testing.assert_allclose(average([a, b]), geometric, atol=1e-5)
    arithmetic = np.log((np.exp(log_softmax(a)) + np.exp(log_softmax(b))) / 2)
    np.testing.assert_allclose(average([a, b], "probabilities"), arithmetic, atol=1e-5)


def test_each_trial_has_the_mean_of_the_runs_own_logits(runs: list[Run]) -> None:
    trials, members = ensemble_logits(runs, "val")
    for run, logits in zip(runs, members, strict=True):
        alone = run.logits("val")
        assert [one.ref for one in alone] == [trial.ref for trial in trials]
        for one, found in zip(alone, logits, strict=True):
            np.testing.assert_array_equal(one.logits, found)
    np.testing.assert_allclose(trials[3].logits, average([members[0][3], members[1][3]]), atol=1e-6)


def test_runs_that_do_not_fit_are_refused(runs: list[Run]) -> None:
    first, second = runs
    fewer = replace(second.config.data, sessions=second.sessions[:-1])
    with pytest.raises(DataError, match="has other sessions than"):
        ensemble_logits([first, replace(second, config=replace(second.config, data=fewer))], "val")
    strides = replace(second.config.model, patch_stride=7)
    other = replace(second, config=replace(second.config, model=strides))
    with pytest.raises(DataError, match="the runs have other frames of"):
        ensemble_logits([first, other], "val")


def test_the_command_writes_what_lm_server_reads(runs: list[Run], tmp_path: Path, capsys) -> None:
    for name, run in zip("ab", runs, strict=True):
        state = init_state(run.config, len(run.sessions))
        write_workdir(tmp_path / name, Weights(run.config, state, BestScore(0.5, 9.0, 0)))
    folders = [str(tmp_path / name) for name in "ab"]
    assert main(["ensemble", *folders, "--out", str(tmp_path / "mean.npz")]) == 0
    assert "ensemble: PER" in capsys.readouterr().out
    with np.load(tmp_path / "mean.npz") as file:
        assert file["logits"].shape == (file["frames"].sum(), 41)
        assert len(file["sentence"]) == len(file["trial"]) == 12
        assert len(str(file["parameters"])) == 8
