"""Published figures of TPU chips.

Sources, by the letter in the table's head and in the fields of `Chip`:
  [a] Google Cloud documentation, one page per chip: docs.cloud.google.com/tpu/docs/v4, v5e, v5p,
      v6e, tpu7x: peak bfloat16 FLOP/s, HBM capacity and bandwidth, interconnect bandwidth.
  [b] jax 0.10.2, jax/_src/pallas/mosaic/tpu_info.py: VMEM and TensorCores.
  [c] Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer", ISCA 2023: v4's links
      (six of 50 GB/s each way) and clock.
  [d] Austin et al., "How to Scale Your Model", jax-ml.github.io/scaling-book: clocks of v5e and
      v5p, and which axes of a slice are closed to rings.
The clocks of v6e and tpu7x have not been published.
"""

from __future__ import annotations

import dataclasses

GB = 10**9
GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. A JAX device is the whole chip or one of its cores."""

    name: str
    peak_flops: float
    """bfloat16 FLOP/s [a]."""
    hbm_bytes: int
    """Capacity [a]."""
    hbm_bandwidth: float
    """Bytes/s [a]."""
    link_bandwidth: float
    """Bytes/s of one interconnect link in one direction: the published bandwidth over the links
    and the two directions [a, c]."""
    mesh_axes: int
    """Dimensions of the interconnect, 2 or 3, with two links each."""
    cores: int
    """TensorCores [b]."""
    cores_per_device: int
    """TensorCores of one JAX device on a Cloud TPU VM."""
    vmem_bytes: int
    """Per TensorCore [b]."""
    clock_hz: float | None
    """Clock of the TensorCore [c, d]. None if it is not published."""
    source: str
    """Short names of the sources."""

    @property
    def devices(self) -> int:
        """JAX devices per chip."""
        return self.cores // self.cores_per_device


# name, bfloat16 TFLOP/s, HBM GiB, HBM GB/s, link GB/s, mesh axes, cores, cores per device,
# VMEM MiB, clock GHz, source of the clock. A link is the published bandwidth in both directions of
# 4 links (v5e: 1600 Gb/s, v6e: 800 GB/s) or 6 (v5p, tpu7x: 1200 GB/s).
_TABLE = (
    ("v4", 275, 32, 1200, 50, 3, 2, 2, 16, 1.05, "links and clock: Jouppi et al., ISCA 2023; "),
    ("v5e", 197, 16, 819, 50, 2, 1, 1, 128, 1.5, "clock: jax-ml.github.io/scaling-book; "),
    ("v5p", 459, 95, 2765, 100, 3, 2, 2, 64, 1.75, "clock: jax-ml.github.io/scaling-book; "),
    ("v6e", 918, 32, 1600, 100, 2, 1, 1, 128, None, ""),
    ("tpu7x", 2307, 192, 7380, 100, 3, 2, 1, 64, None, ""),
)

CHIPS: dict[str, Chip] = {
    name: Chip(
        name,
        peak * 1e12,
        capacity * GIB,
        bandwidth * GB,
        link * GB,
        *(axes, cores, shared),
        vmem * MIB,
        clock and clock * 1e9,
        f"docs.cloud.google.com/tpu/docs/{name}; {source}VMEM: jax",
    )
    for name, peak, capacity, bandwidth, link, axes, cores, shared, vmem, clock, source in _TABLE
}
"""By name, oldest first."""

DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""Chips by JAX's device kind."""
