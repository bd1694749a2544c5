"""Does the simulated drift need calibration? Trains with day layers and with a shared one.

Prints, for each training seed,

- the PER of days decoded with their own day layer and with each other day's,
- the PER with one input layer shared by all days, after the same number of steps.

Usage: python benchmarks/drift.py --data runs/demo/data --out runs/drift
Existing runs are kept. About 7 minutes per run and core.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from b2txt_jax.data.loader import EvaluationData
from b2txt_jax.inference.run import Run, load_run
from b2txt_jax.metrics import ErrorRate, error_rate, greedy_decode
from b2txt_jax.training.step import make_eval_step


def train(config: Path, root: Path, workdir: Path, seed: int, day_layer: bool) -> None:
    """Run `b2txt train`, which continues an existing run or does nothing if it is complete."""
    command = [sys.executable, "-m", "b2txt_jax.cli", "train", "--config", str(config)]
    command += ["--workdir", str(workdir), f"--config.data.root={root}"]
    command += [f"--config.train.seed={seed}", f"--config.model.day_layer={day_layer}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def per_by_layer(model: Run) -> np.ndarray:
    """Return errors and lengths, int [days, layers, 2], of each day's trials with each layer."""
    sessions = model.config.data.sessions
    least = model.config.model.least_bins
    config = model.config
    data = EvaluationData(config.data, sessions, "val", least, labels=True, signal=config.signal)
    step = jax.jit(make_eval_step(model.config, len(sessions)))
    counts = np.zeros((len(sessions), len(sessions), 2), int)
    for _, trials, batch in data.batches():
        for layer in range(len(sessions)):
            output = step(model.params, batch._replace(day=np.full_like(batch.day, layer)))
            logits, frames = np.asarray(output.logits), np.asarray(output.frames)
            for row, trial in enumerate(trials):
                assert trial.labels is not None
                decoded = greedy_decode(logits[row, : frames[row]])
                rate = error_rate(trial.labels.tolist(), decoded.tolist())
                day = sessions.index(trial.ref.session)
                counts[day, layer] += rate.errors, rate.length
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of `b2txt simulate`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--config", type=Path, default=Path("configs/demo.py"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    root = args.data / "hdf5_data_final"
    names = {(seed, own): args.out / f"{'own' if own else 'shared'}_{seed}"
             for seed in args.seeds for own in (True, False)}  # fmt: skip
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda item: train(args.config, root, item[1], *item[0]), names.items()))

    print(f"{'seed':>5} {'own':>8} {'other':>8} {'ratio':>6} {'least of days':>14} {'shared':>8}")
    for seed in args.seeds:
        counts = per_by_layer(load_run(names[seed, True]))
        days = np.flatnonzero(counts[:, 0, 1])  # the first session has no validation trials
        own = counts[days, days].sum(0)
        crossed = counts[days].sum(1) - counts[days, days]
        ratios = (crossed[:, 0] / crossed[:, 1]) / (counts[days, days, 0] / counts[days, days, 1])
        other = crossed.sum(0)
        shared = per_by_layer(load_run(names[seed, False]))[:, 0].sum(0)
        rates = [ErrorRate(*map(int, pair)).rate or 0.0 for pair in (own, other, shared)]
        own_per, other_per, shared_per = (f"{100 * rate:>6.1f} %" for rate in rates)
        ratio = rates[1] / rates[0]
        print(f"{seed:>5} {own_per} {other_per} {ratio:>6.2f} {ratios.min():>14.2f} {shared_per}")


if __name__ == "__main__":
    main()
