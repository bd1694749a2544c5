"""What does each choice of a causal signal path cost: in phoneme errors, and in delay?

    python benchmarks/causal.py --workdir runs/demo/run [--train OUT] [--data DIR] [--steps 400]

Evaluates a trained run's validation trials with each choice, which the model was not trained with.
With --train it trains the run's configuration anew with each choice, in folders of OUT, and those
figures are the ones to choose by. --data names other sessions, such as raw ones of
`b2txt simulate --raw`, of which a run without a rolling z-score learns little. The delay is what
the choice adds before a frame is computed: bins that it looks ahead. A rolling z-score and a
one-sided kernel add none. Further, an event waits for the end of its frame, 40 ms in the mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from b2txt_jax.config import read_written_config, with_overrides
from b2txt_jax.inference.run import Run, load_run
from b2txt_jax.metrics import greedy_decode, phoneme_error_rates, total
from b2txt_jax.signal.rolling import BIN_SECONDS
from b2txt_jax.signal.smooth import taps_of
from b2txt_jax.training.loop import train

CHOICES = {
    "symmetric kernel": {},
    "one-sided kernel": {"smooth_kernel": "one_sided"},
    "rolling z-score, 10 s": {"rolling_seconds": 10.0},
    "rolling z-score, 60 s": {"rolling_seconds": 60.0},
    "one-sided, rolling 10 s": {"smooth_kernel": "one_sided", "rolling_seconds": 10.0},
    "the same, log first": {"smooth_kernel": "one_sided", "rolling_seconds": 10.0, "log": True},
}
_TRAINED_ONLY = "log"


def per_of(run: Run, console: Console) -> float:
    """Return the greedy phoneme error rate of the validation trials."""
    trials = [one for one in run.logits("val", console=console) if one.labels is not None]
    rates = phoneme_error_rates(
        [one.labels for one in trials if one.labels is not None],
        [greedy_decode(one.logits) for one in trials],
    )
    rate = total(rates).rate
    assert rate is not None
    return rate


def overrides_of(choice: dict[str, object], data: Path | None) -> list[str]:
    """Return the choice as options of a command."""
    found = [f"--config.signal.{key}={value}" for key, value in choice.items()]
    return found + ([f"--config.data.root={data}"] if data else [])


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate or train, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--train", type=Path, metavar="OUT", help="train each choice anew there")
    parser.add_argument("--data", type=Path, help="sessions (default: the run's)")
    parser.add_argument("--steps", type=int, help="of a training (default: the run's)")
    parser.add_argument("--choices", nargs="*", default=[*CHOICES], help="(default: all)")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    console, result = Console(stderr=True), {}
    for name in args.choices:
        choice = CHOICES[name]
        changed = overrides_of(choice, args.data)
        if args.train:
            config = read_written_config(args.workdir / "config.json")
            if args.steps:
                changed += [f"--config.train.steps={args.steps}"]
                changed += [f"--config.optimizer.decay_steps={args.steps}"]
                changed += [f"--config.optimizer.day_decay_steps={args.steps}"]
            folder = args.train / name.replace(", ", "_").replace(" ", "_")
            train(with_overrides(config, changed), folder, console)
            run = load_run(folder)
        elif _TRAINED_ONLY in choice:
            continue  # of other features than the model has seen
        else:
            run = load_run(args.workdir, changed)
        ahead = 1000 * BIN_SECONDS * taps_of(run.config.signal)[1]
        per = per_of(run, console)
        result[name] = {"per": per, "looks_ahead_ms": ahead}
        print(f"{name:26s} PER {100 * per:5.2f} %   looks ahead {ahead:3.0f} ms", flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
