"""What a participant with few sentences gains from training together with another.

Two simulated participants with tuning, drift and channels of their own: one has many sentences and
channels, the other few of both. A small GRU is trained on the second alone, and on both
(`data.root` with two folders), for as many steps. Batches draw their days from all, so that the
joint run sees fewer of the second's.

    python benchmarks/joint_training.py OUT [--seeds 0 1 2]

Prints the PER of the second participant's val sentences after the last step, for each seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console

from b2txt_jax.config import Config, load_config
from b2txt_jax.data.joint import folders
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import SPLITS
from b2txt_jax.simulation.plan import SimulationSettings
from b2txt_jax.simulation.write import simulate
from b2txt_jax.training.loop import train

LARGE, SMALL = ("p1", 64, 3, 80), ("p2", 48, 2, 15)
"""Name, features, sessions, training sentences a session."""
VAL = 20


def participant(out: Path, name: str, width: int, sessions: int, sentences: int, seed: int) -> Path:
    """Simulate a participant with `width` of the 512 features. Return the folder of sessions."""
    root = out / name
    if root.is_dir():
        return root
    settings = SimulationSettings(
        sessions=sessions,
        train=sentences,
        val=VAL,
        test=0,
        seed=seed,
        difficulty=0.2,
        max_words=4,
        speaking_rate=2.0,
    )
    simulated = simulate(out / f"{name}_512", settings)
    chosen = np.sort(np.random.default_rng(seed).permutation(512)[:width])
    for path in sorted(simulated.glob("*/data_*.hdf5")):
        to = root / path.parent.name.replace("t15", name) / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path) as old, h5py.File(to, "w") as new:
            for key in old:
                old.copy(key, new)
                features = new[key]["input_features"][:]
                del new[key]["input_features"]
                new[key]["input_features"] = features[:, chosen]
    return root


def configured(root: str, width: int, seed: int, steps: int) -> Config:
    """Return the settings of a run on these folders."""
    overrides = {
        "data.root": root,
        "data.feature_count": width,
        "data.days_per_batch": 2,
        "data.trials_per_day": 4,
        "data.packing": "off",
        "model.units": 64,
        "model.layers": 1,
        "optimizer.decay_steps": steps,
        "optimizer.day_decay_steps": steps,
        "train.steps": steps,
        "train.validate_every": steps,
        "train.save_every": steps,
        "train.seed": seed,
    }
    config = load_config("demo", [f"--config.{key}={value}" for key, value in overrides.items()])
    with open_folder(root, width) as reader:
        lengths = [
            one for split in SPLITS for day in reader.lengths(reader.sessions, split) for one in day
        ]
    # One shape for all batches, which compiles fastest.
    bucket = tuple(max(values) for values in zip(*lengths, strict=True))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=(bucket,)))


def small_per(workdir: Path) -> float:
    """Return the PER of the second participant's days after the last step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    per_day = next(entry["per_day"] for entry in reversed(entries) if "per_day" in entry)
    return float(np.mean([per for day, per in per_day.items() if day.startswith(SMALL[0])]))


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    quiet = Console(quiet=True)
    for seed in args.seeds:
        place = args.out / f"seed{seed}"
        large = participant(place, *LARGE, 2 * seed)
        small = participant(place, *SMALL, 2 * seed + 1)
        found = {}
        for name, roots, width in (
            ("alone", (small,), SMALL[1]),
            ("joint", (large, small), LARGE[1]),
        ):
            root = ",".join(map(str, roots))
            assert len(folders(root)) == len(roots)
            workdir = place / name
            train(configured(root, width, seed, args.steps), workdir, quiet)
            found[name] = small_per(workdir)
        print(
            seed, " ".join(f"{name} {100 * per:.1f} %" for name, per in found.items()), flush=True
        )


if __name__ == "__main__":
    main()
