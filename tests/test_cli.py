"""The `b2txt` command as a user types it: help, errors with exit status 2, the pipeline."""

import argparse
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

import lm_server as lm_server_package
from b2txt_jax.cli import COMMANDS, main, make_parser
from b2txt_jax.data.reader import open_folder
from b2txt_jax.inference.run import load_run
from b2txt_jax.training.loop import train
from lm_server.__main__ import _parser as lm_server_parser
from lm_server.__main__ import main as lm_server
from tests.conftest import FEATURES

COMMAND = [sys.executable, "-m", "b2txt_jax.cli"]


@pytest.fixture(scope="module")
def run_folder(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(tiny_config, workdir)
    return workdir


@pytest.fixture(scope="module")
def language_model(simulated, tmp_path_factory):
    """A small 2-gram model over the most frequent words of the CMU dictionary."""
    folder = tmp_path_factory.mktemp("lm")
    text = folder / "text.txt"
    lines = (simulated / "language_model_text.txt").read_text().splitlines()[:2000]
    text.write_text("\n".join(lines) + "\n")
    arguments = ["build", "--text", str(text), "--order", "2", "--lexicon", "cmudict"]
    arguments += ["--vocabulary", "2000"]
    assert lm_server([*arguments, "--out", str(folder / "lm")]) == 0
    return folder / "lm"


@pytest.fixture
def damaged(narrow, tmp_path):
    """A function that copies the sessions, changes the first train file's first trial, and
    trains."""

    def train_on(change, tiny_overrides, capsys):
        root = tmp_path / "sessions"
        shutil.copytree(narrow, root)
        session = open_folder(root).sessions[0]
        change(root / session / "data_train.hdf5")
        arguments = ["--config", "configs/demo.py", "--workdir", str(tmp_path / "run")]
        arguments += [*tiny_overrides, f"--config.data.root={root}"]
        # An epoch has every trial, also the damaged one.
        arguments += ["--config.data.plan=epochs", "--config.train.steps=8"]
        status = main(["train", *arguments])
        return status, capsys.readouterr().err

    return train_on


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: b2txt {command}" in capsys.readouterr().out


def edit(change):
    """A change of the first trial, as a change of its file."""

    def on_file(path):
        with h5py.File(path, "r+") as file:
            change(file["trial_0000"])

    return on_file


def shrink_features(trial):
    features = trial["input_features"][:, : FEATURES - 1]
    del trial["input_features"]
    trial["input_features"] = features


def poison(trial):
    trial["input_features"][5, 7] = np.nan


def label_41(trial):
    trial["seq_class_ids"][1] = 41


def long_label(trial):
    trial.attrs["seq_len"] = 38
    trial["seq_class_ids"][:] = 3


def cut_trial(trial):
    trial.attrs["n_time_steps"] = 9


def truncate(path):
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (truncate, ["data_train.hdf5", "copy or download it again"]),
        (edit(shrink_features), ["trial_0000", "input_features", f"needed [T, {FEATURES}]"]),
        pytest.param(
            edit(poison), ["trial_0000", "NaN", "bin 5, feature 7"], marks=pytest.mark.slow
        ),
        (edit(label_41), ["trial_0000", "the id 41", "needed 1 to 40"]),
        (edit(long_label), ["trial_0000", "label of 38 phonemes", "drop the trial"]),
        (edit(cut_trial), ["trial_0000", "9 bins", "the model needs 14"]),
    ],
    ids=["truncated", "feature count", "NaN", "label 41", "long label", "short trial"],
)
def test_bad_sessions_end_training_with_an_error_that_names_the_trial(
    change, messages, damaged, tiny_overrides, capsys
):
    status, error = damaged(change, tiny_overrides, capsys)
    assert status == 2
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for message in messages:
        assert message in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.data.root=/nowhere", "the data folder /nowhere is not there"),
        ("--config.data.sessions=('t15.2023.08.12',)", "nearest of its 4 sessions: t15.2023.08."),
        ("--config.model.layer=3", "did you mean model.layers"),
        ("--config.data.days_per_batch=9", "4 sessions have training trials; a batch needs 9"),
    ],
)
def test_bad_configuration_ends_training_with_a_clear_error(
    override, message, tiny_overrides, tmp_path, capsys
):
    arguments = ["--config", "configs/demo.py", "--workdir", str(tmp_path / "run")]
    assert main(["train", *arguments, *tiny_overrides, override]) == 2
    output, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert message in error
    assert "compiling" not in output
    assert not (tmp_path / "run").exists()


def test_evaluate_writes_rates_and_a_submission_through_its_own_server(
    run_folder, language_model, capfd
):
    command = ["evaluate", "--workdir", str(run_folder), "--lm", str(language_model)]
    status = main([*command, "--split", "val"])
    result = json.loads((run_folder / "val/lm/evaluation.json").read_text())
    # An untrained model's logits may have no sentence; then the trial is named and the status is 1.
    assert status == (1 if result["failed"] else 0), capfd.readouterr().err
    assert result["trials"] == 12
    for kind in ("per", "wer"):
        assert result[kind]["all"]["length"] == sum(
            group["length"] for group in result[kind]["per_session"].values()
        )
        assert (
            sum(group["errors"] for group in result[kind]["per_corpus"].values())
            == (result[kind]["all"]["errors"])
        )
    with (run_folder / "val/lm/submission.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [str(i) for i in range(12)]
    assert [row["text"] for row in rows] == [s["decoded"] or "" for s in result["sentences"]]

    main([*command, "--split", "test"])
    result = json.loads((run_folder / "test/lm/evaluation.json").read_text())
    assert (result["per"], result["wer"], result["trials"]) == (None, None, 9)
    assert "Traceback" not in capfd.readouterr().err


def test_evaluate_without_redis_or_model_says_how_to_start_one(run_folder, monkeypatch, capsys):
    monkeypatch.setenv("B2TXT_REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    assert main(["evaluate", "--workdir", str(run_folder)]) == 2
    error = capsys.readouterr().err
    assert "Give --lm DIR" in error
    assert "secret" not in error


def test_evaluate_with_a_folder_that_holds_no_model_shows_the_servers_message(
    run_folder, tmp_path, capsys
):
    assert main(["evaluate", "--workdir", str(run_folder), "--lm", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "lm-server build" in error


def test_infer_then_decode_gives_one_line_per_trial(run_folder, language_model, tmp_path):
    logits, lines = tmp_path / "logits.npz", tmp_path / "decoded.jsonl"
    assert main(["infer", "--workdir", str(run_folder), "--out", str(logits)]) == 0
    arguments = ["--lm", str(language_model), "--logits", str(logits), "--out", str(lines)]
    command = [sys.executable, "-m", "lm_server", "decode", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    decoded = [json.loads(line) for line in lines.read_text().splitlines()]
    with np.load(logits) as file:
        assert [entry["trial"] for entry in decoded] == file["trial"].tolist()
    assert done.returncode == 0, done.stderr
    assert all(entry["nbest"][0]["sentence"] == entry["sentence"] for entry in decoded)


def test_stream_gives_bin_by_bin_what_the_whole_trials_give_and_records_it(
    run_folder, language_model, tmp_path, capsys
):
    run = load_run(run_folder)
    session, record, summary = run.sessions[1], tmp_path / "record", tmp_path / "summary.json"
    command = ["stream", "--workdir", str(run_folder), "--lm", str(language_model), "--speed=max"]
    command += [
        "--replay",
        session,
        "--limit=2",
        "--record",
        str(record),
        "--summary",
        str(summary),
    ]
    assert main([*command, "--view", "0"]) == 0
    decoder = lm_server_package.load(language_model)
    reader = open_folder(run.config.data.root, FEATURES)
    refs = reader.find_trials([session], "val")[:2]
    features = [reader.read(ref).features for ref in refs]
    expected = [decoder.decode(logits).sentence for logits in run.logits(features, session)]
    entries = [json.loads(line) for line in (record / "sentences.jsonl").open()]
    assert [entry["text"] for entry in entries] == expected
    assert [entry["name"] for entry in entries] == [ref.name for ref in refs]
    for entry, trial in zip(entries, features, strict=True):
        with np.load(record / f"features/{entry['id']}.npz") as file:
            np.testing.assert_array_equal(file["features"], trial)
    figures = json.loads(summary.read_text())
    assert (figures["sentences"], figures["problems"]) == (2, {})
    assert figures["chunks"] > 0
    printed = capsys.readouterr().out
    assert "the page is at http://127.0.0.1:" in printed
    assert "the model looks ahead 80 ms" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replay", "x", "--lm", "a", "--redis", "b"], "--lm DIR.*and not both"),
        (["--replay", "x"], "needed --lm DIR"),
        (["--replay", "x", "--lm", "a", "--speed", "fast"], "--speed is 'fast'"),
        (["--replay", "x", "--lm", "a", "--chunk-frames", "0"], "--chunk-frames is 0"),
        (["--source", "lsl://x", "--lm", "a", "--limit", "2"], "--limit does nothing.*--replay"),
        (["--replay", "x", "--lm", "a", "--silence", "2"], "nothing without --sentences silence"),
        (["--replay", "x", "--lm", "a", "--adapt-bound", "1"], "--adapt-bound .* without --adapt"),
        (["--replay", "x", "--lm", "a", "--view-token", "t"], "--view-token .* without --view"),
        (["--replay", "t15.2023.08.12", "--lm", "a"], "'t15.2023.08.12'.*nearest"),
        (["--source", "lab://x", "--lm", "a"], "needed a URL that begins with"),
        (["--replay", "t15.2023.08.13", "--lm", "a", "--day", "none"], "the day is 'none'"),
        (
            ["--replay", "t15.2023.08.13", "--lm", "a", "--view", "--view-host", "0.0.0.0"],
            "needed --view-token",
        ),
    ],
)
def test_stream_names_an_option_that_cannot_be(run_folder, arguments, said, tmp_path, capsys):
    record = ["--record", str(tmp_path / "record")]
    assert main(["stream", "--workdir", str(run_folder), *record, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert re.search(said, error[0])


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "--out", "{file}/x"],
        ["train", "--config", "configs/demo.py", "--workdir", "{file}/x"],
        ["evaluate", "--workdir", "{run}", "--lm", "{file}", "--out", "{file}/x"],
        ["prepare", "--root", "{data}", "--out", "{file}/x"],
        ["demo", "--out", "{file}/x"],
        ["infer", "--workdir", "/no/run", "--out", "{file}/x"],
        ["infer", "--workdir", "/no/run", "--out", "/proc/x"],
        ["infer", "--workdir", "/no/run", "--out", "{run}"],
        ["convert", "--to-nejm", "{file}/x", "--workdir", "/no/run"],
        ["convert", "--to-safetensors", "/proc/x.safetensors", "--workdir", "/no/run"],
        ["convert", "--from-nejm", "/no/run", "--workdir", "/proc/x"],
    ],
    ids=lambda words: f"{words[0]} {words[-1]}",
)
def test_a_place_that_cannot_be_written_is_an_error_in_one_line_before_all_else(
    arguments, run_folder, simulated, tiny_overrides, tmp_path, capsys
):
    file = tmp_path / "file"
    file.write_text("")
    places = {"file": file, "run": run_folder, "data": simulated / "hdf5_data_final"}
    words = [word.format(**places) for word in arguments]
    words += tiny_overrides if words[0] == "train" else []
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert any(place in error for place in (str(file), "/proc", str(run_folder)))
    assert "/no/run" not in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "extra"), [("cuda", "cuda"), pytest.param("rocm", "cuda", marks=pytest.mark.slow)]
)
def test_a_platform_without_its_plug_in_is_an_error_in_one_line(platform, extra, tmp_path):
    if importlib.util.find_spec(f"jax_{platform}12_plugin"):
        pytest.skip("the plug-in is installed")
    done = subprocess.run(
        [*COMMAND, "demo", "--out", str(tmp_path / "demo")],
        env={**os.environ, "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "Trace"))]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert lines[0].startswith(f"error: JAX_PLATFORMS is '{platform}'")
    assert f"pip install -e '.[{extra}]', or unset JAX_PLATFORMS" in lines[0]
    assert not (tmp_path / "demo").exists()


def test_a_key_without_a_value_is_told_how_to_give_one(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", "c", "--workdir", "w", "--config.model.units", "256"])
    assert "needed --config.model.units=VALUE" in capsys.readouterr().err


def subcommands(parser):
    (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_that_states_its_default(command):
    assert_help_states_defaults(subcommands(make_parser(command))[command])


def test_every_option_of_the_server_s_commands_has_help_that_states_its_default():
    for parser in subcommands(lm_server_parser()).values():
        assert_help_states_defaults(parser)


def assert_help_states_defaults(parser):
    for option in parser._actions:
        name = f"{parser.prog} {(*option.option_strings, option.dest)[0]}"
        assert option.help, name
        if option.default not in (None, False, (), [], argparse.SUPPRESS):
            assert "default" in option.help, name
            told = option.dest in ("redis", "lm_options") or _shown(option) in option.help
            assert told, name


def _shown(option):
    """A default as help texts have it. `auto` is told by its effect, memory by its unit."""
    special = {"auto": "default", 2 * 10**9: "2G"}
    value = option.default
    if isinstance(value, list):
        return " ".join(map(str, value))
    return special.get(value, f"{value:g}" if isinstance(value, float) else str(value))
