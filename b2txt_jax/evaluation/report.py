"""`report.html`: one page about a run that needs no other file and no network."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.evaluation.figures import (
    data_uri,
    learning_curve,
    per_by_day,
    phoneme_picture,
    wer_bars,
)
from b2txt_jax.metrics import Difference, ErrorRate, differences
from b2txt_jax.provenance import versions
from b2txt_jax.training.metrics_log import read_metrics
from lm_server.atomic_file import replacing
from lm_server.text_rules import scored_words

_SENTENCES_SHOWN = 10


@dataclass(frozen=True)
class ReportInputs:
    """The content of a report.

    Attributes:
      title: heading of the page.
      summary: `val_per, wer_greedy, wer_1gram, wer_3gram` (rates, 1.0 = 100 %, None = not
        measured), `train_seconds, decode_seconds_per_sentence, steps`. Other keys are listed
        unchanged.
      metrics_file: `metrics.jsonl` of the training run.
      trial: name of the trial in the picture.
      logits: that trial's logits [P, 41] in the RNN's order.
      label: its true class ids [L], None when unknown.
      wer_rows: name and rate, such as ("3-gram", ErrorRate(53, 600)).
      sentences: entries of `evaluation.json`: trial, true, decoded (None: failed). The first ten
        are shown.
      settings: whatever explains the figures, name -> value.
    """

    title: str
    summary: Mapping[str, Any]
    metrics_file: Path
    trial: str
    logits: np.ndarray
    label: np.ndarray | None
    wer_rows: Sequence[tuple[str, ErrorRate]]
    sentences: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]


def write_report(path: Path, inputs: ReportInputs) -> None:
    """Write the page, whole or not at all.

    Raises:
      MetricsError: the metrics file cannot be read.
      ValueError: the logits are not [P, 41].
    """
    page = report_html(inputs, datetime.datetime.now().astimezone())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def report_html(inputs: ReportInputs, made: datetime.datetime) -> str:
    """Return the page as HTML. Every text of the inputs is escaped."""
    entries = read_metrics(inputs.metrics_file)
    validations = [e for e in entries if e["kind"] == "val" and e.get("per") is not None]
    curve = _figure(data_uri(learning_curve(entries)), "Loss and phoneme error rate by step")
    if validations:
        # The days of the validation that the kept checkpoint comes from: the best one.
        best = min(validations, key=lambda entry: float(entry["per"]))
        days = _day_rates(best.get("per_day") or {})
        by_day = _figure(data_uri(per_by_day(days)), "Phoneme error rate of each day")
        step = f"<p>Validation at step {int(best['step']):,}, the best one of the run.</p>"
    else:
        by_day, step = "<p>No validation took place.</p>", ""
    picture = data_uri(phoneme_picture(inputs.logits, inputs.label, inputs.trial))
    sections = [
        _header(inputs, made),
        _section("Learning curve", curve),
        _section("Phoneme error rate per day", step + by_day),
        _section(
            "Phoneme probabilities of one trial",
            "<p>Each column is a frame of 80 ms, each row a class. Above: the decoded phonemes "
            "where they occur. Beneath: the true ones.</p>"
            + _figure(picture, f"Phoneme probabilities of {inputs.trial}", wide=True),
        ),
        _section(
            "Word error rate",
            _wer_table(inputs.wer_rows)
            + _figure(data_uri(wer_bars(inputs.wer_rows)), "Word error rates as bars"),
        ),
        _section("Sentences", _sentences(inputs.sentences[:_SENTENCES_SHOWN])),
        _section("How this was made", _how(inputs)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(inputs.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def marked_sentences(true: str, decoded: str) -> tuple[str, str]:
    """Return both sentences as HTML over the scored words, with the differing words marked."""
    stretches = differences(scored_words(true), scored_words(decoded))
    return (
        _marked(stretches, [stretch.reference for stretch in stretches], "del"),
        _marked(stretches, [stretch.decoded for stretch in stretches], "ins"),
    )


def _marked(
    stretches: Sequence[Difference[str]], words: Sequence[tuple[str, ...]], tag: str
) -> str:
    parts = []
    for stretch, group in zip(stretches, words, strict=True):
        if group:
            text = escape(" ".join(group))
            parts.append(text if stretch.same else f"<{tag}>{text}</{tag}>")
    return " ".join(parts) or "<em>no words</em>"


def _header(inputs: ReportInputs, made: datetime.datetime) -> str:
    summary = inputs.summary
    cards = [
        ("phoneme error rate", _percent(summary.get("val_per"))),
        ("WER without LM", _percent(summary.get("wer_greedy"))),
        ("WER, 1-gram", _percent(summary.get("wer_1gram"))),
        ("WER, 3-gram", _percent(summary.get("wer_3gram"))),
    ]
    boxes = "".join(
        f'<div class="card"><strong>{escape(value)}</strong><span>{escape(name)}</span></div>'
        for name, value in cards
    )
    facts = [
        _fact(summary, "steps", lambda value: f"{int(value):,} training steps"),
        _fact(summary, "train_seconds", lambda value: f"{_duration(float(value))} of training"),
        _fact(
            summary,
            "decode_seconds_per_sentence",
            lambda value: f"{1000 * float(value):.0f} ms of decoding per sentence",
        ),
        made.strftime("%-d %B %Y, %H:%M %Z"),
    ]
    line = " · ".join(escape(fact) for fact in facts if fact)
    return (
        f'<header><h1>{escape(inputs.title)}</h1><div class="cards">{boxes}</div>'
        f"<p>{line}</p></header>"
    )


def _fact(summary: Mapping[str, Any], key: str, text: Any) -> str:
    return "" if summary.get(key) is None else str(text(summary[key]))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _figure(uri: str, description: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f'<figure{kind}><img src="{uri}" alt="{escape(description)}"></figure>'


def _wer_table(rows: Sequence[tuple[str, ErrorRate]]) -> str:
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td>{_percent(rate.rate)}</td>"
        f"<td>{rate.errors:,}</td><td>{rate.length:,}</td></tr>"
        for name, rate in rows
    )
    head = "<tr><th>language model</th><th>WER</th><th>errors</th><th>words</th></tr>"
    return f'<table class="numbers"><thead>{head}</thead><tbody>{lines}</tbody></table>'


def _sentences(sentences: Sequence[Mapping[str, Any]]) -> str:
    items = []
    for sentence in sentences:
        true, decoded = sentence.get("true"), sentence.get("decoded")
        if decoded is None:
            shown_true = escape(" ".join(scored_words(str(true)))) if true else "<em>unknown</em>"
            shown = "<em>failed: no answer</em>"
        elif true is None:
            shown_true, shown = "<em>unknown</em>", escape(str(decoded))
        else:
            shown_true, shown = marked_sentences(str(true), str(decoded))
        items.append(
            f'<li><span class="trial">{escape(str(sentence.get("trial", "")))}</span>'
            f"<dl><dt>true</dt><dd>{shown_true}</dd><dt>decoded</dt><dd>{shown}</dd></dl></li>"
        )
    note = (
        "<p>As they are scored: lower case, without punctuation. <del>Struck</del> words were "
        "missed, <ins>underlined</ins> words were put instead.</p>"
    )
    return f'{note}<ol class="sentences">{"".join(items)}</ol>'


def _how(inputs: ReportInputs) -> str:
    shown = {"val_per", "wer_greedy", "wer_1gram", "wer_3gram"}
    settings = dict(inputs.settings)
    settings |= {key: value for key, value in inputs.summary.items() if key not in shown}
    return (
        "<h3>Settings</h3>"
        + _pairs(settings)
        + "<h3>Versions</h3>"
        + _pairs(versions())
        + "<p>Error rates are aggregates: all errors divided by the length of all references. "
        "A phoneme error rate counts silences; a word error rate compares normalised words. "
        "“Without LM” looks up each greedily decoded group of phonemes in the CMU dictionary.</p>"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>"
        for key, value in values.items()
    )
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def _day_rates(per_day: Mapping[str, Any]) -> dict[str, float | None]:
    return {day: None if per_day[day] is None else float(per_day[day]) for day in sorted(per_day)}


def _percent(rate: Any) -> str:
    return "not measured" if rate is None else f"{100 * float(rate):.1f} %"


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
main { max-width: 58rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 0 0 0.5rem; }
h3 { font-size: 1rem; margin: 1rem 0 0.3rem; }
section { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px;
  padding: 1rem 1.2rem; margin: 1rem 0; }
.cards { display: grid; gap: 0.7rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.card { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: 0.7rem 1rem; }
.card strong { display: block; font-size: 1.5rem; color: #0072b2; }
.card span, header p, .trial { color: #5f6368; font-size: 0.9rem; }
figure { margin: 0; overflow-x: auto; }
figure img { width: 100%; min-width: 30rem; height: auto; display: block; }
figure.wide img { min-width: 46rem; }
table { border-collapse: collapse; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #eceef1; }
.numbers { margin-bottom: 1rem; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.pairs th { font-weight: normal; color: #5f6368; }
.pairs td { overflow-wrap: anywhere; }
.sentences { padding-left: 1.5rem; }
.sentences li { margin-bottom: 0.8rem; }
dl { display: grid; grid-template-columns: 5rem 1fr; margin: 0; }
dt { color: #5f6368; }
dd { margin: 0; }
del { background: #fde7dc; color: #8f3a00; }
ins { background: #dcedf8; color: #004b77; }
@media (max-width: 30rem) { main { padding: 0.5rem; } section { padding: 0.8rem; }
  dl { grid-template-columns: 1fr; } dt { font-size: 0.8rem; } }
"""
