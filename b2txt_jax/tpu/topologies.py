"""Slices of TPU pods by name, such as `v5e:4x4`, and JAX devices that represent their chips.

Programs can be compiled for these devices, but not run. libtpu, the compiler, runs on any x86
machine with Linux.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

from b2txt_jax.errors import UserError
from b2txt_jax.tpu.chips import CHIPS, Chip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SHAPES: dict[str, tuple[str, ...]] = {
    name: _FLAT if chip.mesh_axes == 2 else _CUBE for name, chip in CHIPS.items()
}
"""Slices of up to 256 chips that Google Cloud documents, smallest first."""

# Without these, libtpu on a machine without a TPU queries the cloud's metadata server for minutes,
# logs to stderr, and refuses a second process that compiles at the same time.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


_INSTALL = "from the checkout: pip install '.[tpu]' -c constraints.txt"


class TopologyError(UserError, ValueError):
    """An unknown slice, or a missing compiler."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: chips in a grid."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name for JAX and libtpu."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.chip.devices

    @property
    def ring_bandwidth(self) -> float:
        """Bytes/s that a chip can send in an all-reduce over the whole slice, in one direction.

        Each axis longer than one carries a ring. The ring uses both links of a chip if the ends of
        the axis are joined, and one otherwise. Ends are joined on axes of 16 chips (v5e, v6e) and
        in slices of whole 4x4x4 cubes (v4, v5p, tpu7x). Infinite for a single chip.
        """
        whole_cubes = all(size % 4 == 0 for size in self.shape)
        links = 0
        for size in self.shape:
            joined = size == 16 if self.chip.mesh_axes == 2 else whole_cubes
            links += 0 if size == 1 else 2 if joined else 1
        return links * self.chip.link_bandwidth if links else math.inf


def parse_topology(name: str) -> Topology:
    """Parse a name such as `v5e:4x4`.

    Raises:
      TopologyError: the slice is not known.
    """
    chip, _, shape = name.strip().lower().partition(":")
    if chip not in CHIPS:
        raise TopologyError(
            f"topology {name!r} names no known chip; needed CHIP:SHAPE, one of {known_topologies()}"
        )
    if shape not in SHAPES[chip]:
        listed = ", ".join(f"{chip}:{known}" for known in SHAPES[chip])
        raise TopologyError(
            f"topology {name!r} is no known slice of {chip}; needed one of {listed}"
        )
    return Topology(CHIPS[chip], tuple(map(int, shape.split("x"))))


def known_topologies() -> str:
    """List all names, for messages."""
    return "; ".join(f"{chip}: {', '.join(shapes)}" for chip, shapes in SHAPES.items())


def require_libtpu() -> None:
    """Raise TopologyError if libtpu is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "libtpu, the TPU compiler, is not installed; needed the tpu extra (684 MB, Linux on "
            f"x86, no TPU): {_INSTALL}"
        )


def topology_devices(topology: Topology) -> list[Any]:
    """Return JAX devices of a slice, to compile for.

    JAX uses only the CPU in this process afterwards: on a TPU VM, a compilation must not take the
    chips from a training.

    Raises:
      TopologyError: libtpu is missing or refuses the slice.
    """
    require_libtpu()
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if topology.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.chip.name == "v4":
        # One device per chip, as on a Cloud TPU VM. libtpu's default here is one per core.
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(
            f"libtpu cannot describe topology {topology.name}: {error}. Install the libtpu that "
            f"belongs to this jax: {_INSTALL}"
        ) from error
    devices = list(described.devices)
    if len(devices) != topology.devices:
        raise TopologyError(
            f"libtpu shows {len(devices)} devices for topology {topology.name}; needed "
            f"{topology.devices}: is this jax newer than b2txt-jax knows?"
        )
    return devices
