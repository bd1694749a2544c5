"""What does each lever bring? Trains variants of the small recipes and compares them.

Usage: b2txt simulate --out runs/levers/data --preset recordings --sessions 7 --train 180 --val 30 \
           --test 0
       python benchmarks/levers.py --data runs/levers/data --out runs/levers
       python benchmarks/levers.py --data runs/levers/data --out runs/levers --list

Existing runs are kept, and interrupted ones continue. Prints a table in Markdown and draws
OUT/levers.svg. FLOPs are those of matrix products and convolutions of one training step with its
backward pass, counted in the program before compilation, of trials of `BINS` bins.

PER is the mean of the last three validations. Intervals are 95 %, Student's t over seeds. A
difference is taken between runs of the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib
import numpy as np

from b2txt_jax.check_device.limits import product_flops
from b2txt_jax.config import Config, load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.sweep import mean_interval
from b2txt_jax.training.step import init_state, make_train_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BINS = 880
"""A whole number of patches near the recordings' mean trial of 875 bins."""
LAST = 3


@dataclasses.dataclass(frozen=True)
class Lever:
    """A variant of a recipe."""

    config: str
    against: str | None
    """The lever that it is compared with."""
    says: str
    settings: tuple[str, ...] = ()
    """Configuration keys and values, KEY=VALUE."""
    flops_of: str | None = None
    """Train for as many steps as cost what this lever's do."""


GRU, TRANSFORMER = "demo", "transformer_demo"
_SHARED = "model.day_layer=False"
LEVERS = {
    "gru": Lever(GRU, None, "GRU, one input layer for all days", (_SHARED,)),
    "gru_day": Lever(GRU, "gru", "GRU with day layers"),
    "gru_epochs": Lever(GRU, "gru", "shuffled epochs over all days", (_SHARED, "data.plan=epochs")),
    "gru_speckle": Lever(
        GRU,
        "gru",
        "speckled masking of features, 0.2",
        (_SHARED, "signal.augment=('white_noise','constant_offset','random_cut','speckle')"),
    ),
    "gru_per_label": Lever(
        GRU, "gru", "CTC divided by label length", (_SHARED, "train.ctc_per_label=True")
    ),
    "transformer": Lever(TRANSFORMER, "gru", "Transformer, at equal steps"),
    "transformer_flops": Lever(
        TRANSFORMER, "gru", "Transformer, at the GRU's FLOPs", flops_of="gru"
    ),
    "transformer_day": Lever(
        TRANSFORMER, "transformer", "Transformer with day layers", ("model.day_layer=True",)
    ),
    "transformer_no_mask": Lever(
        TRANSFORMER,
        "transformer",
        "without time masking",
        ("signal.augment=('white_noise','constant_offset')",),
    ),
    "transformer_speckle": Lever(
        TRANSFORMER,
        "transformer",
        "with speckled masking",
        ("signal.augment=('white_noise','constant_offset','time_mask','speckle')",),
    ),
    "transformer_context_5": Lever(
        TRANSFORMER,
        "transformer",
        "left context of 5 s",
        ("model.context=5.0", "model.context_most=5.0"),
    ),
    "transformer_patch_8": Lever(
        TRANSFORMER,
        "transformer",
        "patches of 8 bins",
        ("model.patch_size=8", "signal.time_mask_patch=8"),
    ),
    "transformer_sum": Lever(
        TRANSFORMER,
        "transformer",
        "CTC not divided by label length",
        ("train.ctc_per_label=False",),
    ),
    "transformer_ema": Lever(
        TRANSFORMER, "transformer", "EMA of the weights, 0.99", ("train.ema=0.99",)
    ),
}


def gflop_per_trial(config: Config, days: int) -> float:
    """Return 10^9 FLOPs of a training step per trial of BINS bins."""
    rows, bins = config.data.trials_per_day, BINS
    shapes = jax.eval_shape(lambda: init_state(config, days))
    batch = Batch(
        *(
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((rows, bins, config.data.feature_count), np.float32),
                ((rows,), np.int32),
                ((rows,), np.int32),
                ((rows, 64), np.int32),
                ((rows,), np.int32),
            )
        )
    )
    return product_flops(make_train_step(config, days), shapes, batch) / rows / 1e9


def overrides(lever: Lever, steps: int, seed: int, root: Path) -> list[str]:
    """Return `--config.KEY=VALUE` of a run."""
    pairs = [f"data.root={root}", f"train.seed={seed}", f"train.steps={steps}"]
    pairs += [f"optimizer.{key}={steps}" for key in ("decay_steps", "day_decay_steps")]
    pairs += [f"train.{key}={max(steps // 10, 1)}" for key in ("validate_every", "save_every")]
    return [f"--config.{pair}" for pair in (*pairs, *lever.settings)]


def train(lever: Lever, steps: int, seed: int, root: Path, workdir: Path) -> None:
    """Run `b2txt train`, which continues an existing run or does nothing if it is complete."""
    command = [sys.executable, "-m", "b2txt_jax.cli", "train", "--config", lever.config]
    command += ["--workdir", str(workdir), *overrides(lever, steps, seed, root)]
    print(f"{workdir.name}: {steps} steps", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def curve(workdir: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (steps, validation PER in %) and the seconds of training in all."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = [one for one in lines if one["kind"] == "val"]
    key = "ema_per" if "ema_per" in found[-1] else "per"
    seconds = sum(one["seconds"] for one in lines if one["kind"] == "train")
    return np.array([v["step"] for v in found]), 100 * np.array([v[key] for v in found]), seconds


def interval(values: np.ndarray) -> str:
    """Return mean and 95 % interval over seeds as text."""
    found = mean_interval(values.tolist())
    if found["low"] is None:
        return f"{found['mean']:+.1f}"
    return f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def picture(path: Path, runs: dict[str, list[Path]]) -> None:
    """Draw the validation PER of all runs over steps, one colour for each lever."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, (name, folders) in enumerate(runs.items()):
        for number, folder in enumerate(folders):
            steps, per, _ = curve(folder)
            axes.plot(steps, per, color=f"C{place % 10}", label=None if number else name)
    axes.set(xlabel="step", ylabel="validation PER, %", ylim=(0, 100))
    axes.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of `b2txt simulate`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--list", action="store_true", help="print the levers and their FLOPs only")
    args = parser.parse_args()
    root = args.data / "hdf5_data_final"
    days = sum(1 for one in root.iterdir() if one.is_dir())
    wanted = list(LEVERS if args.list else args.levers)
    wanted += [LEVERS[name].flops_of for name in wanted if LEVERS[name].flops_of]
    configs = {
        name: load_config(
            LEVERS[name].config,
            [f"--config.{pair}" for pair in LEVERS[name].settings],
        )
        for name in wanted
    }
    work = {name: gflop_per_trial(config, days) for name, config in configs.items()}
    steps = {
        name: round(
            args.steps * (work[LEVERS[name].flops_of] / work[name] if LEVERS[name].flops_of else 1)
        )
        for name in work
    }
    if args.list:
        for name, lever in LEVERS.items():
            print(f"{name:24} {work[name]:6.2f} GFLOP a trial  {steps[name]:5} steps  {lever.says}")
        return
    runs = {name: [args.out / f"{name}_{seed}" for seed in args.seeds] for name in args.levers}
    for number, seed in enumerate(args.seeds):
        for name, folders in runs.items():
            train(LEVERS[name], steps[name], seed, root, folders[number])
    found = {name: [curve(folder) for folder in folders] for name, folders in runs.items()}
    last = {
        name: np.array([per[-LAST:].mean() for _, per, _ in curves])
        for name, curves in found.items()
    }
    print("| | PER of each seed, % | compared with | points | GFLOP a trial | steps | s a step |")
    print("|---|---|---|---|---|---|---|")
    for name, values in last.items():
        lever = LEVERS[name]
        peer = lever.against if lever.against in last else None
        points = interval(values - last[peer]) if peer else ""
        each = " ".join(f"{value:.1f}" for value in values)
        pace = np.mean([seconds / steps[name] for _, _, seconds in found[name]])
        print(
            f"| {lever.says} | {each} | {peer or ''} | {points} | {work[name]:.1f} | {steps[name]} "
            f"| {pace:.2f} |"
        )
    picture(args.out / "levers.svg", runs)


if __name__ == "__main__":
    main()
