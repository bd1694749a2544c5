"""The main job end to end: simulate sessions, build language models, train, decode, report.

Writes a folder with everything: data/, lm_1gram/, lm_3gram/, run/, report.html, summary.json.
Called again, it keeps what is done and goes on with what is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from b2txt_jax.config import CONFIG_FILE, load_config, read_written_config
from b2txt_jax.errors import UserError
from b2txt_jax.evaluation.command import evaluate_run, language_model, write_results
from b2txt_jax.evaluation.evaluate import Evaluation
from b2txt_jax.evaluation.report import ReportInputs, write_report
from b2txt_jax.inference.run import TrialLogits, load_run
from b2txt_jax.metrics import ErrorRate
from b2txt_jax.simulate.plan import SimulationSettings
from b2txt_jax.simulate.write import simulate
from b2txt_jax.training.loop import train
from b2txt_jax.training.metrics_log import METRICS_FILE

DEFAULT_CONFIG = Path("configs/demo.py")
_ORDERS = (1, 3)
_SENTENCES_SHOWN = 10
_TEST_SENTENCES = 10


class DemoError(UserError, RuntimeError):
    """A part of the demo failed; the text names it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `b2txt demo`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="training recipe")
    parser.add_argument("--sessions", type=int, default=6, help="simulated sessions")
    parser.add_argument("--train", type=int, default=120, help="training sentences per session")
    parser.add_argument("--val", type=int, default=30, help="validation sentences per session")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation")
    parser.add_argument("--difficulty", type=float, default=0.5, help="of the simulation, 0 to 1")
    parser.epilog = "Any key of the configuration: --config.section.key=value."


def run(args: argparse.Namespace) -> int:
    """`b2txt demo`."""
    console = Console()
    out: Path = args.out
    # A mistake in the configuration is told before the work.
    overrides = [f"--config.data.root={out / 'data' / 'hdf5_data_final'}", *args.overrides]
    config = load_config(args.config, overrides)
    settings = SimulationSettings(
        sessions=args.sessions,
        train=args.train,
        val=args.val,
        test=_TEST_SENTENCES,
        seed=args.seed,
        difficulty=args.difficulty,
        # Short trials, so that two cores train on them in minutes.
        max_words=8,
        speaking_rate=1.4,
    )
    console.rule("1 of 5: simulated sessions")
    simulate(out / "data", settings)
    console.rule("2 of 5: language models")
    models = {order: _language_model(out, order, console) for order in _ORDERS}
    console.rule("3 of 5: training")
    result = train(config, out / "run", console)
    if not result.finished:
        return 130
    console.rule("4 of 5: decoding")
    model = load_run(out / "run")
    trials = model.logits("val", console=console)
    evaluations = {}
    for order, folder in models.items():
        with language_model(None, folder) as (url, name):
            evaluations[order] = evaluate_run(
                model, trials, "val", url, {"language_model": name, "order": order}, console
            )
        write_results(out / f"val_{order}gram", evaluations[order])
    console.rule("5 of 5: report")
    summary = _summary(out, evaluations, config.train.steps)
    _write_json(out / "summary.json", summary)
    rows = wer_rows(evaluations)
    write_report(out / "report.html", _report_inputs(out, summary, rows, trials, evaluations))
    _print(console, summary, rows, evaluations)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)
    failures = [failure for evaluation in evaluations.values() for failure in evaluation.failed]
    for failure in failures:
        console.print(f"failed: {failure.trial}: {failure.reason}", soft_wrap=True)
    return 1 if failures else 0


def wer_rows(evaluations: Mapping[int, Evaluation]) -> list[tuple[str, ErrorRate]]:
    """Name and rate of each way from phonemes to words."""
    last = evaluations[max(evaluations)]
    assert last.wer_without_lm is not None
    rows = [("without LM", last.wer_without_lm.all)]
    for order, evaluation in evaluations.items():
        assert evaluation.wer is not None
        rows.append((f"{order}-gram", evaluation.wer.all))
    return rows


def _language_model(out: Path, order: int, console: Console) -> Path:
    folder = out / f"lm_{order}gram"
    if (folder / "lm.json").is_file():
        console.print(f"{folder} is built")
        return folder
    text = out / "data" / "language_model_text.txt"
    command = [sys.executable, "-m", "lm_server", "build", "--text", str(text)]
    command += ["--order", str(order), "--lexicon", "cmudict", "--out", str(folder)]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise DemoError(
            f"`{' '.join(command)}` ended with exit status {status}; its message stands above"
        )
    return folder


def _summary(out: Path, evaluations: Mapping[int, Evaluation], steps: int) -> dict[str, Any]:
    last = evaluations[max(evaluations)]
    assert last.per is not None
    rates = {name: rate.rate for name, rate in wer_rows(evaluations)}
    return {
        "val_per": last.per.all.rate,
        "wer_greedy": rates["without LM"],
        "wer_1gram": rates["1-gram"],
        "wer_3gram": rates["3-gram"],
        "train_seconds": _training_seconds(out / "run"),
        "decode_seconds_per_sentence": last.seconds_per_sentence,
        "steps": steps,
    }


def _training_seconds(workdir: Path) -> float:
    """Seconds of steps and validations, over all calls of the training."""
    lines = (workdir / METRICS_FILE).read_text().splitlines()
    return sum(float(json.loads(line)["seconds"]) for line in lines)


def _report_inputs(
    out: Path,
    summary: dict[str, Any],
    rows: list[tuple[str, ErrorRate]],
    trials: list[TrialLogits],
    evaluations: Mapping[int, Evaluation],
) -> ReportInputs:
    config = read_written_config(out / "run" / CONFIG_FILE)
    shown = sorted(trials, key=lambda trial: len(trial.logits))[len(trials) // 2]
    sentences = evaluations[max(evaluations)].to_json()["sentences"]
    return ReportInputs(
        title="Brain-to-text demo on simulated sessions",
        summary=summary,
        metrics_file=out / "run" / METRICS_FILE,
        trial=shown.ref.name,
        logits=shown.logits,
        label=shown.labels,
        wer_rows=rows,
        sentences=sentences[:: max(1, len(sentences) // _SENTENCES_SHOWN)],
        settings={
            "data": "simulated sessions; not recordings of a person",
            "sessions": ", ".join(config.data.sessions),
            "model": f"{config.model.layers} x {config.model.units} GRU",
            "seed": config.train.seed,
            "version": metadata.version("b2txt-jax"),
        },
    )


def _print(
    console: Console,
    summary: dict[str, Any],
    rows: list[tuple[str, ErrorRate]],
    evaluations: Mapping[int, Evaluation],
) -> None:
    results = Table(title="validation")
    results.add_column("")
    results.add_column("rate", justify="right")
    results.add_row("PER", f"{100 * summary['val_per']:.1f} %")
    for name, rate in rows:
        results.add_row(f"WER {name}", "-" if rate.rate is None else f"{100 * rate.rate:.1f} %")
    console.print(results)
    sentences = evaluations[max(evaluations)].sentences
    shown = Table(title="ten sentences, 3-gram", show_lines=True)
    shown.add_column("true")
    shown.add_column("decoded")
    for sentence in sentences[:: max(1, len(sentences) // _SENTENCES_SHOWN)][:_SENTENCES_SHOWN]:
        shown.add_row(sentence.true or "", sentence.decoded or "(failed)")
    console.print(shown)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)
