"""The demo as a newcomer runs it: what it promises, and that a second call keeps what is done."""

import json
import re
import subprocess
import sys
import time

import pytest

from b2txt_jax.data.reader import open_folder
from b2txt_jax.simulation.corpus import language_model_text
from lm_server.lexicon.text_rules import normalise

COMMAND = [sys.executable, "-m", "b2txt_jax.cli", "demo"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    subprocess.run([*COMMAND, "--out", str(folder)], check=True, timeout=1800)
    return folder


def test_the_demo_decodes_held_out_sentences_and_says_how_well(out):
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {
        "val_per",
        "wer_greedy",
        "wer_1gram",
        "wer_3gram",
        "train_seconds",
        "decode_seconds_per_sentence",
        "steps",
    }
    assert summary["val_per"] <= 0.15
    assert summary["wer_3gram"] <= 0.12
    assert summary["wer_3gram"] <= 0.5 * summary["wer_1gram"]
    assert summary["wer_1gram"] < summary["wer_greedy"]
    report = (out / "report.html").read_text()
    assert report.count('<img src="data:image/') >= 4
    assert "http://" not in report
    assert "https://" not in report

    root = out / "data" / "hdf5_data_final"
    text = set((out / "data" / "language_model_text.txt").read_text().splitlines())
    assert text == set(language_model_text())
    reader = open_folder(root)
    for ref in reader.trials(reader.sessions, "val"):
        assert normalise(reader.read(ref).sentence or "") not in text

    started = time.monotonic()
    subprocess.run([*COMMAND, "--out", str(out)], check=True, timeout=600)
    assert time.monotonic() - started < 0.5 * summary["train_seconds"]
    assert json.loads((out / "summary.json").read_text())["wer_3gram"] == summary["wer_3gram"]


def test_the_live_demo_ends_by_itself_and_a_calibrated_day_has_fewer_wrong_words(out):
    command = [*COMMAND, "--out", str(out), "--live", "--view", "0"]
    found = subprocess.run(command, check=True, timeout=900, capture_output=True, text=True).stdout
    before, after = map(float, re.findall(r"8 sentences; WER ([0-9.]+) %", found))
    assert after < before
    assert re.search(r"the page is at http://127\.0\.0\.1:\d+/", found)
    report = json.loads((out / "live" / "run" / "calibration.json").read_text())
    assert report["per"]["after"] < 0.6 * report["per"]["before"]
