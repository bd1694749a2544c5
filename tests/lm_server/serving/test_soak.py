"""The soak test, short; docs/reliability.md has the long one's figures."""

import json
import subprocess
import sys

from processes import ROOT


def test_eight_faults_in_two_hundred_sentences_lose_and_double_nothing(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "scripts/soak.py", "--out", str(tmp_path)),
            *("--sentences", "200", "--faults", "8"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "soak.json").read_text())
    assert told["sentences"] >= 200
    # The last one does not take place if the sentences end before it.
    assert told["injected faults"] >= 7
    assert {"worker killed", "Redis killed", "wrong shape", "NaN"} <= set(told["faults"])
    for what in ("lost answers", "duplicated answers", "wrong answers", "refusals lost"):
        assert told[what] == 0, what
    assert told["jobs taken over from killed workers"] == told["faults"]["worker killed"]
    assert "| lost answers | 0 |" in (tmp_path / "soak.md").read_text()
