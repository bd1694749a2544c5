"""Write a trained model as a folder for others, in the layout of the Hugging Face hub.

The folder has model.safetensors, config.json, phonemes.json (the order of the classes),
preprocessing.json, lm_settings/ (the decoder's settings that were tuned for it), README.md (the
model card, with the figures of the run's results) and the streaming step for plain JAX with
streaming.py, which runs it. `load_run`, `b2txt infer` and `b2txt evaluate` read the folder as a
run. To publish it: `hf upload NAME DIR`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path

from b2txt_jax.config import CONFIG_FILE, write_config
from b2txt_jax.evaluation.decoder_settings import FOLDER
from b2txt_jax.evaluation.report.inputs import calls_of
from b2txt_jax.evaluation.results import results_of
from b2txt_jax.inference.run import SHARED_FILE, Run, add_weights_argument, load_run
from b2txt_jax.interop.nejm import Run as Weights
from b2txt_jax.interop.safetensors_file import write_safetensors
from b2txt_jax.interop.weights import fresh_state
from b2txt_jax.phonemes import SILENCE_ID
from b2txt_jax.sharing.card import model_card
from b2txt_jax.sharing.program import ExportError, export_stream
from b2txt_jax.signal.rolling import described
from b2txt_jax.signal.smooth import taps_of
from b2txt_jax.simulation.write import SETTINGS_FILE
from b2txt_jax.training.checkpoint import BestScore
from lm_server.files.atomic_file import require_writable
from lm_server.protocol import CLASSES

_ROOT = "data/hdf5_data_final"
"""In place of the folder of the data, which says something of the machine and nothing to others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt export-model`."""
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument(
        "--workdir", required=True, type=Path, metavar="RUN", help="folder of a trained run"
    )
    parser.add_argument("--name", help="of the model (default: that of DIR)")
    parser.add_argument(
        "--license", default="other", help="the hub's identifier, such as cc-by-4.0 (default other)"
    )
    parser.add_argument(
        "--data-statement",
        metavar="TEXT",
        help="what it was trained on, with which consent and terms; needed unless simulated",
    )
    parser.add_argument(
        "--no-stream", action="store_true", help="leave out the streaming step for plain JAX"
    )
    add_weights_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Run `b2txt export-model`."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ExportError(f"{args.out} exists and is not an empty folder; needed a new one")
    require_writable(args.out / CONFIG_FILE, "DIR", make=False)
    trained = load_run(args.workdir, weights=args.weights)
    statement = args.data_statement or _simulated(trained)
    if statement is None:
        raise ExportError(
            f"{trained.config.data.root} is not a folder of simulated sessions, or the run started "
            "from another's weights; needed --data-statement: whose recordings they are, with "
            "which consent, and under which terms a model trained on them may be shared"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{args.out.name}.", dir=args.out.parent) as building:
        folder = Path(building) / "model"
        folder.mkdir()
        difference = write_model(
            folder, trained, args.name or args.out.name, statement, args.license, not args.no_stream
        )
        args.out.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir()):
            shutil.move(path, args.out / path.name)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: step {trained.step} ({trained.weights}), {size / 1e6:.1f} MB")
    if difference is not None:
        print(f"the streaming step in plain JAX: the same logits within {difference:.1g}")
    return 0


def write_model(
    folder: Path, run: Run, name: str, data_statement: str, license: str, stream: bool = True
) -> float | None:
    """Write the files. Return how much the streaming step's logits differ, None without it.

    Raises:
      ConfigError, ExportError: the streaming step cannot be exported.
      ResultsError: a result of the run is damaged.
    """
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, root=_ROOT))
    per = run.selection["per"]
    best = BestScore(math.inf if per is None else per, math.inf, run.step)
    weights = Weights(config, fresh_state(config, run.params, run.step), best)
    write_safetensors(folder / SHARED_FILE, weights)
    (folder / SHARED_FILE).with_suffix(".json").unlink()  # beside it stands config.json
    write_config(config, folder / CONFIG_FILE)
    _write(
        folder / "phonemes.json",
        ["silence" if one == CLASSES[SILENCE_ID] else one for one in CLASSES],
    )
    signal = config.signal
    taps, ahead = taps_of(signal)
    _write(
        folder / "preprocessing.json",
        {
            "features": config.data.feature_count,
            "bin_seconds": 0.02,
            "normalisation": described(signal),
            "smoothing": {"taps": taps, "ahead": ahead, "padding": signal.eval_padding},
            "days": list(run.sessions),
        },
    )
    results = []
    if run.workdir is not None:
        results = [one for one in results_of(run.workdir) if one.parameters == run.fingerprint]
        for path in sorted((run.workdir / FOLDER).glob("*.json")):
            about = json.loads(path.read_bytes()).get("about", {})
            if about.get("checkpoint", {}).get("parameters") == run.fingerprint:
                (folder / FOLDER).mkdir(exist_ok=True)
                shutil.copyfile(path, folder / FOLDER / path.name)
    difference = export_stream(run, folder) if stream else None
    calls = calls_of(run.workdir) if run.workdir else []
    card = model_card(run, name, results, data_statement, license, calls, stream)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return difference


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _simulated(run: Run) -> str | None:
    """Return the statement of simulated data. None: they are recordings, or the weights that the
    run started from may be of some."""
    path = Path(run.config.data.root).parent / SETTINGS_FILE
    if run.config.train.warm_start or not path.is_file():
        return None
    return (
        "It was trained on simulated sessions of `b2txt simulate`, not on recordings of a person. "
        "It shows that the code works, and says nothing about a participant."
    )
