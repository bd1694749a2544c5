"""How much less does a training step compute where short trials share a row, and how much faster?

    python benchmarks/packing.py [--config nejm_baseline] [--steps 3] [--workdir runs/packing]

Lengths are like those of the published recordings. First an epoch's worth of batches is laid out
with and without packing: frames computed per frame of content, and how often each shape occurs.
Then whole training steps run on 2 CPU cores, alternately with and without in one process, on the
same trials of a small set of noise (0.6 GB, deleted afterwards). Wall-clock and processor time of
each are printed, and the ratio of trials per second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # before JAX counts the cores
os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import numpy as np
from input import write

from b2txt_jax.config import Config, load_config
from b2txt_jax.data.batches.shapes import choose, drawn_trials
from b2txt_jax.data.loader import TrainingData
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.typical import SESSIONS, typical_lengths
from b2txt_jax.training.step import init_state, make_train_step, model_of, packing_rules

TRIALS = 8072
"""Of an epoch of the published recordings."""


def computed(config: Config, devices: int) -> float:
    """Print the shapes of an epoch's batches. Return frames computed per frame of content."""
    lengths, frames = typical_lengths(), model_of(config, SESSIONS).frames
    rules = packing_rules(config, SESSIONS, devices)
    seed, steps = config.train.seed, config.train.steps
    shapes = choose(config.data, config.data.buckets, lengths, rules, seed, steps)
    every = content = bins_sent = bins_fullest = 0
    used: dict[str, int] = {}
    # Other steps than those that the shapes are chosen from.
    batches = -(-TRIALS // config.data.batch_rows)
    for step in range(10_000, 10_000 + batches):
        rows = drawn_trials(config.data, [len(day) for day in lengths], seed, step)
        trials = [lengths[day][trial] for day, trial in rows]
        bins = [length for length, _ in trials]
        if shapes.rules is not None:
            layout = shapes.lay_out(bins, [int(day) for day, _ in rows])
            shape = layout.shape
            held = np.where(layout.trial >= 0, np.array(bins)[layout.trial], 0)
            bins_sent += shape.rows * shape.bins
            bins_fullest += devices * int(held.reshape(devices, -1).sum(1).max())
        else:
            most = max(label for _, label in trials)
            shape = next(s for s in shapes.share if s.bins >= max(bins) and s.labels >= most)
        used[str(shape)] = used.get(str(shape), 0) + 1
        every += shape.rows * frames(shape.bins)
        content += sum(map(frames, bins))
    print(
        f"data.packing={config.data.packing}, {devices} device(s): {every / content:.3f} frames "
        f"computed per frame of content; {used}",
        flush=True,
    )
    if bins_sent:
        print(
            f"if every device received as many bins as the fullest has content: "
            f"{1 - bins_fullest / bins_sent:.1%} fewer bytes",
            flush=True,
        )
    return every / content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="nejm_baseline")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each")
    parser.add_argument("--workdir", type=Path, default=Path("runs/packing"))
    args = parser.parse_args()
    modes = {
        mode: load_config(
            args.config, ["--config.model.dtype=float32", f"--config.data.packing={mode}"]
        )
        for mode in ("off", "on")
    }
    for devices in (1, 4, 8, 16):
        for config in modes.values():
            computed(config, devices)
    if not args.steps:
        return
    folder = args.workdir / "bfloat16"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        write(folder, "bfloat16", 0.6)
        times = timed(modes, folder, args.steps)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for mode, (wall, cpu, loss) in times.items():
        print(
            f"data.packing={mode}: {wall:.1f} s and {cpu:.1f} s of processor time a step, "
            f"{modes[mode].data.batch_rows / wall:.2f} trials a second, last loss {loss:.5f}"
        )
    ratios = [times["off"][i] / times["on"][i] for i in (0, 1)]
    print(f"with packing {ratios[0]:.2f} times the trials a second, {ratios[1]:.2f} by processor")


def timed(
    modes: dict[str, Config], folder: Path, steps: int
) -> dict[str, tuple[float, float, float]]:
    """Return the median seconds, of the clock and of the processors, of a step, and the last
    loss."""
    sessions = open_folder(folder).sessions
    days, data, states, programs = len(sessions), {}, {}, {}
    for mode, config in modes.items():
        model = model_of(config, days)
        data[mode] = TrainingData(
            dataclasses.replace(config.data, root=str(folder)),
            sessions,
            config.model.least_bins,
            model.frames,
            packing_rules(config, days, 1),
            (config.train.seed, config.train.steps),
        )
        states[mode] = init_state(config, days)
        programs[mode] = jax.jit(make_train_step(config, days), donate_argnums=0)
    found: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in modes}
    for step in range(steps):
        for mode in modes:
            batch = data[mode].batch(modes[mode].train.seed, step)
            compiled = programs[mode].lower(states[mode], batch).compile()
            wall, cpu = time.perf_counter(), time.process_time()
            states[mode], metrics = compiled(states[mode], batch)
            loss = float(metrics.loss)
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            print(mode, batch.features.shape, *seconds, loss, flush=True)
            found[mode].append((*seconds, loss))
    return {
        mode: (
            statistics.median(wall for wall, *_ in one),
            statistics.median(cpu for _, cpu, _ in one),
            one[-1][2],
        )
        for mode, one in found.items()
    }


if __name__ == "__main__":
    main()
