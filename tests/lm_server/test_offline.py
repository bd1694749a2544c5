"""`lm-server decode` from file to file."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import ROOT
from small_model import say

from lm_server import offline
from lm_server.__main__ import main
from lm_server.files.logits_file import Logits, LogitsFileError, read_logits
from lm_server.files.resumable import ResumeError, resumable
from lm_server.hypothesis import Hypothesis
from lm_server.offline import searched
from lm_server.protocol import LM_CLASSES, to_rnn_order
from lm_server.search.flashlight import BeamSearch, LanguageModel
from lm_server.settings import Settings, SettingsError, write_settings

SENTENCES = ["the cat sat", "a dog ran", "", "the bat ate the hat", "on the mat"] * 4


def write(path, sentences=SENTENCES, **changes):
    parts = [to_rnn_order(say(text.split())) for text in sentences]
    fields = {
        "logits": np.concatenate(parts),
        "frames": np.array([len(part) for part in parts], np.int32),
        "trial": np.array([f"t15.2023.08.13/trial_{i:04d}" for i in range(len(parts))]),
    }
    fields |= changes
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return fields


def run(model_folder, tmp_path, *options):
    command = ["decode", "--lm", str(model_folder), "--logits", str(tmp_path / "logits.npz")]
    return main([*command, "--out", str(tmp_path / "out.jsonl"), *options])


@pytest.mark.parametrize("workers", ["1", "3"])
def test_every_trial_is_decoded_in_order_with_its_scores(model_folder, tmp_path, workers):
    fields = write(tmp_path / "logits.npz")
    assert run(model_folder, tmp_path, "--workers", workers, "--acoustic-scale", "0.8") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["trial"] for line in lines] == fields["trial"].tolist()
    assert [line["sentence"] for line in lines] == SENTENCES

    search = BeamSearch(LanguageModel(model_folder), Settings(acoustic_scale=0.8))
    for line, text in zip(lines, SENTENCES, strict=True):
        search.step(say(text.split()))
        expected = search.finish()
        assert [one["sentence"] for one in line["nbest"]] == [h.sentence for h in expected]
        for one, h in zip(line["nbest"], expected, strict=True):
            assert set(one) == {"sentence", "acoustic", "ngram", "bonus", "llm", "total"}
            assert (one["acoustic"], one["ngram"]) == (h.acoustic, h.ngram)
            assert one["total"] == pytest.approx(0.8 * one["acoustic"] + one["ngram"])


def test_the_command_works_as_a_process_and_shows_progress(model_folder, tmp_path):
    write(tmp_path / "logits.npz")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_server", "decode", "--lm", str(model_folder)),
            *("--logits", str(tmp_path / "logits.npz"), "--out", str(tmp_path / "out.jsonl")),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "decoding" in done.stderr
    assert f"{len(SENTENCES)}/{len(SENTENCES)}" in done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(SENTENCES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits.npz", "out.jsonl"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_broken_trial_is_named_and_the_others_are_written(
    model_folder, tmp_path, capsys, workers
):
    fields = write(tmp_path / "logits.npz", SENTENCES[:5])
    logits = fields["logits"].copy()
    logits[fields["frames"][0] + 3, 7] = np.nan
    write(tmp_path / "logits.npz", SENTENCES[:5], logits=logits)
    assert run(model_folder, tmp_path, "--workers", workers) == 1
    error = capsys.readouterr().err
    assert "t15.2023.08.13/trial_0001: logits hold 1 NaN" in error
    assert "error: 1 trials could not be decoded" in error
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["trial"][-4:] for line in lines] == ["0000", "0002", "0003", "0004"]


def test_no_trials_give_an_empty_file_and_a_warning(model_folder, tmp_path, capsys):
    nothing = {"logits": np.zeros((0, 41), np.float32), "frames": np.zeros(0, np.int32)}
    write(tmp_path / "logits.npz", trial=np.array([], "U1"), **nothing)
    assert run(model_folder, tmp_path) == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
    assert "holds 0 trials" in capsys.readouterr().err


def test_an_output_that_is_no_regular_file_is_refused_and_left(model_folder, tmp_path, capsys):
    write(tmp_path / "logits.npz", ["the cat"])
    out = tmp_path / "out.jsonl"
    os.mkfifo(out)
    assert run(model_folder, tmp_path) == 2
    assert "no regular file" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="no regular file"):
        write_settings(out, Settings())
    assert out.is_fifo()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logits": None}, "has no field 'logits'"),
        ({"trial": None}, "has no field 'trial'"),
        ({"logits": np.zeros((9, 40), np.float32)}, "logits are float32 (9, 40); needed float32"),
        ({"logits": np.zeros((9, 41), np.int32)}, "logits are int32"),
        ({"frames": np.zeros(20, np.float32)}, "frames are float32"),
        ({"frames": np.full(20, -1)}, "none below 0"),
        ({"frames": np.full(20, 3, np.int32)}, "frames add up to 60, but logits have"),
        ({"trial": np.arange(20)}, "trial is int64"),
        ({"trial": np.array(["one"] * 20)}, "trial 'one' is there 20 times"),
        ({"trial": np.array(["one"])}, "trial is <U3 (1,); needed str (20,)"),
        ({"classes": np.array(LM_CLASSES)}, "classes are 41 names, 'BLANK', ' | ', 'AA' to 'ZH'"),
    ],
)
def test_a_wrong_file_is_refused_with_field_found_and_needed(
    model_folder, tmp_path, capsys, changes, reason
):
    write(tmp_path / "logits.npz", **changes)
    assert run(model_folder, tmp_path) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_missing_truncated_or_pickled_file_is_refused(model_folder, tmp_path, capsys):
    assert run(model_folder, tmp_path) == 2
    assert "there is no logits file" in capsys.readouterr().err
    write(tmp_path / "logits.npz")
    whole = (tmp_path / "logits.npz").read_bytes()
    (tmp_path / "logits.npz").write_bytes(whole[: len(whole) // 2])
    assert run(model_folder, tmp_path) == 2
    assert "is no readable .npz file" in capsys.readouterr().err
    write(tmp_path / "logits.npz", trial=np.array(["a"] * 20, object))
    assert run(model_folder, tmp_path) == 2
    assert "is no readable .npz file" in capsys.readouterr().err


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_whatever_byte_is_damaged_the_file_is_read_or_refused(tmp_path, save):
    """Nothing but the module's own error comes out, whichever part the damage hits."""
    path = tmp_path / "logits.npz"
    fields = write(path, ["the cat"])
    save(path, **fields)
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(whole)
        # The names and headers at both ends are hit as often as the data.
        spots = (len(whole), 200, -250)
        spot = generator.choice(spots)
        start = len(whole) + spot if spot < 0 else 0
        damaged[generator.randrange(start, start + abs(spot))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_logits(path)
        except LogitsFileError:
            refused += 1
    assert refused > 500


def test_a_file_of_one_array_is_refused(model_folder, tmp_path, capsys):
    np.save(tmp_path / "array.npy", np.zeros((3, 41), np.float32))
    (tmp_path / "array.npy").rename(tmp_path / "logits.npz")
    assert run(model_folder, tmp_path) == 2
    assert "holds one array, as .npy files do; needed an .npz file" in capsys.readouterr().err


def test_names_that_are_no_text_are_refused(model_folder, tmp_path, capsys):
    write(tmp_path / "logits.npz", ["the"], trial=np.array([b"\xff"]))
    assert run(model_folder, tmp_path) == 2
    assert "trial holds bytes that are not UTF-8" in capsys.readouterr().err


def test_a_folder_without_a_model_and_bad_settings_are_refused(model_folder, tmp_path, capsys):
    write(tmp_path / "logits.npz")
    assert run(tmp_path, tmp_path) == 2
    assert "is no model folder" in capsys.readouterr().err
    assert run(model_folder, tmp_path, "--blank-penalty", "-3") == 2
    assert "blank_penalty is -3.0" in capsys.readouterr().err
    assert run(model_folder, tmp_path, "--workers", "0") == 2
    assert "--workers is 0" in capsys.readouterr().err
    missing = tmp_path / "logits.npz" / "out.jsonl"
    command = ["decode", "--lm", str(model_folder), "--logits", str(tmp_path / "logits.npz")]
    assert main([*command, "--out", str(missing)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_interruption_does_not_wait_for_the_sentences_under_way():
    class Slow:
        def search(self, settings, hot_words):
            return self

        def begin(self):
            time.sleep(300)

    logits = Logits(np.zeros((8, 41), np.float32), np.arange(1, 9), tuple("abcdefgh"))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), searched(Slow(), Settings(), logits, 2):  # noqa: PT012
        time.sleep(0.5)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 120


def test_when_a_worker_is_killed_the_rest_is_decoded_all_the_same(capsys):
    here = os.getpid()

    class Killed:
        def search(self, settings, hot_words):
            return self

        def begin(self):
            pass

        def step(self, logits):
            self.said = int(logits[0].max())
            if self.said == 9 and os.getpid() != here:
                os.kill(os.getpid(), signal.SIGKILL)

        def finish(self):
            return (Hypothesis((str(self.said),), 0.0, 0.0),)

    rows = np.repeat(np.arange(20, dtype=np.float32)[:, None], 41, axis=1)
    logits = Logits(rows, np.arange(1, 21), tuple(map(str, range(20))))
    with searched(Killed(), Settings(), logits, 2) as outcomes:
        found = [(one.trial, one.hypotheses[0].sentence) for one in outcomes]
    assert found == [(str(n), str(n)) for n in range(20)]
    assert "fewer --workers" in capsys.readouterr().err


@pytest.fixture
def interrupted(model_folder, tmp_path, monkeypatch):
    """A run that ended at its eighth trial, and the trials that are searched from then on."""
    write(tmp_path / "logits.npz")
    searched, search = [], offline.decode_trial

    def ended_at_the_eighth(*arguments):
        if len(searched) == 7:
            raise KeyboardInterrupt
        searched.append(arguments[1])
        return search(*arguments)

    monkeypatch.setattr(offline, "decode_trial", ended_at_the_eighth)
    assert run(model_folder, tmp_path, "--workers", "1") == 130
    searched.clear()
    monkeypatch.setattr(offline, "decode_trial", lambda *a: searched.append(a[1]) or search(*a))
    return searched


def answers_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_written_as_they_come_and_an_interrupted_run_goes_on_from_them(
    model_folder, tmp_path, capsys, interrupted
):
    unfinished = tmp_path / "out.jsonl.unfinished"
    assert [one["sentence"] for one in answers_of(unfinished)[1:]] == SENTENCES[:7]
    assert "7 answers are in" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    with unfinished.open("ab") as file:  # as a power failure leaves it
        file.write(b'{"trial": "t15.2023.08.13/trial_0007", "sent')
    assert run(model_folder, tmp_path, "--workers", "1") == 0
    assert "resuming: 7 of 20 trials" in capsys.readouterr().err
    assert len(interrupted) == 13
    assert interrupted[0].endswith("0007")
    resumed = (tmp_path / "out.jsonl").read_text()
    assert run(model_folder, tmp_path) == 0
    assert (tmp_path / "out.jsonl").read_text() == resumed
    assert not unfinished.exists()


def test_a_run_with_other_inputs_is_not_resumed(model_folder, tmp_path, capsys, interrupted):
    assert run(model_folder, tmp_path, "--workers", "1", "--beam", "9") == 2
    assert "7 answers of an interrupted run with another beam" in capsys.readouterr().err
    write(tmp_path / "logits.npz", SENTENCES[::-1])
    assert run(model_folder, tmp_path, "--workers", "1") == 2
    assert "another --logits: repeat the command" in capsys.readouterr().err
    assert run(model_folder, tmp_path, "--workers", "1", "--restart") == 0
    assert len(interrupted) == 20
    found = [one["sentence"] for one in answers_of(tmp_path / "out.jsonl")]
    assert found == SENTENCES[::-1]


def test_a_sentence_that_was_not_rescored_is_tried_again(tmp_path):
    inputs = {"--llm": "x"}
    with resumable(tmp_path / "out", inputs) as first:
        first.add({"trial": "a", "problem": "out of memory"})
        first.add({"trial": "b", "problem": None})
    with resumable(tmp_path / "out", inputs) as second:
        assert second.done == {"b"}
        second.add({"trial": "a", "problem": None})
        second.finish(tmp_path / "out", ["a", "b", "failed"])
    assert [one["trial"] for one in answers_of(tmp_path / "out")] == ["a", "b"]


def test_two_runs_never_write_the_same_answers(tmp_path):
    with resumable(tmp_path / "out", {}), pytest.raises(ResumeError, match="another process"):
        resumable(tmp_path / "out", {}).__enter__()


def test_a_file_that_is_no_interrupted_run_is_kept(tmp_path):
    (tmp_path / "out.unfinished").write_text("[1]\n")
    with pytest.raises(ResumeError, match="is no file of an interrupted run"):
        resumable(tmp_path / "out", {}).__enter__()
    assert (tmp_path / "out.unfinished").read_text() == "[1]\n"


def test_the_time_that_is_left_is_printed_where_no_terminal_is(
    model_folder, tmp_path, capsys, monkeypatch
):
    write(tmp_path / "logits.npz")
    monkeypatch.setattr(offline, "_LINE_EVERY", 0.0)
    assert run(model_folder, tmp_path) == 0
    assert "decoding: 19 of 20, 0:00:0" in capsys.readouterr().err
