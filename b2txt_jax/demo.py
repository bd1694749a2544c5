"""The main job end to end: simulate sessions, build language models, train, decode, report.

Writes a folder with data/, lm_1gram/, lm_3gram/, run/ with the results in run/val/, report.html and
summary.json. A second call keeps what is finished and continues with the rest.

With --live, of a finished demo: a further day of the simulated participant, whose signals have
drifted, decoded before a calibration and live after it, with a page for a browser.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from b2txt_jax.config import find_config_file, load_config
from b2txt_jax.data.batches.plan import plan
from b2txt_jax.errors import UserError
from b2txt_jax.evaluation.command import (
    Decoding,
    all_settings,
    evaluate_run,
    language_model,
    write_results,
)
from b2txt_jax.evaluation.evaluate import Evaluation
from b2txt_jax.evaluation.report.inputs import report_run
from b2txt_jax.evaluation.report.page import write_report
from b2txt_jax.inference.run import load_run
from b2txt_jax.live.command import VIEW_PORT
from b2txt_jax.live.demo import LiveDemo, show_live
from b2txt_jax.metrics import ErrorRate
from b2txt_jax.simulation.plan import SimulationSettings
from b2txt_jax.simulation.write import simulate
from b2txt_jax.training.loop import train
from b2txt_jax.training.metrics_log import METRICS_FILE, read_metrics
from lm_server.files.atomic_file import replacing, require_writable

_CONFIG = "demo"
_SUMMARY, _REPORT = "summary.json", "report.html"
_ORDERS = (1, 3)
_SENTENCES_SHOWN = 10
_TEST_SENTENCES = 10
_BUCKETS = ((340, 64), (460, 80), (2560, 500))
"""For the short trials below: two programs to compile, where a choice from the data makes six."""


class DemoError(UserError, RuntimeError):
    """A part of the demo failed. The message names it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt demo`."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder to write to (default runs/demo)"
    )
    parser.add_argument("--config", default=_CONFIG, help="training recipe (default: demo)")
    parser.add_argument("--sessions", type=int, default=6, help="simulated sessions (default 6)")
    parser.add_argument(
        "--train", type=int, default=120, help="training sentences per session (default 120)"
    )
    parser.add_argument(
        "--val", type=int, default=30, help="validation sentences per session (default 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default 0)")
    parser.add_argument(
        "--difficulty", type=float, default=0.5, help="of the simulation, 0 to 1 (default 0.5)"
    )
    live = parser.add_argument_group("live")
    live.add_argument(
        "--live", action="store_true", help="calibrate a further day and decode it live"
    )
    live.add_argument(
        "--view",
        type=int,
        default=VIEW_PORT,
        metavar="PORT",
        help=f"of the page on this machine (default {VIEW_PORT})",
    )
    live.add_argument("--no-view", action="store_true", help="without the page")
    parser.epilog = "Any key of the configuration: --config.section.key=value."


def run(args: argparse.Namespace) -> int:
    """Run `b2txt demo`."""
    console = Console()
    out: Path = args.out
    if args.live:
        return show_live(out, LiveDemo(None if args.no_view else args.view), console)
    # First, so that a mistake in the configuration is reported before the work.
    root = out / "data" / "hdf5_data_final"
    overrides = [f"--config.data.root={root}"]
    if find_config_file(args.config) == find_config_file(_CONFIG):
        overrides.append(f"--config.data.buckets={_BUCKETS}")
    config = load_config(args.config, [*overrides, *args.overrides])
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
    jax.devices()  # Without any, fail before the work.
    plan(0, 0, [args.train] * args.sessions, config.data.days_per_batch, 1)
    for name in (_SUMMARY, _REPORT):
        require_writable(out / name)
    console.rule("1 of 5: simulated sessions")
    simulate(out / "data", settings)
    console.rule("2 of 5: language models")
    models = {order: _language_model(out, order, console) for order in _ORDERS}
    console.rule("3 of 5: training")
    result = train(config, out / "run", console)
    if not result.finished:
        return 130
    console.rule("4 of 5: decoding")
    trained = load_run(out / "run")
    trials = trained.logits("val", console=console)
    evaluations = {}
    for order, folder in models.items():
        with language_model(None, folder) as (url, name):
            given = {"language_model": name, "order": order}
            made_with = all_settings(trained, given, url, folder, jobs=False)
            how = Decoding("val", url, made_with, console)
            evaluations[order] = evaluate_run(trained, trials, how)
        write_results(out / "run" / "val" / folder.name, evaluations[order])
    console.rule("5 of 5: report")
    last = evaluations[max(evaluations)]
    rows = _word_error_rates(evaluations)
    summary = _summary(out, last, dict(rows), config.train.steps)
    with replacing(out / _SUMMARY) as unfinished:
        unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    page = report_run(out / "run", trained=trained, outputs=trials)
    write_report(out / _REPORT, [page], "Brain-to-text demo on simulated sessions")
    _print(console, summary, rows, last)
    console.print(f"report: {out / _REPORT}", soft_wrap=True)
    failures = [failure for evaluation in evaluations.values() for failure in evaluation.failed]
    for failure in failures:
        console.print(f"failed: {failure.trial}: {failure.reason}", soft_wrap=True)
    return 1 if failures else 0


def _word_error_rates(evaluations: Mapping[int, Evaluation]) -> list[tuple[str, ErrorRate]]:
    """Return name and rate of each way from phonemes to words."""
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
            f"`{shlex.join(command)}` ended with exit status {status}; see its message above"
        )
    return folder


def _summary(
    out: Path, last: Evaluation, rates: Mapping[str, ErrorRate], steps: int
) -> dict[str, Any]:
    assert last.per is not None
    # Steps and validations, over all calls of the training.
    entries = read_metrics(out / "run" / METRICS_FILE)
    return {
        "val_per": last.per.all.rate,
        "wer_greedy": rates["without LM"].rate,
        "wer_1gram": rates["1-gram"].rate,
        "wer_3gram": rates["3-gram"].rate,
        "train_seconds": sum(float(entry.get("seconds", 0)) for entry in entries),
        "decode_seconds_per_sentence": last.seconds_per_sentence,
        "steps": steps,
    }


def _print(
    console: Console, summary: dict[str, Any], rows: list[tuple[str, ErrorRate]], last: Evaluation
) -> None:
    results = Table("", title="validation")
    results.add_column("rate", justify="right")
    results.add_row("PER", f"{100 * summary['val_per']:.1f} %")
    for name, rate in rows:
        results.add_row(f"WER {name}", "-" if rate.rate is None else f"{100 * rate.rate:.1f} %")
    console.print(results)
    shown = Table("true", "decoded", title="ten sentences, 3-gram", show_lines=True)
    for sentence in _some(last.sentences)[:_SENTENCES_SHOWN]:
        shown.add_row(sentence.true or "", sentence.decoded or "(failed)")
    console.print(shown)


def _some(sentences: Sequence[Any]) -> Sequence[Any]:
    """Return about ten sentences, spread over all."""
    return sentences[:: max(1, len(sentences) // _SENTENCES_SHOWN)]
