"""The cost of one run of a compiled program on one device: products, memory traffic, collectives,
and the compiler's estimate of cycles. Each instruction counts as often as its loops run it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter

from b2txt_jax.tpu.hlo_text import (
    Array,
    Computation,
    Frame,
    Instruction,
    Module,
    loop_frame,
    parse_module,
    trip_count,
)

COLLECTIVES = frozenset(
    (
        *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
        *("collective-permute", "collective-broadcast"),
    )
)
_KERNEL = "tpu_custom_call"
# They only name or order values, or are counted through what they call or through their other half.
_FREE = frozenset(
    (
        *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call"),
        *("conditional", "after-all", "opt-barrier", "partition-id", "replica-id", "iota"),
    )
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """All runs of one kind of collective over groups of one size."""

    kind: str
    group: int
    """Devices in each group."""
    count: int
    bytes: int
    """Size of the whole array per device, summed over the runs."""


@dataclasses.dataclass(frozen=True)
class KernelRun:
    """Runs of a kernel of the recurrence, of one size."""

    name: str
    """'gru_forward' or 'gru_backward'."""
    frames: int
    rows: int
    """Of one device, with padding."""
    units: int
    times: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one run of the program on one device."""

    flops: int = 0
    """FLOPs of matrix products and convolutions, two per multiply and add."""
    hbm_bytes: int = 0
    """Read from and written to the device's main memory."""
    cycles: int = 0
    """Sum of the compiler's `estimated_cycles`. Kernels, collectives, waiting and instructions
    without an estimate are not included."""
    loop_cycles: int = 0
    """The part of `cycles` inside loops."""
    collectives: tuple[Collective, ...] = ()
    kernels: int = 0
    """Runs of Pallas kernels."""
    kernel_flops: int = 0
    """Declared by the kernels, not included in `flops`."""
    kernel_bytes: int = 0
    """Declared by the kernels, or their operands and results. Not included in `hbm_bytes`."""
    undeclared_kernels: int = 0
    """Runs of kernels that declare no cost."""
    unknown_loops: tuple[str, ...] = ()
    """Loops with an unknown number of trips, counted once."""
    recurrences: tuple[KernelRun, ...] = ()


def program_cost(text: str, devices: int) -> Cost:
    """Compute the cost of a program from its optimised HLO, `compiled.as_text()`.

    Args:
      text: the module.
      devices: number of devices, for collectives that name no groups.
    """
    walk = _Walk(parse_module(text), devices)
    entry = walk.module.computations[walk.module.entry]
    walk.visit(Frame(entry), 1, fused=False, looped=False)
    for (kind, group, _), (times, size) in walk.in_parts.items():
        walk.add_collective(kind, group, times, size)
    collectives = tuple(
        Collective(kind, group, *numbers)
        for (kind, group), numbers in sorted(walk.collectives.items())
    )
    return Cost(
        **walk.sums,
        collectives=collectives,
        unknown_loops=tuple(walk.unknown),
        recurrences=tuple(KernelRun(*one, times) for one, times in walk.recurrences.items()),
    )


_NO_ESTIMATE = 2**63 - 1
"""The compiler for tpu7x writes this number or more for an instruction without an estimate."""


def _estimated_cycles(instruction: Instruction) -> int:
    cycles = instruction.number("estimated_cycles")
    return 0 if cycles is None or cycles >= _NO_ESTIMATE else cycles


class _Walk:
    """Sums over a module."""

    def __init__(self, module: Module, devices: int):
        self.module = module
        self.devices = devices
        self.sums = Counter[str]()
        """Fields of `Cost`."""
        self.collectives: dict[tuple[str, int], tuple[int, int]] = {}
        self.in_parts: dict[tuple[str, int, str], tuple[int, int]] = {}
        """Collectives that overlap other fusions, by their channel: (runs, bytes of one)."""
        self.unknown: list[str] = []
        self.recurrences = Counter[tuple[str, int, int, int]]()
        """(kernel, frames, rows, units) -> runs."""

    def visit(self, frame: Frame, times: int, *, fused: bool, looped: bool) -> None:
        """Add the cost of a computation that runs `times` times."""
        computation = frame.computation
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode in ("dot", "convolution"):
                self.sums["flops"] += times * product_flops(instruction, computation)
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                self._collective(kind, instruction, computation, times)
            if not fused:
                cycles = times * _estimated_cycles(instruction)
                self.sums["cycles"] += cycles
                self.sums["loop_cycles"] += cycles if looped else 0
                if _is_kernel(instruction):
                    self._kernel(instruction, computation, times)
                else:
                    traffic = hbm_traffic(instruction, computation, self.module)
                    self.sums["hbm_bytes"] += times * traffic
            if opcode == "while":
                self._loop(instruction, frame, times, fused)
            elif opcode == "conditional":
                self._branches(instruction, times, fused, looped)
            else:
                inner = fused or opcode == "fusion"
                for name in (*instruction.called("calls"), *_to_apply(instruction)):
                    if name in self.module.computations:
                        called = Frame(self.module.computations[name])
                        self.visit(called, times, fused=inner, looped=looped)

    def _loop(self, loop: Instruction, frame: Frame, times: int, fused: bool) -> None:
        trips = trip_count(self.module, loop, frame)
        if trips is None:
            self.unknown.append(loop.name)
            trips = 1
        body = loop_frame(self.module, loop, frame)
        self.visit(body, times * trips, fused=fused, looped=True)

    def _branches(self, instruction: Instruction, times: int, fused: bool, looped: bool) -> None:
        """Count only the branch with the most products."""
        names = [
            name
            for key in ("branch_computations", "true_computation", "false_computation")
            for name in instruction.called(key)
        ]

        def flops(name: str) -> int:
            branch = _Walk(self.module, self.devices)
            branch.visit(Frame(self.module.computations[name]), 1, fused=fused, looped=looped)
            return branch.sums["flops"]

        if names:
            heaviest = Frame(self.module.computations[max(names, key=flops)])
            self.visit(heaviest, times, fused=fused, looped=looped)

    def _collective(
        self, kind: str, instruction: Instruction, computation: Computation, times: int
    ) -> None:
        given = _bytes(_operand_arrays(instruction, computation))
        group = group_size(instruction.attributes, self.devices)
        # The whole array is the operand, or for a gather the result.
        size = given * group if kind == "all-gather" else given
        channel = _channel_in_parts(instruction)
        if channel is None:
            self.add_collective(kind, group, times, size)
            return
        # It appears in every fusion that it overlaps, also in those of a loop's body. It runs as
        # often as the fusion that starts it.
        runs, _ = self.in_parts.get((kind, group, channel), (times, size))
        self.in_parts[kind, group, channel] = (min(runs, times), size)

    def add_collective(self, kind: str, group: int, times: int, size: int) -> None:
        """Add a collective that runs `times` times on `size` bytes."""
        count, total = self.collectives.get((kind, group), (0, 0))
        self.collectives[kind, group] = (count + times, total + times * size)

    def _kernel(self, instruction: Instruction, computation: Computation, times: int) -> None:
        declared = _declared_cost(instruction.attributes)
        touched = _bytes(_operand_arrays(instruction, computation)) + _bytes(instruction.result)
        name = re.search(r"gru_(?:forward|backward)", instruction.name + instruction.attributes)
        if name:
            # The first result: states of `units`, or the cotangents of three gates.
            frames, rows, width = instruction.result[0].dims
            units = width // 3 if name[0] == "gru_backward" else width
            self.recurrences[name[0], frames, rows, units] += times
        self.sums["kernels"] += times
        self.sums["kernel_flops"] += times * declared.get("flops", 0)
        self.sums["kernel_bytes"] += times * declared.get("bytes_accessed", touched)
        self.sums["undeclared_kernels"] += 0 if declared else times


def _channel_in_parts(instruction: Instruction) -> str | None:
    """Return the channel of a collective that is split into parts, or None for a whole one."""
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    return channel[1] if channel and "chain_id=" in instruction.attributes else None


def _is_kernel(instruction: Instruction) -> bool:
    target = f'custom_call_target="{_KERNEL}"'
    return instruction.opcode == "custom-call" and target in instruction.attributes


def _to_apply(instruction: Instruction) -> tuple[str, ...]:
    """Return the computations of calls, including calls that another core runs (tpu7x).

    The function of a reduction or a sort is too small to count.
    """
    return instruction.called("to_apply") if instruction.opcode in ("call", "call-start") else ()


def _declared_cost(attributes: str) -> dict[str, int]:
    found = re.search(r'"cost_estimate":\s*(\{[^{}]*\})', attributes)
    if not found:
        return {}
    return {key: int(value) for key, value in json.loads(found.group(1)).items()}


def _operand_arrays(instruction: Instruction, computation: Computation) -> list[Array]:
    return [
        array
        for name in instruction.operands
        if name in computation.instructions
        for array in computation.instructions[name].result
    ]


def _bytes(arrays: list[Array] | tuple[Array, ...], hbm_only: bool = False) -> int:
    return sum(array.bytes for array in arrays if not (hbm_only and array.space))


def product_flops(instruction: Instruction, computation: Computation) -> int:
    """Return the FLOPs of a dot or a convolution: two per multiply and add, without padding."""
    left, right = (computation.instructions[name].result[0] for name in instruction.operands[:2])
    result = instruction.result[0]
    if instruction.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        summed = [int(axis) for axis in found.group(1).split(",") if axis] if found else []
        return 2 * result.elements * math.prod(left.dims[axis] for axis in summed)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, f"convolution {instruction.name} has no dim_labels"
    of_left, of_right, of_result = labels.groups()
    products = result.dims[of_result.index("b")] * result.dims[of_result.index("f")]
    # The kernel's input features and the result's batch already belong to one group.
    products *= right.dims[of_right.index("i")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}
    for axis in range(len(of_left) - 2):
        label = str(axis)
        products *= _valid_positions(
            left.dims[of_left.index(label)],
            right.dims[of_right.index(label)],
            result.dims[of_result.index(label)],
            {key: value.split("x")[axis] for key, value in fields.items()},
        )
    return 2 * products


def _valid_positions(size: int, kernel: int, result: int, window: dict[str, str]) -> int:
    """Count pairs of (output, kernel) positions on one axis that meet an input value.

    Pairs that meet padding, or a hole between dilated inputs, do not count.
    """
    stride = int(window.get("stride", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    of_input, of_kernel = int(window.get("lhs_dilate", 1)), int(window.get("rhs_dilate", 1))
    last = (size - 1) * of_input
    return sum(
        0 <= (place := out * stride + tap * of_kernel - low) <= last and place % of_input == 0
        for out in range(result)
        for tap in range(kernel)
    )


def group_size(attributes: str, devices: int) -> int:
    """Return the number of devices in each group of a collective."""
    if found := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", found.group(1)))
        axes = re.findall(r"[\w.]+", found.group(2))
        return math.prod(int(sizes[axis]) for axis in axes)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found.group(1).split(","))
    return devices


def hbm_traffic(instruction: Instruction, computation: Computation, module: Module) -> int:
    """Return the bytes of main memory that one run of an instruction reads and writes.

    A slice taken inside a fusion counts as the slice. On-chip memory does not count.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or opcode == "custom-call":
        return 0
    if opcode.endswith("-start"):
        # The result of a copy is (destination, source, ...). Others are counted inside.
        return _bytes(instruction.result[:2], hbm_only=True) if opcode == "copy-start" else 0
    if opcode == "fusion":
        return _fusion_traffic(instruction, computation, module)
    operands = [computation.instructions[name] for name in instruction.operands]
    written = _bytes(instruction.result, hbm_only=True)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return written + (0 if operands[0].result[0].space else _bytes(instruction.result))
    if opcode == "dynamic-update-slice":
        update = operands[1].result
        return _bytes(update, hbm_only=True) + (_bytes(update) if written else 0)
    return written + sum(_bytes(operand.result, hbm_only=True) for operand in operands)


def _fusion_traffic(instruction: Instruction, computation: Computation, module: Module) -> int:
    inner = module.computations[instruction.called("calls")[0]]
    passed_in, passed_out = _passed_through(instruction, inner)
    total = 0
    for number, parameter in inner.parameters.items():
        if number in passed_in:
            continue
        source = computation.instructions[instruction.operands[number]]
        if not all(array.space for array in source.result):
            total += _read(inner, parameter)
    roots = [inner.root]
    if inner.root.opcode == "tuple":
        roots = [inner.instructions[name] for name in inner.root.operands]
    for number, (root, array) in enumerate(zip(roots, instruction.result, strict=False)):
        if array.space == 0 and number not in passed_out:
            total += _written(inner, root, array)
    return total


def _passed_through(instruction: Instruction, inner: Computation) -> tuple[set[int], set[int]]:
    """Return the operands and results that a fusion only passes on to a running collective."""
    if all(_channel_in_parts(one) is None for one in inner.instructions.values()):
        return set(), set()
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", aliases[1]) if aliases else []
    return {int(operand) for _, operand in pairs}, {int(result or 0) for result, _ in pairs}


def _through(inner: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "copy") and instruction.operands:
        instruction = inner.instructions[instruction.operands[0]]
    return instruction


def _read(inner: Computation, name: str) -> int:
    """Return the bytes that a fusion reads of one parameter: only the slices if it only slices."""
    whole = _bytes(inner.instructions[name].result)
    total = 0
    for user in inner.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(inner, user.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather"):
            total += _bytes(user.result)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # written in place
        else:
            return whole
    return min(total, whole)


def _written(inner: Computation, root: Instruction, array: Array) -> int:
    root = _through(inner, root)
    if root.opcode == "dynamic-update-slice":
        return _bytes(inner.instructions[root.operands[1]].result)
    return array.bytes
