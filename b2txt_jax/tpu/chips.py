"""What each TPU chip can do, from what its maker has published.

Sources, by the letter that each figure carries:
  [a] Google Cloud documentation, one page per chip: docs.cloud.google.com/tpu/docs/v4, v5e, v5p,
      v6e, tpu7x: peak bfloat16 FLOP/s, HBM capacity and bandwidth, interconnect bandwidth.
  [b] jax 0.10.2, jax/_src/pallas/mosaic/tpu_info.py: VMEM and TensorCores.
  [c] Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer", ISCA 2023: v4's links
      (six of 50 GB/s each way) and clock.
  [d] Austin et al., "How to Scale Your Model", jax-ml.github.io/scaling-book: clocks of v5e and
      v5p, and which axes of a slice are closed to rings.
Clocks of v6e and tpu7x have not been published.
"""

from __future__ import annotations

import dataclasses

GB = 10**9
GIB = 2**30
MIB = 2**20
_DOCS = "docs.cloud.google.com/tpu/docs"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; a JAX device is the whole chip or one of its cores."""

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
    """Dimensions of the interconnect, 2 or 3; two links each."""
    cores: int
    """TensorCores [b]."""
    cores_per_device: int
    """TensorCores that JAX shows as one device on a Cloud TPU VM."""
    vmem_bytes: int
    """Per TensorCore [b]."""
    clock_hz: float | None
    """Of the TensorCore [c, d]; None: not published."""
    source: str
    """Where the figures are from, in a few words."""

    @property
    def devices(self) -> int:
        """JAX devices per chip."""
        return self.cores // self.cores_per_device


_CHIPS = (
    Chip(
        name="v4",
        peak_flops=275e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1200 * GB,
        link_bandwidth=50 * GB,
        mesh_axes=3,
        cores=2,
        cores_per_device=2,
        vmem_bytes=16 * MIB,
        clock_hz=1.05e9,
        source=f"{_DOCS}/v4; links and clock: Jouppi et al., ISCA 2023; VMEM: jax",
    ),
    Chip(
        name="v5e",
        peak_flops=197e12,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=819 * GB,
        link_bandwidth=50 * GB,  # 1600 Gb/s over 4 links
        mesh_axes=2,
        cores=1,
        cores_per_device=1,
        vmem_bytes=128 * MIB,
        clock_hz=1.5e9,
        source=f"{_DOCS}/v5e; clock: jax-ml.github.io/scaling-book; VMEM: jax",
    ),
    Chip(
        name="v5p",
        peak_flops=459e12,
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2765 * GB,
        link_bandwidth=100 * GB,  # 1200 GB/s over 6 links and two directions
        mesh_axes=3,
        cores=2,
        cores_per_device=2,
        vmem_bytes=64 * MIB,
        clock_hz=1.75e9,
        source=f"{_DOCS}/v5p; clock: jax-ml.github.io/scaling-book; VMEM: jax",
    ),
    Chip(
        name="v6e",
        peak_flops=918e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1600 * GB,
        link_bandwidth=100 * GB,  # 800 GB/s over 4 links and two directions
        mesh_axes=2,
        cores=1,
        cores_per_device=1,
        vmem_bytes=128 * MIB,
        clock_hz=None,
        source=f"{_DOCS}/v6e; VMEM: jax",
    ),
    Chip(
        name="tpu7x",
        peak_flops=2307e12,
        hbm_bytes=192 * GIB,
        hbm_bandwidth=7380 * GB,
        link_bandwidth=100 * GB,  # 1200 GB/s over 6 links and two directions
        mesh_axes=3,
        cores=2,
        cores_per_device=1,
        vmem_bytes=64 * MIB,
        clock_hz=None,
        source=f"{_DOCS}/tpu7x; VMEM: jax",
    ),
)

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}
"""By name, oldest first."""
