"""The whole CMU dictionary in memory: size, speed and answers, measured in a fresh process."""

import json
import subprocess
import sys

import pytest
from processes import ROOT
from rich.console import Console
from small_model import TEXT

from lm_server.lm.build import build

MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np
from lm_server.search.flashlight import BeamSearch, LanguageModel
from lm_server.settings import Settings
from lm_server.protocol import LM_CLASSES, SILENCE

model = LanguageModel(Path(sys.argv[1]))
said = {"the": "DH AH", "cat": "K AE T", "saw": "S AO", "aardvark": "AA R D V AA R K"}
said["saxophone"] = "S AE K S AH F OW N"
words = ["the", "saxophone", "saw", "the", "aardvark"]
classes = [name for word in words for name in [*said[word].split(), SILENCE]]
rows = [i for name in classes for i in (LM_CLASSES.index(name), LM_CLASSES.index(name), 0, 0)]
logits = np.random.default_rng(0).normal(0, 1, (len(rows), 41)).astype(np.float32)
logits[np.arange(len(rows)), rows] += 7
search = BeamSearch(model, Settings())
started = time.process_time()
for _ in range(10):
    search.step(logits)
    best = search.finish()[0].sentence
seconds = (time.process_time() - started) / 10
# Not getrusage's ru_maxrss: a child inherits there what the process that started it had used.
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"words": len(model.words), "best": best, "seconds": seconds, "megabytes": peak}))
"""


@pytest.mark.slow
def test_the_whole_dictionary_decodes_fast_and_within_400_megabytes(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 20)
    build([tmp_path / "text.txt"], 2, "cmudict", tmp_path / "lm", Console(quiet=True))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "lm")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["words"] >= 120_000
    # Words that the text lacks ("saxophone", "aardvark") are recognised too.
    assert measured["best"] == "the saxophone saw the aardvark"
    assert measured["megabytes"] < 400
    assert measured["seconds"] < 1  # a budget of 0.25 s a sentence, on a busy machine
