"""The result of `b2txt compile`, as values, as JSON and as printed lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from b2txt_jax.tpu.hlo_cost import Cost
from b2txt_jax.tpu.roofline import StepTime, assumptions
from b2txt_jax.tpu.topologies import Topology


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device's main memory."""

    parameters: int
    optimizer: int
    batch: int
    arguments: int
    """Parameters, optimizer state and batch in the compiler's layout, with padding."""
    temporaries: int
    """Activations, gradients and scratch at their peak."""
    outputs: int
    """Results that do not reuse the memory of an argument."""
    program: int
    capacity: int

    @property
    def total(self) -> int:
        """Bytes that the step needs."""
        return self.arguments + self.temporaries + self.outputs + self.program

    @property
    def fits(self) -> bool:
        """Whether the step fits."""
        return self.total <= self.capacity


@dataclasses.dataclass(frozen=True)
class Result:
    """Figures of a compiled training step."""

    topology: Topology
    devices: int
    model_axis: int
    per_device_batch: int
    """Rows of the batch per device of the data axis."""
    rows: int
    """Rows of the whole batch."""
    bucket: tuple[int, int]
    days: int
    dtype: str
    wanted: str
    """The variant of the recurrence in the configuration."""
    recurrence: str
    """The variant in the program: 'pallas' if it has kernels. Empty for a model without any."""
    compile_seconds: float
    memory: Memory
    cost: Cost
    time: StepTime
    steps: int
    """Steps of the whole recipe."""
    trials: int = 0
    """Of the whole batch, more than rows where trials share them."""
    share: float = 1.0
    """Of the recipe's batches that have this shape."""

    @property
    def batches_per_hour(self) -> float:
        """Rate at the likely step time."""
        return 3600 / self.time.likely

    @property
    def at_best(self) -> bool:
        """Whether the likely step time is only a lower bound: the chip's clock is not published."""
        return self.time.compiler is None

    @property
    def hours(self) -> float:
        """Hours of the whole recipe at the likely step time."""
        return self.steps * self.time.likely / 3600

    def to_json(self) -> dict[str, Any]:
        """Return plain values, including the derived ones."""
        values = dataclasses.asdict(self)
        values["topology"] = self.topology.name
        values["chips"] = self.topology.chips
        values["memory"] |= {"total": self.memory.total, "fits": self.memory.fits}
        values["time"] |= {"bound": self.time.bound, "likely": self.time.likely}
        return values


def described(result: Result) -> Iterator[str]:
    """Yield the lines of one result."""
    topology, memory, cost, time = result.topology, result.memory, result.cost, result.time
    yield (
        f"{topology.name}: {topology.chips} chips, {result.devices} devices (data "
        f"{result.devices // result.model_axis} x model {result.model_axis}); compiled in "
        f"{result.compile_seconds:.0f} s"
    )
    yield (
        f"  step     {_trials(result)}{result.rows} rows of {result.bucket[0]} bins "
        f"({result.per_device_batch} a device), up to {result.bucket[1]} labels, {result.days} "
        f"days, products in {result.dtype}"
        f"{f', recurrence {result.recurrence}' if result.recurrence else ''}"
    )
    yield (
        f"  memory   per device: parameters {_mb(memory.parameters)}, optimizer "
        f"{_mb(memory.optimizer)}, batch {_mb(memory.batch)}; together as laid out "
        f"{_mb(memory.arguments)}; activations and temporaries {_mb(memory.temporaries)}; other "
        f"results {_mb(memory.outputs)}; program {_mb(memory.program)}"
    )
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    yield (
        f"  {verdict}     {_mb(memory.total)} of {_mb(memory.capacity)} HBM "
        f"({100 * memory.total / memory.capacity:.0f} %)"
    )
    for found in cost.collectives:
        yield (
            f"  traffic  {found.kind} x {found.count} over {found.group} devices: "
            f"{_mb(found.bytes)} a step"
        )
    if not cost.collectives:
        yield "  traffic  no collectives"
    yield (
        f"  work     {_gflop(cost.flops + cost.kernel_flops)} a device and step "
        f"(matrix products, loops multiplied out{_of_kernels(result)}); HBM traffic "
        f"{_mb(cost.hbm_bytes + cost.kernel_bytes)}; compiler's cycles {cost.cycles / 1e6:.1f} "
        f"million, {cost.loop_cycles / 1e6:.1f} of them in loops{_scheduled(time)}"
    )
    if cost.unknown_loops:
        yield f"  caution  loops counted once, trips unknown: {', '.join(cost.unknown_loops)}"
    yield from _caution(result)
    compiler = "not known" if time.compiler is None else f"{1e3 * time.compiler:.2f} ms"
    yield (
        f"  time     roofline {1e3 * time.bound:.2f} ms a step, limited by {time.limit} (products "
        f"{1e3 * time.compute:.2f}, HBM {1e3 * time.hbm:.2f}, interconnect "
        f"{1e3 * time.ici:.2f}); by the compiler's cycles {compiler}"
    )
    rate, hours = f"{result.batches_per_hour:,.0f} batches an hour", f"{result.hours:.2f} hours"
    if result.at_best:
        yield f"  so       at most {rate}, at least {hours} for {result.steps:,} steps"
    else:
        yield (
            f"  so       about {rate}, {hours} for {result.steps:,} steps, at "
            f"{1e3 * time.likely:.2f} ms; at the roofline "
            f"{result.steps * time.bound / 3600:.2f} hours"
        )
    yield "  assumed"
    for line in assumptions(topology):
        yield f"    - {line}"


def _of_kernels(result: Result) -> str:
    cost = result.cost
    if not cost.kernels:
        return ""
    return f", {_gflop(cost.kernel_flops)} of it declared by {cost.kernels} kernel runs"


def _scheduled(time: StepTime) -> str:
    if time.kernel_cycles is None:
        return ""
    return f"; the recurrence's kernels {time.kernel_cycles / 1e6:.1f} million by their schedule"


def weighed(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines about the whole recipe, whose batches have these shapes."""
    steps, share = results[0].steps, sum(result.share for result in results)
    hours = sum(result.share * result.hours for result in results) / share
    least = "at least " if any(result.at_best for result in results) else ""
    frames = sum(result.share * result.rows * result.bucket[0] for result in results) / share
    yield (
        f"all shapes by how often batches have them: {least}{hours:.2f} hours for {steps:,} steps, "
        f"{frames:,.0f} bins computed for {results[0].trials} trials of a step"
    )


def _trials(result: Result) -> str:
    return f"{result.trials} trials in " if result.trials > result.rows else ""


def compared(results: Sequence[Result]) -> Iterator[str]:
    """Yield the lines that rank variants of one step by cycles outside kernels."""
    yield "variants by the compiler's cycles outside kernels, fewest first"
    for place, result in enumerate(sorted(results, key=lambda found: found.cost.cycles), 1):
        cost = result.cost
        kernels = (
            f"{cost.kernels} kernel runs, {_gflop(cost.kernel_flops)} and "
            f"{_mb(cost.kernel_bytes)} in them"
            if cost.kernels
            else "no kernels"
        )
        yield (
            f"  {place}. {result.wanted:<7} {cost.cycles / 1e6:8.1f} million cycles "
            f"({cost.loop_cycles / 1e6:.1f} in loops); {kernels}; temporaries "
            f"{_mb(result.memory.temporaries)}; roofline {1e3 * result.time.bound:.2f} ms"
        )
    yield (
        "  not known: the compiler has no cycles for custom calls (Pallas kernels). They count by "
        "the products and bytes that they declare, at the chip's peak. The waiting of dependent "
        "frames and the vector work inside kernels are missing: only a run on the chip shows them."
    )


def _caution(result: Result) -> Iterator[str]:
    if result.wanted not in ("auto", result.recurrence):
        yield (
            f"  caution  asked for the recurrence {result.wanted}, but the program has "
            f"{'no kernels' if result.recurrence == 'scan' else 'kernels'}"
        )


def _gflop(count: float) -> str:
    return f"{count / 1e9:,.{0 if count >= 1e11 else 2}f} GFLOP"


def _mb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
