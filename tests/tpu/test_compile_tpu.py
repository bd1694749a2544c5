"""A small recipe's training step compiled by the TPU compiler itself, for slices of two chips.

Run by `make test-tpu`, which installs the tpu extra; elsewhere there is no compiler to ask.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("libtpu", reason="needs the tpu extra: make test-tpu")

from b2txt_jax.config import Config, load_config, with_overrides
from b2txt_jax.model.interface import parameter_count
from b2txt_jax.tpu import compile as command
from b2txt_jax.tpu.compile import CompileError, compile_step
from b2txt_jax.tpu.report import Result
from b2txt_jax.tpu.topologies import parse_topology, topology_devices
from b2txt_jax.training.sharding import abstract_state

BASELINE = Path(__file__).parents[2] / "configs/nejm_baseline.py"
DAYS, BUCKET, ROWS = 3, (122, 20), 16
UNITS, LAYERS = 128, 2
FRAMES = (BUCKET[0] - 14) // 4 + 1


@pytest.fixture(scope="module")
def small() -> Config:
    config = load_config(BASELINE)
    model = dataclasses.replace(config.model, units=UNITS, layers=LAYERS, recurrence="scan")
    return dataclasses.replace(config, model=model)


def step(config: Config, topology: str, model_axis: int = 1) -> Result:
    return compile_step(
        config,
        parse_topology(topology),
        days=DAYS,
        bucket=BUCKET,
        per_device_batch=ROWS,
        model_axis=model_axis,
    )


@pytest.fixture(scope="module")
def on_v5e(small: Config) -> Result:
    return step(small, "v5e:2x2")


@pytest.fixture(scope="module")
def on_v4(small: Config) -> Result:
    """Large parameters shared by two devices, and the recurrence as a configuration has it."""
    model = dataclasses.replace(small.model, recurrence="auto")
    return step(dataclasses.replace(small, model=model), "v4:2x2x1", model_axis=2)


def products(rows: int) -> int:
    """FLOPs of the matrix products, forward and backward, by hand."""
    features, patch, classes = 512, 14, 41
    # Nothing asks for the gradient of the features, so that the first layer has two products.
    day = 2 * rows * BUCKET[0] * features * features
    gates = 3 * UNITS
    first = 3 * rows * FRAMES * patch * features * gates
    others = 3 * (LAYERS - 1) * rows * FRAMES * UNITS * gates
    recurrent = 3 * LAYERS * rows * FRAMES * UNITS * gates
    head = 3 * rows * FRAMES * UNITS * classes
    # The CTC loss spreads log-probabilities to states and gathers posteriors by one-hot products.
    ctc = 2 * rows * FRAMES * classes * (2 * BUCKET[1] + 1)
    return 2 * (day + first + others + recurrent + head + ctc)


def test_the_triple_gru_compiles_with_its_noise_model_shared_by_devices(small: Config) -> None:
    changes = {"name": "triple_gru", "noise_units": 256, "noisy_layers": 1, "recompute_frames": 8}
    triple = with_overrides(small, [f"--config.model.{k}={v}" for k, v in changes.items()])
    found = step(triple, "v5e:2x2", model_axis=2)
    assert found.memory.fits
    gathers = [one for one in found.cost.collectives if one.kind == "all-gather" and one.group == 2]
    # The noise model's state is gathered in every frame, so that no device needs all its units.
    assert sum(one.count for one in gathers) >= 2 * FRAMES


def test_every_slice_that_is_listed_can_be_compiled_for() -> None:
    for name in ("v4:4x4x4", "v5e:1x1", "v5e:16x16", "v5p:4x8x8", "v6e:4x8", "tpu7x:2x2x2"):
        topology = parse_topology(name)
        assert len(topology_devices(topology)) == topology.devices


def test_the_step_fits_and_holds_parameters_and_its_share_of_two_moments(
    small: Config, on_v5e: Result
) -> None:
    memory = on_v5e.memory
    assert memory.fits
    count = parameter_count(abstract_state(small, DAYS).params)
    assert memory.parameters == 4 * count
    assert memory.optimizer == pytest.approx(2 * memory.parameters / 4, rel=0.03)
    held = memory.parameters + memory.optimizer + memory.batch
    assert held <= memory.arguments < 1.5 * held
    assert memory.outputs < 10_000  # the state takes the place of the old one


def test_flops_are_those_counted_by_hand(on_v5e: Result) -> None:
    assert on_v5e.cost.unknown_loops == ()
    assert on_v5e.cost.flops == products(ROWS)


def test_every_gradient_is_summed_over_the_devices_once_and_in_float32(on_v5e: Result) -> None:
    reduced = sum(c.bytes for c in on_v5e.cost.collectives if c.kind == "all-reduce")
    assert on_v5e.memory.parameters <= reduced < 1.02 * on_v5e.memory.parameters
    assert {c.group for c in on_v5e.cost.collectives if c.kind == "all-reduce"} == {4}


def test_loops_and_cycles_are_seen(on_v5e: Result) -> None:
    assert 0 < on_v5e.cost.loop_cycles < on_v5e.cost.cycles
    assert on_v5e.time.compiler is not None
    assert on_v5e.time.likely >= on_v5e.time.bound > 0


def test_the_model_axis_shares_the_day_layers(on_v5e: Result, on_v4: Result) -> None:
    assert on_v4.devices == 4
    assert on_v4.rows == 2 * ROWS
    day = 4 * DAYS * (512 * 512 + 512)
    assert on_v5e.memory.parameters - on_v4.memory.parameters == day // 2
    assert on_v4.memory.fits


def test_auto_takes_the_kernels_on_a_tpu_and_they_declare_their_products(
    on_v5e: Result, on_v4: Result
) -> None:
    assert (on_v5e.recurrence, on_v5e.cost.kernels) == ("scan", 2)  # those of the CTC loss
    assert on_v4.recurrence == "pallas"
    assert on_v4.cost.kernels == 2 * (LAYERS + 1)  # forward and backward
    assert on_v4.cost.undeclared_kernels == 0
    frame = 2 * ROWS * UNITS * 3 * UNITS
    ctc = 2 * 10 * FRAMES * ROWS * 128  # 41 states, padded
    assert on_v4.cost.kernel_flops == 2 * LAYERS * FRAMES * frame + ctc


def test_too_large_a_step_is_refused_with_what_to_change(small: Config) -> None:
    with pytest.raises(CompileError, match=r"does not fit v5e:2x2 with 60000 rows.*batch"):
        compile_step(
            small, parse_topology("v5e:2x2"), days=DAYS, bucket=BUCKET, per_device_batch=60_000
        )


def test_the_command_prints_the_verdict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = f"--topology v5e:2x2 --config {BASELINE} --days 2 --bucket 62x8 --json"
    args = parser.parse_args([*words.split(), str(tmp_path / "out.json")])
    args.overrides = [
        "--config.model.units=128",
        "--config.model.layers=1",
        "--config.data.sessions=('a','b')",
    ]
    assert command.run(args) == 0
    printed = capsys.readouterr().out
    assert "fits" in printed
    assert "hours for 120,000 steps" in printed
    assert "by 4 kernel runs" in printed  # recurrence and CTC, forward and backward
    assert '"fits": true' in (tmp_path / "out.json").read_text()
