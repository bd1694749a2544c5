"""The demo as a newcomer runs it: what it promises, and that a second call keeps what is done."""

import json
import subprocess
import sys
import time

from b2txt_jax.data.reader import open_folder
from b2txt_jax.simulation.corpus import language_model_text
from lm_server.lexicon.text_rules import normalise

COMMAND = [sys.executable, "-m", "b2txt_jax.cli", "demo"]


def test_the_demo_decodes_held_out_sentences_and_says_how_well(tmp_path):
    out = tmp_path / "demo"
    subprocess.run([*COMMAND, "--out", str(out)], check=True, timeout=1800)
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
