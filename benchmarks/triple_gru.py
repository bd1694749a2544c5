"""Does adversarial denoising help? The triple GRU against two baselines on bursts of noise.

Trains on simulated sessions with movement-like bursts that channels share, for each seed:

- baseline: the decoder of configs/demo.py, as large as the triple GRU's clean path,
- wide: the same with as many units as give it the triple GRU's number of parameters,
- triple: configs/triple_gru_small.py.

Prints the validation PER of each with a 95 % confidence interval (bootstrap over seeds and trials)
and the differences, and draws a picture.

Usage: python benchmarks/triple_gru.py --out runs/triple --picture docs/triple_gru.png
Existing runs are kept, and interrupted ones continue. On 2 quiet cores about 4 minutes for a
baseline, 10 for each of the others.
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

from b2txt_jax.config import Config, load_config
from b2txt_jax.inference.run import load_run
from b2txt_jax.metrics import error_rate, greedy_decode
from b2txt_jax.model.interface import make_model, parameter_count
from b2txt_jax.simulation.plan import SimulationSettings
from b2txt_jax.simulation.write import simulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = ("baseline", "wide", "triple")
_DAYS = 6


def parameters(config: Config, **changes: int) -> int:
    """Count the parameters of a configuration's model for the benchmark's sessions."""
    model = dataclasses.replace(config.model, **changes)
    features = config.data.feature_count
    shapes = jax.eval_shape(lambda: make_model(model, features, _DAYS).init(jax.random.key(0)))
    return parameter_count(shapes)


def equal_units(baseline: Config, triple: Config) -> int:
    """Return the units with which the baseline has about as many parameters as the triple GRU."""
    wanted = parameters(triple)
    return min(range(64, 2048, 4), key=lambda n: abs(parameters(baseline, units=n) - wanted))


def train(kind: str, units: int, seed: int, steps: int, root: Path, workdir: Path) -> None:
    """Run `b2txt train`, which continues an existing run or does nothing if it is complete."""
    name = "triple_gru_small" if kind == "triple" else "demo"
    command = [sys.executable, "-m", "b2txt_jax.cli", "train", "--config", f"configs/{name}.py"]
    command += ["--workdir", str(workdir), f"--config.data.root={root}"]
    command += [f"--config.train.seed={seed}", f"--config.train.steps={steps}"]
    command += [f"--config.optimizer.{key}={steps}" for key in ("decay_steps", "day_decay_steps")]
    command += [f"--config.model.units={units}"] if kind == "wide" else []
    print(f"{workdir.name}: training", flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def counts(workdir: Path) -> np.ndarray:
    """Return errors and lengths of every validation trial, int [trials, 2]."""
    found = []
    for trial in load_run(workdir).logits("val"):
        assert trial.labels is not None
        rate = error_rate(trial.labels.tolist(), greedy_decode(trial.logits).tolist())
        found.append((rate.errors, rate.length))
    return np.array(found)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def bootstrap(all_counts: dict[str, np.ndarray], draws: int = 4000) -> dict[str, np.ndarray]:
    """Return the PER of each kind [draws], with seeds and trials resampled alike for all kinds.

    Counts are [seeds, trials, 2].
    """
    rng = np.random.default_rng(0)
    seeds, trials, _ = all_counts["baseline"].shape
    rates: dict[str, list[float]] = {kind: [] for kind in all_counts}
    for _ in range(draws):
        row = rng.integers(seeds, size=seeds)[:, None]
        column = rng.integers(trials, size=trials)[None]
        for kind, values in all_counts.items():
            errors, length = values[row, column].sum((0, 1))
            rates[kind].append(errors / length)
    return {kind: np.array(values) for kind, values in rates.items()}


def logged(workdir: Path, kind: str, key: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of a run's metrics."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    pairs = [(one["step"], one[key]) for one in lines if one["kind"] == kind and key in one]
    return [step for step, _ in pairs], [value for _, value in pairs]


def picture(path: Path, rates: dict[str, np.ndarray], folders: dict[str, list[Path]]) -> None:
    """Draw PER with intervals, PER over training, and the adversary's PER."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for place, kind in enumerate(KINDS):
        low, high = interval(100 * rates[kind])
        mean = 100 * rates[kind].mean()
        left.errorbar(place, mean, [[mean - low], [high - mean]], fmt="o", capsize=6)
        for number, folder in enumerate(folders[kind]):
            steps, per = logged(folder, "val", "per")
            label = kind if number == 0 else None
            middle.plot(steps, 100 * np.array(per), color=f"C{place}", label=label)
    left.set_xticks(range(len(KINDS)), KINDS)
    left.set(ylabel="validation PER, %", title="with 95 % intervals", xlim=(-0.5, 2.5))
    middle.set(xlabel="step", ylabel="validation PER, %", title="over training")
    middle.legend()
    for folder in folders["triple"]:
        right.plot(*logged(folder, "val", "noisy_per"), color="C3")
    right.plot(*logged(folders["triple"][0], "train", "reversal"), "k--", label="lambda")
    right.axhline(1.0, color="gray", linewidth=0.8)
    right.set(xlabel="step", ylabel="PER of the noise", title="what the adversary reads")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/triple"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--bursts", type=float, default=1.0)
    parser.add_argument("--picture", type=Path, default=Path("runs/triple/triple_gru.png"))
    args = parser.parse_args()
    data = args.out / f"data_{args.bursts:g}"
    # As short as the demo's trials, which the buckets of both configurations are for.
    settings = SimulationSettings(
        sessions=_DAYS, bursts=args.bursts, max_words=8, speaking_rate=1.4
    )
    simulate(data, settings)
    baseline, triple = load_config("configs/demo.py"), load_config("configs/triple_gru_small.py")
    wide = equal_units(baseline, triple)
    sizes = {
        "baseline": parameters(baseline),
        "wide": parameters(baseline, units=wide),
        "triple": parameters(triple),
    }
    folders = {
        kind: [args.out / f"{kind}_{args.bursts:g}_{seed}" for seed in args.seeds] for kind in KINDS
    }
    for number, seed in enumerate(args.seeds):
        for kind in KINDS:
            train(kind, wide, seed, args.steps, data / "hdf5_data_final", folders[kind][number])
    found = {kind: np.stack([counts(folder) for folder in folders[kind]]) for kind in KINDS}
    rates = bootstrap(found)
    print(f"{'':>9} {'parameters':>11} {'PER of each seed, %':>24} {'mean':>6}  95 % interval")
    for kind in KINDS:
        by_seed = [100 * one[:, 0].sum() / one[:, 1].sum() for one in found[kind]]
        low, high = interval(100 * rates[kind])
        listed = " ".join(f"{value:6.2f}" for value in by_seed)
        print(
            f"{kind:>9} {sizes[kind]:>11,} {listed:>24} {np.mean(by_seed):6.2f}"
            f"  {low:.2f} to {high:.2f}"
        )
    for peer in ("baseline", "wide"):
        difference = 100 * (rates["triple"] - rates[peer])
        low, high = interval(difference)
        print(f"triple - {peer}: {difference.mean():+.2f} points, {low:+.2f} to {high:+.2f}")
    picture(args.picture, rates, folders)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
