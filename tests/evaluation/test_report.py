"""Claims about the report page, read back with an HTML parser."""

import base64
import dataclasses
import datetime
import html.parser
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from spoken import logits_of

from b2txt_jax.config import CONFIG_FILE, load_config, write_config
from b2txt_jax.data.trial import TrialRef
from b2txt_jax.evaluation.report.calibration import phoneme_pairs, reliability, word_pairs
from b2txt_jax.evaluation.report.confusions import confusions
from b2txt_jax.evaluation.report.inputs import ReportRun, distinguished, groups, report_run
from b2txt_jax.evaluation.report.page import (
    chosen_trials,
    marked_sentences,
    report_html,
    write_report,
)
from b2txt_jax.evaluation.results import ResultsError, SavedTrial, read_result
from b2txt_jax.inference.run import TrialLogits
from b2txt_jax.metrics import ErrorRate
from b2txt_jax.phonemes import PHONEME_IDS, sentence_to_ids

MADE = datetime.datetime(2030, 1, 2, 3, 4, tzinfo=datetime.UTC)
METRICS = [
    {"step": 10, "kind": "train", "loss": 80.0, "gradient_norm": 3.0, "seconds": 372.4},
    {"step": 10, "kind": "val", "loss": 82.0, "per": 0.4, "seconds": 2.0},
]
SAID = {
    "t15.2023.08.13/trial_0000": ("Yes, I can.", [("yes i ran", -1.0), ("yes i can", -2.0)]),
    "t15.2023.08.13/trial_0001": ("how are you", [("how are you", -1.0)]),
    "t15.2023.08.18/trial_0002": ("the cat sat on the mat", [("the cat", -5.0), ("the cad", -6.0)]),
    "t15.2023.08.18/trial_0003": ("no", [("no", -5.0)]),
}


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
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def trial_of(name: str, true: str, decoded: str) -> TrialLogits:
    session, key = name.split("/")
    ref = TrialRef(session, Path("data_val.hdf5"), key, 99, 9, 1, 1)
    return TrialLogits(ref, logits_of(decoded.split()), sentence_to_ids(true.split()), true)


@pytest.fixture
def make_run(make_result: Callable[..., Path], tmp_path: Path) -> Callable[..., ReportRun]:
    def make(name: str = "run", **changes: Any) -> ReportRun:
        known = {"train_sentences": ["no"], "corpora": ["Harvard", "Harvard", None, "Random"]}
        said = {trial: (re.sub(r"[^\w ]", "", t).lower(), f) for trial, (t, f) in SAID.items()}
        result = read_result(make_result(f"{name}/val/lm", said, **known))
        outputs = {t: trial_of(t, true, found[0][0]) for t, (true, found) in said.items()}
        given: dict[str, Any] = {
            "name": name,
            "workdir": tmp_path / name,
            "config": load_config("demo"),
            "metrics": METRICS,
            "calls": [{"command": "b2txt train --x", "hardware": {"cpu": "Z80"}, "data": "da7a"}],
            "facts": {"step": 10, "parameters": 1234, "fingerprint": "0123abcd"},
            "results": [result],
            "trials": result.trials,
            "outputs": outputs,
            "notes": (),
        }
        return ReportRun(**{**given, **changes})

    return make


def test_the_page_loads_nothing_and_its_figures_are_svgs_to_save(make_run) -> None:
    text, notes = report_html([make_run()], MADE)
    page = Page(text)
    assert notes == []
    pictures = [link for link in page.links if link.startswith("data:image/svg+xml;base64,")]
    assert len(pictures) + page.links.count("#") == len(page.links)
    assert len(pictures) == page.links.count("#") == text.count('.svg" onclick="this.href=') == 11
    for picture in pictures:
        assert b"<svg" in base64.b64decode(picture.partition(",")[2])
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)


def test_rates_origin_and_hypotheses_are_on_the_page(make_run) -> None:
    text = Page(report_html([make_run(outputs={})], MADE)[0]).text
    for shown in ("38.5 %", "Worst: t15.2023.08.18/trial_0002", "the cad", "6 min 12 s"):
        assert shown in text
    for shown in ("b2txt train --x", "Z80", "da7a", "0123abcd", "250 ms a sentence", "acoustic"):
        assert shown in text
    assert "2 January 2030" in text


def test_rates_are_counted_by_day_corpus_length_and_train_split(make_run) -> None:
    found = groups(make_run().trials)
    named = {kind: {one.name: one.wer for one in some} for kind, some in found.items()}
    assert named["all"] == {"all": ErrorRate(5, 13)}
    assert named["recording day"] == {
        "t15.2023.08.13": ErrorRate(1, 6),
        "t15.2023.08.18": ErrorRate(4, 7),
    }
    assert named["corpus"] == {"Harvard": ErrorRate(1, 6), "Random": ErrorRate(0, 1)}
    assert named["sentence length"] == {"1-3 words": ErrorRate(1, 7), "4-6 words": ErrorRate(4, 6)}
    assert named["train split"] == {
        "not seen in train": ErrorRate(5, 12),
        "seen in train": ErrorRate(0, 1),
    }


def test_confusions_add_up_to_the_edit_distance() -> None:
    label, decoded = sentence_to_ids(["cat"]), sentence_to_ids(["bats"])
    found = confusions([label, label], [decoded, label])
    k, b, s = (PHONEME_IDS[one] for one in ("K", "B", "S"))
    assert found.most_frequent(9) == [(0, s, 1), (k, b, 1)]
    sums = found.substitutions.sum(), found.deletions.sum(), found.insertions.sum()
    assert (*sums, found.lengths.sum()) == (1, 0, 1, 8)


def test_a_reliability_has_the_mean_confidence_and_the_share_that_is_right() -> None:
    found = reliability([(0.85, True), (0.81, False), (1.0, True), (0.0, False)])
    assert found is not None
    assert found.confidence.tolist() == pytest.approx([0.0, 0.83, 1.0])
    assert found.right.tolist() == [0.0, 0.5, 1.0]
    assert found.error == pytest.approx(0.33 / 2)
    assert reliability([]) is None


def test_confidences_belong_to_the_words_and_phonemes_in_their_place() -> None:
    answer = {"word_confidences": [0.9, 0.4, 0.7]}
    trial = SavedTrial("t/a", "Yes, I can.", "yes i ran", None, None, None, None, answer)
    assert list(word_pairs([trial])) == [(0.9, True), (0.4, True), (0.7, False)]
    pairs = list(phoneme_pairs([trial_of("t/a", "cat", "cat")]))
    assert [right for _, right in pairs] == [True] * 4
    assert pairs[0][0] == pytest.approx(np.exp(9) / (np.exp(9) + 40))


def test_worst_median_and_best_are_by_words_then_by_phonemes(make_run) -> None:
    trials = make_run().trials
    chosen = chosen_trials(trials)
    assert list(chosen) == ["Worst", "Median", "Best", "Random"]
    assert chosen["Worst"].trial.endswith("0002")
    assert chosen["Best"].wer == ErrorRate(0, 1)
    assert chosen["Random"] in trials


def test_pictures_are_in_seconds_of_the_runs_own_frames(make_run, monkeypatch) -> None:
    drawn: list[float] = []

    def draw(*args: Any) -> Figure:
        drawn.append(args[3])
        return Figure()

    monkeypatch.setattr("b2txt_jax.evaluation.report.page.phoneme_picture", draw)
    denser = load_config("demo", [f"--config.model.patch_{one}" for one in ("size=6", "stride=2")])
    for config, frame in ((load_config("demo"), 80), (denser, 40)):
        drawn.clear()
        text = Page(report_html([make_run(config=config)], MADE)[0]).text
        assert f"a frame of {frame} ms" in text
        assert drawn
        assert set(drawn) == {frame / 1000}


@pytest.mark.slow
def test_several_runs_share_the_curves_and_have_their_own_trials(make_run) -> None:
    runs = [make_run("one", outputs={}), make_run("two", outputs={})]
    text = Page(report_html(runs, MADE)[0]).text
    for title in ("Trials: one", "Trials: two", "How this was made: two"):
        assert title in text
    assert text.count("Learning curves") == 1


def test_runs_of_equal_names_are_told_apart_and_none_is_given_twice(make_run) -> None:
    one, two = make_run("a/run"), make_run("b/run")
    assert [run.name for run in distinguished([one, two])] == ["a/run", "b/run"]
    with pytest.raises(ResultsError, match="is given more than once"):
        distinguished([one, one])


@pytest.mark.slow
def test_a_page_that_would_be_too_large_leaves_out_trials_and_names_them(
    make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("b2txt_jax.evaluation.report.page._trials", lambda run: "x" * 1_700_000)
    runs = [make_run("one", outputs={}), make_run("two", outputs={})]
    text, notes = report_html(runs, MADE)
    assert len(text) < 3_000_000
    assert notes == ["two: its trials are left out, since the page would pass 3 MB"]
    assert notes[0] in Page(text).text


def test_every_text_is_escaped(make_run) -> None:
    evil = "<script>alert('x')</script>&\""
    trial = SavedTrial(
        evil,
        evil,
        evil,
        None,
        ErrorRate(1, 2),
        None,
        evil,
        {"nbest": [{"sentence": evil, "total": 1.0}]},
    )
    failed = dataclasses.replace(trial, decoded=None, answer={})
    unknown = dataclasses.replace(trial, true=None)
    run = make_run(
        name=evil,
        workdir=Path(evil),
        calls=[{evil: evil}],
        results=[],
        trials=[trial, failed, unknown],
        outputs={},
        notes=(evil,),
    )
    text, _ = report_html([run], MADE, evil)
    assert "<script" not in text
    assert Page(text).text.count(evil) >= 8


def test_a_run_that_has_only_begun_has_a_page_that_names_what_is_missing(make_run) -> None:
    run = make_run(
        metrics=[], calls=[], facts={}, results=[], trials=[], outputs={}, notes=("no words",)
    )
    text, notes = report_html([run], MADE)
    assert notes == ["no words"]
    shown = Page(text).text
    for part in ("Missing here", "no words", "not measured", "No trial was scored"):
        assert part in shown


def test_a_result_of_another_split_is_left_out_and_each_has_its_own_per(
    make_run, make_result, tmp_path: Path
) -> None:
    one = read_result(
        make_result("run/train/lm", {"t15.2023.08.13/trial_0000": ("no", [("no", -1.0)])}, "train")
    )
    write_config(load_config("demo"), tmp_path / "run" / CONFIG_FILE)
    found = report_run(tmp_path / "run", [one], logits=False)
    assert found.results == []
    assert any("not of val" in note for note in found.notes)
    first = make_run().results[0]
    content = {**first.content, "per": {**first.content["per"], "all": {"errors": 1, "length": 2}}}
    results = [dataclasses.replace(first, content=content), first]
    head = Page(
        report_html([make_run(results=results, outputs={}, trials=[])], MADE)[0]
    ).text.partition("Learning")[0]
    assert "50.0 %" in head
    assert "of trials" in head  # two days are too few to draw from


def test_differing_words_are_marked_in_both_sentences() -> None:
    true, decoded = marked_sentences("Yes, I can do it.", "yes i ran do it now")
    assert true == "yes i <del>can</del> do it"
    assert decoded == "yes i <ins>ran</ins> do it <ins>now</ins>"
    assert marked_sentences("yes", "") == ("<del>yes</del>", "<em>no words</em>")


def test_the_page_is_written_whole(make_run, tmp_path: Path) -> None:
    path = tmp_path / "pages" / "report.html"
    assert write_report(path, [make_run(outputs={}, trials=())]) == []
    assert path.read_text().endswith("</html>\n")
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="found no run"):
        write_report(path, [])
