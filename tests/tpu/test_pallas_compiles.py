"""The Pallas recurrence compiled by the TPU compiler itself, forward and backward, on four chips.

Run by `make test-tpu`, which installs the tpu extra; elsewhere there is no compiler to ask.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("libtpu", reason="needs the tpu extra: make test-tpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from b2txt_jax.model.gru.recurrence import recurrence
from b2txt_jax.model.gru.vmem import choose_blocks, core_of
from b2txt_jax.tpu.topologies import parse_topology, topology_devices
from b2txt_jax.training.ctc import ctc_loss
from b2txt_jax.training.sharding import make_mesh


def compiled(
    topology: str, frames: int, rows: int, hidden: int, dtype: jnp.dtype, shared: bool = False
) -> str:
    """The optimised program of a gradient, `rows` on each device, its mesh the surrounding one.
    `shared`: of several trials each."""
    mesh = make_mesh(devices=topology_devices(parse_topology(topology)))
    batch = rows * mesh.shape["data"]

    def shape(spec: P, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

    arguments = (
        shape(P(None, "data"), frames, batch, 3 * hidden),
        shape(P("data"), batch, hidden),
        shape(P(), 3 * hidden, hidden),
        shape(P(), 3 * hidden),
        *([shape(P(None, "data"), frames, batch)] if shared else []),
    )

    def loss(
        projected: jax.Array, h0: jax.Array, weight: jax.Array, bias: jax.Array, *marks: jax.Array
    ) -> jax.Array:
        begins = marks[0] > 0 if marks else None
        states = recurrence(projected.astype(dtype), h0, weight, bias, dtype, "auto", begins)
        return jnp.square(states.astype(jnp.float32)).sum()

    def gradient(*arguments: jax.Array) -> tuple[jax.Array, ...]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(loss, argnums=(0, 1, 2, 3))(*arguments)

    return str(jax.jit(gradient).lower(*arguments).compile().as_text())


@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1"])
@pytest.mark.parametrize(
    ("rows", "hidden", "dtype", "shared"),
    [
        (8, 256, jnp.bfloat16, False),
        (3, 130, jnp.float32, False),
        (16, 256, jnp.bfloat16, True),
        (3, 130, jnp.float32, True),
        (2, 256, jnp.bfloat16, True),
    ],
    ids=["whole tiles", "odd sizes", "whole tiles, shared", "odd sizes, shared", "few rows"],
)
def test_both_kernels_compile_and_gradients_are_summed_once(
    topology: str, rows: int, hidden: int, dtype: jnp.dtype, shared: bool
) -> None:
    program = compiled(topology, 20, rows, hidden, dtype, shared)
    kernels = re.findall(r"(gru_\w+ward)[.\d]* = [^\n]*tpu_custom_call", program)
    assert sorted(kernels) == ["gru_backward", "gru_forward"]
    collectives = re.findall(r" (all-\w+|reduce-\w+|collective-\w+)\(", program)
    assert set(collectives) == {"all-reduce"}  # gradients of weight and bias, combined
    assert "while(" not in program  # no scan is left


def test_the_published_width_compiles_in_the_smallest_memory() -> None:
    # 16 MiB of VMEM: blocks are cut to fit, or the compiler says so here.
    mesh = make_mesh(devices=topology_devices(parse_topology("v4:2x2x1")))
    assert choose_blocks(64, 768, jnp.dtype(jnp.bfloat16), core_of(mesh.abstract_mesh)) is not None
    assert "gru_backward" in compiled("v4:2x2x1", 9, 64, 768, jnp.bfloat16)


@pytest.mark.parametrize(("topology", "rows"), [("v5e:2x2", 3), ("v4:2x2x1", 64)])
def test_the_kernels_of_the_ctc_loss_compile_for_each_device_s_rows(
    topology: str, rows: int
) -> None:
    mesh = make_mesh(devices=topology_devices(parse_topology(topology)))
    batch, frames, classes, labels = rows * mesh.shape["data"], 20, 41, 500

    def shape(dtype: jnp.dtype, *sizes: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, P("data"))
        return jax.ShapeDtypeStruct((batch, *sizes), dtype, sharding=sharding)

    def gradient(logits: jax.Array, *others: jax.Array) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(lambda x: ctc_loss(x, *others).sum())(logits)

    whole = jnp.int32
    arguments = shape(jnp.float32, frames, classes), shape(whole), shape(whole, labels)
    program = jax.jit(gradient).lower(*arguments, shape(whole)).compile().as_text()
    kernels = re.findall(r"(ctc_\w+ward)[.\d]* = [^\n]*tpu_custom_call", str(program))
    assert sorted(kernels) == ["ctc_backward", "ctc_forward"]
    assert not re.findall(r" (all-\w+|reduce-scatter|collective-\w+)\(", str(program))
    assert "while(" not in str(program)
