"""The GRU recurrence as two Pallas TPU kernels, forward and backward: equations of scan.py.

A `lax.scan` reads the recurrent weight from HBM once per frame. Here it stays in VMEM: time is the
sequential axis of the grid, the state (backward: its cotangent) is carried in VMEM scratch, and
the frames' inputs and results stream past in blocks. The forward kernel saves the gates. The
backward kernel runs in reverse and returns the cotangents of both projections. The weight's
gradient is one matrix product over all frames, outside.

Rows of a batch are independent, so the kernels run on each device's rows under `shard_map`.
Everything that sums over rows (gradients of weight and bias) stays outside: the partitioner sums it
over the devices exactly once, and no shard_map is differentiated.

Sizes that do not fill a tile (hidden units in 128s, more than 8 rows in 8s or 16s) are padded with
zeros, which is exact: a padded unit starts at 0, stays 0 (z = 1/2, n = 0) and has no weight to the
others. Fewer rows stay as they are: what surrounds the kernels would grow severalfold. The last
block of frames is cut short by the loop over its frames, not padded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from b2txt_jax.errors import UserError
from b2txt_jax.model.gru.vmem import LANES, Blocks, Core, choose_blocks, core_of, up, vmem_needed
from b2txt_jax.model.gru.vmem import fits_vmem as fits_vmem
from b2txt_jax.model.mesh import data_devices, devices_mesh
from b2txt_jax.model.product import over_rows

# ------------------------------------------------------------------------------------- kernels


def _split(values: jax.Array, parts: int) -> list[jax.Array]:
    width = values.shape[-1] // parts
    return [values[..., i * width : (i + 1) * width] for i in range(parts)]


def _forward_kernel(
    projected: Any,
    h0: Any,
    weight_t: Any,
    bias: Any,
    *refs: Any,
    length: int,
    save: bool,
    shared: bool,
) -> None:
    """Compute one block: projected [F, R, 3H], h0 [R, H], weight_t [H, 3H], bias [1, 3H], and with
    `shared` where trials begin [F, R, 1] -> states [F, R, H], and with `save` the states before
    [F, R, H] and r, z, n, W_hn h + b_hn side by side [F, R, 4H]."""
    begins, refs = (refs[0], refs[1:]) if shared else (None, refs)
    states, *saved, carry = refs
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        carry[...] = h0[...]

    def frame(k: jax.Array, _: None) -> None:
        h = carry[...]
        if begins is not None:
            h = jnp.where(begins[k] > 0, h0[...], h)
        gates = jnp.dot(h.astype(weight_t.dtype), weight_t[...], preferred_element_type=jnp.float32)
        h_r, h_z, h_n = _split(gates + bias[...], 3)
        x_r, x_z, x_n = _split(projected[k].astype(jnp.float32), 3)
        r = jax.nn.sigmoid(x_r + h_r)
        z = jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
        after = (1 - z) * n + z * h
        carry[...] = after
        states[k] = after.astype(states.dtype)
        if save:
            before, gates = saved
            before[k] = h.astype(states.dtype)
            gates[k] = jnp.concatenate([r, z, n, h_n], axis=-1).astype(states.dtype)

    frames = jnp.minimum(projected.shape[0], length - block * projected.shape[0])
    jax.lax.fori_loop(0, frames, frame, None)


def _backward_kernel(
    d_states: Any,
    before: Any,
    gates: Any,
    weight: Any,
    *refs: Any,
    length: int,
    shared: bool,
) -> None:
    """Compute one block, last first: cotangent of each state and the state before [F, R, H], saved
    gates [F, R, 4H], weight [3H, H], and with `shared` where trials begin [F, R, 1] -> cotangents
    of the input projection [F, R, 3H], of the recurrent one where it differs, in W_hn h + b_hn
    [F, R, H], of bias by eighths of the rows [8, 3H], of h0 [R, H]."""
    begins, refs = (refs[0], refs[1:]) if shared else (None, refs)
    d_projected, d_new, d_bias, d_h0, carry = refs
    step, size = pl.program_id(1), d_states.shape[0]
    block = pl.num_programs(1) - 1 - step
    dtype = d_projected.dtype

    @pl.when(step == 0)
    def _() -> None:
        carry[...] = jnp.zeros_like(carry)
        d_bias[...] = jnp.zeros_like(d_bias)
        d_h0[...] = jnp.zeros_like(d_h0)

    frames = jnp.minimum(size, length - block * size)

    def frame(done: jax.Array, _: None) -> None:
        k = frames - 1 - done
        h = before[k].astype(jnp.float32)
        r, z, n, h_n = _split(gates[k].astype(jnp.float32), 4)
        d_h = carry[...] + d_states[k].astype(jnp.float32)
        d_n = d_h * (1 - z) * (1 - n * n)
        d_z = d_h * (h - n) * z * (1 - z)
        d_r = d_n * h_n * r * (1 - r)
        d_projected[k] = jnp.concatenate([d_r, d_z, d_n], axis=-1).astype(dtype)
        exact = jnp.concatenate([d_r, d_z, d_n * r], axis=-1)
        if exact.shape[0] < 8:
            d_bias[: exact.shape[0]] += exact
        else:
            d_bias[...] += exact.reshape(-1, 8, exact.shape[-1]).sum(0)
        both = exact.astype(dtype)
        d_new[k] = both[..., -h.shape[-1] :]
        d_before = d_h * z + jnp.dot(both, weight[...], preferred_element_type=jnp.float32)
        if begins is not None:
            first = begins[k] > 0
            d_h0[...] += jnp.where(first, d_before, 0.0)
            d_before = jnp.where(first, 0.0, d_before)
        carry[...] = d_before

    jax.lax.fori_loop(0, frames, frame, None)

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        d_h0[...] += carry[...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Choices made while tracing. Hashable."""

    dtype: jnp.dtype
    blocks: Blocks
    mesh: AbstractMesh | Mesh | None
    interpret: bool


def _call(
    kernel: Callable[..., None],
    plan: Plan,
    shapes: tuple[int, int, int],
    arrays: list[tuple[jax.Array, str]],
    results: list[tuple[int, Any, str]],
    *,
    reverse: bool,
) -> list[jax.Array]:
    """Run a kernel over (blocks of rows, blocks of frames).

    Args:
      kernel: takes a reference per array, per result, and the carried state.
      plan: blocks, dtype.
      shapes: frames, padded rows, padded hidden units.
      arrays: each with its layout: 'stream' [P, B, .], 'rows' [B, .], 'parts' [8 per block of
        rows, .] or 'whole'.
      results: width, dtype and layout of each.
      reverse: last block of frames first.
    """
    length, batch, hidden = shapes
    rows, frames = plan.blocks.rows, min(plan.blocks.frames, length)
    steps = pl.cdiv(length, frames)

    def at(step: Any) -> Any:
        return steps - 1 - step if reverse else step

    def spec(width: int, layout: str, height: int) -> pl.BlockSpec:
        if layout == "stream":
            return pl.BlockSpec((frames, rows, width), lambda b, t: (at(t), b, 0))
        if layout == "rows":
            return pl.BlockSpec((rows, width), lambda b, t: (b, 0))
        if layout == "parts":
            return pl.BlockSpec((8, width), lambda b, t: (b, 0))
        # One buffer: it never changes, so there is nothing to fetch meanwhile.
        once = pl.Buffered(buffer_count=1)
        return pl.BlockSpec((height, width), lambda b, t: (0, 0), pipeline_mode=once)

    shape_of = {"stream": (length, batch), "rows": (batch,), "parts": (8 * batch // rows,)}
    out_shape = [jax.ShapeDtypeStruct((*shape_of[at_], w), d) for w, d, at_ in results]
    streamed = sum(a.size * a.dtype.itemsize for a, _ in arrays)
    streamed += sum(s.size * s.dtype.itemsize for s in out_shape)
    outputs: list[jax.Array] = pl.pallas_call(
        kernel,
        grid=(batch // rows, steps),
        in_specs=[spec(a.shape[-1], layout, a.shape[-2]) for a, layout in arrays],
        out_specs=[spec(width, layout, 0) for width, _, layout in results],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((rows, hidden), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_needed(plan.blocks, hidden, plan.dtype),
        ),
        cost_estimate=pl.CostEstimate(
            # A product of few rows takes as long as one of a tile: its weight is loaded as often.
            flops=6 * length * up(batch, 16) * hidden * hidden,
            transcendentals=0 if reverse else 3 * length * batch * hidden,
            bytes_accessed=streamed,
        ),
        interpret=plan.interpret,
        name="gru_backward" if reverse else "gru_forward",
    )(*(a for a, _ in arrays))
    return outputs


# ------------------------------------------------------------------- padding and the batch axis


def _pad_gates(values: jax.Array, parts: int, width: int) -> jax.Array:
    """Put zeros after each part: [..., parts * H] -> [..., parts * width]."""
    hidden = values.shape[-1] // parts
    if hidden == width:
        return values
    apart = values.reshape(*values.shape[:-1], parts, hidden)
    apart = jnp.pad(apart, [(0, 0)] * (apart.ndim - 1) + [(0, width - hidden)])
    return apart.reshape(*values.shape[:-1], parts * width)


def _cut_gates(values: jax.Array, parts: int, hidden: int) -> jax.Array:
    """Undo _pad_gates."""
    width = values.shape[-1] // parts
    if hidden == width:
        return values
    apart = values.reshape(*values.shape[:-1], parts, width)[..., :hidden]
    return apart.reshape(*values.shape[:-1], parts * hidden)


def _pad_rows(values: jax.Array, rows: int, axis: int) -> jax.Array:
    missing = -values.shape[axis] % rows
    if not missing:
        return values
    return jnp.pad(values, [(0, missing if i == axis else 0) for i in range(values.ndim)])


def _pad_weight(weight: jax.Array, width: int, dtype: jnp.dtype) -> jax.Array:
    """Pad a weight: [3H, H] -> [3 width, width] of `dtype`."""
    return _pad_gates(_pad_gates(weight.astype(dtype), 1, width).T, 3, width).T


def _marks(begins: jax.Array | None, rows: int) -> list[tuple[jax.Array, str]]:
    """Return where trials begin as an array of a kernel, float32 [P, B, 1], if it needs one."""
    if begins is None:
        return []
    return [(_pad_rows(begins.astype(jnp.float32)[..., None], rows, 1), "stream")]


def _rows_forward(
    projected: jax.Array,
    h0: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    begins: jax.Array | None = None,
    *,
    plan: Plan,
    save: bool,
) -> tuple[jax.Array, ...]:
    """Run one device's rows forward: states [P, B, H] and, with `save`, the states before, and
    padded gates [P, B', 4H']."""
    length, batch, hidden = *projected.shape[:2], h0.shape[-1]
    width, rows = up(hidden, LANES), plan.blocks.rows
    arrays = [
        (_pad_rows(_pad_gates(projected.astype(plan.dtype), 3, width), rows, 1), "stream"),
        (_pad_rows(_pad_gates(h0.astype(jnp.float32), 1, width), rows, 0), "rows"),
        (_pad_weight(weight, width, plan.dtype).T, "whole"),
        (_pad_gates(bias.astype(jnp.float32), 3, width)[None], "whole"),
        *_marks(begins, rows),
    ]
    results: list[tuple[int, Any, str]] = [(width, plan.dtype, "stream")]
    if save:
        results += [(width, plan.dtype, "stream"), (4 * width, plan.dtype, "stream")]
    kernel = functools.partial(_forward_kernel, length=length, save=save, shared=begins is not None)
    shapes = length, up(batch, rows), width
    *states, last = _call(kernel, plan, shapes, arrays, results, reverse=False)
    if not save:
        return (last[:, :batch, :hidden],)
    return *(value[:, :batch, :hidden] for value in states), last


def _rows_backward(
    d_states: jax.Array,
    before: jax.Array,
    gates: jax.Array,
    weight: jax.Array,
    begins: jax.Array | None = None,
    *,
    plan: Plan,
) -> tuple[jax.Array, ...]:
    """Run one device's rows backward: cotangents of the input projection [P, B, 3H], of W_hn h +
    b_hn [P, B, H], of bias in parts [_, 3H], of h0 [B, H]."""
    length, batch, hidden = before.shape
    width, rows = up(hidden, LANES), plan.blocks.rows
    arrays = [
        (_pad_rows(_pad_gates(d_states, 1, width), rows, 1), "stream"),
        (_pad_rows(_pad_gates(before, 1, width), rows, 1), "stream"),
        (gates, "stream"),
        (_pad_weight(weight, width, plan.dtype), "whole"),
        *_marks(begins, rows),
    ]
    results = [
        (3 * width, plan.dtype, "stream"),
        (width, plan.dtype, "stream"),
        (3 * width, jnp.float32, "parts"),
        (width, jnp.float32, "rows"),
    ]
    kernel = functools.partial(_backward_kernel, length=length, shared=begins is not None)
    shapes = length, up(batch, rows), width
    d_projected, d_new, d_bias, d_h0 = _call(kernel, plan, shapes, arrays, results, reverse=True)
    return (
        _cut_gates(d_projected[:, :batch], 3, hidden),
        d_new[:, :batch, :hidden],
        _cut_gates(d_bias, 3, hidden),
        d_h0[:batch, :hidden],
    )


def _over_rows(
    function: Callable[..., tuple[jax.Array, ...]], plan: Plan, inputs: str, outputs: str
) -> Callable[..., tuple[jax.Array, ...]]:
    """Return `function` on each device's rows: the axis "data" is axis 1 at 'stream' (s), axis 0 at
    'rows' (r), and 'whole' (w) is on every device. Nothing in it sums over rows, and it is never
    differentiated."""
    if plan.mesh is None:
        return function
    data = "data" if "data" in plan.mesh.axis_names else None
    specs = {"s": P(None, data), "r": P(data), "w": P()}
    mapped: Callable[..., tuple[jax.Array, ...]] = jax.shard_map(
        function,
        mesh=plan.mesh,
        in_specs=tuple(specs[kind] for kind in inputs),
        out_specs=tuple(specs[kind] for kind in outputs),
        check_vma=False,
    )
    return mapped


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _recurrence(
    projected: jax.Array,
    h0: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    plan: Plan,
    begins: jax.Array | None,
) -> jax.Array:
    function = functools.partial(_rows_forward, plan=plan, save=False)
    return _over_rows(function, plan, "srwws", "s")(projected, h0, weight, bias, begins)[0]


def _forward(
    projected: jax.Array,
    h0: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    plan: Plan,
    begins: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    function = functools.partial(_rows_forward, plan=plan, save=True)
    states, before, gates = _over_rows(function, plan, "srwws", "sss")(
        projected, h0, weight, bias, begins
    )
    return states, (before, gates, weight, projected[:0], begins)


def _backward(
    plan: Plan, kept: tuple[Any, ...], d_states: jax.Array
) -> tuple[jax.Array | None, ...]:
    before, gates, weight, projected_like, begins = kept
    hidden = before.shape[-1]
    function = functools.partial(_rows_backward, plan=plan)
    d_projected, d_new, d_bias, d_h0 = _over_rows(function, plan, "sssws", "ssrr")(
        d_states, before, gates, weight, begins
    )
    d_weight = jnp.concatenate(
        [
            over_rows("pbk,pbh->kh", d_projected[..., : 2 * hidden], before, plan.dtype),
            over_rows("pbk,pbh->kh", d_new, before, plan.dtype),
        ]
    )
    return d_projected.astype(projected_like.dtype), d_h0, d_weight, d_bias.sum(0), None


_recurrence.defvjp(_forward, _backward)


def plan_for(
    batch: int,
    hidden: int,
    dtype: jnp.dtype,
    *,
    mesh: AbstractMesh | Mesh | None = None,
    core: Core | None = None,
    interpret: bool = False,
) -> Plan:
    """Return blocks for `batch` rows over all devices of `mesh`.

    Raises:
      UserError: the weight does not fit VMEM, or the rows cannot be divided over the devices.
    """
    mesh = devices_mesh(mesh)
    core = core or core_of(mesh or jax.sharding.get_abstract_mesh())
    devices = data_devices(mesh)
    if batch % devices:
        raise UserError(
            f"the Pallas recurrence got {batch} rows for {devices} devices on the mesh's axis "
            '"data"; give a multiple, or set model.recurrence to "scan"'
        )
    blocks = choose_blocks(batch // devices, hidden, dtype, core)
    if blocks is None:
        unit = 8 * 4 // jnp.dtype(dtype).itemsize
        needed = vmem_needed(Blocks(unit, 1), hidden, dtype)
        raise UserError(
            f"the Pallas recurrence of {hidden} units in {jnp.dtype(dtype).name} needs "
            f"{needed / 2**20:.0f} MiB of VMEM and this chip has {core.vmem_bytes / 2**20:.0f}; "
            'set model.recurrence to "scan" or "auto", or model.dtype to "bfloat16"'
        )
    return Plan(jnp.dtype(dtype), blocks, mesh, interpret)


def gru_recurrence_pallas(
    projected: jax.Array,
    h0: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    dtype: jnp.dtype,
    begins: jax.Array | None = None,
    *,
    interpret: bool = False,
    mesh: AbstractMesh | Mesh | None = None,
    core: Core | None = None,
) -> jax.Array:
    """Run gru_recurrence as Pallas kernels: same arguments, same values and gradients.

    Args:
      projected: input projections with the input bias, [P, B, 3H].
      h0: first state, float32 [B, H].
      weight: recurrent weight, float32 [3H, H].
      bias: recurrent bias, float32 [3H].
      dtype: of the recurrent products' operands and of the result. Gates and state stay float32.
        Float32 operands are multiplied at `jax_default_matmul_precision`, as in the scan.
      begins: frames at which a trial begins, from `h0`, bool [P, B]. None: one trial a row.
      interpret: run the kernels as ordinary operations, slowly, on any platform.
      mesh: whose axis "data" the rows B are divided over, weights being whole on every device.
        Without it the surrounding one (`jax.sharding.use_abstract_mesh`, `jax.set_mesh`).
      core: what the kernels are cut for. Without it, that of the mesh's or this process's devices.

    Returns:
      States after each frame, [P, B, H] of `dtype`.

    Raises:
      UserError: the weight does not fit VMEM, or the rows cannot be divided over the devices.
    """
    batch, hidden = h0.shape
    plan = plan_for(batch, hidden, dtype, mesh=mesh, core=core, interpret=interpret)
    return _recurrence(projected, h0, weight, bias, plan, begins)
