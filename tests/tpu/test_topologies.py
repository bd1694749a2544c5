"""Names of slices, what their chips can do, and the way out when the compiler is missing."""

from __future__ import annotations

import importlib.util
import math

import pytest
from jax._src.pallas.mosaic import tpu_info

from b2txt_jax.tpu.chips import CHIPS
from b2txt_jax.tpu.topologies import SHAPES, TopologyError, parse_topology, require_libtpu


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5e:4x4", 16, 16), ("V4:2x2x1", 4, 4), ("tpu7x:4x4x8", 128, 256), ("v6e:1x1", 1, 1)],
)
def test_a_name_gives_chips_and_devices(name: str, chips: int, devices: int) -> None:
    topology = parse_topology(name)
    assert (topology.chips, topology.devices) == (chips, devices)
    assert topology.name == name.lower()


@pytest.mark.parametrize("name", ["v3:2x2", "4x4", "", "gpu:8"])
def test_an_unknown_chip_is_answered_with_all_slices(name: str) -> None:
    with pytest.raises(TopologyError, match=r"v4: 2x2x1.*tpu7x: 2x2x1"):
        parse_topology(name)


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e:2x2x1", "v5e", "v4:2x2"])
def test_an_unknown_shape_is_answered_with_the_slices_of_that_chip(name: str) -> None:
    with pytest.raises(
        TopologyError, match=rf"{name[:3]}:.*needed one of|needed one of {name[:3]}"
    ):
        parse_topology(name)


def test_slices_go_from_four_or_fewer_to_256_chips_for_every_chip() -> None:
    for chip, shapes in SHAPES.items():
        sizes = [parse_topology(f"{chip}:{shape}").chips for shape in shapes]
        assert sizes == sorted(sizes)
        assert sizes[0] <= 4
        assert sizes[-1] == 256


def test_figures_of_chips_agree_with_those_that_jax_keeps() -> None:
    versions = {
        "v4": tpu_info.ChipVersion.TPU_V4,
        "v5e": tpu_info.ChipVersion.TPU_V5E,
        "v5p": tpu_info.ChipVersion.TPU_V5P,
        "v6e": tpu_info.ChipVersion.TPU_V6E,
        "tpu7x": tpu_info.ChipVersion.TPU_7X,
    }
    assert set(versions) == set(CHIPS)
    for name, chip in CHIPS.items():
        core = tpu_info.get_tpu_info_for_chip(versions[name], chip.cores_per_device)
        assert chip.vmem_bytes == core.vmem_capacity_bytes
        assert chip.cores == versions[name].num_physical_tensor_cores_per_chip
        assert chip.peak_flops == pytest.approx(chip.cores * core.bf16_ops_per_second, rel=0.01)
        assert chip.hbm_bytes == pytest.approx(chip.cores * core.hbm_capacity_bytes, rel=0.02)
        # The documentation and jax differ by an eighth for v5p.
        assert chip.hbm_bandwidth == pytest.approx(
            chip.cores * core.mem_bw_bytes_per_second, rel=0.13
        )


def test_published_clocks_give_the_published_peak() -> None:
    # Four 128 x 128 multipliers a core, two FLOPs each per cycle.
    for chip in CHIPS.values():
        if chip.clock_hz:
            assert chip.cores * 4 * 128 * 128 * 2 * chip.clock_hz == pytest.approx(
                chip.peak_flops, rel=0.01
            )


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("v5e:2x2", 2),  # a line on each axis
        ("v5e:4x4", 2),
        ("v5e:8x16", 3),  # the axis of 16 is a ring
        ("v5e:16x16", 4),
        ("v4:2x2x1", 2),
        ("v4:2x2x4", 3),
        ("v4:4x4x4", 6),  # a cube's axes are rings
    ],
)
def test_an_all_reduce_uses_the_links_that_the_slice_has(name: str, links: int) -> None:
    topology = parse_topology(name)
    assert topology.ring_bandwidth == links * topology.chip.link_bandwidth
    assert 1 <= links <= 2 * topology.chip.mesh_axes


def test_a_single_chip_needs_no_links() -> None:
    assert parse_topology("v5e:1x1").ring_bandwidth == math.inf


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_error_says_how_to_install_it() -> None:
    with pytest.raises(TopologyError, match=r"pip install '\.\[tpu\]' -c constraints\.txt"):
        require_libtpu()
