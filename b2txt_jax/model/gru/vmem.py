"""How the Pallas recurrence is cut to fit a TPU's VMEM, the memory beside its compute units."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

LANES = 128
"""Numbers in a row of a tile: hidden units are padded to a multiple."""
_MOST_FRAMES = 8
"""Frames per step of the grid: a step's own cost (about 0.35 us) is then small beside them."""


@dataclasses.dataclass(frozen=True)
class Core:
    """What the kernels must know about a TPU device."""

    vmem_bytes: int
    """VMEM of one tensor core."""
    count: int = 1
    """Tensor cores that share a program ("megacore")."""


SMALLEST = Core(16 << 20)
"""Assumed where the chip is not known: fits every chip since v4."""

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
"""Of one tensor core by JAX's device kind; jax.experimental.pallas.tpu.get_tpu_info_for_chip."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the kernels cut [P, B, .]: `rows` of the batch by `frames` of 80 ms."""

    rows: int
    frames: int


def up(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def vmem_needed(blocks: Blocks, hidden: int, dtype: jnp.dtype) -> int:
    """Bytes of VMEM that the larger of the two kernels (backward) needs, an upper bound.

    The weight is held once; the blocks of frames twice, one being filled while the other is worked
    on; sums, gates and states of one frame in float32.
    """
    width, item = up(hidden, LANES), jnp.dtype(dtype).itemsize
    rows = up(blocks.rows, 16)
    weight = 3 * width * width * item
    streamed = 2 * 12 * blocks.frames * rows * width * item
    one_frame = 16 * rows * width * 4
    return weight + streamed + one_frame + (1 << 20)


def choose_blocks(
    batch: int, hidden: int, dtype: jnp.dtype, core: Core = SMALLEST
) -> Blocks | None:
    """The largest blocks that fit; None when not even the smallest do.

    Fewest blocks of rows first, since each goes through all frames by itself; cores that share a
    program take one each.
    """
    unit = 8 * 4 // jnp.dtype(dtype).itemsize
    rows = up(batch, unit)
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
    """Whether the kernels can run `batch` rows per device of `hidden` units in that much VMEM.

    Blocks of rows shrink to fit, so that above all the weight decides: 3 hidden^2 of `dtype`.
    """
    return choose_blocks(batch, hidden, dtype, Core(vmem_bytes)) is not None


def core_of(mesh: AbstractMesh | Mesh | None) -> Core:
    """The core that a program for this mesh runs on: of the mesh's devices, else of this process's
    first device; SMALLEST where neither is a TPU that is known."""
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    device = abstract.abstract_device if abstract is not None else None
    device = jax.devices()[0] if device is None else device
    vmem_bytes = VMEM_BYTES.get(device.device_kind)
    if vmem_bytes is None:
        return SMALLEST
    return Core(vmem_bytes, getattr(device, "num_cores", None) or 1)
