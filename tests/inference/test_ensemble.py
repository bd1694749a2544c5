"""Claims about averaged logits: the mean of what each run says, of the same trials."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from b2txt_jax.cli import main
from b2txt_jax.config import Config
from b2txt_jax.data.description import DataError
from b2txt_jax.inference.ensemble import ensemble_logits
from b2txt_jax.inference.run import Run
from b2txt_jax.interop.convert import write_workdir
from b2txt_jax.interop.nejm import Run as Weights
from b2txt_jax.signal.augment import augment
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.step import init_state, step_keys
from lm_server.files.several_logits import average


@pytest.fixture(scope="module")
def runs(tiny_config: Config, narrow: Path) -> list[Run]:
    """Two runs with fresh parameters of other seeds."""
    days = sorted(path.name for path in narrow.iterdir())
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


@pytest.mark.slow
def test_each_trial_has_the_mean_of_the_runs_own_logits(runs: list[Run]) -> None:
    found = ensemble_logits(runs, "val")
    for run, logits, member in zip(runs, found.plain, found.members, strict=True):
        alone = run.logits("val")
        assert [one.ref for one in alone] == [trial.ref for trial in found.trials]
        for one, plain, normalised in zip(alone, logits, member, strict=True):
            np.testing.assert_array_equal(one.logits, plain)
            np.testing.assert_allclose(log_softmax(plain), normalised, atol=1e-5)
    both = [plain[3] for plain in found.plain]
    np.testing.assert_allclose(found.trials[3].logits, average(both), atol=1e-6)


@pytest.mark.slow
def test_passes_are_the_model_on_features_augmented_by_seed_pass_and_batch(
    runs: list[Run],
) -> None:
    """Against the plain model on features that are augmented here. What is cut from a beginning
    costs no frame."""
    run = augmented(runs[0], white_noise_std=0.7, constant_offset_std=0.3, random_cut=9)
    found = ensemble_logits([run], "val", passes=2, seed=5)
    for number, (indices, _, batch) in enumerate(run.batches("val")):
        every = [list(run.of_batch(batch))]
        for step in range(2):
            key = jax.random.fold_in(step_keys(5, step).augment, number)
            features = jnp.asarray(batch.features, jnp.float32)
            x, _ = augment(key, features, batch.bins, run.config.signal)
            assert not np.array_equal(x, batch.features)
            every.append(list(run.of_batch(batch._replace(features=np.asarray(x)))))
        for row, index in enumerate(indices):
            expected = average([one[row] for one in every])
            np.testing.assert_allclose(found.members[0][index], expected, atol=1e-4)
            np.testing.assert_allclose(found.trials[index].logits, expected, atol=1e-4)
    other = ensemble_logits([run], "val", passes=1, seed=6)
    assert not np.array_equal(other.trials[0].logits, found.trials[0].logits)


def augmented(run: Run, **signal: object) -> Run:
    signals = replace(run.config.signal, **signal)  # type: ignore[arg-type]
    return replace(run, config=replace(run.config, signal=signals))


def test_runs_that_do_not_fit_are_refused(runs: list[Run]) -> None:
    first, second = runs
    fewer = replace(second.config.data, sessions=second.sessions[:-1])
    with pytest.raises(DataError, match="has other sessions than"):
        ensemble_logits([first, replace(second, config=replace(second.config, data=fewer))], "val")
    rolling = augmented(second, rolling_seconds=10.0)
    with pytest.raises(DataError, match=r"has other signal\.log, rolling_seconds"):
        ensemble_logits([first, rolling], "val")
    strides = replace(second.config.model, patch_stride=7)
    other = replace(second, config=replace(second.config, model=strides))
    with pytest.raises(DataError, match="the runs have other frames of"):
        ensemble_logits([first, other], "val")


def test_a_run_that_is_given_twice_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [str(tmp_path / "a"), str(tmp_path / "b/../a")]
    assert main(["ensemble", *both, "--out", str(tmp_path / "mean.npz")]) == 2
    assert "a is given more than once, and would weigh more" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_what_lm_server_reads(runs: list[Run], tmp_path: Path, capsys) -> None:
    for name, run in zip("ab", [augmented(one, white_noise_std=0.5) for one in runs], strict=True):
        state = init_state(run.config, len(run.sessions))
        write_workdir(tmp_path / name, Weights(run.config, state, BestScore(0.5, 9.0, 0)))
    folders = [str(tmp_path / name) for name in "ab"]
    command = ["ensemble", *folders, "--out", str(tmp_path / "mean.npz")]
    assert main([*command, "--passes", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("  with 1 passes: PER") == 2
    assert "ensemble: PER" in shown
    with np.load(tmp_path / "mean.npz") as file:
        assert file["logits"].shape == (file["frames"].sum(), 41)
        assert len(file["sentence"]) == len(file["trial"]) == 12
        assert len(str(file["parameters"])) == 8
    assert main([*command, "--passes", "1", "--config.signal.augment=()"]) == 2
    assert "would repeat the same logits" in capsys.readouterr().err
    assert main([*command, "--config.signal.white_noise_std=1"]) == 2
    assert "signal.white_noise_std belongs to the trained model" in capsys.readouterr().err
