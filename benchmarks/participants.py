"""What a participant with few sentences gains from another, and from recordings without labels.

Two simulated participants have tuning, drift and channels of their own. The first has many
sentences and 64 channels, the second few and 48. A small GRU is trained for as many steps
  alone       on the second's sentences
  joint       on both, half of each batch of each
and then scored on the second's val sentences, or
  few         on the first 10 labelled sentences of each of the first's sessions
  pretrained  on the same, from weights that have learned to predict all of its features
and then scored on the first's. One compiled step serves all, and batches are in memory.

    python benchmarks/participants.py OUT [--seeds 0 1 2] [--steps 300]

Prints the PER after the last step, for each seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np

from b2txt_jax.config import Config, load_config
from b2txt_jax.data.loader import Batch
from b2txt_jax.data.reader import open_folder, session_widths
from b2txt_jax.data.trial import Trial
from b2txt_jax.metrics import error_rate, greedy_decode, total
from b2txt_jax.simulation.plan import SimulationSettings
from b2txt_jax.simulation.write import simulate
from b2txt_jax.training.pretrain import HEAD, HIDDEN, make_pretraining_step, pretraining_state
from b2txt_jax.training.step import TrainState, init_state, make_eval_step, make_train_step

PARTICIPANTS = (("p1", 64, 3, 80), ("p2", 48, 2, 15))
"""Name, features, sessions, training sentences a session."""
VAL, ROWS, MOST_LABELS, FEW = 20, 8, 40, 10


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


Drawn = list[tuple[int, Trial]]
"""(day, trial) of each row of a batch."""


class Data:
    """The trials of both participants, in memory."""

    def __init__(self, root: str, width: int) -> None:
        with open_folder(root, width) as reader:
            self.sessions = reader.sessions
            self.widths = session_widths(root, self.sessions, width)
            self.trials = {
                split: [
                    [reader.read(ref) for ref in reader.find_trials((name,), split)]
                    for name in self.sessions
                ]
                for split in ("train", "val")
            }
        self.second = [at for at, name in enumerate(self.sessions) if name.startswith("p2")]
        self.first = [at for at in range(len(self.sessions)) if at not in self.second]

    def batch(self, drawn: Drawn, bins: int, labels: int) -> Batch:
        """Return trials of days as a batch of one shape."""
        features = np.zeros((ROWS, bins, drawn[0][1].features.shape[1]), np.float32)
        ids, counts = np.zeros((ROWS, labels), np.int32), np.zeros((3, ROWS), np.int32)
        for row, (day, trial) in enumerate(drawn):
            label = trial.labels if trial.labels is not None else np.zeros(0, np.int32)
            features[row, : len(trial.features)] = trial.features
            ids[row, : len(label)] = label
            counts[:, row] = len(trial.features), day, len(label)
        arrays: Any = (features, counts[0], counts[1], ids, counts[2])
        return Batch(*arrays)

    def draw(
        self, days: list[int], count: int, rng: np.random.Generator, most: int | None = None
    ) -> Drawn:
        """Draw training trials of some days, of the first `most` of each."""
        trials = [day[:most] for day in self.trials["train"]]
        chosen = rng.choice(days, count)
        return [(day, trials[day][rng.integers(len(trials[day]))]) for day in chosen]


def configured(data: Data, steps: int) -> Config:
    """Return the settings of all runs."""
    overrides = {
        "data.feature_count": PARTICIPANTS[0][1],
        "data.widths": data.widths,
        "model.units": 64,
        "model.layers": 1,
        "model.recurrence": "scan",
        "signal.random_cut": 1,
        "optimizer.decay_steps": steps,
        "optimizer.day_decay_steps": steps,
        "train.steps": steps,
    }
    return load_config("demo", [f"--config.{key}={value}" for key, value in overrides.items()])


class Comparison:
    """Trainings of one seed, with programs that all seeds share."""

    def __init__(self, data: Data, config: Config, bins: int, programs: dict[str, Any]) -> None:
        self.data, self.config, self.programs = data, config, programs
        self.days, self.shape = len(data.sessions), (bins, MOST_LABELS)

    def per_of(self, kind: str, seed: int) -> float:
        """Train in one way and return the PER."""
        data, state = self.data, init_state(self.config, self.days)
        if kind == "pretrained":
            before = pretraining_state(self.config, self.days)

            def unlabelled(rng: np.random.Generator) -> Drawn:
                return data.draw(data.first, ROWS, rng)

            learned = self._trained(before, "pretrain", unlabelled, seed).params
            state = state._replace(params={**learned, HEAD: state.params[HEAD]})

        def drawn(rng: np.random.Generator) -> Drawn:
            if kind == "alone":
                return data.draw(data.second, ROWS, rng)
            if kind == "joint":
                half = ROWS // 2
                return data.draw(data.second, half, rng) + data.draw(data.first, half, rng)
            return data.draw(data.first, ROWS, rng, FEW)

        scored = data.second if kind in ("alone", "joint") else data.first
        return self._per(self._trained(state, "train", drawn, seed).params, scored)

    def _trained(
        self,
        state: TrainState,
        program: str,
        draw: Callable[[np.random.Generator], Drawn],
        seed: int,
    ) -> TrainState:
        rng = np.random.default_rng(seed)
        # The step's number decides a step's noise: the seed of the settings is in the program.
        state = state._replace(step=jnp.int32(seed * 100_000))
        for _ in range(self.config.train.steps):
            batch = self.data.batch(draw(rng), *self.shape)
            state, _ = self.programs[program](state, batch)
        return state

    def _per(self, params: Any, days: list[int]) -> float:
        data, rates = self.data, []
        held = [(day, one) for day in days for one in data.trials["val"][day]]
        for start in range(0, len(held), ROWS):
            some = held[start : start + ROWS]
            output = self.programs["evaluate"](params, data.batch(some, *self.shape))
            for row, (_, one) in enumerate(some):
                logits = np.asarray(output.logits[row, : output.frames[row]])
                assert one.labels is not None
                rates.append(error_rate(one.labels.tolist(), greedy_decode(logits).tolist()))
        return total(rates).rate


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="(default 300)")
    parser.add_argument("--bins", type=int, default=240, help="of a batch (default 240)")
    parser.add_argument("--kinds", nargs="+", default=["alone", "joint", "few", "pretrained"])
    args = parser.parse_args()
    programs: dict[str, Any] = {}
    for seed in args.seeds:
        roots = [
            participant(args.out / f"seed{seed}", *one, 2 * seed + at)
            for at, one in enumerate(PARTICIPANTS)
        ]
        data = Data(",".join(map(str, roots)), PARTICIPANTS[0][1])
        config, days = configured(data, args.steps), len(data.sessions)
        programs = programs or {
            "train": jax.jit(make_train_step(config, days), donate_argnums=0),
            "pretrain": jax.jit(make_pretraining_step(config, days, HIDDEN), donate_argnums=0),
            "evaluate": jax.jit(make_eval_step(config, days)),
        }
        comparison = Comparison(data, config, args.bins, programs)
        for kind in args.kinds:
            per = comparison.per_of(kind, seed)
            print(f"seed {seed} {kind}: PER {100 * per:.1f} %", flush=True)


if __name__ == "__main__":
    main()
