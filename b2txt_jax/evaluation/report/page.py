"""The page of `b2txt report`: one HTML file that needs no other file and no network."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.evaluation.figures import (
    Curves,
    Point,
    confusion_picture,
    data_uri,
    learning_curves,
    phoneme_errors,
    phoneme_picture,
    rates_by_group,
    reliability_diagram,
)
from b2txt_jax.evaluation.intervals import DRAWS, LEAST_DAYS, Interval
from b2txt_jax.evaluation.report.calibration import (
    phoneme_pairs,
    reliability,
    sentence_pairs,
    word_pairs,
)
from b2txt_jax.evaluation.report.confusions import confusions
from b2txt_jax.evaluation.report.inputs import Group, ReportRun, groups
from b2txt_jax.evaluation.results import Result, SavedTrial
from b2txt_jax.metrics import Difference, ErrorRate, differences, greedy_decode
from b2txt_jax.phonemes import BLANK_ID, ids_to_text
from b2txt_jax.provenance import versions
from b2txt_jax.training.checksum import text_checksum
from b2txt_jax.training.optimizer import learning_rates
from lm_server.files.atomic_file import replacing
from lm_server.lexicon.text_rules import scored_words

MOST_BYTES = 3_000_000
"""Of a page. What runs beyond the first lose first are the pictures of their trials."""
_NBEST_SHOWN, _CONFUSIONS_SHOWN = 10, 15


def write_report(path: Path, runs: Sequence[ReportRun], title: str = "") -> list[str]:
    """Write the page, whole or not at all. Return the notes on it: what is missing, and why.

    Raises:
      ValueError: there is no run.
    """
    page, notes = report_html(runs, datetime.datetime.now().astimezone(), title)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return notes


def report_html(
    runs: Sequence[ReportRun], made: datetime.datetime, title: str = ""
) -> tuple[str, list[str]]:
    """Return the page as HTML, in which every text of the runs is escaped, and the notes on it."""
    if not runs:
        raise ValueError("found no run; needed one or more")
    title = title or "Brain-to-text: " + ", ".join(run.name for run in runs)
    alone = len(runs) == 1
    notes = [note if alone else f"{run.name}: {note}" for run in runs for note in run.notes]
    sections = [
        _section("Learning curves", _curves(runs)),
        _section("Error rates", _rates(runs)),
        *(_section(_of(run, "Phonemes", alone), _phonemes(run)) for run in runs if run.outputs),
        _section("Confidences", _confidences(runs)),
    ]
    last = [
        _section("Runtime", _runtime(runs)),
        *(_section(_of(run, "How this was made", alone), _provenance(run)) for run in runs),
    ]
    room = MOST_BYTES - sum(map(len, [*sections, *last])) - 30_000
    for run in runs:
        trials = _section(_of(run, "Trials", alone), _trials(run)) if run.trials else ""
        if len(trials) > room:
            notes.append(f"{run.name}: its trials are left out, since the page would pass 3 MB")
            continue
        room -= len(trials)
        sections.append(trials)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + _header(runs, title, made, notes)
        + "\n".join(filter(None, [*sections, *last]))
        + "\n</main>\n</body>\n</html>\n"
    )
    return page, notes


def marked_sentences(true: str, decoded: str) -> tuple[str, str]:
    """Return both sentences as HTML over the scored words, with the differing words marked."""
    stretches = differences(scored_words(true), scored_words(decoded))
    return (
        _marked(stretches, [stretch.reference for stretch in stretches], "del"),
        _marked(stretches, [stretch.decoded for stretch in stretches], "ins"),
    )


def chosen_trials(trials: Sequence[SavedTrial]) -> dict[str, SavedTrial]:
    """Return the worst, the median, the best and a random trial, by WER and then by PER."""

    def badness(trial: SavedTrial) -> tuple[float, float]:
        rates = (trial.wer, trial.per)
        wer, per = (-1.0 if one is None or one.rate is None else one.rate for one in rates)
        return wer, per

    order = sorted(trials, key=badness, reverse=True)
    random = order[int(np.random.default_rng(0).integers(len(order)))]
    return {
        "Worst": order[0],
        "Median": order[len(order) // 2],
        "Best": order[-1],
        "Random": random,
    }


def _header(
    runs: Sequence[ReportRun], title: str, made: datetime.datetime, notes: Sequence[str]
) -> str:
    rows = []
    for run in runs:
        rows += [_result_row(run, one) for one in run.results[::-1]] or [_result_row(run, None)]
    head = ["run", "decoder", "step", "PER", "WER", "n-best oracle", "WER without LM", "trials"]
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    missing = f'<div class="notes"><p>Missing here:</p><ul>{listed}</ul></div>' if notes else ""
    return (
        f"<header><h1>{escape(title)}</h1>{_table(head, rows)}"
        f"<p>{escape(made.strftime('%-d %B %Y, %H:%M %Z'))}</p>{missing}</header>"
    )


def _result_row(run: ReportRun, result: Result | None) -> list[str]:
    per = _group_all(run)
    shown = f"{_percent(per.per)} {_interval(per.per_interval)}" if per else "not measured"
    step = str(run.facts.get("step", "no checkpoint"))
    if result is None:
        return [run.name, "none", step, shown, *["not measured"] * 3, str(len(run.trials))]
    # An older result has no PER of its own. One with augmented passes has another than the run.
    shown = _of_result(result, "per") if result.content.get("per") else shown
    rates = (_percent(result.rate(kind)) for kind in ("wer_oracle", "wer_without_lm"))
    count = str(len(result.trials))
    return [run.name, result.name, step, shown, _of_result(result, "wer"), *rates, count]


def _of_result(result: Result, kind: str) -> str:
    ends = (result.content.get(kind) or {}).get("interval")
    shown = _percent(result.rate(kind))
    if not ends:
        return shown
    of = "" if ends.get("unit", "days") == "days" else ", of trials"
    return f"{shown} ({100 * ends['low']:.1f} to {100 * ends['high']:.1f}{of})"


def _group_all(run: ReportRun) -> Group | None:
    found = groups(run.trials).get("all")
    return found[0] if found else None


def _curves(runs: Sequence[ReportRun]) -> str:
    curves = [
        Curves(run.name, run.metrics, learning_rates(run.config.optimizer)[0]) for run in runs
    ]
    text = (
        "<p>The best checkpoint, circled, is the lowest of many validations, which is too good by "
        "chance.</p>"
    )
    return text + _figure(data_uri(learning_curves(curves)), "learning_curves")


def _rates(runs: Sequence[ReportRun]) -> str:
    found = {run.name: groups(run.trials) for run in runs}
    kinds = list(dict.fromkeys(kind for kinds in found.values() for kind in kinds))
    parts = [
        f"<p>With 95 % intervals of a bootstrap of {DRAWS:,} draws of whole recording days. Of "
        f"fewer than {LEAST_DAYS} days (such as a single one), single trials are drawn instead, "
        "whose interval lacks the differences between days.</p>"
    ]
    for kind in kinds[1:]:
        of_kind = {name: kinds.get(kind, []) for name, kinds in found.items()}
        panels = {
            what: {
                name: {one.name: _point(*rate_of(one)) for one in some}
                for name, some in of_kind.items()
            }
            for what, rate_of in _RATES.items()
            if any(rate_of(one)[0] for some in of_kind.values() for one in some)
        }
        if panels:
            title = f"By {kind}"
            picture = data_uri(rates_by_group(title, panels))
            parts.append(_figure(picture, title.lower().replace(" ", "_")))
    head = ["run", "", "group", "trials", "PER", "interval", "WER", "interval"]
    rows = [
        [
            *(name, kind, one.name, str(one.trials)),
            *(str(one.per or ""), _interval(one.per_interval)),
            *(str(one.wer or ""), _interval(one.wer_interval)),
        ]
        for name, kinds in found.items()
        for kind, some in kinds.items()
        for one in some
    ]
    if not rows:
        return "<p>No trial was scored.</p>"
    return "".join(parts) + _details("Numbers", _table(head, rows))


_RATES: Mapping[str, Callable[[Group], tuple[ErrorRate | None, Interval | None]]] = {
    "phoneme error rate": lambda one: (one.per, one.per_interval),
    "word error rate": lambda one: (one.wer, one.wer_interval),
}


def _point(rate: ErrorRate | None, interval: Interval | None) -> Point:
    ends = (interval.low, interval.high) if interval else (None, None)
    return Point(rate.rate if rate else None, *ends)


def _phonemes(run: ReportRun) -> str:
    known = [one for one in run.outputs.values() if one.labels is not None]
    labels = [one.labels for one in known if one.labels is not None]
    found = confusions(labels, [greedy_decode(one.logits) for one in known])
    kinds = {
        "substitutions": found.substitutions,
        "deletions (missed)": found.deletions,
        "insertions (invented)": found.insertions,
    }
    said = max(1, int(found.lengths.sum()))
    rows = [
        [kind, f"{counts.sum():,}", f"{100 * counts.sum() / said:.2f} %"]
        for kind, counts in kinds.items()
    ]
    frequent = [
        [_phoneme(true), _phoneme(decoded), f"{count:,}"]
        for true, decoded, count in found.most_frequent(_CONFUSIONS_SHOWN)
    ]
    bars = phoneme_errors(found.substitutions, found.deletions, found.insertions)
    return (
        f"<p>Greedy decoding of {len(known):,} trials with {said:,} phonemes, silences among "
        "them.</p>"
        + _table(["error", "count", "of all phonemes"], rows)
        + _figure(data_uri(confusion_picture(found.counts)), "confusions")
        + _details("The most frequent errors", _table(["true", "decoded", "count"], frequent))
        + _details("Errors of each phoneme", _figure(data_uri(bars), "phoneme_errors"))
    )


def _phoneme(index: int) -> str:
    return "nothing" if index == BLANK_ID else ids_to_text([index]).replace("|", "silence")


def _confidences(runs: Sequence[ReportRun]) -> str:
    panels: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    rows = []
    for run in runs:
        kinds = {
            "phonemes": phoneme_pairs(run.outputs.values()),
            "words": word_pairs(run.trials),
            "sentences": sentence_pairs(run.trials),
        }
        for kind, pairs in kinds.items():
            found = reliability(pairs)
            if found is not None:
                panels.setdefault(kind, {})[run.name] = (found.confidence, found.right)
                count, error = f"{found.counts.sum():,}", f"{100 * found.error:.1f} %"
                rows.append([run.name, kind, count, error])
    if not panels:
        return "<p>No confidences were kept.</p>"
    return (
        "<p>Of the confidences in each tenth, the share that proved right. On the dotted line they "
        "are what they claim. Of a phoneme it is the network's probability, of words and sentences "
        "the decoder's.</p>"
        + _figure(data_uri(reliability_diagram(panels)), "confidences")
        + _table(["run", "of", "count", "expected calibration error"], rows)
    )


def _trials(run: ReportRun) -> str:
    parts = [
        "<p>Worst, median and best by WER, then by PER, and one at random. Each column of a "
        f"picture is a frame of {1000 * run.frame_seconds:.0f} ms. Above: the decoded phonemes "
        "where they occur. Beneath: the true ones. Sentences are as they are scored: "
        "<del>struck</del> words were missed, <ins>underlined</ins> ones were put instead.</p>"
    ]
    drawn: set[str] = set()
    for kind, trial in chosen_trials(run.trials).items():
        facts = [f"PER {trial.per}" if trial.per else "", f"WER {trial.wer}" if trial.wer else ""]
        facts += [
            trial.corpus or "",
            {True: "seen in train", False: "not seen in train"}.get(trial.seen, "")
            if trial.seen is not None
            else "",
        ]
        parts.append(f"<h3>{kind}: {escape(trial.trial)}</h3>")
        parts.append(f'<p class="trial">{escape(" · ".join(filter(None, facts)))}</p>')
        if trial.trial in drawn:
            parts.append("<p>Shown above.</p>")
            continue
        drawn.add(trial.trial)
        parts.append(_sentence(trial))
        output = run.outputs.get(trial.trial)
        if output is not None:
            figure = phoneme_picture(output.logits, output.labels, trial.trial, run.frame_seconds)
            picture = data_uri(figure)
            name = "trial_" + trial.trial.replace("/", "_").replace(".", "_")
            parts.append(_figure(picture, name, wide=True))
        parts.append(_nbest(trial))
    return "".join(parts)


def _sentence(trial: SavedTrial) -> str:
    if trial.decoded is None:
        true = escape(" ".join(scored_words(trial.true))) if trial.true else "<em>unknown</em>"
        decoded = "<em>no answer</em>"
    elif trial.true is None:
        true, decoded = "<em>unknown</em>", escape(trial.decoded)
    else:
        true, decoded = marked_sentences(trial.true, trial.decoded)
    return f"<dl><dt>true</dt><dd>{true}</dd><dt>decoded</dt><dd>{decoded}</dd></dl>"


def _nbest(trial: SavedTrial) -> str:
    found = trial.answer.get("nbest")
    if not found:
        return ""
    scores = ("acoustic", "ngram", "llm", "bonus", "total")
    shown = [key for key in scores if any(one.get(key) is not None for one in found)]
    rows = [
        [str(rank), one["sentence"], *(_score(one.get(key)) for key in shown)]
        for rank, one in enumerate(found[:_NBEST_SHOWN], start=1)
    ]
    title = f"n-best: the first {len(rows)} of {len(found)}, scores in natural logarithms"
    return _details(title, _table(["", "sentence", *shown], rows))


def _score(value: Any) -> str:
    return "" if value is None else f"{float(value):.2f}"


def _runtime(runs: Sequence[ReportRun]) -> str:
    head = ["run", "steps logged", "training", "steps per second", "validations", "decoding"]
    rows = []
    for run in runs:
        train = [one for one in run.metrics if one["kind"] == "train"]
        speeds = [float(s) for one in train if (s := one.get("steps_per_second"))]
        validations = [float(one.get("seconds", 0)) for one in run.metrics if one["kind"] == "val"]
        per_sentence = run.result and run.result.content.get("seconds_per_sentence")
        rows.append(
            [
                run.name,
                f"{train[-1]['step']:,}" if train else "none",
                _duration(sum(float(one.get("seconds", 0)) for one in train)),
                f"{np.median(speeds):.2f} (median)" if speeds else "not measured",
                f"{len(validations)} in {_duration(sum(validations))}",
                f"{1000 * per_sentence:.0f} ms a sentence" if per_sentence else "not measured",
            ]
        )
    return _table(head, rows)


def _provenance(run: ReportRun) -> str:
    config = dataclasses.asdict(run.config)
    facts: dict[str, Any] = {
        "folder": run.workdir,
        **run.facts,
        "seed": run.config.train.seed,
        "sessions": ", ".join(run.config.data.sessions),
        "settings": f"{text_checksum(json.dumps(config, sort_keys=True)):08x} (fingerprint)",
    }
    parts = [_pairs(facts)]
    for number, call in enumerate(run.calls, start=1):
        parts.append(f"<h3>Call {number} of b2txt train</h3>" + _pairs(_flat(call)))
    if not run.calls:
        parts.append("<p>The calls that trained it are not recorded.</p>")
    for result in run.results:
        parts.append(
            f"<h3>Result {escape(result.name)}</h3>" + _pairs(_flat(result.content["made"]))
        )
        parts.append(_details("Settings of the decoder", _pairs(_flat(result.content["settings"]))))
    parts.append(_details("Configuration", _pairs(_flat(config))))
    parts.append(_details("Versions that made this page", _pairs(versions())))
    return "".join(parts)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": one for name, one in _flat(value).items()}
        else:
            found[key] = value
    return found


def _marked(
    stretches: Sequence[Difference[str]], words: Sequence[tuple[str, ...]], tag: str
) -> str:
    parts = []
    for stretch, group in zip(stretches, words, strict=True):
        if group:
            text = escape(" ".join(group))
            parts.append(text if stretch.same else f"<{tag}>{text}</{tag}>")
    return " ".join(parts) or "<em>no words</em>"


def _of(run: ReportRun, title: str, alone: bool) -> str:
    return title if alone else f"{title}: {run.name}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _figure(uri: str, name: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    described = escape(name.replace("_", " "))
    # The address is copied when it is wanted: a second copy would double the page.
    link = (
        f'<a href="#" download="{escape(name)}.svg" onclick="this.href=this.previousElementSibling'
        '.src">download SVG</a>'
    )
    return f'<figure{kind}><img src="{uri}" alt="{described}">{link}</figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return (
        f'<div class="wide"><table class="numbers"><thead>{line(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>"
        for key, value in values.items()
    )
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def _percent(rate: ErrorRate | None) -> str:
    known = rate is not None and rate.rate is not None
    return f"{100 * (rate.rate or 0.0):.1f} %" if rate and known else "not measured"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    of = "" if interval.unit == "days" else ", of trials"
    return f"({100 * interval.low:.1f} to {100 * interval.high:.1f}{of})"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1d2430; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 0 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.3rem; }
section, header { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px;
  padding: 1rem 1.2rem; margin: 1rem 0; }
header p, .trial { color: #5f6368; font-size: 0.9rem; }
.notes { background: #fff6e5; border-radius: 6px; padding: 0.4rem 0.9rem; font-size: 0.9rem; }
.notes p, .notes ul { margin: 0.2rem 0; overflow-wrap: anywhere; }
figure { margin: 0.5rem 0; overflow-x: auto; }
figure img { width: 100%; max-width: 50rem; min-width: 30rem; height: auto; display: block; }
figure.wide img { max-width: none; min-width: 46rem; }
figure a, summary { color: #0072b2; font-size: 0.9rem; }
summary { cursor: pointer; margin-top: 0.5rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.95rem; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #eceef1; }
.numbers { margin-bottom: 0.5rem; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { white-space: nowrap; }
.pairs th { font-weight: normal; color: #5f6368; }
.pairs td { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: 5rem 1fr; margin: 0; }
dt { color: #5f6368; }
dd { margin: 0; }
del { background: #fde7dc; color: #8f3a00; }
ins { background: #dcedf8; color: #004b77; }
@media (max-width: 30rem) { main { padding: 0.5rem; } section { padding: 0.8rem; }
  dl { grid-template-columns: 1fr; } dt { font-size: 0.8rem; } }
@media print { body { background: #fff; } section, header { border: 0; padding: 0; }
  figure a { display: none; } figure, tr { break-inside: avoid; } }
"""
