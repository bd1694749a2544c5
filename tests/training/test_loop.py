"""`train` on real files: what it writes, and that it goes on where it stopped."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from b2txt_jax.config import ConfigError, load_config, with_overrides
from b2txt_jax.data.description import DataError
from b2txt_jax.inference.logits import write_logits
from b2txt_jax.inference.run import load_run
from b2txt_jax.metrics import ErrorRate, error_rate, greedy_decode, total
from b2txt_jax.training.checkpoint import BestScore, CheckpointError, Checkpoints
from b2txt_jax.training.loop import out_of_patience, train
from b2txt_jax.training.metrics_log import mean_of_last
from b2txt_jax.training.step import init_state
from b2txt_jax.training.tracker import Tracker
from b2txt_jax.training.validation import Validation


def lines_of(workdir, kind):
    entries = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def latest_params(config, workdir):
    with Checkpoints(workdir) as checkpoints:
        like = init_state(config, len(config.data.sessions) or 4)
        return jax.tree.leaves(checkpoints.restore_latest(like)[0].params)


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """A run of six steps, uninterrupted."""
    workdir = tmp_path_factory.mktemp("trained")
    assert train(tiny_config, workdir).finished
    return workdir


def test_a_run_leaves_metrics_checkpoints_and_its_configuration(trained, tiny_config):
    assert [entry["step"] for entry in lines_of(trained, "train")] == [2, 4, 6]
    validations = lines_of(trained, "val")
    assert [entry["step"] for entry in validations] == [3, 6]
    for entry in validations:
        assert entry["per"] == pytest.approx(entry["errors"] / entry["length"])
        assert len(entry["per_day"]) == 3
    assert list((trained / "tensorboard").iterdir())
    model = load_run(trained)
    assert len(model.config.data.sessions) == 4
    best = min(validations, key=lambda entry: (entry["per"], entry["loss"]))
    assert model.step == best["step"]


@pytest.mark.slow
def test_a_run_in_two_parts_equals_an_uninterrupted_one_bit_for_bit(trained, tiny_config, tmp_path):
    first = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, steps=4))
    train(first, tmp_path)
    result = train(tiny_config, tmp_path)
    assert (result.step, result.finished) == (6, True)
    for ours, uninterrupted in zip(
        latest_params(tiny_config, tmp_path), latest_params(tiny_config, trained), strict=True
    ):
        np.testing.assert_array_equal(ours, uninterrupted)
    assert [entry["loss"] for entry in lines_of(tmp_path, "train")] == [
        entry["loss"] for entry in lines_of(trained, "train")
    ]


@pytest.fixture(scope="module")
def epochs_config(tiny_config):
    """Epochs, averaged weights, step decay, masks and a loss per label."""
    keys = {
        "data.plan": "epochs",
        "signal.augment": ("white_noise", "speckle", "time_mask"),
        "optimizer.schedule": "steps",
        "optimizer.decay_at": (4,),
        "train.ctc_per_label": True,
        "train.ema": 0.9,
        "train.validate_every": 2,
    }
    return with_overrides(tiny_config, [f"--config.{key}={value}" for key, value in keys.items()])


@pytest.fixture(scope="module")
def averaged(epochs_config, tmp_path_factory):
    """A run of it in two parts, and what the second one printed."""
    workdir, said = tmp_path_factory.mktemp("averaged"), io.StringIO()
    train(with_overrides(epochs_config, ["--config.train.steps=4"]), workdir)
    assert train(epochs_config, workdir, Console(file=said, width=1000)).finished
    return workdir, said.getvalue()


@pytest.mark.slow
def test_a_run_of_epochs_in_two_parts_equals_an_uninterrupted_one(
    averaged, epochs_config, tmp_path
):
    train(epochs_config, tmp_path)
    for name in ("val", "train"):
        kept = [
            [{k: v for k, v in line.items() if "second" not in k} for line in lines_of(run, name)]
            for run in (averaged[0], tmp_path)
        ]
        assert kept[0] == kept[1]
    states = []
    for run in (averaged[0], tmp_path):
        with Checkpoints(run, read_only=True, ema=True) as checkpoints:
            states.append(checkpoints.restore_latest(init_state(epochs_config, 4)))
    assert states[0][1] == states[1][1]
    jax.tree.map(np.testing.assert_array_equal, states[0][0], states[1][0])


@pytest.mark.slow
def test_the_mean_of_the_last_validations_stands_beside_the_best_of_both_weights(averaged):
    workdir, said = averaged
    lines = lines_of(workdir, "val")
    for key in ("per", "ema_per"):
        for number, line in enumerate(lines):
            so_far = [one[key] for one in lines[: number + 1]]
            assert line[f"{key}_last_ten"] == pytest.approx(np.mean(so_far))
    mean = 100 * np.mean([line["per"] for line in lines])
    assert f"mean of the last ten validations {mean:.2f} %" in said
    assert f"an epoch is {32 / 4:.4g} batches of 4" in said
    finished = json.loads((workdir / "finished.json").read_text())
    assert finished["per_last_ten"] == pytest.approx(mean / 100)
    assert finished["validations"] == len(lines)
    assert finished["ema_per_last_ten"] == pytest.approx(np.mean([one["ema_per"] for one in lines]))
    assert f", the lowest of {len(lines)}; mean of the last ten" in said
    assert finished["best"]["ema"]["per"] == min(line["ema_per"] for line in lines)


def test_only_the_last_ten_validations_count(tiny_config):
    tracker = Tracker(tiny_config, None, None, Progress(), 0, None)
    for number in range(14):
        rate = ErrorRate(errors=number, length=100)
        tracker.step += 1
        improved = tracker.validated(Validation(rate, {}, {}, 1.0, 0), 0.0)
        assert improved == (["raw"] if number == 0 else [])
    assert mean_of_last(tracker.pers["raw"]) == pytest.approx(np.mean(range(4, 14)) / 100)
    assert (tracker.best.per, tracker.best.validations_since) == (0.0, 13)


@pytest.mark.slow
def test_either_weights_of_a_run_can_be_used(averaged, trained):
    workdir, _ = averaged
    lines = lines_of(workdir, "val")
    found = {}
    for weights, key, loss in (("raw", "per", "loss"), ("ema", "ema_per", "ema_loss")):
        run = load_run(workdir, weights=weights)
        best = min(lines, key=lambda line, key=key, loss=loss: (line[key], line[loss]))
        assert (run.weights, run.step) == (weights, best["step"])
        assert run.selection == {
            "per": best[key],
            "validations": len(lines),
            "per_last_ten": lines[-1][f"{key}_last_ten"],
        }
        trials = run.logits("val")
        rates = [error_rate(t.labels.tolist(), greedy_decode(t.logits).tolist()) for t in trials]
        assert total(rates).rate == pytest.approx(best[key])
        found[weights] = trials[0].logits
    assert not np.allclose(found["raw"], found["ema"])
    with pytest.raises(ConfigError, match=r"trained with train\.ema = 0; needed weights 'raw'"):
        load_run(trained, weights="ema")


def test_a_score_of_before_there_were_averages_is_read():
    old = {"per": 0.5, "loss": 1.0, "step": 3, "validations_since": 2}
    assert BestScore.of(old) == BestScore(0.5, 1.0, 3, 2)
    both = BestScore(0.5, 1.0, 3, 2, ema=BestScore(0.4, 1.0, 2))
    assert BestScore.of(dataclasses.asdict(both)) == both


def test_patience_waits_for_the_averaged_weights_too(tiny_config):
    patient = with_overrides(tiny_config, ["--config.train.patience=2"])
    score = BestScore(0.5, 1.0, 3, validations_since=2)
    assert out_of_patience(patient, score)
    better = dataclasses.replace(score, ema=BestScore(0.4, 1.0, 5, validations_since=1))
    assert not out_of_patience(patient, better)


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(
    trained, tiny_config
):
    other = with_overrides(tiny_config, ["--config.model.units=24"])
    with pytest.raises(ConfigError, match=r"model\.units was 16, is 24"):
        train(other, trained)


@pytest.mark.slow
def test_a_key_that_the_run_has_fixed_is_named_when_it_is_asked_for_anew(
    trained, tiny_config, tiny_overrides
):
    said = io.StringIO()
    console = Console(file=said, width=1000)
    train(load_config("configs/demo.py", tiny_overrides), trained, console)
    train(with_overrides(tiny_config, ["--config.data.buckets=()"]), trained, console)
    first, second = (line for line in said.getvalue().splitlines() if "stay as" in line)
    assert first.startswith(f"data.sessions stay as {trained}/config.json has them")
    assert second.startswith("data.sessions and data.buckets stay as")
    assert "For others give a new --workdir" in second


def test_a_damaged_checkpoint_is_an_error_that_names_it(trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    for path in (workdir / "checkpoints" / "best").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoints/best/.* cannot be read"):
        load_run(workdir)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="not a run's folder"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("score", "wins"),
    [((0.2, 9.0), True), ((0.3, 1.0), False), ((0.25, 4.0), True), ((0.25, 5.0), False)],
)
def test_a_lower_per_wins_and_at_equal_per_the_lower_loss(score, wins):
    assert BestScore(*score, step=2).beats(BestScore(0.25, 5.0, step=1)) is wins


def test_the_logits_file_has_the_documented_arrays(trained, tmp_path, simulated):
    model = load_run(trained)
    for split, has_sentences in (("val", True), ("test", False)):
        trials = model.logits(split)
        write_logits(tmp_path / "logits.npz", trials)
        with np.load(tmp_path / "logits.npz") as file:
            assert file["logits"].dtype == np.float32
            assert file["logits"].shape == (file["frames"].sum(), 41)
            assert file["frames"].dtype == np.int32
            assert ("sentence" in file) is has_sentences
            names = file["trial"].tolist()
        assert names == sorted(names)
        assert names[0].split("/")[1] == "trial_0000"
        for trial, frames in zip(trials, [len(t.logits) for t in trials], strict=True):
            assert frames == (trial.ref.bins - 14) // 4 + 1


def test_a_call_that_failed_on_the_data_leaves_nothing_in_the_way_of_the_next(
    tiny_config, tmp_path, not_compiled
):
    wrong = with_overrides(tiny_config, ["--config.data.sessions=('t15.2023.08.11','x')"])
    with pytest.raises(DataError, match="'x'"):
        train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(tiny_config, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(written["data"]["sessions"]) == 4


def test_a_best_checkpoint_of_steps_that_were_lost_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, value in ((6, 6.0), (5, 5.0)):
            score = BestScore(0.5, 1.0, step)
            checkpoints.save_best(step, {"x": np.full(3, value, np.float32)}, score)
            checkpoints.wait()
        params, best = checkpoints.restore_best({"x": np.zeros(3, np.float32)})
    assert best.step == 5
    np.testing.assert_array_equal(params["x"], np.full(3, 5.0))


def test_the_sessions_of_a_trained_model_cannot_be_reordered_when_it_is_used(trained):
    with pytest.raises(ConfigError, match="belongs to the trained model"):
        load_run(trained, ["--config.data.sessions=('b', 'a')"])


def test_steps_per_second_are_the_steps_of_a_window_over_its_seconds(trained):
    for entry in lines_of(trained, "train"):
        assert entry["seconds"] > 0
        assert entry["steps_per_second"] == pytest.approx(2 / entry["seconds"])


@pytest.mark.slow
def test_a_run_out_of_patience_ends_early_and_stays_complete(tiny_overrides, tmp_path, request):
    """Without a learning rate no validation is better than the first."""
    keys = {
        "optimizer.learning_rate": 0.0,
        "optimizer.learning_rate_min": 0.0,
        "optimizer.day_learning_rate": 0.0,
        "optimizer.day_learning_rate_min": 0.0,
        "train.steps": 40,
        "train.validate_every": 2,
        "train.patience": 2,
    }
    overrides = [f"--config.{key}={value}" for key, value in keys.items()]
    config = load_config("configs/demo.py", [*tiny_overrides, *overrides])
    for _ in range(2):
        ended = train(config, tmp_path)
        assert (ended.step, ended.finished) == (6, True)
    assert json.loads((tmp_path / "finished.json").read_text())["step"] == 6
    # Validating more often does not make the validations of the past more.
    more = with_overrides(config, ["--config.train.patience=4", "--config.train.validate_every=1"])
    request.getfixturevalue("not_compiled")
    going_on = train(more, tmp_path)
    assert (going_on.step, going_on.finished, going_on.compiled) == (6, False, False)
    assert going_on.best.validations_since == 2


def test_buckets_that_do_not_suit_the_trials_are_told(tiny_config, tmp_path, not_compiled):
    """That those chosen from the trials are not is in test_faults.py."""
    said = io.StringIO()
    large = ["data.buckets=((320, 80),)", "data.packing=off"]
    config = with_overrides(tiny_config, [f"--config.{pair}" for pair in large])
    train(config, tmp_path, Console(file=said, width=1000))
    assert "data.buckets do not suit these trials" in " ".join(said.getvalue().split())


@pytest.mark.parametrize(("warmup", "noticed"), [(5, False), (6, True)])
def test_a_run_that_ends_in_its_warm_up_is_noticed(
    warmup, noticed, tiny_config, tmp_path, not_compiled
):
    said = io.StringIO()
    config = with_overrides(tiny_config, [f"--config.optimizer.warmup_steps={warmup}"])
    train(config, tmp_path, Console(file=said, width=1000))
    assert ("the learning rate still rises at the end" in said.getvalue()) == noticed
