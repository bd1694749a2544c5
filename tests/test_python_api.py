"""The functions of the package from a program, compared with what the commands write."""

import json
import subprocess
import sys

import numpy as np
import pytest

import b2txt_jax as b2t
from b2txt_jax.cli import main
from b2txt_jax.config import load_config
from b2txt_jax.data.description import DataError
from b2txt_jax.data.reader import open_folder
from b2txt_jax.errors import UserError
from b2txt_jax.evaluation.command import check_replaceable
from lm_server.__main__ import main as lm_server
from tests.conftest import FEATURES, make_narrow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sessions simulated through the function, of which some features are left."""
    out = tmp_path_factory.mktemp("api") / "sessions"
    settings = {"sessions": 4, "train": 8, "val": 4, "test": 3}
    folder = b2t.simulate(str(out), **settings, max_words=4, speaking_rate=2.0)
    make_narrow(folder)
    return folder


@pytest.fixture(scope="module")
def workdir(root, tiny_overrides, tmp_path_factory):
    """The folder of a run trained through the function, with two buckets."""
    folder = tmp_path_factory.mktemp("api") / "run"
    overrides = [override.removeprefix("--config.") for override in tiny_overrides]
    changes = [f"data.root={root}", "train.steps=2", "train.validate_every=2"]
    buckets = "data.buckets=((200, 80), (320, 80))"
    result = b2t.train("demo", str(folder), [*overrides, *changes, buckets], quiet=True)
    assert (result.finished, result.step) == (True, 2)
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return b2t.load_run(str(workdir))


@pytest.fixture(scope="module")
def trials(root):
    reader = open_folder(root, FEATURES)
    return [reader.read(ref) for ref in reader.trials(reader.sessions, "val")]


@pytest.fixture(scope="module")
def inferred(workdir, tmp_path_factory):
    """Trial -> logits, as `b2txt infer` writes them."""
    out = tmp_path_factory.mktemp("infer") / "logits.npz"
    assert main(["infer", "--workdir", str(workdir), "--out", str(out)]) == 0
    with np.load(out) as file:
        parts = np.split(file["logits"], np.cumsum(file["frames"])[:-1])
        return dict(zip(file["trial"].tolist(), parts, strict=True))


def test_simulated_sessions_are_those_of_the_command(root, tmp_path):
    out = ["--out", str(tmp_path / "sessions")]
    sizes = ["--sessions=4", "--train=8", "--val=4", "--test=3"]
    assert main(["simulate", *out, *sizes, "--max-words=4", "--speaking-rate=2.0"]) == 0
    command = open_folder(tmp_path / "sessions" / root.name)
    function = open_folder(root, FEATURES)
    refs = command.trials(command.sessions, "train")[::7]
    for mine, theirs in zip(function.trials(function.sessions, "train")[::7], refs, strict=True):
        ours, whole = function.read(mine).features, command.read(theirs).features
        np.testing.assert_array_equal(ours, whole[:, :FEATURES])
    with pytest.raises(DataError, match="sessions is 1; needed 2 to 45"):
        b2t.simulate(tmp_path / "few", sessions=1)


def test_logits_of_arrays_lists_and_splits_are_those_of_infer(run, trials, inferred):
    split = {trial.ref.name: trial.logits for trial in run.logits("val")}
    days = [trial.ref.session for trial in trials]
    several = run.logits([trial.features for trial in trials], days)
    assert split.keys() == inferred.keys() == {trial.ref.name for trial in trials}
    for trial, logits in zip(trials, several, strict=True):
        expected = inferred[trial.ref.name]
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(split[trial.ref.name], expected)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    one = run.logits(trials[3].features, day=days[3])
    np.testing.assert_allclose(one, inferred[trials[3].ref.name], atol=1e-5)
    same_day = [trial for trial in trials if trial.ref.session == days[0]]
    together = run.logits([trial.features for trial in same_day], day=days[0])
    for trial, logits in zip(same_day, together, strict=True):
        np.testing.assert_allclose(logits, inferred[trial.ref.name], atol=1e-5)
    assert run.logits([], day=days[0]) == []


def test_the_day_chooses_the_input_layer(run, trials):
    first, second = run.sessions[:2]
    features = trials[0].features
    assert not np.allclose(run.logits(features, first), run.logits(features, second), atol=1e-6)


def test_trials_of_any_length_compile_one_program_per_bucket(run, trials):
    features = np.tile(trials[0].features, (8, 1))
    day = run.sessions[0]
    for bins in (14, 15, 100, 199, 200, 201, 320):
        assert len(run.logits(features[:bins], day)) == (bins - 14) // 4 + 1
    before = run._eval_step._cache_size()
    for bins in (17, 60, 133, 250, 319):
        run.logits(features[:bins], day)
    assert run._eval_step._cache_size() == before
    # Longer ones take multiples of the largest bucket.
    assert len(run.logits(features[:641], day)) == (641 - 14) // 4 + 1


@pytest.mark.parametrize(
    ("change", "day", "message"),
    [
        (lambda x: x, "t15.2023.08.12", r"day is 't15.2023.08.12'.*nearest: t15.2023.08."),
        (lambda x: x, None, r"the day is None; needed one of the 4"),
        (lambda x: x, ["t15.2023.08.11"], "needed one name, for one trial"),
        (lambda x: x[:, :50], "t15.2023.08.11", rf"is \[\d+, 50\]; needed \[T, {FEATURES}\]"),
        (lambda x: x[None], "t15.2023.08.11", r"several trials are a list"),
        (lambda x: x[:13], "t15.2023.08.11", "has 13 bins; the model needs 14"),
        (lambda x: x * np.nan, "t15.2023.08.11", "NaN or infinite values, the first in bin 0"),
        (lambda x: [x, x], ["t15.2023.08.11"], "found 1 days for 2 trials"),
        (lambda x: [x, x[:9]], "t15.2023.08.11", "trial 1: the trial has 9 bins"),
        (lambda x: "validation", None, "split 'validation' is unknown; needed one of train"),
    ],
)
def test_unusable_input_is_an_error_that_names_what_is_needed(run, trials, change, day, message):
    with pytest.raises(DataError, match=message):
        run.logits(change(trials[0].features), day)


def test_what_can_be_repaired_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a run's folder"):
        b2t.load_run(tmp_path)
    with pytest.raises(UserError, match="one of the names demo, nejm_baseline"):
        b2t.train("nosuch", tmp_path / "run")
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        b2t.nosuch  # noqa: B018


@pytest.mark.slow
def test_evaluate_finds_the_rates_of_the_command(root, workdir, run, tmp_path):
    text = tmp_path / "text.txt"
    lines = (root.parent / "language_model_text.txt").read_text().splitlines()[:2000]
    text.write_text("\n".join(lines) + "\n")
    lm = str(tmp_path / "lm")
    build = ["build", "--text", str(text), "--order", "2", "--lexicon", "cmudict"]
    assert lm_server([*build, "--vocabulary", "2000", "--out", lm]) == 0
    result = b2t.evaluate(run, lm=lm, split="val", out=tmp_path / "mine", quiet=True)
    main(["evaluate", "--workdir", str(workdir), "--lm", lm, "--out", str(tmp_path / "theirs")])
    mine, theirs = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("mine", "theirs")
    )
    assert mine.pop("seconds_per_sentence") is not None
    theirs.pop("seconds_per_sentence")
    origins = mine.pop("made"), theirs.pop("made")
    assert origins[0]["data"] == origins[1]["data"]
    assert origins[0]["parameters"] == origins[1]["parameters"] == run.fingerprint
    assert mine["settings"]["search"]["lm_path"] == lm
    with pytest.raises(UserError, match=r"mine holds the result of other settings: language_model"):
        check_replaceable(tmp_path / "mine", {**mine["settings"], "language_model": "another"})
    assert mine == theirs
    assert result.per is not None
    assert result.per.all.rate == theirs["per"]["all"]["rate"]


QUIET = """
import sys
import numpy as np
import b2txt_jax as b2t
assert "jax" not in sys.modules
run = b2t.load_run(sys.argv[1])
logits = run.logits(np.zeros((50, run.config.data.feature_count), np.float32), day=run.sessions[0])
assert logits.shape == (10, 41)
{training}
from absl import logging
assert logging.get_verbosity() == logging.WARNING
import b2txt_jax.simulation.write
assert callable(b2t.simulate)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"redis": "redis://localhost:1", "lm": "lm"}, "--redis and --lm are both given"),
        ({"redis": "redis://localhost:1", "options": ["--llm", "x"]}, "without `lm`"),
        ({"lm": "lm", "workers": 0}, "--workers 0 leaves the work"),
        ({"redis": "redis://localhost:1", "workers": 2}, "needs --lm DIR"),
    ],
)
def test_evaluate_refuses_what_the_command_refuses(run, arguments, message):
    with pytest.raises(UserError, match=message):
        b2t.evaluate(run, **arguments)


TRAINING = """
b2t.train(run.config, sys.argv[2], ["train.steps=1", "data.buckets=((320, 80),)"], quiet=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "training", ["", pytest.param(TRAINING, marks=pytest.mark.slow)], ids=["read", "trained"]
)
def test_the_library_prints_nothing_and_leaves_logging_as_it_was(training, workdir, tmp_path):
    program = QUIET.format(training=training)
    command = [sys.executable, "-c", program, str(workdir), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_configuration_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    by_path = load_config("configs/triple_gru_small.py")
    monkeypatch.chdir(tmp_path)
    assert load_config("triple_gru_small") == by_path
    (tmp_path / "demo.py").write_text("raise RuntimeError")
    assert load_config("demo").model.units == 128
