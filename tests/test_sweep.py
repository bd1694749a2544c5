"""A sweep trains each combination once, goes on where it was stopped, and reports intervals."""

import json
from pathlib import Path

import pytest

from b2txt_jax.cli import main
from b2txt_jax.config import CONFIG_FILE, Config, ConfigError, with_overrides, write_config
from b2txt_jax.sweep import combinations, is_complete, is_evaluated, mean_interval
from b2txt_jax.training.loop import resolve


def test_a_grid_has_all_combinations_and_a_value_in_brackets_is_one() -> None:
    found = combinations(["model.units=8,16", "data.buckets=((180,40),),((200,50),(300,60))"])
    assert list(found.values()) == [
        [f"--config.model.units={units}", f"--config.data.buckets={buckets}"]
        for units in (8, 16)
        for buckets in ("((180,40),)", "((200,50),(300,60))")
    ]
    assert len({*found}) == 4
    assert combinations([]) == {"base": []}


@pytest.mark.parametrize(
    "grid",
    [["model.units"], ["model.units="], ["a=1", "a=2"], ["model.units=8,8"], ["train.seed=3"]],
)
def test_a_grid_that_is_none_is_refused(grid: list[str]) -> None:
    with pytest.raises(ConfigError, match="--grid"):
        combinations(grid)


@pytest.mark.parametrize(
    ("option", "sets"), [("--config.train.seed=3", "--seeds"), ("--config.model.units=8", "--grid")]
)
def test_a_key_that_the_sweep_sets_is_not_taken_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, sets: str
) -> None:
    command = ["sweep", "--config", "demo", "--out", str(tmp_path), "--grid", "model.units=16,32"]
    assert main([*command, option]) == 2
    assert f"{option} would change nothing, since {sets} sets" in capsys.readouterr().err


def test_intervals_are_student_s() -> None:
    found = mean_interval([0.1, 0.12, 0.09, 0.11, 0.13])
    half = 2.7764 * 0.0158114 / 5**0.5  # the table's quantile for 4 degrees of freedom
    assert (found["low"], found["high"]) == pytest.approx((0.11 - half, 0.11 + half), abs=1e-6)
    assert mean_interval([0.1])["low"] is None


def test_a_complete_run_of_another_configuration_is_not_taken_for_this_one(
    tiny_config: Config, tmp_path: Path
) -> None:
    assert not is_complete(tiny_config, tmp_path)
    write_config(resolve(tiny_config, tmp_path, resumed=False), tmp_path / CONFIG_FILE)
    (tmp_path / "finished.json").write_text('{"best": {"per": 0.1, "step": 6}}')
    assert is_complete(tiny_config, tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate was"):
        is_complete(with_overrides(tiny_config, ["--config.optimizer.learning_rate=1"]), tmp_path)
    # More steps of the same run are trained.
    assert not is_complete(with_overrides(tiny_config, ["--config.train.steps=60"]), tmp_path)


def test_a_result_by_another_language_model_or_checkpoint_is_none_of_this_sweep(
    tmp_path: Path,
) -> None:
    lm = tmp_path / "other" / "lm"
    lm.mkdir(parents=True)
    (lm / "lm.json").write_text("{}")
    run, crc = tmp_path / "run", 2745614147  # crc32 of b"{}"
    (run / "val" / "lm").mkdir(parents=True)
    (run / "finished.json").write_text('{"best": {"per": 0.1, "step": 6}}')
    assert not is_evaluated(run, lm)
    right = {"language_model": str(lm), "language_model_crc32": crc, "step": 6}
    wrong = {"language_model": str(tmp_path / "lm"), "language_model_crc32": 1, "step": 5}
    for made in [right, *({**right, key: value} for key, value in wrong.items())]:
        content = {"settings": made, "made": {}, "checkpoint": {}, "sentences": []}
        (run / "val" / "lm" / "evaluation.json").write_text(json.dumps(content))
        assert is_evaluated(run, lm) == (made == right), made


@pytest.mark.slow
def test_a_sweep_goes_on_names_what_failed_and_a_mistake_comes_before_the_work(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", "--config", "demo", "--out", str(out), *tiny_overrides]
    command += ["--config.train.steps=2", "--config.train.validate_every=2"]
    assert main([*command, "--seeds", "2", "--grid", "model.units=16,x"]) == 2
    assert not out.exists() or not list(out.glob("*/*"))
    assert main([*command, "--seeds", "1"]) == 0
    before = (out / "base" / "seed_0" / "metrics.jsonl").read_bytes()
    (out / "base" / "seed_1").mkdir()
    (out / "base" / "seed_1" / "metrics.jsonl").mkdir()  # which no training can write to
    assert main([*command, "--seeds", "2"]) == 1
    assert (out / "base" / "seed_0" / "metrics.jsonl").read_bytes() == before
    found = json.loads((out / "sweep.json").read_text())
    assert [one["seed"] for one in found["settings"]["base"]["runs"]] == [0]
    assert list(found["failed"]) == [str(out / "base" / "seed_1")]
    assert "means and 95% intervals" in capsys.readouterr().out
