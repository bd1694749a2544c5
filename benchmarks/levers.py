"""What does each lever bring? Trains variants of the small recipes and compares them.

Usage: b2txt simulate --out runs/levers/data --preset recordings --sessions 7 --train 180 --val 30 \
           --test 0 --electrodes 16 --difficulty 0 --min-words 4 --max-words 5 --speaking-rate 2
       python benchmarks/levers.py --data runs/levers/data --out runs/levers --steps 500 \
           --keys data.feature_count=128 data.trials_per_day=2 [--levers gru transformer] [--list]

Writes the learning curve of each run to OUT/LEVER_SEED.json and keeps those that are there. Prints
a table in Markdown and draws OUT/levers.svg. FLOPs are those of matrix products and convolutions of
one training step with its backward pass, counted in the program before compilation, of trials of
`BINS` bins.

PER is the mean of the last three of ten validations. Intervals are 95 %, Student's t over seeds. A
difference is taken between runs of the same seed. Seconds are processor time of a training step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from b2txt_jax.check_device.limits import product_flops
from b2txt_jax.config import Config, load_config
from b2txt_jax.data.loader import Batch, EvaluationData, TrainingData, configured_sessions
from b2txt_jax.data.reader import open_folder
from b2txt_jax.sweep import mean_interval
from b2txt_jax.training.step import init_state, make_eval_step, make_train_step, model_of
from b2txt_jax.training.validation import validate
from lm_server.files.atomic_file import replacing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BINS = 880
"""A whole number of patches near the recordings' mean trial of 875 bins."""
LAST, VALIDATIONS = 3, 10


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
    """Train for as many steps as cost what this lever's do, or a share of it."""
    share: float = 1


GRU, TRANSFORMER = "demo", "transformer_demo"
_SHARED = "model.day_layer=False"
_MASKED = "signal.augment=('white_noise','constant_offset','time_mask')"
_LONG = "model.patch_size=8", "signal.time_mask_patch=8", _MASKED
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
    "transformer": Lever(TRANSFORMER, "gru", "Transformer, patches of 8 bins", _LONG),
    "transformer_patch_4": Lever(
        TRANSFORMER, "transformer", "patches of 4 bins, as published", (_MASKED,)
    ),
    "transformer_flops": Lever(
        TRANSFORMER, "gru", "Transformer, at the GRU's FLOPs", _LONG, flops_of="gru"
    ),
    "transformer_quarter": Lever(
        TRANSFORMER,
        "gru",
        "Transformer, at a quarter of the GRU's FLOPs",
        _LONG,
        flops_of="gru",
        share=0.25,
    ),
    "transformer_day": Lever(
        TRANSFORMER, "transformer", "with day layers", (*_LONG, "model.day_layer=True")
    ),
    "transformer_no_mask": Lever(
        TRANSFORMER,
        "transformer",
        "without time masks",
        (*_LONG, "signal.augment=('white_noise','constant_offset')"),
    ),
    "transformer_speckle": Lever(
        TRANSFORMER,
        "transformer",
        "with speckled masking, 0.2",
        (*_LONG, "signal.augment=('white_noise','constant_offset','time_mask','speckle')"),
    ),
    "transformer_context_5": Lever(
        TRANSFORMER,
        "transformer",
        "left context of 5 s",
        (*_LONG, "model.context=5.0", "model.context_most=5.0"),
    ),
    "transformer_triple": Lever(
        TRANSFORMER,
        "transformer",
        "behind the triple GRU's noise model",
        (*_LONG, "model.name=triple_transformer", "model.noise_units=64", "model.units=64"),
    ),
    "transformer_sum": Lever(
        TRANSFORMER,
        "transformer",
        "CTC not divided by label length",
        (*_LONG, "train.ctc_per_label=False"),
    ),
    "transformer_ema": Lever(
        TRANSFORMER, "transformer", "EMA of the weights, 0.99", (*_LONG, "train.ema=0.99")
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


def config_of(lever: Lever, keys: list[str], steps: int | None = None) -> Config:
    """Return the configuration of a lever. `keys` are common to all levers."""
    pairs = list(keys)
    if steps is not None:
        pairs += [f"{key}={steps}" for key in _SCHEDULE]
    return load_config(lever.config, [f"--config.{pair}" for pair in (*pairs, *lever.settings)])


_SCHEDULE = "train.steps", "optimizer.decay_steps", "optimizer.day_decay_steps"


class Trained(NamedTuple):
    """The learning curve of a run."""

    steps: list[int]
    """At which it was validated."""
    per: list[float]
    """Validation PER in %, of the averaged weights where there are some."""
    seconds: float
    """Processor time of the training steps, without compilation and validation."""


def train(config: Config, seeds: list[int], files: list[Path]) -> None:
    """Train with each of the seeds whose file is missing, and write a `Trained` to it.

    All batches have one shape, and the seed is an argument, so that one program serves all.
    """
    missing = [pair for pair in zip(seeds, files, strict=True) if not pair[1].is_file()]
    if not missing:
        return
    sessions = configured_sessions(config.data)
    with open_folder(config.data.root, config.data.feature_count) as reader:
        lengths = [
            one
            for split in ("train", "val")
            for day in reader.lengths(sessions, split)
            for one in day
        ]
    most = [max(values) for values in zip(*lengths, strict=True)]
    bucket = -(-most[0] // 16) * 16, most[1]
    data = dataclasses.replace(config.data, buckets=(bucket,))
    config = dataclasses.replace(config, data=data)
    model = model_of(config, len(sessions))
    least = config.model.least_bins
    training = TrainingData(data, sessions, least, model.frames)
    validation = EvaluationData(data, sessions, "val", least, labels=True)
    step = jax.jit(make_train_step(config, len(sessions)), donate_argnums=0)
    evaluate = jax.jit(make_eval_step(config, len(sessions), validating=True))
    every = max(config.train.steps // VALIDATIONS, 1)
    for seed, file in missing:
        own = dataclasses.replace(config.train, seed=seed)
        state = init_state(dataclasses.replace(config, train=own), len(sessions))
        steps, per, seconds = [], [], 0.0
        for number in range(1, config.train.steps + 1):
            batch = training.batch(seed, number - 1)
            started = time.process_time()
            state, metrics = step(state, batch, jnp.int32(seed))
            metrics.loss.block_until_ready()
            if number > 1:  # The first one compiles.
                seconds += time.process_time() - started
            if number % every == 0:
                weights = state.params if state.ema is None else state.ema
                steps.append(number)
                per.append(100 * validate(evaluate, weights, validation).per.rate)
                print(f"{file.stem}: step {number}, {per[-1]:.1f} %, {seconds:.0f} s", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as unfinished:
            unfinished.write_text(json.dumps(Trained(steps, per, seconds)._asdict()))


def interval(values: np.ndarray) -> str:
    """Return mean and 95 % interval over seeds as text."""
    found = mean_interval(values.tolist())
    if found["low"] is None:
        return f"{found['mean']:+.1f}"
    return f"{found['mean']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})"


def picture(path: Path, runs: dict[str, list[Trained]]) -> None:
    """Draw the validation PER of all runs over steps, one colour for each lever."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, (name, curves) in enumerate(runs.items()):
        for number, curve in enumerate(curves):
            label = None if number else name
            axes.plot(curve.steps, curve.per, color=f"C{place % 10}", label=label)
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
    parser.add_argument(
        "--keys", nargs="*", default=[], help="configuration keys of all levers, KEY=VALUE"
    )
    parser.add_argument("--list", action="store_true", help="print the levers and their FLOPs only")
    args = parser.parse_args()
    root = args.data / "hdf5_data_final"
    days = sum(1 for one in root.iterdir() if one.is_dir())
    keys = [f"data.root={root}", *args.keys]
    wanted = list(args.levers)
    wanted += [LEVERS[name].flops_of for name in wanted if LEVERS[name].flops_of]
    work = {name: gflop_per_trial(config_of(LEVERS[name], keys), days) for name in wanted}
    steps = {
        name: round(
            args.steps
            * LEVERS[name].share
            * (work[LEVERS[name].flops_of] / work[name] if LEVERS[name].flops_of else 1)
        )
        for name in work
    }
    if args.list:
        for name in args.levers:
            says = LEVERS[name].says
            print(f"{name:24} {work[name]:6.2f} GFLOP a trial  {steps[name]:5} steps  {says}")
        return
    files = {
        name: [args.out / f"{name}_{seed}.json" for seed in args.seeds] for name in args.levers
    }
    made = {"data": str(root.resolve()), "steps": args.steps, "keys": args.keys}
    note = args.out / "made.json"
    if note.is_file() and json.loads(note.read_text()) != made:
        parser.error(
            f"{args.out} holds curves made with {note.read_text()}; these are made with "
            f"{json.dumps(made)}: give another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(made))
    for name, of_lever in files.items():
        train(config_of(LEVERS[name], keys, steps[name]), args.seeds, of_lever)
    found = {
        name: [Trained(**json.loads(file.read_text())) for file in of_lever]
        for name, of_lever in files.items()
    }
    last = {
        name: np.array([np.mean(curve.per[-LAST:]) for curve in curves])
        for name, curves in found.items()
    }
    print("| | PER of each seed, % | compared with | points | GFLOP a trial | steps | s a step |")
    print("|---|---|---|---|---|---|---|")
    for name, values in last.items():
        lever = LEVERS[name]
        peer = lever.against if lever.against in last else None
        points = interval(values - last[peer]) if peer else ""
        each = " ".join(f"{value:.1f}" for value in values)
        pace = np.mean([curve.seconds / steps[name] for curve in found[name]])
        print(
            f"| {lever.says} | {each} | {peer or ''} | {points} | {work[name]:.2f} | {steps[name]} "
            f"| {pace:.2f} |"
        )
    picture(args.out / "levers.svg", found)


if __name__ == "__main__":
    main()
