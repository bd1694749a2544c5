"""`b2txt infer` on several devices: they share the rows, and the logits are those of one."""

import os
import subprocess
import sys

import numpy as np
import pytest

from b2txt_jax.cli import main
from b2txt_jax.config import with_overrides
from b2txt_jax.training.loop import train

# Runs the command, and says which rows of each batch's features every device held.
PROGRAM = """
import sys
import jax
from b2txt_jax import cli
from b2txt_jax.inference import run

jitted = run.jit_eval_step

def spying(*arguments):
    step = jitted(*arguments)

    def spied(params, batch):
        output = step(params, batch)
        compiled = step.lower(params, batch).compile()
        (_, placed), _ = compiled.input_shardings
        held = placed.features.devices_indices_map(batch.features.shape).values()
        rows = sorted({index[0].indices(len(batch.bins))[:2] for index in held})
        print("devices", len(held), "rows", rows, flush=True)
        return output

    return spied

run.jit_eval_step = spying
sys.exit(cli.main(sys.argv[1:]))
"""


def infer(run, out, devices):
    """(arrays of the written file, what was said) by so many emulated devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "infer", "--workdir", run, "--out", out],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as file:
        return dict(file), done.stdout


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """A run of few steps, with a configured batch of 6 that 8 devices cannot share."""
    workdir = tmp_path_factory.mktemp("run")
    few = ["--config.train.steps=2", "--config.data.eval_batch_size=6"]
    train(with_overrides(tiny_config, few), workdir)
    return workdir


@pytest.mark.slow
def test_logits_of_eight_devices_are_those_of_one_and_each_has_its_rows(run, tmp_path):
    assert main(["infer", "--workdir", str(run), "--out", str(tmp_path / "one.npz")]) == 0
    with np.load(tmp_path / "one.npz") as file:
        one = dict(file)
    eight, said = infer(run, tmp_path / "eight.npz", 8)
    assert f"devices 8 rows {[(row, row + 1) for row in range(8)]}" in said
    assert eight.keys() == one.keys()
    for name in one.keys() - {"logits"}:
        np.testing.assert_array_equal(eight[name], one[name])
    assert len(one["frames"]) == 12  # all trials, whatever the batches
    np.testing.assert_allclose(eight["logits"], one["logits"], rtol=0, atol=1e-6)
