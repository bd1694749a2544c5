"""Counts the cycles per frame of the recurrence's TPU kernels, without a TPU.

Run:  python scripts/kernel_cycles.py v5e:2x2 2 16 64      (slice, rows of a device)

Compiles the kernels of 768 units in bfloat16, with several trials in a row, for one device of the
slice, has libtpu write its schedule, and counts the bundles of the loop over frames: one a cycle,
but for stalls. Prints lines for SCHEDULED in b2txt_jax/tpu/kernel_cycles.py. Needs the tpu extra,
about half a minute of one core and 0.3 GB of disk for each number of rows.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FRAMES = 100
_BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s+(\w\w)?\s*:\s*(>*)")


def frame_cycles(schedule: str) -> int:
    """Return the bundles of the innermost loop with the most products."""
    loops: list[list[int]] = []  # [bundles, products]
    for line in schedule.splitlines():
        found = _BUNDLE.match(line)
        if found is None or len(found[2]) < 2:
            continue
        if found[1] == "LB" or not loops:
            loops.append([0, 0])
        loops[-1][0] += 1
        loops[-1][1] += line.count("vmatpush")
    return max(loops, key=lambda loop: loop[1])[0]


def compile_kernels(topology: str, rows: int) -> None:
    """Compile a layer forward and backward for a device of a slice."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from b2txt_jax.model.gru.pallas import gru_recurrence_pallas
    from b2txt_jax.tpu.kernel_cycles import UNITS
    from b2txt_jax.tpu.topologies import parse_topology, topology_devices
    from b2txt_jax.training.sharding import make_mesh

    devices = topology_devices(parse_topology(topology))
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = make_mesh(1, devices[:1])

    def loss(*arrays: jax.Array) -> jax.Array:
        *inputs, begins = arrays
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            states = gru_recurrence_pallas(*inputs, jnp.dtype("bfloat16"), begins)
        return states.astype(jnp.float32).sum()

    sizes = (FRAMES, rows, 3 * UNITS), (rows, UNITS), (3 * UNITS, UNITS), (3 * UNITS,)
    kinds = jnp.bfloat16, jnp.float32, jnp.float32, jnp.float32
    whole = NamedSharding(mesh, P())
    shapes = [
        jax.ShapeDtypeStruct(size, kind, sharding=whole)
        for size, kind in (*zip(sizes, kinds, strict=True), ((FRAMES, rows), jnp.bool_))
    ]
    jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*shapes).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("topology", help="such as v5e:2x2")
    parser.add_argument("rows", type=int, nargs="+", help="of a device")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_kernels(args.topology, args.rows[0])
        return
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            subprocess.run(
                [sys.executable, __file__, args.topology, str(rows), "--compile"],
                env={**os.environ, "LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
                check=True,
            )
            cycles = []
            for kernel in ("gru_forward", "gru_backward"):
                files = Path(folder).glob(f"*{kernel}*-final_bundles.txt")
                texts = [f.read_text() for f in files if "schedule" not in f.name]
                if not texts:
                    sys.exit(f"libtpu wrote no schedule of {kernel}; needed one in {folder}")
                cycles.append(frame_cycles(texts[0]))
        print(f"{args.topology}: {rows}: ({cycles[0]}, {cycles[1]}),", flush=True)


if __name__ == "__main__":
    main()
