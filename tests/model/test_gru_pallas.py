"""The Pallas recurrence against the scan, by Pallas's interpreter; the choice between the two."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from b2txt_jax.errors import UserError
from b2txt_jax.model.gru.pallas import fits_vmem, gru_recurrence_pallas, plan_for
from b2txt_jax.model.gru.recurrence import recurrence
from b2txt_jax.model.gru.scan import gru_recurrence
from b2txt_jax.model.gru.vmem import (
    SMALLEST,
    VMEM_BYTES,
    Blocks,
    Core,
    choose_blocks,
    core_of,
    vmem_needed,
)

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
interpreted = functools.partial(gru_recurrence_pallas, interpret=True)


def arguments(length, batch, hidden, seed=0):
    """projected, h0, weight, bias, and a cotangent of the states."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    projected, h0 = normal(length, batch, 3 * hidden), normal(batch, hidden)
    weight, bias = normal(3 * hidden, hidden) / hidden**0.5, normal(3 * hidden)
    return (projected, h0, weight, bias), normal(length, batch, hidden)


def values_and_gradients(function, inputs, cotangent, dtype):
    """States, and gradients by all four arguments, under jit."""

    def loss(projected, h0, weight, bias):
        states = function(projected.astype(dtype), h0, weight, bias, dtype)
        return (states.astype(jnp.float32) * cotangent).sum(), states

    gradients, states = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)
    return [np.asarray(value, np.float32) for value in (states, *gradients)]


def assert_equal(ours, scan, relative):
    """Every entry within `relative` of the array's largest."""
    names = "states", "d_projected", "d_h0", "d_weight", "d_bias"
    for name, a, b in zip(names, ours, scan, strict=True):
        assert a.shape == b.shape, name
        assert np.abs(a - b).max() <= relative * np.abs(b).max(), name


def assert_equals_scan(function, sizes, dtype, relative):
    inputs, cotangent = arguments(*sizes)
    ours = values_and_gradients(function, inputs, cotangent, dtype)
    assert_equal(ours, values_and_gradients(gru_recurrence, inputs, cotangent, dtype), relative)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 5), (9, 3, 20), (16, 8, 128), (17, 9, 130)],
    ids=["one frame", "odd", "whole tiles", "one beyond"],
)
def test_float32_values_and_gradients_are_the_scans(sizes):
    assert_equals_scan(interpreted, sizes, F32, 1e-6)


@settings(max_examples=4, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24))
def test_every_size_gives_the_scans_values_and_gradients(length, batch, hidden):
    assert_equals_scan(interpreted, (length, batch, hidden), F32, 1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 5), (17, 9, 130)])
def test_bfloat16_differs_from_the_scan_by_its_own_rounding(sizes):
    # One unit in the last place of 1 is 2**-8.
    assert_equals_scan(interpreted, sizes, BF16, 2**-8)


@pytest.mark.parametrize(
    ("core", "blocks"),
    [
        (Core(vmem_needed(Blocks(16, 2), 20, F32)), Blocks(16, 2)),
        (Core(1 << 30, 2), Blocks(16, 8)),
    ],
    ids=["little memory", "two cores"],
)
def test_blocks_change_no_value(core, blocks):
    sizes = 11, 21, 20
    assert choose_blocks(21, 20, F32, core) == blocks
    assert_equals_scan(functools.partial(interpreted, core=core), sizes, F32, 1e-6)


def test_without_a_gradient_the_states_are_the_same():
    inputs, _ = arguments(10, 5, 20)
    ours = interpreted(*inputs, F32)
    np.testing.assert_allclose(ours, gru_recurrence(*inputs, F32), rtol=0, atol=1e-6)


ON_EIGHT_DEVICES = """
import functools, json, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[1])
from test_gru_pallas import F32, arguments, gru_recurrence, interpreted, values_and_gradients

inputs, cotangent = arguments(6, 24, 20)
alone = values_and_gradients(gru_recurrence, inputs, cotangent, F32)
found = {}
for name, shape in (("data", (8, 1)), ("data and model", (4, 2))):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = P(None, "data"), P("data"), P(), P(), P(None, "data")
    placed = [
        jax.device_put(value, NamedSharding(mesh, spec))
        for value, spec in zip((*inputs, cotangent), specs)
    ]

    def surrounded(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return interpreted(*args)

    def by_hand(projected, h0, weight, bias, dtype):
        return jax.shard_map(
            functools.partial(interpreted, dtype=dtype), mesh=mesh,
            in_specs=specs[:4], out_specs=specs[0], check_vma=False,
        )(projected, h0, weight, bias)

    ways = {
        "argument": functools.partial(interpreted, mesh=mesh),
        "surrounding": surrounded,
        "shard_map": by_hand,
    }
    for how in ("surrounding",) if name == "data and model" else ways:
        function = ways[how]
        ours = values_and_gradients(function, placed[:4], placed[4], F32)
        found[f"{name}, {how}"] = [
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, alone)
        ]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_eight_devices_that_share_the_rows_give_what_one_device_gives():
    # Each weight gradient summed over the devices exactly once, whoever divides the rows.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, os.path.dirname(__file__)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 4
    for case, errors in found.items():
        assert max(errors) <= 1e-6, (case, errors)


def lowered(kind, platform, hidden=128):
    """The program of a gradient, lowered for a platform that this machine need not have."""
    inputs, cotangent = arguments(3, 8, hidden) if hidden < 1000 else shapes(3, 8, hidden)

    def loss(cotangent, *inputs):
        return (recurrence(*inputs, F32, kind) * cotangent).sum()

    traced = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4))).trace(cotangent, *inputs)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def shapes(length, batch, hidden):
    sizes = (length, batch, 3 * hidden), (batch, hidden), (3 * hidden, hidden), (3 * hidden,)
    inputs = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    return inputs, jax.ShapeDtypeStruct((length, batch, hidden), jnp.float32)


@pytest.mark.parametrize(
    ("kind", "platform", "kernels"),
    [("auto", "tpu", 2), ("auto", "cpu", 0), ("pallas", "tpu", 2), ("scan", "tpu", 0)],
)
def test_the_platform_compiled_for_chooses(kind, platform, kernels):
    assert lowered(kind, platform).count("@tpu_custom_call") == kernels


def test_auto_takes_the_scan_when_the_weight_does_not_fit():
    assert "@tpu_custom_call" not in lowered("auto", "tpu", hidden=7168)


def test_auto_on_a_cpu_is_the_scan_to_the_bit_and_in_memory():
    inputs, cotangent = arguments(30, 4, 20)

    def program(function):
        def loss(*inputs):
            return (function(*inputs, F32) * cotangent).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*inputs).compile()

    auto, scan = program(recurrence), program(gru_recurrence)
    for a, b in zip(jax.tree.leaves(auto(*inputs)), jax.tree.leaves(scan(*inputs)), strict=True):
        np.testing.assert_array_equal(a, b)
    bytes_of = [p.memory_analysis().temp_size_in_bytes for p in (auto, scan)]
    assert bytes_of[0] == bytes_of[1]


def test_pallas_off_a_tpu_runs_by_the_interpreter():
    inputs, _ = arguments(3, 2, 20)
    ours = jax.jit(lambda *inputs: recurrence(*inputs, F32, "pallas"))(*inputs)
    np.testing.assert_allclose(ours, gru_recurrence(*inputs, F32), rtol=0, atol=1e-6)


def test_the_published_width_fits_every_chip():
    for dtype in (BF16, F32):
        for batch in (1, 8, 64, 1024):
            assert fits_vmem(batch, 768, dtype, min(VMEM_BYTES.values())), (dtype, batch)
    assert not fits_vmem(1, 7168, BF16, max(VMEM_BYTES.values()))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_chosen_blocks_cover_the_batch_and_fit(dtype):
    for batch in (1, 7, 8, 33, 64, 500):
        for core in (SMALLEST, Core(64 << 20, 2), Core(128 << 20)):
            blocks = choose_blocks(batch, 768, dtype, core)
            assert blocks is not None
            unit = batch if batch <= 8 else 8 * 4 // dtype.itemsize
            assert blocks.rows % unit == 0
            assert vmem_needed(blocks, 768, dtype) <= core.vmem_bytes


@pytest.mark.parametrize(
    ("kind", "chip", "cores"),
    [
        ("TPU v4", pltpu.ChipVersion.TPU_V4, 2),
        ("TPU v5", pltpu.ChipVersion.TPU_V5P, 2),
        ("TPU v5 lite", pltpu.ChipVersion.TPU_V5E, 1),
        ("TPU v6 lite", pltpu.ChipVersion.TPU_V6E, 1),
        ("TPU7x", pltpu.ChipVersion.TPU_7X, 1),
    ],
)
def test_the_meshs_chip_is_known_without_having_one(kind, chip, cores):
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
    mesh = AbstractMesh((4,), ("data",), (AxisType.Auto,), abstract_device=device)
    expected = pltpu.get_tpu_info_for_chip(chip, cores)
    assert core_of(mesh) == Core(expected.vmem_capacity_bytes, cores)


def test_an_unknown_device_counts_as_the_smallest_chip():
    assert core_of(None) == SMALLEST  # tests run on a CPU


def test_rows_that_devices_cannot_share_are_refused():
    mesh = AbstractMesh((8,), ("data",), (AxisType.Auto,))
    with pytest.raises(UserError, match="20 rows for 8 devices"):
        plan_for(20, 128, F32, mesh=mesh)


def test_a_weight_beyond_vmem_is_refused_with_the_sizes():
    with pytest.raises(UserError, match=r"7168 units in bfloat16 needs 3\d\d MiB .* has 16"):
        plan_for(8, 7168, BF16)


def test_an_unknown_kind_is_refused():
    inputs, _ = arguments(1, 1, 4)
    with pytest.raises(UserError, match="'fast'; needed one of auto, scan, pallas"):
        recurrence(*inputs, F32, "fast")
