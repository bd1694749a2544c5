"""What do the differences from NEJM change? Measures those that are visible in simulated sessions.

Trains, for each seed, as this package does (own_SEED) and with noise in the padding as in NEJM
(noise_SEED), and prints

- padding: loss and logits of validation trials by how far they are padded, PER of both trainings,
- smoothing: PER with "same" and "valid" padding in evaluation,
- alignment: trials that CTC cannot align, and draws that a random cut makes impossible,
- validation loss: mean over trials, and means over batches of their means,
- steps whose loss or gradient was not finite, and the PER's spread over seeds.

Usage: python benchmarks/differences.py
Existing runs are kept. About 6 minutes per run and core, and 1 per seed for the rest.
"""

import argparse
import dataclasses
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from b2txt_jax.config import Config, SignalConfig, load_config
from b2txt_jax.data.batches.plan import plan
from b2txt_jax.data.loader import EvaluationData
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import TrialRef, frames_needed
from b2txt_jax.inference.run import Run, load_run
from b2txt_jax.metrics import error_rate, greedy_decode, total
from b2txt_jax.segments import inside
from b2txt_jax.signal.augment import augment
from b2txt_jax.training import step as step_module
from b2txt_jax.training.loop import train
from b2txt_jax.training.step import make_eval_step, model_of, step_keys
from b2txt_jax.training.validation import validate

PADDINGS = (1, 2, 4, 8, 160)
"""Bins of noise that follow a trial."""
LAST_FRAMES = 4
EVAL_BATCH_SIZES = (16, 64)


def augment_like_nejm(
    key: jax.Array, features: jax.Array, bins: jax.Array, signal: SignalConfig
) -> tuple[jax.Array, jax.Array]:
    """Augment with the same draws as `augment`, but add noise to the padding too."""
    length = features.shape[1]
    noisy, kept = augment(key, features, jnp.full_like(bins, length), signal)
    bins = jnp.maximum(bins - (length - kept), 0)
    # NEJM: batches are padded to their longest trial, not to a bucket. No noise follows that trial.
    longest = jnp.full_like(bins, bins.max())
    return jnp.where(inside(None, longest, length)[..., None], noisy, 0), bins


def train_run(config: Config, workdir: Path, like_nejm: bool) -> None:
    """Train, which continues an existing run or does nothing if it is complete."""
    if like_nejm:
        assert step_module.augment is augment  # otherwise replacing it has no effect
        step_module.augment = augment_like_nejm
    train(config, workdir, Console(quiet=True))


def train_all(config_file: Path, root: Path, out: Path, seeds: Sequence[int]) -> None:
    """Train the missing runs, each in its own process: one kind replaces part of the step."""
    context = multiprocessing.get_context("spawn")
    for seed in seeds:
        overrides = [f"--config.data.root={root}", f"--config.train.seed={seed}"]
        config = load_config(config_file, overrides)
        for name, like_nejm in ((f"own_{seed}", False), (f"noise_{seed}", True)):
            child = context.Process(target=train_run, args=(config, out / name, like_nejm))
            child.start()
            child.join()
            if child.exitcode:
                raise SystemExit(f"training {out / name} failed with exit status {child.exitcode}")


def metrics_of(workdir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def best_per(workdir: Path) -> float:
    return float(min(entry["per"] for entry in metrics_of(workdir, "val")))


def evaluation_data(config: Config) -> EvaluationData:
    data = config.data
    least = config.model.least_bins
    return EvaluationData(data, data.sessions, "val", least, True, config.signal)


def eval_step_of(config: Config) -> Any:
    return jax.jit(make_eval_step(config, len(config.data.sessions)))


def print_padding(model: Run, seed: int) -> None:
    """Print the effect of noise after a trial. The noise within the trial stays the same."""
    signal = dataclasses.replace(model.config.signal, random_cut=0)
    step = eval_step_of(model.config)
    add_noise = jax.jit(lambda key, x, bins: augment(key, x, bins, signal)[0])
    outputs: dict[str, list[tuple[float, np.ndarray]]] = {}
    labels: list[list[int]] = []
    for index, (_, trials, batch) in enumerate(evaluation_data(model.config).batches()):
        labels += [trial.labels.tolist() for trial in trials if trial.labels is not None]
        narrow = batch.features.shape[1]
        length = narrow + max(PADDINGS)
        wide = np.pad(np.asarray(batch.features), ((0, 0), (0, max(PADDINGS)), (0, 0)))
        everywhere = np.full(len(wide), length, np.int32)
        noisy = add_noise(jax.random.fold_in(jax.random.key(seed), index), wide, everywhere)
        masks = {
            p: inside(None, jnp.asarray(batch.bins) + p, length)[..., None] for p in (0, *PADDINGS)
        }
        cases = {"zeros": jnp.where(masks[0], noisy, 0)[:, :narrow]}
        cases["more zeros"] = jnp.where(masks[0], noisy, 0)
        cases |= {f"{p} of noise": jnp.where(masks[p], noisy, 0) for p in PADDINGS}
        for name, x in cases.items():
            found = jax.tree.map(np.asarray, step(model.params, batch._replace(features=x)))
            for row in range(len(trials)):
                logits = found.logits[row, : found.frames[row]]
                outputs.setdefault(name, []).append((float(found.loss[row]), logits))

    print(f"\npadding, seed {seed}: change against padding with zeros, %")
    print(f"{'':<13}{'loss':>9}{'largest':>9}{'   logits, from the last frame':<36}{'PER':>8}")
    losses = np.array([loss for loss, _ in outputs["zeros"]])
    ends = np.stack([logits[-LAST_FRAMES:] for _, logits in outputs["zeros"]])
    for name, rows in outputs.items():
        loss = 100 * np.abs(np.array([loss for loss, _ in rows]) / losses - 1)
        change = np.linalg.norm(np.stack([row[-LAST_FRAMES:] for _, row in rows]) - ends, axis=2)
        by_frame = 100 * (change / np.linalg.norm(ends, axis=2)).mean(0)[::-1]
        decoded = [greedy_decode(logits).tolist() for _, logits in rows]
        per = total(error_rate(*pair) for pair in zip(labels, decoded, strict=True)).rate or 0
        listed = "".join(f"{value:>9.2g}" for value in (loss.mean(), loss.max(), *by_frame))
        print(f"{name:<13}{listed}{100 * per:>8.2f}")


def print_smoothing(model: Run, seed: int) -> None:
    for padding in ("same", "valid"):
        signal = dataclasses.replace(model.config.signal, eval_padding=padding)
        config = dataclasses.replace(model.config, signal=signal)
        result = validate(eval_step_of(config), model.params, evaluation_data(config))
        print(f"smoothing, seed {seed}: {padding:<5} PER {100 * (result.per.rate or 0):.2f} %")


def print_alignment(config: Config, seeds: Sequence[int]) -> None:
    reader = open_folder(config.data.root, config.data.feature_count)
    refs = reader.trials(config.data.sessions, "train")
    needed = {ref: frames_needed(reader.read(ref).labels) for ref in refs}  # type: ignore[arg-type]

    model = model_of(config, len(config.data.sessions))

    def spare(ref: TrialRef, cut: int) -> int:
        return model.frames(ref.bins - cut) - needed[ref]

    largest_cut = max(config.signal.random_cut - 1, 0)
    tightest = min(refs, key=lambda ref: spare(ref, 0))
    refused = sum(spare(ref, 0) < 0 for ref in refs)
    at_risk = sum(spare(ref, largest_cut) < 0 for ref in refs) - refused
    print(f"\nalignment: {refused} of {len(refs)} training trials refused, {at_risk} impossible ")
    print(f"  after a cut of {largest_cut} bins; the tightest needs {needed[tightest]} frames and")
    print(f"  has {spare(tightest, 0)} to spare")
    of_day = [[ref for ref in refs if ref.session == name] for name in config.data.sessions]
    counts = [len(day) for day in of_day]
    width = 2 * config.signal.random_cut + 1
    blank, bins = jnp.zeros((1, width, 1)), jnp.full((1,), width)
    kept = jax.jit(lambda seed, s: augment(step_keys(seed, s).augment, blank, bins, config.signal))
    for seed in seeds:
        draws, impossible = 0, 0
        for s in range(config.train.steps):
            cut = width - int(kept(seed, s)[1][0])
            rows = plan(seed, s, counts, config.data.days_per_batch, config.data.trials_per_day)
            draws += len(rows)
            impossible += sum(spare(of_day[day][trial], cut) < 0 for day, trial in rows)
        print(f"  seed {seed}: {impossible} of {draws} draws in {config.train.steps} steps")


def print_validation_loss(model: Run, seed: int) -> None:
    config = model.config
    step = eval_step_of(config)
    data = evaluation_data(config)
    losses, ours = np.zeros(len(data.refs)), []
    for indices, _, batch in data.batches():
        losses[indices] = np.asarray(step(model.params, batch).loss)[: len(indices)]
        ours.append(indices)
    groupings = {f"{config.data.eval_batch_size} trials of a bucket": ours}
    for size in EVAL_BATCH_SIZES:
        # NEJM's batches hold trials of one day, in the file's order.
        groupings[f"{size} trials of a day"] = [
            day[start : start + size]
            for name in config.data.sessions
            for day in [[i for i, ref in enumerate(data.refs) if ref.session == name]]
            for start in range(0, len(day), size)
        ]
    print(f"validation loss, seed {seed}: {losses.mean():.4f} over trials")
    for name, groups in groupings.items():
        mean = np.mean([losses[group].mean() for group in groups])
        change = 100 * (mean / losses.mean() - 1)
        print(f"  {mean:.4f} ({change:+.2f} %) over {len(groups)} batches of up to {name}")


def print_finite(runs: Sequence[Path]) -> None:
    # A logged value is a mean over steps. It is finite only if every step was.
    found = [(run, entry) for run in runs for entry in metrics_of(run, "train")]
    bad = sum(not np.isfinite([e["loss"], e["gradient_norm"]]).all() for _, e in found)
    infeasible = sum(entry["infeasible"] for _, entry in found)
    steps = sum(max(entry["step"] for run, entry in found if run == name) for name in runs)
    print(f"\nlogs of {len(runs)} runs, {steps} steps: {bad} entries with a loss or gradient norm ")
    print(f"  that is not finite, {infeasible} rows left out since nothing can align them")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=Path("runs/demo/data"), help="folder of `b2txt simulate`")
    add("--config", type=Path, default=Path("configs/demo.py"))
    add("--out", type=Path, default=Path("runs/differences"), help="folder for the runs")
    add("--seeds", type=int, nargs="+", default=[10, 11, 12])
    args = parser.parse_args()
    train_all(args.config, args.data / "hdf5_data_final", args.out, args.seeds)

    own = {seed: args.out / f"own_{seed}" for seed in args.seeds}
    noise = {seed: args.out / f"noise_{seed}" for seed in args.seeds}
    for name, runs in (("ours", own), ("noise in the padding", noise)):
        rates = 100 * np.array([best_per(run) for run in runs.values()])
        spread = rates.std(ddof=1) if len(rates) > 1 else float("nan")
        listed = " / ".join(f"{rate:.2f}" for rate in rates)
        print(f"PER, {name}: {listed} %, mean {rates.mean():.2f}, standard deviation {spread:.2f}")
    models = {seed: load_run(run) for seed, run in own.items()}
    for measure in (print_padding, print_smoothing, print_validation_loss):
        for seed, model in models.items():
            measure(model, seed)
    print_alignment(next(iter(models.values())).config, args.seeds)
    print_finite([*own.values(), *noise.values()])


if __name__ == "__main__":
    main()
