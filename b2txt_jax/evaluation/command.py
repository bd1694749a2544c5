"""Score a trained run: PER, and WER through the language-model server.

Writes evaluation.json, answers.jsonl (n-best lists with scores and confidences) and submission.csv
(id,text by session and trial) into --out, by default WORKDIR/SPLIT/NAME, where NAME is that of the
language model, with _ema for averaged weights. A result that other settings gave is not replaced.
With --redis the server that listens there decodes. With --lm DIR a server with its own Redis is
started for this call and stopped after it. With neither, a server at $B2TXT_REDIS_URL or on this
machine's port 6379 is used if one answers.

With --workers N, N worker processes share the sentences: --lm DIR starts them, and together with
--redis they share them with the workers that run elsewhere. --workers 0 leaves all to those.

With --with RUN ..., the runs together answer each trial, all decoded with the same settings: by
minimum Bayes risk over their n-best lists, by ROVER, or by one decoding of their averaged logits.
With --passes N, each run is averaged over N augmented versions of a trial and the trial itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from b2txt_jax.config import SignalConfig
from b2txt_jax.data.description import corpora_of
from b2txt_jax.data.fingerprint import fingerprint, short
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import SPLITS, Reader, listed
from b2txt_jax.errors import UserError
from b2txt_jax.evaluation.combine import as_result, print_systems
from b2txt_jax.evaluation.decoder_settings import DecoderSettings, settings_in_use
from b2txt_jax.evaluation.evaluate import (
    Evaluation,
    Rates,
    evaluate,
    run_language_model,
    run_workers,
    submission_texts,
    write_answers,
    write_evaluation,
)
from b2txt_jax.evaluation.intervals import DRAWS, LEAST_DAYS, LEVEL
from b2txt_jax.evaluation.results import ANSWERS, EVALUATION
from b2txt_jax.evaluation.submission import SubmissionWarning, write_submission
from b2txt_jax.inference.ensemble import (
    add_passes_arguments,
    augmentations_of,
    ensemble_fingerprint,
    ensemble_logits,
    load_runs,
)
from b2txt_jax.inference.run import CHANGEABLE, Run, TrialLogits, add_weights_argument
from b2txt_jax.metrics import total, word_error_rates
from b2txt_jax.provenance import hardware, provenance
from b2txt_jax.training.checkpoint import RAW
from lm_server.client.answers import LanguageModelUnavailableError, Result
from lm_server.client.client import Client
from lm_server.client.connection import mask_password
from lm_server.client.process import serve_child
from lm_server.files.answers_file import scored_nbest
from lm_server.files.atomic_file import require_writable
from lm_server.rescoring.consensus import METHODS, agree

_SUBMISSION = "submission.csv"
DEFAULT_URL = "redis://127.0.0.1:6379/0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt evaluate`."""
    parser.add_argument("--workdir", required=True, type=Path, help="folder of a trained run")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="val",
        help="of the data (default val). train: for `b2txt correction-data`",
    )
    add_weights_argument(parser)
    parser.add_argument(
        "--with",
        dest="others",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="further runs of the same data, which answer together with --workdir",
    )
    parser.add_argument(
        "--combine",
        choices=(*METHODS, "logits"),
        default=METHODS[0],
        help="with --with: minimum Bayes risk, ROVER, or averaged logits (default mbr)",
    )
    add_passes_arguments(parser)
    parser.add_argument(
        "--redis",
        metavar="URL",
        help="Redis where an lm-server listens (default: $B2TXT_REDIS_URL, else this machine's)",
    )
    parser.add_argument("--lm", type=Path, metavar="DIR", help="model folder of `lm-server build`")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="decode with N worker processes at once (default: one server)",
    )
    parser.add_argument(
        "--llm",
        metavar="DIR",
        help="with --lm: rescore with the causal language model there (default: no rescoring)",
    )
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="with --lm: settings of `lm-server tune` (default: those in WORKDIR/lm_settings that "
        "were tuned for this checkpoint, else the search's)",
    )
    parser.add_argument(
        "--lm-options",
        default="",
        metavar="TEXT",
        help="with --lm: further options of `lm-server serve` (with --workers: of `lm-server "
        "worker`) in one text, e.g. --lm-options='--llm-device cuda --backend wfst' (default: "
        "none)",
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default WORKDIR/SPLIT/NAME)")
    parser.add_argument(
        "--force", action="store_true", help="replace a result that other settings gave"
    )
    keys = ", ".join(f"--config.{key}" for key in sorted(CHANGEABLE))
    parser.epilog = f"Keys of the run's configuration that can be changed: {keys} (=value)."


def run(args: argparse.Namespace) -> int:
    """Run `b2txt evaluate`. Return exit status 1 when trials failed."""
    console = Console()
    options = child_options(args)
    if args.others and args.out is None:
        raise OptionsError(
            "--with is given without --out; needed --out DIR: the result is not that of one run"
        )
    models = load_runs([args.workdir, *args.others], args.overrides, args.weights, args.passes)
    model = models[0]
    decoder = settings_in_use(model, args.lm, options)
    options = decoder.options(options)
    args.settings = decoder.file
    out = args.out or args.workdir / args.split / result_name(args)
    check_results(out)
    if args.split == "train":
        console.print(
            "the runs were trained on these sentences: their rates say nothing of other ones"
        )
    with language_model(args.redis, args.lm, args.workers, options) as (url, name):
        jobs = args.workers is not None
        given = {
            "language_model": name,
            "llm": args.llm,
            "lm_settings": args.settings and str(args.settings),
            "lm_options": args.lm_options or None,
            "passes": args.passes or None,
            "passes_seed": args.passes_seed if args.passes else None,
            "augmentations": augmentations_of(model) if args.passes else None,
            "with": [str(path.absolute()) for path in args.others] or None,
            "combine": args.combine if args.others else None,
        }
        settings = all_settings(model, given, url, args.lm, jobs)
        check_replaceable(out, settings, args.force)
        how = Decoding(args.split, url, settings, console, jobs, decoder)
        if args.others or args.passes:
            passes = (args.passes, args.passes_seed)
            result = evaluate_together(models, args.combine, passes, how)
        else:
            result = evaluate_run(model, model.logits(args.split, console=console), how)
    write_results(out, result)
    print_results(result, console)
    print_origin(model, decoder, args.lm, args.split, console)
    if args.others:
        console.print(f"of {model.workdir}; the other runs are decoded with the same settings")
    console.print(f"written: {out / EVALUATION}, {out / _SUBMISSION}", soft_wrap=True)
    return 1 if result.failed else 0


def result_name(args: argparse.Namespace) -> str:
    """Return the name of a result: the language model, settings, rescoring and weights given."""
    server = "workers" if args.workers is not None else "server"
    names = [args.lm.absolute().name if args.lm else server]
    names += [Path(given).absolute().stem for given in (args.settings, args.llm) if given]
    names += [f"passes_{args.passes}"] if args.passes else []
    return "-".join(names) + ("" if args.weights == RAW else f"_{args.weights}")


def all_settings(
    model: Run, given: dict[str, Any], url: str, lm: Path | None, jobs: bool
) -> dict[str, Any]:
    """Return what explains a result: the run, the options given, and the server's own settings.

    Raises:
      LanguageModelUnavailableError: the server is gone.
    """
    settings: dict[str, Any] = {
        "step": model.step,
        "weights": model.weights,
        "eval_padding": model.config.signal.eval_padding,
    }
    settings |= {key: value for key, value in given.items() if value is not None}
    for key in ("smooth_kernel", "rolling_seconds", "rolling_clip"):
        value = getattr(model.config.signal, key)
        if value != getattr(SignalConfig, key):
            settings[key] = value
    if lm is not None and (lm / "lm.json").is_file():
        settings["language_model_crc32"] = zlib.crc32((lm / "lm.json").read_bytes())
    if not jobs:
        with Client(url) as client:
            settings["search"] = client.settings()
    return settings


_MAY_CHANGE = ("step", "not_rescored", "search.protocol_version", "search.server_version")
"""Settings with which a later result replaces an earlier one."""


def check_replaceable(out: Path, settings: Mapping[str, Any], force: bool = False) -> None:
    """Check that `out` holds no result, or one of the same settings, of the same run as it was.

    Raises:
      OptionsError: it holds a result of other settings. Names them.
    """
    path = out / EVALUATION
    if force or not path.is_file():
        return
    try:
        before, now = _flat(json.loads(path.read_bytes())["settings"]), _flat(settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionsError(
            f"{path} is not a result of `b2txt evaluate` ({error!r}); needed another --out, or "
            "--force to replace it"
        ) from error
    keys = sorted({*before, *now} - {*_MAY_CHANGE})
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise OptionsError(
            f"{out} holds the result of other settings: {listed(changed)}. Needed another --out, "
            "or --force to replace it"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    search = settings.get("search", {})
    flat = {f"search.{key}": value for key, value in search.items()}
    # Results of before there were averaged weights lack the key.
    return {"weights": RAW, **settings, "search": None, **flat}


class OptionsError(UserError, ValueError):
    """Options that do not go together."""


def check_decoders(redis: str | None, lm: Path | None, workers: int | None) -> None:
    """Check that it is clear what decodes: a running server, workers, or those started here.

    Raises:
      OptionsError: some do not go together. Names them and what is needed.
    """
    if workers is None:
        if redis is not None and lm is not None:
            raise OptionsError(
                "--redis and --lm are both given; needed one of them (the server there, or one of "
                "our own), or --workers N besides"
            )
    elif workers < 0:
        raise OptionsError(f"--workers is {workers}; needed 0 or more")
    elif workers > 0 and lm is None:
        raise OptionsError(
            f"--workers {workers} needs --lm DIR, the model that they decode with; 0 leaves "
            "the work to workers that run elsewhere"
        )
    elif workers == 0 and (redis is None or lm is not None):
        raise OptionsError(
            "--workers 0 leaves the work to workers that run elsewhere: needed --redis URL, and no "
            "--lm"
        )


def child_options(args: argparse.Namespace) -> list[str]:
    """Return further options of a server or of workers that are started here.

    Raises:
      OptionsError: some do not go together. Names them and what is needed.
    """
    check_decoders(args.redis, args.lm, args.workers)
    for name in ("llm", "settings", "lm-options"):
        if getattr(args, name.replace("-", "_")) and args.lm is None:
            raise OptionsError(
                f"--{name} is for a server that is started here; needed --lm DIR. A running server "
                "has its own, which `lm-server serve` was given"
            )
    options = []
    if args.llm is not None:
        options += ["--llm", args.llm]
    if args.settings is not None:
        options += ["--settings", str(args.settings)]
    try:
        return options + shlex.split(args.lm_options)
    except ValueError as error:
        raise OptionsError(
            f"--lm-options is {args.lm_options!r} ({error}); needed options as a shell takes them"
        ) from error


@contextlib.contextmanager
def language_model(
    redis: str | None,
    lm_dir: Path | None,
    workers: int | None = None,
    options: Sequence[str] = (),
) -> Iterator[tuple[str, str]]:
    """Yield (Redis URL, name of what decodes there): a running server, or our own for `lm_dir`.

    Args:
      redis: URL of a Redis where a server or workers listen, or will.
      lm_dir: model folder of what is started.
      workers: how many workers are started. None: a server.
      options: further ones of `lm-server serve` or `worker`.

    Raises:
      LanguageModelUnavailableError: no server answers, or the own one cannot start.
    """
    if workers == 0 and redis is not None:
        yield redis, f"workers at {mask_password(redis)}"
        return
    if workers and lm_dir is not None:
        given = ["--workers", str(workers), *options]
        with serve_child(lm_dir, given, subcommand="worker", redis=redis) as url:
            yield url, str(lm_dir.absolute())
        return
    if lm_dir is not None:
        with serve_child(lm_dir, options) as url:
            yield url, str(lm_dir.absolute())
        return
    url = redis or os.environ.get("B2TXT_REDIS_URL", DEFAULT_URL)
    try:
        with Client(url) as client:
            client.check()
    except LanguageModelUnavailableError as error:
        if redis is not None:
            raise
        raise LanguageModelUnavailableError(
            f"neither --redis nor --lm was given and no lm-server answers at {mask_password(url)}. "
            "Give --lm DIR (made by `lm-server build`), and a server is started for you"
        ) from error
    yield url, mask_password(url)


@dataclass(frozen=True)
class Decoding:
    """How the logits of a split are decoded, and what its result records of that.

    Attributes:
      split: val, test or train.
      url: Redis of the server, or of the workers.
      settings: what explains the result, as of `all_settings`.
      console: shows the progress.
      jobs: whether workers decode, and not a server.
      decoder: the settings in use, for the record.
    """

    split: str
    url: str
    settings: Mapping[str, Any]
    console: Console
    jobs: bool = False
    decoder: DecoderSettings | None = None


def evaluate_run(model: Run, trials: Sequence[TrialLogits], how: Decoding) -> Evaluation:
    """Decode the logits of a run, and score them.

    Raises:
      LanguageModelUnavailableError: the server is gone.
    """
    results = _decoded(trials, [trial.logits for trial in trials], how)
    return _scored(model, trials, results, {**model.identity, **model.selection}, how)


def evaluate_together(
    models: Sequence[Run], method: str, passes: tuple[int, int], how: Decoding
) -> Evaluation:
    """Decode what several runs, or one with augmented passes, say together, and score it.

    Args:
      models: of the same data.
      method: mbr, rover, or logits for one decoding of averaged logits.
      passes: augmented versions of each trial, and the seed of their noise.
      how: the logits are decoded.

    Raises:
      DataError: the runs are of other data.
      LanguageModelUnavailableError: the server is gone.
    """
    first = models[0]
    found = ensemble_logits(
        models, how.split, console=how.console, passes=passes[0], seed=passes[1]
    )
    trials = found.trials
    if len(models) == 1:
        return evaluate_run(first, trials, how)
    checkpoint = {
        "step": max(one.step for one in models),
        "weights": first.weights,
        "parameters": ensemble_fingerprint(models),
        "of": [{"workdir": str(one.workdir), **one.identity} for one in models],
    }
    if method == "logits":
        logits = [trial.logits for trial in trials]
        return _scored(first, trials, _decoded(trials, logits, how), checkpoint, how)
    each = [_decoded(trials, one, how) for one in found.members]
    results = []
    for of_trial in zip(*each, strict=True):
        lists = [scored_nbest(one.answer.as_json()) if one.answer else [] for one in of_trial]
        seconds = sum(one.seconds for one in of_trial)
        problems = [one.answer.problem for one in of_trial if one.answer and one.answer.problem]
        problem = problems[0] if problems else None
        results.append(as_result(of_trial[0].name, agree(lists, method), seconds, problem))
    true = [trial.sentence for trial in trials if trial.sentence is not None]
    if how.split != "test" and len(true) == len(trials):
        texts = [[one.answer.sentence if one.answer else "" for one in some] for some in each]
        rates = [total(word_error_rates(true, some)) for some in texts]
        names = [str(model.workdir) for model in models]
        print_systems([*zip(names, rates, strict=True)], how.console)
    return _scored(first, trials, results, checkpoint, how)


def _decoded(
    trials: Sequence[TrialLogits], logits: Sequence[np.ndarray], how: Decoding
) -> list[Result]:
    names = [trial.ref.name for trial in trials]
    with Progress(console=how.console) as progress:
        task = progress.add_task(f"sentences of {how.split}", total=len(trials))
        decode = run_workers if how.jobs else run_language_model
        return decode(logits, names, how.url, lambda done, _: progress.update(task, completed=done))


def _scored(
    model: Run,
    trials: Sequence[TrialLogits],
    results: Sequence[Result],
    checkpoint: dict[str, Any],
    how: Decoding,
) -> Evaluation:
    settings = dict(how.settings)
    if how.decoder is not None:
        checkpoint = {**checkpoint, "decoder_settings": how.decoder.to_json()}
    problems = {one.name: one.answer.problem for one in results if one.answer}
    not_rescored = [name for name, problem in problems.items() if problem]
    if not_rescored:
        first = not_rescored[0]
        how.console.print(
            f"warning: {len(not_rescored)} of {len(trials)} sentences were not rescored; the "
            f"first, {first}: {problems[first]}",
            soft_wrap=True,
        )
        settings["not_rescored"] = not_rescored
    labels = [trial.labels for trial in trials if trial.labels is not None]
    sentences = [trial.sentence for trial in trials if trial.sentence is not None]
    known = how.split != "test"
    reader = open_folder(model.config.data.root, model.config.data.feature_count)
    return evaluate(
        split=how.split,
        results=results,
        logits=[trial.logits for trial in trials],
        labels=labels if known else None,
        sentences=sentences if known else None,
        corpora=corpora_of(
            model.config.data.root, [(trial.ref.session, trial.ref.block) for trial in trials]
        ),
        train_sentences=train_sentences(reader, model.sessions, how.console) if known else None,
        checkpoint=checkpoint,
        settings=settings,
        made={
            **provenance(),
            "hardware": hardware(),
            "data": short(fingerprint(reader, [trial.ref for trial in trials])),
            "parameters": checkpoint["parameters"],
        },
    )


def train_sentences(
    reader: Reader, sessions: Sequence[str], console: Console
) -> frozenset[str] | None:
    """Return what is said in the train split. None, and a line why, where there is no such split.

    Raises:
      DataError: a trial cannot be read.
    """
    refs = reader.find_trials(sessions, "train", labels_needed=False)
    said = [reader.sample(ref).sentence for ref in refs]
    known = frozenset(sentence for sentence in said if sentence is not None)
    if not known:
        console.print(
            f"{reader.root} has no train sentences: which sentences occur in the train split is "
            "not known",
            soft_wrap=True,
        )
        return None
    if None in said:
        console.print(
            f"warning: {said.count(None)} of {len(said)} train trials have no sentence: sentences "
            "that only they repeat count as not seen",
            soft_wrap=True,
        )
    return known


def check_results(out: Path) -> None:
    """Raise before the work what `write_results` would raise after it.

    Raises:
      UnwritableError: `out` is no folder that can be written to.
    """
    for name in (EVALUATION, ANSWERS, _SUBMISSION):
        require_writable(out / name)


def write_results(out: Path, result: Evaluation) -> None:
    """Write evaluation.json, answers.jsonl and submission.csv. Warn of empty rows, which benchmarks
    refuse."""
    write_evaluation(out / EVALUATION, result)
    write_answers(out / ANSWERS, result)
    write_submission(out / _SUBMISSION, submission_texts(result))
    empty = [row.trial for row in result.sentences if not row.decoded]
    if empty:
        warnings.warn(
            f"{len(empty)} of {result.trials} rows of {out / _SUBMISSION} have no text, and "
            f"Kaggle refuses such a file (Submission contains null values): {listed(empty)}",
            SubmissionWarning,
            stacklevel=2,
        )


def print_results(result: Evaluation, console: Console) -> None:
    """Print the rates with their intervals, per session and per corpus, and name failed trials."""
    kinds = {
        "PER": result.per,
        "WER": result.wer,
        "n-best oracle": result.wer_oracle,
        "WER without LM": result.wer_without_lm,
    }
    shown = {name: kind for name, kind in kinds.items() if kind}
    first = result.per or result.wer
    if first is not None and result.wer is not None:
        table = Table(title=f"{result.split}: {result.trials} trials")
        for column in ("", *shown):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("all", *map(_with_interval, shown.values()))
        for half in ("seen", "unseen"):
            halves = [found for kind in shown.values() if (found := getattr(kind, half))]
            if halves:
                name = f"{'' if half == 'seen' else 'not '}seen in train\n{halves[0].trials} trials"
                table.add_row(name, *map(_with_interval, halves))
        for group in ("per_corpus", "per_session"):
            table.add_section()
            for name in getattr(first, group):
                table.add_row(name, *(str(getattr(kind, group)[name]) for kind in shown.values()))
        console.print(table)
        if result.per is not None:
            _print_halves(result.per, result.wer, console)
        _print_intervals(first, console)
    if result.seconds_per_sentence is not None:
        console.print(f"{1000 * result.seconds_per_sentence:.0f} ms per sentence")
    if result.failed:
        console.print(f"{len(result.failed)} of {result.trials} trials failed:")
        for failure in result.failed:
            console.print(f"  {failure.trial}: {failure.reason}", soft_wrap=True)


def _with_interval(rates: Rates) -> str:
    return f"{rates.all}\n{rates.interval}" if rates.interval else str(rates.all)


def _print_halves(per: Rates, wer: Rates, console: Console) -> None:
    """Print both halves per corpus and session, where both have trials."""
    halves = {
        f"{name} {half}": found
        for name, kind in (("PER", per), ("WER", wer))
        for half, found in (("seen", kind.seen), ("unseen", kind.unseen))
        if found and found.trials
    }
    if len(halves) < 4:
        return
    table = Table("", title="sentences that occur in the train split, and the others")
    for column in halves:
        table.add_column(column, justify="right")
    for group in ("per_corpus", "per_session"):
        table.add_section()
        for name in getattr(per, group):
            rates = (getattr(half, group).get(name) for half in halves.values())
            table.add_row(name, *(str(rate) if rate else "none" for rate in rates))
    console.print(table)


def _print_intervals(rates: Rates, console: Console) -> None:
    """Print what the intervals are of, with a warning where days are too few."""
    found = [half.interval for half in (rates, rates.seen, rates.unseen) if half and half.interval]
    if not found:
        return
    text = (
        f"beneath the rates: {LEVEL:.0%} intervals, by a bootstrap of {DRAWS} draws of whole "
        "recording days"
    )
    few = [one for one in found if one.unit == "trials"]
    if few:
        text += (
            f". Of {min(one.days for one in few)} days, fewer than {LEAST_DAYS}, single trials are "
            "drawn instead: do not trust these intervals, they lack the differences between days"
        )
    console.print(text, soft_wrap=True)


def print_origin(
    run: Run, decoder: DecoderSettings, lm: Path | None, split: str, console: Console
) -> None:
    """Print how the checkpoint was chosen, and what the decoder's settings were tuned for."""
    chosen = run.selection
    text = f"checkpoint: step {run.step} ({run.weights})"
    if chosen["validations"]:
        text += (
            f", chosen for the lowest PER of {chosen['validations']} validations, "
            f"{100 * chosen['per']:.2f} %, which is too good; mean of the last ten "
            f"{100 * chosen['per_last_ten']:.2f} %"
        )
    else:
        text += "; of how many validations it is the best is not known"
    console.print(text, soft_wrap=True)
    notice = decoder.notice(run, lm, split)
    if notice:
        console.print(notice, soft_wrap=True, markup=False)
