"""Blocks of the Pallas recurrence that fit a TPU's VMEM, the memory beside its compute units."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

LANES = 128
"""Numbers in a row of a tile: hidden units are padded to a multiple."""
_MOST_FRAMES = 8
"""Frames per step of the grid, so that a step's own cost (about 0.35 us) is small beside them."""


@dataclasses.dataclass(frozen=True)
class Core:
    """Properties of a TPU device that decide the blocks."""

    vmem_bytes: int
    """VMEM of one tensor core."""
    count: int = 1
    """Tensor cores that share a program ("megacore")."""


SMALLEST = Core(16 << 20)
"""Assumed for an unknown chip. Fits every chip since v4."""

VMEM_BYTES = {
    "TPU v4": 16 << 20,
    "TPU v5": 64 << 20,
    "TPU v5p": 64 << 20,
    "TPU v5 lite": 128 << 20,
    "TPU v5e": 128 << 20,
    "TPU v6 lite": 128 << 20,
    "TPU v6e": 128 << 20,
    "TPU7x": 64 << 20,
}
"""VMEM of one tensor core by JAX's device kind, from
jax.experimental.pallas.tpu.get_tpu_info_for_chip."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernels cut [P, B, .]: `rows` of the batch by `frames` of 80 ms."""

    rows: int
    frames: int


def up(size: int, unit: int) -> int:
    """Round `size` up to a multiple of `unit`."""
    return -(-size // unit) * unit


def vmem_needed(blocks: Blocks, hidden: int, dtype: jnp.dtype) -> int:
    """Return an upper bound of the VMEM, in bytes, of the larger kernel (backward).

    The weight is held once. Blocks of frames are held twice: one is filled while the other is
    computed. The mark of a row where a trial begins takes a whole row of a tile. Sums, gates and
    states of one frame are float32.
    """
    width, item = up(hidden, LANES), jnp.dtype(dtype).itemsize
    rows = up(blocks.rows, 16)
    weight = 3 * width * width * item
    streamed = 2 * blocks.frames * rows * (12 * width * item + 4 * LANES)
    one_frame = 16 * rows * width * 4
    return weight + streamed + one_frame + (1 << 20)


def choose_blocks(
    batch: int, hidden: int, dtype: jnp.dtype, core: Core = SMALLEST
) -> Blocks | None:
    """Return the largest blocks that fit. None when not even the smallest do.

    Fewest blocks of rows first, since each goes through all frames by itself. Cores that share a
    program take one each. Up to 8 rows are a block as they are, more are padded to whole tiles.
    """
    unit = 8 * 4 // jnp.dtype(dtype).itemsize
    rows = batch if batch <= 8 else up(batch, unit)
    if core.count > 1 and rows > unit:
        rows = up(-(-rows // core.count), unit)
    while True:
        frames = _MOST_FRAMES
        while frames:
            blocks = Blocks(rows, frames)
            if vmem_needed(blocks, hidden, dtype) <= core.vmem_bytes:
                return blocks
            frames //= 2
        if rows <= unit:
            return None
        rows = up(rows // 2, unit)


def fits_vmem(batch: int, hidden: int, dtype: jnp.dtype, vmem_bytes: int) -> bool:
    """Return whether the kernels can run `batch` rows per device of `hidden` units in that VMEM.

    Blocks of rows shrink to fit, so the weight decides most: 3 hidden^2 of `dtype`.
    """
    return choose_blocks(batch, hidden, dtype, Core(vmem_bytes)) is not None


def core_of(mesh: AbstractMesh | Mesh | None) -> Core:
    """Return the core of the mesh's devices, else of this process's first device. SMALLEST where
    neither is a known TPU."""
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    device = abstract.abstract_device if abstract is not None else None
    device = jax.devices()[0] if device is None else device
    vmem_bytes = VMEM_BYTES.get(device.device_kind)
    if vmem_bytes is None:
        return SMALLEST
    return Core(vmem_bytes, getattr(device, "num_cores", None) or 1)
