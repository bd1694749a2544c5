"""`b2txt infer`: writes a trained run's logits for every trial of a split to a file."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from b2txt_jax.data.description import DataWarning
from b2txt_jax.data.logits_file import write_logits_file
from b2txt_jax.data.trial import listed
from b2txt_jax.inference.run import TrialLogits, add_weights_argument, load_run
from lm_server.files.atomic_file import require_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt infer`."""
    parser.add_argument("--workdir", required=True, type=Path, help="folder of a trained run")
    parser.add_argument(
        "--split", choices=("val", "test"), default="val", help="of the data (default val)"
    )
    add_weights_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="the .npz file to write")
    parser.epilog = (
        "Writes `logits` float32 [all frames, 41] (RNN class order), `classes` str [41], `frames` "
        "int32 [N], `trial` str [N] and, for val, `sentence` str [N], and the `step`, `weights`, "
        "`parameters` (a fingerprint) and `split` that the logits are of. Keys of the run's "
        "configuration can be changed: --config.data.root=DIR, --config.signal.eval_padding=valid."
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt infer`."""
    own = [args.workdir / name for name in ("config.json", "checkpoints")]
    require_writable(args.out, devices=True, inputs=own)
    trained = load_run(args.workdir, args.overrides, args.weights)
    trials = trained.logits(args.split, console=Console(stderr=True))
    write_logits(args.out, trials, **trained.identity, split=args.split)
    frames = sum(len(trial.logits) for trial in trials)
    print(f"{args.out}: {len(trials)} {args.split} trials, {frames} frames, step {trained.step}")
    return 0


def write_logits(path: Path, trials: Sequence[TrialLogits], **checkpoint: Any) -> None:
    """Write the logits file, whole or not at all. `checkpoint`: what made them."""
    names, logits, sentences = zip(
        *((trial.ref.name, trial.logits, trial.sentence) for trial in trials), strict=True
    )
    without = [name for name, text in zip(names, sentences, strict=True) if text is None]
    if 0 < len(without) < len(trials):
        warnings.warn(
            f"{len(without)} of {len(trials)} trials have no sentence: {listed(without)}; {path} "
            "gets no field `sentence`, so that `lm-server tune` needs --refs",
            DataWarning,
            stacklevel=2,
        )
    write_logits_file(path, names, logits, sentences, **checkpoint)
