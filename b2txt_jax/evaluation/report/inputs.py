"""What a report needs of a run: metrics, results, logits, and what of these is missing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from b2txt_jax.config import CONFIG_FILE, Config, read_written_config
from b2txt_jax.data.description import corpora_of
from b2txt_jax.data.reader import open_folder
from b2txt_jax.errors import UserError
from b2txt_jax.evaluation.command import train_sentences
from b2txt_jax.evaluation.intervals import Interval, bootstrap_interval
from b2txt_jax.evaluation.results import Result, ResultsError, SavedTrial, results_of
from b2txt_jax.inference.run import Run, TrialLogits, load_run
from b2txt_jax.metrics import ErrorRate, greedy_decode, phoneme_error_rates, total
from b2txt_jax.model.interface import first_and_further_bins, make_model, parameter_count
from b2txt_jax.signal.rolling import BIN_SECONDS
from b2txt_jax.training.checkpoint import RAW
from b2txt_jax.training.loop import CALLS_FILE
from b2txt_jax.training.metrics_log import METRICS_FILE, MetricsError, read_metrics
from lm_server.files.atomic_file import regular
from lm_server.lexicon.text_rules import normalise, scored_words

LENGTHS = ((1, 3), (4, 6), (7, 9), (10, 10**9))
"""Words of sentences that are counted together."""


@dataclass(frozen=True)
class ReportRun:
    """A run as a report shows it.

    Attributes:
      name: that distinguishes it from the others on the page.
      workdir: its folder.
      config: its configuration.
      metrics: entries of metrics.jsonl.
      calls: of `b2txt train`, as calls.jsonl records them.
      facts: step, parameters and their fingerprint. Empty without a checkpoint.
      results: of `b2txt evaluate` for this checkpoint, the newest last.
      trials: of the validation split, with the answers of the newest result.
      outputs: logits by trial. Empty where they were not computed.
      notes: what is missing on the page, and why.
    """

    name: str
    workdir: Path
    config: Config
    metrics: Sequence[Mapping[str, Any]]
    calls: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    results: Sequence[Result]
    trials: Sequence[SavedTrial]
    outputs: Mapping[str, TrialLogits]
    notes: tuple[str, ...]

    @property
    def result(self) -> Result | None:
        """The newest result."""
        return self.results[-1] if self.results else None

    @property
    def frame_seconds(self) -> float:
        """Seconds from frame to frame of its logits."""
        data = self.config.data
        model = make_model(self.config.model, data.feature_count, len(data.sessions))
        return first_and_further_bins(model)[1] * BIN_SECONDS


def report_run(
    workdir: Path,
    results: Sequence[Result] | None = None,
    *,
    logits: bool = True,
    weights: str = RAW,
    console: Console | None = None,
    trained: Run | None = None,
    outputs: Sequence[TrialLogits] = (),
) -> ReportRun:
    """Gather what there is of a run. What cannot be had is a note.

    Args:
      workdir: the run's folder.
      results: of this run. None: those in its folder.
      logits: whether to compute the logits of the validation split, unless they are given.
      weights: which ones of the run, RAW or EMA.
      console: shows the progress.
      trained: the run, where it is loaded already.
      outputs: the logits of the validation split, where they are computed already.

    Raises:
      ConfigError: the folder holds no run.
      MetricsError, ResultsError: a file of it is damaged.
    """
    config = trained.config if trained else read_written_config(workdir / CONFIG_FILE)
    notes: list[str] = []
    if trained is None:
        try:
            trained = load_run(workdir, weights=weights)
        except UserError as error:
            notes.append(f"no checkpoint, so no logits: {error}")
    if not outputs and logits and trained is not None:
        try:
            outputs = trained.logits("val", console=console)
        except UserError as error:
            notes.append(f"no pictures, confusions and confidences of phonemes: {error}")
    if not logits and not outputs:
        notes.append("no pictures, confusions and confidences of phonemes: --no-logits")
    found = results_of(workdir) if results is None else list(results)
    # Trials of two splits may have the same name.
    elsewhere = [one.folder for one in found if one.content.get("split", "val") != "val"]
    if elsewhere:
        notes.append(f"left out, since they are not of val: {', '.join(map(str, elsewhere))}")
        found = [one for one in found if one.folder not in elsewhere]
    if trained is not None:
        others = [one.folder for one in found if one.parameters != trained.fingerprint]
        if others:
            notes.append(
                f"left out, since they are of another checkpoint than step {trained.step}: "
                + ", ".join(map(str, others))
            )
        found = [one for one in found if one.parameters == trained.fingerprint]
    if not found:
        notes.append(
            f"no words: there is no result; make one with `b2txt evaluate --workdir {workdir} "
            "--lm DIR`"
        )
    elif not any(trial.answer for trial in found[-1].trials):
        notes.append(
            f"no n-best lists and confidences of words: {found[-1].folder} has no answers.jsonl; "
            "evaluate again"
        )
    if (workdir / METRICS_FILE).exists():
        metrics = read_metrics(workdir / METRICS_FILE)
    else:
        metrics = []
        notes.append(f"no learning curves: there is no {workdir / METRICS_FILE}")
    facts = {}
    if trained is not None:
        facts = {
            "step": trained.step,
            "parameters": parameter_count(trained.params),
            "fingerprint": trained.fingerprint,
        }
    by_name = {one.ref.name: one for one in outputs}
    trials = _with_phonemes(found[-1].trials, by_name) if found else _of_outputs(config, outputs)
    calls = calls_of(workdir)
    name = workdir.absolute().name
    return ReportRun(
        name, workdir, config, metrics, calls, facts, found, trials, by_name, tuple(notes)
    )


def distinguished(runs: Sequence[ReportRun]) -> list[ReportRun]:
    """Name runs by as many of their folders as it takes to tell them apart."""
    paths = [str(run.workdir.absolute()) for run in runs]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ResultsError(f"the run {twice} is given more than once; needed each run once")
    if len(paths) < 2:
        return list(runs)
    common = os.path.commonpath([str(Path(path).parent) for path in paths])
    return [
        dataclasses.replace(run, name=os.path.relpath(path, common))
        for run, path in zip(runs, paths, strict=True)
    ]


def _with_phonemes(
    trials: Sequence[SavedTrial], outputs: Mapping[str, TrialLogits]
) -> list[SavedTrial]:
    """Count the phoneme errors that an older result lacks."""
    return [
        dataclasses.replace(one, per=_phonemes(outputs[one.trial]))
        if one.per is None and one.trial in outputs
        else one
        for one in trials
    ]


def _of_outputs(config: Config, outputs: Sequence[TrialLogits]) -> list[SavedTrial]:
    if not outputs:
        return []
    root = config.data.root
    reader = open_folder(root, config.data.feature_count)
    said = train_sentences(reader, config.data.sessions, Console(quiet=True))
    known = None if said is None else set(map(normalise, said))
    corpora = corpora_of(root, [(one.ref.session, one.ref.block) for one in outputs])
    found = []
    for one, corpus in zip(outputs, corpora, strict=True):
        seen = None
        if known is not None and one.sentence is not None:
            seen = normalise(one.sentence) in known
        per = _phonemes(one)
        found.append(SavedTrial(one.ref.name, one.sentence, None, per, None, seen, corpus, {}))
    return found


def _phonemes(trial: TrialLogits) -> ErrorRate | None:
    if trial.labels is None:
        return None
    return phoneme_error_rates([trial.labels], [greedy_decode(trial.logits)])[0]


def calls_of(workdir: Path) -> list[dict[str, Any]]:
    """Return the calls of `b2txt train` that a run records.

    Raises:
      MetricsError: the record is damaged.
    """
    path = workdir / CALLS_FILE
    if not path.exists():
        return []
    try:
        found = [json.loads(line) for line in regular(path).read_text("utf-8").splitlines()]
        if not all(isinstance(call, dict) for call in found):
            raise ValueError("a line is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise MetricsError(f"{path} cannot be read ({error}); move it away") from error
    return found


@dataclass(frozen=True)
class Group:
    """Trials that are counted together, with their rates and intervals."""

    name: str
    trials: int
    per: ErrorRate | None
    per_interval: Interval | None
    wer: ErrorRate | None
    wer_interval: Interval | None


def groups(trials: Sequence[SavedTrial]) -> dict[str, list[Group]]:
    """Count rates in all, by day, corpus, sentence length, and whether training had the sentence.

    A kind without any known group is left out.
    """
    kinds: dict[str, Callable[[SavedTrial], str | None]] = {
        "all": lambda _: "all",
        "recording day": lambda one: one.session,
        "corpus": lambda one: one.corpus,
        "sentence length": _length,
        "train split": lambda one: (
            None if one.seen is None else "seen in train" if one.seen else "not seen in train"
        ),
    }
    found = {}
    for kind, key in kinds.items():
        parts: dict[str, list[SavedTrial]] = {}
        for one in trials:
            name = key(one)
            if name is not None:
                parts.setdefault(name, []).append(one)
        if kind != "corpus":
            parts = dict(sorted(parts.items(), key=lambda part: _natural(part[0])))
        if parts:
            found[kind] = [_group(name, part) for name, part in parts.items()]
    return found


def _natural(name: str) -> tuple[int, str]:
    first = name.split("-")[0].split(" ")[0]
    return (int(first) if first.isdecimal() else 0, name)


def _length(trial: SavedTrial) -> str | None:
    if trial.true is None:
        return None
    words = max(1, len(scored_words(trial.true)))
    low, high = next(both for both in LENGTHS if both[0] <= words <= both[1])
    return f"{low}-{high} words" if (low, high) != LENGTHS[-1] else f"{low} words and more"


def _group(name: str, trials: Sequence[SavedTrial]) -> Group:
    def of(rates: Iterable[ErrorRate | None]) -> tuple[ErrorRate | None, Interval | None]:
        known = [(one.session, rate) for one, rate in zip(trials, rates, strict=True) if rate]
        if not known:
            return None, None
        days, found = zip(*known, strict=True)
        return total(found), bootstrap_interval(days, found)

    return Group(name, len(trials), *of(one.per for one in trials), *of(one.wer for one in trials))
