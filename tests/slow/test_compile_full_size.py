"""The published recipe at full size, compiled by the TPU compiler for slices that people rent.

Run by `make test-slow`, which installs the tpu extra; elsewhere there is no compiler to ask.
"""

import json
import time

import pytest

pytest.importorskip("libtpu", reason="needs the tpu extra: make test-slow installs it")

from b2txt_jax import cli

PARAMETERS = 44_315_177
"""Of the published model, with its 45 day layers."""

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize(("topology", "devices"), [("v5e:4x4", 16), ("v6e:2x4", 8)])
def test_the_baseline_fits_and_sums_every_gradient_in_float32(topology, devices, tmp_path, capfd):
    out = tmp_path / "figures.json"
    started = time.monotonic()
    words = f"compile --topology {topology} --config configs/nejm_baseline.py --json {out}"
    status = cli.main(words.split())
    seconds = time.monotonic() - started
    said = capfd.readouterr().out
    assert status == 0, said
    with capfd.disabled():
        print(f"\n{topology}: compiled in {seconds:.0f} s\n{said}")
    assert "fits" in said
    assert "NOT FIT" not in said
    [figures] = json.loads(out.read_text())
    assert figures["devices"] == devices
    assert figures["memory"]["fits"]
    assert figures["memory"]["total"] < figures["memory"]["capacity"]
    assert figures["memory"]["parameters"] == 4 * PARAMETERS
    assert figures["memory"]["optimizer"] == pytest.approx(8 * PARAMETERS, rel=1e-3)
    reduced = [c for c in figures["cost"]["collectives"] if c["kind"] == "all-reduce"]
    total = sum(c["bytes"] for c in reduced)
    assert 4 * PARAMETERS <= total < 1.02 * 4 * PARAMETERS  # 177 MB: float32, each once
    assert {c["group"] for c in reduced} == {devices}
    assert figures["cost"]["unknown_loops"] == []
    assert figures["time"]["likely"] > 0
