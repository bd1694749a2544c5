"""Claims about the report page, read back with an HTML parser."""

import datetime
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from b2txt_jax.evaluation.report import ReportInputs, marked_sentences, report_html, write_report
from b2txt_jax.metrics import ErrorRate
from b2txt_jax.phonemes import sentence_to_ids
from b2txt_jax.training.metrics_log import MetricsError

MADE = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)
VOID = {"meta", "img"}


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report_html(make_inputs(tmp_path_factory.mktemp("run")), MADE)


def make_inputs(tmp_path: Path, **changes: Any) -> ReportInputs:
    metrics = tmp_path / "metrics.jsonl"
    if not metrics.exists():
        lines = [
            {"step": 10, "kind": "train", "loss": 80.0},
            {
                "step": 10,
                "kind": "val",
                "loss": 82.0,
                "per": 0.4,
                "per_day": {"t15.2023.08.13": 0.4},
            },
        ]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sentence = {"trial": "t15.2023.08.13/trial_0001", "true": "Yes, I can.", "decoded": "yes i ran"}
    given: dict[str, Any] = {
        "title": "Brain to text",
        "summary": {
            "val_per": 0.1234,
            "wer_greedy": 0.5,
            "wer_1gram": None,
            "wer_3gram": 0.0789,
            "train_seconds": 372.4,
            "decode_seconds_per_sentence": 0.036,
            "steps": 1500,
        },
        "metrics_file": metrics,
        "trial": "t15.2023.08.13/trial_0001",
        "logits": np.eye(41, dtype=np.float32)[[1, 2, 0, 40]],
        "label": sentence_to_ids(["yes"]),
        "wer_rows": [("3-gram", ErrorRate(59, 748))],
        "sentences": [sentence] * 12,
        "settings": {"config": "configs/demo.py"},
    }
    return ReportInputs(**{**given, **changes})


def test_the_page_loads_nothing_from_elsewhere(ordinary: str) -> None:
    page = Page(ordinary)
    assert len(page.links) == 4  # the pictures
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", ordinary)


def test_key_figures_are_shown_and_a_missing_one_says_so(ordinary: str) -> None:
    text = Page(ordinary).text
    for shown in ("12.3 %", "50.0 %", "7.9 %", "not measured", "1,500 training steps"):
        assert shown in text
    for shown in ("6 min 12 s", "36 ms", "2 January 2030", "configs/demo.py", "748", "jax"):
        assert shown in text


def test_ten_sentences_are_shown(ordinary: str) -> None:
    assert Page(ordinary).tags.count("li") == 10


def test_differing_words_are_marked_in_both_sentences() -> None:
    true, decoded = marked_sentences("Yes, I can do it.", "yes i ran do it now")
    assert true == "yes i <del>can</del> do it"
    assert decoded == "yes i <ins>ran</ins> do it <ins>now</ins>"


def test_a_sentence_without_words_is_no_empty_line() -> None:
    assert marked_sentences("yes", "") == ("<del>yes</del>", "<em>no words</em>")


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\""
    sentences = [
        {"trial": evil, "true": evil, "decoded": None},
        {"trial": evil, "true": None, "decoded": evil},
        {"trial": evil, "true": evil, "decoded": evil},
    ]
    page = make_inputs(
        tmp_path,
        title=evil,
        trial=evil,
        wer_rows=[(evil, ErrorRate(1, 2))],
        sentences=sentences,
        settings={evil: evil},
        summary={evil: evil},
    )
    text = report_html(page, MADE)
    assert "<script" not in text
    assert Page(text).text.count(evil) >= 8


def test_a_failed_trial_is_shown_as_failed(tmp_path: Path) -> None:
    sentence = {"trial": "t", "true": "Yes.", "decoded": None}
    text = Page(report_html(make_inputs(tmp_path, sentences=[sentence]), MADE)).text
    assert "failed: no answer" in text


def test_a_run_that_was_never_validated_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 9.0}\n')
    page = make_inputs(tmp_path, label=None, sentences=[], wer_rows=[], summary={})
    assert "No validation took place" in Page(report_html(page, MADE)).text


def test_the_days_shown_are_those_of_the_best_validation(tmp_path: Path) -> None:
    lines = [
        {"step": 10, "kind": "val", "loss": 1.0, "per": 0.2, "per_day": {"t15.2023.08.13": 0.2}},
        {"step": 20, "kind": "val", "loss": 1.0, "per": 0.3, "per_day": {"t15.2023.08.13": 0.3}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Validation at step 10," in Page(report_html(make_inputs(tmp_path), MADE)).text


def test_a_missing_metrics_file_leaves_the_earlier_page_alone(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, make_inputs(tmp_path))
    before = path.read_bytes()
    assert before.startswith(b"<!DOCTYPE html>")
    with pytest.raises(MetricsError):
        write_report(path, make_inputs(tmp_path, metrics_file=tmp_path / "none.jsonl"))
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
