"""Lower bound of a compiled program's step time, from the chip's published limits."""

from __future__ import annotations

import dataclasses

from b2txt_jax.tpu.hlo_cost import Collective, Cost
from b2txt_jax.tpu.kernel_cycles import recurrence_cycles
from b2txt_jax.tpu.topologies import Topology


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one device, by resource."""

    compute: float
    """Matrix products at the peak rate."""
    hbm: float
    """Main memory traffic at the peak bandwidth."""
    ici: float
    """Collectives at the peak bandwidth of the links."""
    compiler: float | None
    """The compiler's cycles at the chip's clock, plus kernels by their schedule, or where none was
    counted at their own roofline. None if the clock is not published."""
    kernel_cycles: int | None = None
    """Of the recurrence's kernels, by their schedule. None where none was counted."""

    @property
    def bound(self) -> float:
        """Lower bound: products and memory traffic overlap fully, collectives not at all."""
        return max(self.compute, self.hbm) + self.ici

    @property
    def likely(self) -> float:
        """The larger of the bound and the compiler's cycles with the collectives."""
        if self.compiler is None:
            return self.bound
        return max(self.bound, self.compiler + self.ici)

    @property
    def limit(self) -> str:
        """The largest part of the bound."""
        parts = {"matrix products": self.compute, "HBM": self.hbm, "interconnect": self.ici}
        return max(parts, key=lambda name: parts[name])


def step_time(cost: Cost, topology: Topology) -> StepTime:
    """Return the seconds of one step for the program's cost on one device."""
    chip = topology.chip
    peak, bandwidth = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    kernels = max(cost.kernel_flops / peak, cost.kernel_bytes / bandwidth)
    counted = [recurrence_cycles(run, chip.name) for run in cost.recurrences]
    known = [cycles for cycles in counted if cycles is not None]
    scheduled = sum(known) if known and len(known) == len(counted) else None
    if scheduled is not None and chip.clock_hz is not None:
        kernels = max(kernels, scheduled / chip.clock_hz)
    compiler = None if chip.clock_hz is None else cost.cycles / chip.clock_hz + kernels
    return StepTime(
        compute=(cost.flops + cost.kernel_flops) / peak,
        hbm=(cost.hbm_bytes + cost.kernel_bytes) / bandwidth,
        ici=sum(bytes_sent(found) for found in cost.collectives) / topology.ring_bandwidth,
        compiler=compiler,
        kernel_cycles=scheduled,
    )


def bytes_sent(collective: Collective) -> float:
    """Return the bytes that each device sends.

    Around a ring, every part of the array passes each link once, in an all-reduce twice.
    """
    if collective.kind == "collective-permute":
        return collective.bytes
    rounds = 2 if collective.kind == "all-reduce" else 1
    return rounds * collective.bytes * (collective.group - 1) / max(collective.group, 1)


def assumptions(topology: Topology) -> list[str]:
    """Return the assumptions behind the step time, one line each."""
    chip = topology.chip
    clock = (
        f"clock {chip.clock_hz / 1e9:.2f} GHz"
        if chip.clock_hz
        else "its clock is not published, so cycles cannot be converted to seconds"
    )
    ring = topology.ring_bandwidth
    sent = f"{ring / 1e9:.0f} GB/s a chip" if topology.chips > 1 else "none"
    return [
        f"{chip.name}: {chip.peak_flops / 1e12:.0f} bfloat16 TFLOP/s, HBM "
        f"{chip.hbm_bytes / 2**30:.0f} GiB at {chip.hbm_bandwidth / 1e9:.0f} GB/s, links of "
        f"{chip.link_bandwidth / 1e9:.0f} GB/s each way, {clock} (source: {chip.source})",
        f"collectives are rings over the axes of the slice: {sent}; they overlap with nothing",
        "products run at the peak and overlap with HBM traffic; latency of dependent frames, the "
        "vector unit, the host and the input pipeline cost nothing: a lower bound",
        "compiler's estimate: its static cycles per instruction, loops multiplied out, with "
        "the recurrence's kernels by the schedule that libtpu writes for them (without stalls) "
        "and other kernels at their own bound: it ranks programs and is not a timing",
    ]
