"""The cost of a program read from its text, against hand counts and against XLA itself."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from b2txt_jax.tpu.hlo_cost import Collective, KernelRun, group_size, program_cost
from b2txt_jax.tpu.hlo_text import Frame, parse_module, trip_count

# An outer loop of 3 trips; in it an inner one that counts 10, 8, ... 2 down to 0: 5 trips of a
# product of [4, 8] and [8, 8]. The inner limit comes from outside, unchanged by the outer loop.
NESTED = """HloModule nested, is_scheduled=true

%inner_condition (p.1: (s32[], f32[4,8], f32[8,8], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %limit.1 = s32[] get-tuple-element(%p.1), index=3
  ROOT %more.1 = pred[] compare(%i.1, %limit.1), direction=GT
}

%inner_body (p.2: (s32[], f32[4,8], f32[8,8], s32[])) -> (s32[], f32[4,8], f32[8,8], s32[]) {
  %p.2 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0}, s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %two = s32[] constant(2)
  %next.2 = s32[] subtract(%i.2, %two)
  %x.2 = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%p.2), index=1
  %w.2 = f32[8,8]{1,0} get-tuple-element(%p.2), index=2
  %limit.2 = s32[] get-tuple-element(%p.2), index=3
  %y.2 = f32[4,8]{1,0:T(8,128)S(1)} dot(%x.2, %w.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"window_config":{"estimated_cycles":"70"}}
  ROOT %t.2 = (s32[], f32[4,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0}, s32[]) tuple(%next.2, %y.2, %w.2, %limit.2)
}

%outer_condition (p.3: (s32[], f32[4,8], f32[8,8], s32[])) -> pred[] {
  %p.3 = (s32[], f32[4,8]{1,0:S(1)}, f32[8,8]{1,0}, s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %three = s32[] constant(3)
  ROOT %more.3 = pred[] compare(%three, %i.3), direction=GT
}

%outer_body (p.4: (s32[], f32[4,8], f32[8,8], s32[])) -> (s32[], f32[4,8], f32[8,8], s32[]) {
  %p.4 = (s32[], f32[4,8]{1,0:S(1)}, f32[8,8]{1,0}, s32[]) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %one = s32[] constant(1)
  %copied = s32[]{:T(128)S(6)} copy(%i.4)
  %next.4 = s32[] add(%copied, %one)
  %x.4 = f32[4,8]{1,0:S(1)} get-tuple-element(%p.4), index=1
  %w.4 = f32[8,8]{1,0} get-tuple-element(%p.4), index=2
  %limit.4 = s32[] get-tuple-element(%p.4), index=3
  %ten = s32[] constant(10)
  %t.4 = (s32[], f32[4,8]{1,0:S(1)}, f32[8,8]{1,0}, s32[]) tuple(%ten, %x.4, %w.4, /*index=3*/%limit.4)
  %inner = (s32[], f32[4,8]{1,0:S(1)}, f32[8,8]{1,0}, s32[]) while(%t.4), condition=%inner_condition, body=%inner_body
  %y.4 = f32[4,8]{1,0:S(1)} get-tuple-element(%inner), index=1
  ROOT %t.5 = (s32[], f32[4,8]{1,0:S(1)}, f32[8,8]{1,0}, s32[]) tuple(%next.4, %y.4, %w.4, %limit.4)
}

ENTRY %main (x: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0:S(1)} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %limit = s32[] constant(LIMIT)
  %t.6 = (s32[], f32[4,8]{1,0:S(1)}, f32[8,8]{1,0}, s32[]) tuple(%zero, %x, %w, %limit)
  %outer = (s32[], f32[4,8]{1,0:S(1)}, f32[8,8]{1,0}, s32[]) while(%t.6), condition=%outer_condition, body=%outer_body
  ROOT %y = f32[4,8]{1,0:S(1)} get-tuple-element(%outer), index=1
}
"""  # noqa: E501
PRODUCT = 2 * 4 * 8 * 8


@pytest.mark.parametrize(("limit", "inner_trips"), [(0, 5), (1, 5), (2, 4), (10, 0), (12, 0)])
def test_nested_loops_multiply_and_a_limit_from_outside_is_followed(
    limit: int, inner_trips: int
) -> None:
    cost = program_cost(NESTED.replace("LIMIT", str(limit)), devices=1)
    assert cost.flops == 3 * inner_trips * PRODUCT
    assert cost.unknown_loops == ()


def test_cycles_count_as_often_as_the_loop_runs() -> None:
    text = NESTED.replace("LIMIT", "0").replace(
        "%limit = s32[] constant(0)",
        '%limit = s32[] constant(0), backend_config={"estimated_cycles":"5"}',
    )
    cost = program_cost(text, devices=1)
    assert (cost.cycles, cost.loop_cycles) == (3 * 5 * 70 + 5, 3 * 5 * 70)


@pytest.mark.parametrize("mark", [2**63 - 1, 2**64 - 1])
def test_an_instruction_without_an_estimate_adds_no_cycles(mark: int) -> None:
    text = NESTED.replace("LIMIT", "0").replace('"70"', f'"{mark}"')
    assert program_cost(text, devices=1).cycles == 0


def test_values_on_the_chip_are_no_memory_traffic() -> None:
    cost = program_cost(NESTED.replace("LIMIT", "0"), devices=1)
    # Of the product only the weight is in main memory; the scalars' copy reads and adds are there.
    weights = 3 * 5 * 8 * 8 * 4
    scalars = cost.hbm_bytes - weights
    # inner: subtract 12 bytes, compare is not counted; outer: copy 4 (into SMEM) and add 8.
    assert scalars == 3 * 5 * 12 + 3 * (4 + 8)


def test_a_loop_whose_limit_is_an_argument_is_counted_once_and_named() -> None:
    text = NESTED.replace("%limit = s32[] constant(LIMIT)", "%limit = s32[] parameter(2)")
    cost = program_cost(text, devices=1)
    assert cost.unknown_loops == ("inner",)
    assert cost.flops == 3 * PRODUCT


def test_a_written_trip_count_is_believed() -> None:
    text = NESTED.replace("LIMIT", "0").replace(
        "body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert program_cost(text, devices=1).flops == 7 * 5 * PRODUCT


def _chain(x: jax.Array, w: jax.Array, unroll: bool) -> jax.Array:
    def inner(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return h @ w, None

    def outer(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.scan(inner, h, None, length=3, unroll=unroll)[0], None

    return jax.lax.scan(outer, x, None, length=5, unroll=unroll)[0]


@pytest.fixture(scope="module")
def rolled() -> str:
    """Optimised text of a jitted nested scan for the CPU."""
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    return jax.jit(_chain, static_argnums=2).lower(x, w, False).compile().as_text() or ""


def test_a_jitted_nested_scan_costs_what_it_costs_unrolled(rolled: str) -> None:
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    unrolled = jax.jit(_chain, static_argnums=2).lower(x, w, True).compile().cost_analysis()
    assert program_cost(rolled, 1).flops == unrolled["flops"] == 15 * PRODUCT


def test_trip_counts_follow_from_the_counter_where_the_backend_writes_none(rolled: str) -> None:
    assert "known_trip_count" in rolled
    silent = rolled.replace("known_trip_count", "withheld")
    module = parse_module(silent)
    frame = Frame(module.computations[module.entry])
    (loop,) = (i for i in frame.computation.instructions.values() if i.opcode == "while")
    assert trip_count(module, loop, frame) == 5
    assert program_cost(silent, 1) == program_cost(rolled, 1)


CONVOLUTIONS = [
    {"window_strides": (4,), "padding": [(0, 0)]},
    {"window_strides": (1,), "padding": [(13, 15)], "lhs_dilation": (4,)},
    {"window_strides": (1,), "padding": [(0, -2)], "rhs_dilation": (3,)},
    {"window_strides": (2,), "padding": [(5, 5)]},
    {"window_strides": (1,), "padding": [(2, 2)], "feature_group_count": 3},
    {"window_strides": (1,), "padding": [(2, 2)], "batch_group_count": 2},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_costs_two_per_product_that_is_not_by_padding(settings: dict) -> None:
    groups = settings.get("feature_group_count", 1)
    x = np.ones((4, 23, 6), np.float32)
    kernel = np.ones((6, 5, 6 // groups), np.float32)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, dimension_numbers=("NTC", "OTI", "NTC"), **settings
        )

    # Of ones, every product that is counted adds one to the sum of the result.
    products = float(convolve(jnp.asarray(x), jnp.asarray(kernel)).sum())
    text = jax.jit(convolve).lower(x, kernel).as_text(dialect="hlo")
    assert "convolution(" in text
    assert program_cost(text, 1).flops == 2 * products


def test_a_batched_product_costs_two_per_multiply_and_add() -> None:
    a, b = np.ones((3, 5, 7), np.float32), np.ones((3, 7, 11), np.float32)
    text = jax.jit(jnp.matmul).lower(a, b).as_text(dialect="hlo")
    assert program_cost(text, 1).flops == 2 * 3 * 5 * 7 * 11


COLLECTIVES = """HloModule collectives

%wrapped (q: f32[10]) -> f32[40] {
  %q = f32[10]{0} parameter(0)
  ROOT %gathered = f32[40]{0} all-gather(%q), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (a: f32[100], b: bf16[50]) -> f32[100] {
  %a = f32[100]{0} parameter(0)
  %b = bf16[50]{0} parameter(1)
  %c = f32[10]{0} constant({...})
  %sum = (f32[100]{0}, bf16[50]{0}) all-reduce(%a, /*index=1*/%b), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add
  %part = f32[25]{0} reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %moved = (f32[10]{0}, f32[10]{0}, u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}
  %moved.1 = f32[10]{0} collective-permute-done(%moved)
  %started = ((f32[10]{0}), f32[40]{0}) async-start(%c), calls=%wrapped
  %ended = f32[40]{0} async-done(%started)
  ROOT %first = f32[100]{0} get-tuple-element(%sum), index=0
}
"""  # noqa: E501


def test_collectives_are_counted_by_kind_with_the_whole_array_once() -> None:
    assert program_cost(COLLECTIVES, devices=8).collectives == (
        Collective("all-gather", 4, 1, 160),
        Collective("all-reduce", 4, 1, 500),
        Collective("collective-permute", 8, 1, 40),
        Collective("reduce-scatter", 4, 1, 400),
    )


# As libtpu writes it for tpu7x: the SparseCore sums while the TensorCore goes on.
OFFLOADED = """HloModule offloaded, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%called (p.0: f32[10,10], p.1: token[]) -> f32[10,10] {
  %p.1 = token[] parameter(1)
  %p.0 = f32[10,10]{0,1:T(8,128)} parameter(0)
  ROOT %all-reduce.2 = f32[10,10]{0,1:T(8,128)} all-reduce(%p.0), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, use_global_device_ids=true, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (p: f32[10,10]) -> f32[10,10] {
  %p = f32[10,10]{1,0} parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %start = ((f32[10,10]{0,1:T(8,128)}, token[]), f32[10,10]{0,1:T(8,128)}) call-start(%p, %ready), async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = f32[10,10]{0,1:T(8,128)} call-done(%start)
}
"""  # noqa: E501


def test_a_collective_that_another_core_runs_meanwhile_is_counted() -> None:
    assert program_cost(OFFLOADED, devices=8).collectives == (Collective("all-reduce", 4, 1, 400),)


def test_a_collective_in_a_loop_counts_once_per_trip() -> None:
    text = NESTED.replace("LIMIT", "0").replace(
        "%y.4 = f32[4,8]{1,0:S(1)} get-tuple-element(%inner), index=1",
        "%y.5 = f32[4,8]{1,0:S(1)} get-tuple-element(%inner), index=1\n"
        "  %y.4 = f32[4,8]{1,0:S(1)} all-reduce(%y.5), to_apply=%add",
    )
    assert program_cost(text, devices=16).collectives == (
        Collective("all-reduce", 16, 3, 3 * 4 * 8 * 4),
    )


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("replica_groups={}", 6),
        ("channel_id=3", 6),
    ],
)
def test_group_sizes_are_read_in_every_notation(attributes: str, size: int) -> None:
    assert group_size(attributes, devices=6) == size


FUSION = """HloModule sliced

%frame (whole: f32[100,16], i: s32[], out: f32[100,4]) -> f32[100,4] {
  %whole = f32[100,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %out = f32[100,4]{1,0} parameter(2)
  %slice = f32[1,16]{1,0} dynamic-slice(%whole, %i, %i), dynamic_slice_sizes={1,16}
  %cut = f32[1,4]{1,0} slice(%slice), slice={[0:1], [0:4]}
  ROOT %put = f32[100,4]{1,0} dynamic-update-slice(%out, %cut, %i, %i)
}

ENTRY %main (a: f32[100,16], n: s32[], o: f32[100,4]) -> f32[100,4] {
  %a = f32[100,16]{1,0} parameter(0)
  %n = s32[]{:S(6)} parameter(1)
  %o = f32[100,4]{1,0} parameter(2)
  ROOT %fused = f32[100,4]{1,0} fusion(%a, %n, %o), kind=kLoop, calls=%frame
}
"""


def test_a_fusion_that_reads_and_writes_slices_moves_only_these() -> None:
    assert program_cost(FUSION, 1).hbm_bytes == 16 * 4 + 4 * 4


def test_a_kernel_counts_as_it_declares_and_is_named_where_it_does_not() -> None:
    call = (
        '%k = f32[100,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"body":"x"CONFIG}}\n  ROOT '
    )
    text = FUSION.replace("  ROOT %fused", "  " + call + "%fused")
    declared = text.replace(
        "CONFIG", ',"cost_estimate":{"flops":"900","transcendentals":"3","bytes_accessed":"70"}'
    )
    cost = program_cost(declared, 1)
    assert cost.recurrences == ()
    named = declared.replace(
        "%k = f32[100,4]{1,0}", "%gru_backward.3 = (bf16[100,2,768], f32[8,768])"
    )
    assert program_cost(named, 1).recurrences == (KernelRun("gru_backward", 100, 2, 256, 1),)
    assert (cost.kernels, cost.kernel_flops, cost.kernel_bytes) == (1, 900, 70)
    assert cost.undeclared_kernels == 0
    cost = program_cost(text.replace("CONFIG", ""), 1)
    assert (cost.kernels, cost.kernel_flops, cost.kernel_bytes) == (
        1,
        0,
        100 * 16 * 4 + 100 * 4 * 4,
    )
    assert cost.undeclared_kernels == 1


def test_text_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("no ENTRY computation")):
        parse_module("not a module")


# As libtpu writes it for v5e: a gather goes on beside three products of a loop, whose iterations
# pass its two arrays on in place.
IN_PARTS = """HloModule parts, is_scheduled=true

%starting (p.0: f32[64]) -> (f32[64], f32[256]) {
  %p.0 = f32[64]{0} parameter(0)
  %part.0 = f32[256]{0} all-gather(%p.0), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t.0 = (f32[64]{0}, f32[256]{0}) tuple(%p.0, %part.0)
}

%beside (p.1: f32[64], p.2: f32[256], p.3: f32[8,8]) -> (f32[8,8], f32[64], f32[256]) {
  %p.1 = f32[64]{0} parameter(0)
  %p.2 = f32[256]{0} parameter(1)
  %p.3 = f32[8,8]{1,0} parameter(2)
  %part.1 = f32[256]{0} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  %product = f32[8,8]{1,0} dot(%p.3, %p.3), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t.1 = (f32[8,8]{1,0}, f32[64]{0}, f32[256]{0}) tuple(%product, %p.1, %part.1)
}

%ending (p.4: f32[64], p.5: f32[256]) -> f32[256] {
  %p.4 = f32[64]{0} parameter(0)
  %p.5 = f32[256]{0} parameter(1)
  ROOT %part.2 = f32[256]{0} all-gather(%p.4), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%again (s: (f32[8,8], f32[64], f32[256])) -> (f32[8,8], f32[64], f32[256]) {
  %s = (f32[8,8]{1,0}, f32[64]{0}, f32[256]{0}) parameter(0)
  %s.0 = f32[8,8]{1,0} get-tuple-element(%s), index=0
  %s.1 = f32[64]{0} get-tuple-element(%s), index=1
  %s.2 = f32[256]{0} get-tuple-element(%s), index=2
  ROOT %step = (f32[8,8]{1,0}, f32[64]{0}, f32[256]{0}) fusion(%s.1, %s.2, %s.0), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%beside
}

%more (c: (f32[8,8], f32[64], f32[256])) -> pred[] {
  %c = (f32[8,8]{1,0}, f32[64]{0}, f32[256]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: f32[64], b: f32[8,8]) -> f32[256] {
  %a = f32[64]{0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %start = (f32[64]{0}, f32[256]{0}) fusion(%a), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%starting
  %a.1 = f32[64]{0} get-tuple-element(%start), index=0
  %g.1 = f32[256]{0} get-tuple-element(%start), index=1
  %first = (f32[8,8]{1,0}, f32[64]{0}, f32[256]{0}) tuple(%b, %a.1, %g.1)
  %loop = (f32[8,8]{1,0}, f32[64]{0}, f32[256]{0}) while(%first), condition=%more, body=%again, backend_config={"known_trip_count":{"n":"3"}}
  %a.2 = f32[64]{0} get-tuple-element(%loop), index=1
  %g.2 = f32[256]{0} get-tuple-element(%loop), index=2
  ROOT %done = f32[256]{0} fusion(%a.2, %g.2), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%ending
}
"""  # noqa: E501


def test_a_collective_that_goes_on_beside_a_loop_is_counted_once_and_its_arrays_are_not_touched():
    cost = program_cost(IN_PARTS, devices=8)
    assert cost.collectives == (Collective("all-gather", 4, 1, 4 * 256),)
    assert cost.flops == 3 * 2 * 8**3
    # The gathered array, written by the start; the products' operand and result; the given array,
    # which the end reads.
    assert cost.hbm_bytes == 4 * (256 + 3 * (64 + 64) + 64)
