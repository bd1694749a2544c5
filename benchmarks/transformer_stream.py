"""How long does one frame of the Transformer take in a stream, and does an hour of it change that?

    python benchmarks/transformer_stream.py [--minutes 60] [--out FILE]

The model of configs/transformer.py at full size, one row, 4 bins (80 ms) a call, on one core. The
weights are random: their values do not change the time. Prints the median, the 99th percentile and
the maximum of the first minute after the context is full and of the last one. On a busy machine
other work determines the wall time, so the CPU time of this process is printed too. The target is a
p99 below 5 ms. A frame reads all weights, 39 MB, so that the core's memory bandwidth bounds it: the
time that reading them alone takes is printed beside.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # before JAX counts the cores

import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.config import load_config
from b2txt_jax.model.interface import make_model

FRAMES_PER_MINUTE = 750
TARGET = 5.0


def figures(milliseconds: np.ndarray) -> dict[str, float]:
    """Return p50, p99 and the maximum."""
    values = np.percentile(milliseconds, [50, 99, 100]).round(2).tolist()
    return dict(zip(("p50", "p99", "max"), values, strict=True))


def main() -> None:
    """Measure and print. Exit with 1 if the target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=int, default=60, help="of the stream (default 60)")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    config = load_config("transformer")
    model = make_model(config.model, config.data.feature_count, 45)
    params = jax.jit(model.init)(jax.random.key(0))
    start, step = model.stream()
    step, state, day = jax.jit(step, donate_argnums=3), start(params, 1), jnp.zeros(1, int)
    rng = np.random.default_rng(0)
    bins = jnp.asarray(rng.normal(size=(1, 4, config.data.feature_count)), jnp.float32)
    full = config.model.frames_in(config.model.context)
    frames = full + max(args.minutes, 2) * FRAMES_PER_MINUTE
    times = np.zeros((frames, 2))
    for frame in range(frames):
        clocks = time.perf_counter(), time.process_time()
        logits, state = step(params, bins, day, state)
        logits.block_until_ready()
        times[frame] = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    assert step._cache_size() == 1
    result = {}
    for clock, column in (("wall", 0), ("CPU", 1)):
        of_clock = 1000 * times[full:, column]
        for name, part in (
            ("first", slice(FRAMES_PER_MINUTE)),
            ("last", slice(-FRAMES_PER_MINUTE, None)),
        ):
            found = result[f"{name} minute, {clock} time"] = figures(of_clock[part])
            print(f"{name} minute of {args.minutes}, {clock} time, ms: {found}")
    read = jax.jit(lambda params: [leaf.sum() for leaf in jax.tree.leaves(params)])
    alone = []
    for _ in range(FRAMES_PER_MINUTE):
        started = time.perf_counter()
        jax.block_until_ready(read(params))
        alone.append(1000 * (time.perf_counter() - started))
    result["weights alone, wall time"] = figures(np.array(alone[1:]))
    print(f"reading the weights alone, wall time, ms: {result['weights alone, wall time']}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    met = all(result[f"{name} minute, wall time"]["p99"] < TARGET for name in ("first", "last"))
    print(f"target (p99 < {TARGET:g} ms, wall time): {'met' if met else 'MISSED'}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
