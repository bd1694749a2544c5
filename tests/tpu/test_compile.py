"""The command's parts that need no TPU compiler: shapes, memory, step time, what is printed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from b2txt_jax.config import Config, load_config
from b2txt_jax.tpu import compile as command
from b2txt_jax.tpu.compile import CompileError
from b2txt_jax.tpu.hlo_cost import Collective, Cost, KernelRun
from b2txt_jax.tpu.kernel_cycles import SCHEDULED
from b2txt_jax.tpu.report import Memory, Result, compared, described
from b2txt_jax.tpu.roofline import StepTime, bytes_sent, step_time
from b2txt_jax.tpu.topologies import TopologyError, parse_topology
from b2txt_jax.tpu.whole_run import whole_run
from b2txt_jax.training.sharding import make_mesh
from lm_server.files.atomic_file import UnwritableError

BASELINE = Path(__file__).parents[2] / "configs/nejm_baseline.py"
NOTHING = Cost(0, 0, 0, 0, (), 0, 0, 0, 0, ())


@pytest.fixture(scope="module")
def baseline() -> Config:
    return load_config(BASELINE)


def result(cost: Cost, topology: str = "v5e:2x2", wanted: str = "scan", used: int = 1) -> Result:
    slice_ = parse_topology(topology)
    memory = Memory(10**6, 2 * 10**6, 10**5, 4 * 10**6, used, 0, 10**6, slice_.chip.hbm_bytes)
    return Result(
        topology=slice_,
        devices=slice_.devices,
        model_axis=1,
        per_device_batch=16,
        rows=64,
        bucket=(1000, 100),
        days=45,
        dtype="bfloat16",
        wanted=wanted,
        recurrence="pallas" if cost.kernels else "scan",
        compile_seconds=1.0,
        memory=memory,
        cost=cost,
        time=step_time(cost, slice_),
        steps=120_000,
    )


def test_the_configured_batch_is_shared_by_the_devices(baseline: Config) -> None:
    assert command.batch_rows(baseline, 16, None) == (64, 4)
    assert command.batch_rows(baseline, 16, 64) == (1024, 64)


def test_a_batch_that_cannot_be_shared_names_the_ways_out(baseline: Config) -> None:
    with pytest.raises(CompileError, match=r"64 rows.*256 devices.*--per-device-batch"):
        command.batch_rows(baseline, 256, None)
    with pytest.raises(CompileError, match="needed at least 1"):
        command.batch_rows(baseline, 4, 0)


def test_products_are_bfloat16_as_on_the_slice_and_not_as_on_this_machine(
    baseline: Config,
) -> None:
    assert baseline.model.dtype == "auto"
    resolved = command.as_on_tpu(baseline)
    assert resolved.model == dataclasses.replace(baseline.model, dtype="bfloat16")
    named = dataclasses.replace(baseline.model, dtype="float32", recurrence="scan")
    chosen = dataclasses.replace(baseline, model=named)
    assert command.as_on_tpu(chosen) == chosen


def test_the_bucket_is_a_middle_one_or_as_asked(baseline: Config) -> None:
    assert command.typical_bucket(baseline) in (baseline.data.buckets or ((1000, 100),))
    assert command.parse_bucket("2560x500") == (2560, 500)
    for wrong in ("2560", "x", "0x5", "axb", "10x-3"):
        with pytest.raises(CompileError, match="BINSxLABELS"):
            command.parse_bucket(wrong)


def test_without_data_shapes_are_weighed_by_lengths_like_the_recordings(baseline: Config) -> None:
    shapes, lengths = command.used_shapes(baseline, 45, 16)
    assert "like the published" in lengths
    assert sum(shapes.share.values()) == pytest.approx(1)
    assert all(shape.rows % 16 == 0 and shape.segments for shape in shapes.share)
    data = dataclasses.replace(baseline.data, packing="off")
    whole, _ = command.used_shapes(dataclasses.replace(baseline, data=data), 45, 16)
    used = {shape.bucket: share for shape, share in whole.share.items() if share}
    assert used.keys() == {(1600, 160), (2560, 500)}
    assert used[2560, 500] > 0.8


def test_hours_are_weighed_by_the_share_of_each_shape() -> None:
    cost = dataclasses.replace(NOTHING, flops=10**12)
    two = [
        dataclasses.replace(result(cost), share=0.25, trials=64),
        dataclasses.replace(
            result(dataclasses.replace(cost, flops=2 * 10**12)), share=0.75, trials=64
        ),
    ]
    (line,) = command.weighed(two)
    hours = 0.25 * two[0].hours + 0.75 * two[1].hours
    assert f"{hours:.2f} hours for 120,000 steps, 64,000 bins computed for 64 trials" in line


def test_a_whole_run_adds_validation_saves_and_compiling_to_the_steps(baseline: Config) -> None:
    cost = dataclasses.replace(NOTHING, flops=197 * 10**10)  # 10 ms
    slices = {
        name: dataclasses.replace(result(cost, name), trials=64) for name in ("v5e:2x4", "v5e:4x4")
    }
    hours = {n: {p.name: p.hours for p in whole_run([one], baseline)} for n, one in slices.items()}
    on_one_host = hours["v5e:2x4"]
    assert on_one_host["steps"] == pytest.approx(120_000 * 0.01 / 3600)
    # 60 validations of 1,426 / 64 batches at half the time of a step
    assert on_one_host["validation"] == pytest.approx(60 * 1426 / 64 * 0.5 * 0.01 / 3600)
    # 1,200 s of steps, a save a minute and not one every 10 s
    assert on_one_host["saving"] == pytest.approx(21 / 3600)
    assert on_one_host["compiling"] == pytest.approx(60 * (1 + 3) / 4 / 3600)
    assert hours["v5e:4x4"]["compiling"] == pytest.approx(60 * (1 + 3) / 3600)


def test_kernels_of_the_recurrence_count_by_their_schedule() -> None:
    def time(rows: int, topology: str = "v5e:1x1", units: int = 768) -> StepTime:
        run = KernelRun("gru_forward", 100, rows, units, times=5)
        cost = dataclasses.replace(NOTHING, kernels=5, kernel_bytes=819, recurrences=(run,))
        return step_time(cost, parse_topology(topology))

    assert time(1).kernel_cycles == time(2).kernel_cycles
    assert time(2).compiler == pytest.approx(
        500 * SCHEDULED["v5e"][min(SCHEDULED["v5e"])][0] / 1.5e9
    )
    low, high = (SCHEDULED["v5e"][rows][0] for rows in (16, 64))
    assert time(64).kernel_cycles == 500 * high
    assert 500 * low < time(40).kernel_cycles < 500 * high
    assert time(80).kernel_cycles > 500 * high
    for unknown in (time(16, units=512), time(16, "v4:2x2x1")):
        assert unknown.kernel_cycles is None
        assert unknown.compiler == pytest.approx(0, abs=1e-9)


def test_sessions_that_cannot_be_counted_ask_for_days(baseline: Config) -> None:
    assert command.session_count(baseline) == 45
    data = dataclasses.replace(baseline.data, sessions=(), root="no/such/folder")
    with pytest.raises(CompileError, match="--days N"):
        command.session_count(dataclasses.replace(baseline, data=data))


def test_held_bytes_are_those_of_one_device() -> None:
    mesh = make_mesh(1, jax.devices()[:1])
    leaf = jax.ShapeDtypeStruct((4, 3), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    assert command.held_bytes({"a": leaf, "b": leaf}) == 2 * 4 * 3 * 2


def test_step_time_is_the_larger_of_products_and_memory_plus_collectives() -> None:
    reduce = Collective("all-reduce", 4, 1, 10**9)
    cost = dataclasses.replace(
        NOTHING, flops=197 * 10**9, hbm_bytes=819 * 10**7, cycles=3 * 10**7, collectives=(reduce,)
    )
    time = step_time(cost, parse_topology("v5e:2x2"))
    assert time.compute == pytest.approx(1e-3)
    assert time.hbm == pytest.approx(1e-2)
    assert time.ici == pytest.approx(2 * 1e9 * 3 / 4 / 100e9)
    assert time.compiler == pytest.approx(3e7 / 1.5e9)
    assert time.bound == pytest.approx(time.hbm + time.ici)
    assert time.likely == pytest.approx(time.compiler + time.ici)
    assert time.limit == "interconnect"


def test_a_chip_of_two_devices_gives_each_half() -> None:
    cost = dataclasses.replace(NOTHING, flops=10**12, hbm_bytes=10**10)
    time = step_time(cost, parse_topology("tpu7x:2x2x1"))
    assert time.compute == pytest.approx(1e12 / (2307e12 / 2))
    assert time.hbm == pytest.approx(1e10 / (7380e9 / 2))
    assert time.compiler is None
    assert time.likely == time.bound


def test_kernels_count_by_their_own_bound() -> None:
    kernels = dataclasses.replace(NOTHING, kernels=10, kernel_flops=197 * 10**9)
    time = step_time(kernels, parse_topology("v5e:1x1"))
    assert time.compute == pytest.approx(1e-3)
    assert time.compiler == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-reduce", 2 * 800 * 7 / 8),
        ("all-gather", 800 * 7 / 8),
        ("reduce-scatter", 800 * 7 / 8),
        ("collective-permute", 800),
    ],
)
def test_bytes_sent_around_a_ring(kind: str, sent: float) -> None:
    assert bytes_sent(Collective(kind, 8, 1, 800)) == sent


def test_the_report_says_whether_it_fits_and_how_long_it_takes() -> None:
    cost = dataclasses.replace(NOTHING, flops=10**9, cycles=15 * 10**6, unknown_loops=("while.3",))
    text = "\n".join(described(result(cost)))
    assert "fits" in text
    assert "NOT" not in text
    assert "360,000 batches an hour" in text  # 15 million cycles at 1.5 GHz: 10 ms
    assert "0.33 hours for 120,000 steps" in text
    assert "while.3" in text
    assert "docs.cloud.google.com/tpu/docs/v5e" in text
    unknown = "\n".join(described(result(cost, topology="v6e:2x2", used=10**10)))
    assert "at most" in unknown
    assert "at least" in unknown
    assert "DOES NOT FIT" in "\n".join(described(result(cost, used=17 * 2**30)))


def test_variants_are_ranked_by_cycles_and_the_unknown_is_said() -> None:
    scan = result(dataclasses.replace(NOTHING, cycles=40 * 10**6))
    pallas = result(dataclasses.replace(NOTHING, cycles=20 * 10**6, kernels=10), wanted="pallas")
    text = "\n".join(compared([scan, pallas]))
    assert text.index("pallas") < text.index("scan")
    assert "no cycles for custom calls" in text


def test_a_program_without_the_kernels_that_were_asked_for_is_told() -> None:
    scan = dataclasses.replace(NOTHING, cycles=10**6)
    kernels = dataclasses.replace(scan, kernels=10)
    assert "caution" in "\n".join(described(result(scan, wanted="pallas")))
    for wanted, cost in (("pallas", kernels), ("scan", scan), ("auto", scan), ("auto", kernels)):
        assert "caution" not in "\n".join(described(result(cost, wanted=wanted)))


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--config", str(BASELINE), *words])
    args.overrides = []
    return args


def test_the_command_refuses_a_slice_it_does_not_know() -> None:
    with pytest.raises(TopologyError, match="v5e:4x4"):
        command.run(arguments("--topology", "v5e:5x5"))


def test_a_place_for_the_figures_that_cannot_be_written_is_told_before_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiling(*_: object, **__: object) -> None:
        pytest.fail("compiled first")

    monkeypatch.setattr(command, "compile_step", compiling)
    file = tmp_path / "file"
    file.write_text("")
    for wrong in (tmp_path, file / "out.json", Path("/proc/nowhere/out.json")):
        with pytest.raises(UnwritableError, match=rf"--json {wrong} cannot be written"):
            command.run(arguments("--topology", "v5e:2x2", "--json", str(wrong)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_the_command_says_what_to_install() -> None:
    with pytest.raises(TopologyError, match="tpu extra"):
        command.run(arguments("--topology", "v5e:4x4"))
