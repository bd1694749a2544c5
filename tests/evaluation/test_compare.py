"""Claims about comparisons: paired on the same trials, and right where the answer is known."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from b2txt_jax.cli import main
from b2txt_jax.evaluation.compare import compare, error_segments, matched_pairs, sign_test
from b2txt_jax.evaluation.intervals import bootstrap_interval, paired_bootstrap
from b2txt_jax.evaluation.results import ResultsError, read_result
from b2txt_jax.metrics import ErrorRate, edit_distance

TRIALS = [f"t15.2023.08.{day:02}/trial_{n:04}" for day in range(10, 16) for n in range(3)]


def said(decoded: list[str], true: str = "how are you today") -> dict:
    return {trial: (true, [(text, -1.0)]) for trial, text in zip(TRIALS, decoded, strict=False)}


def test_segments_are_parted_by_two_words_that_both_have_right() -> None:
    true = list("abcdefg")
    assert error_segments(true, true, true) == []
    # One right word between two errors does not part them, two do.
    assert error_segments(true, list("xbydefz"), true) == [(2, 0), (1, 0)]
    assert error_segments(true, list("abcdef"), list("abcdefgh")) == [(1, 1)]
    # A word that is inserted between two right ones is an error between them.
    assert error_segments(true, list("abcxdefg"), true) == [(1, 0)]
    assert error_segments([], ["x"], []) == [(1, 0)]


def test_every_error_is_in_a_segment() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        true, a, b = (list(rng.choice(list("abc"), rng.integers(0, 9))) for _ in range(3))
        found = error_segments(true, a, b)
        assert sum(one for one, _ in found) == edit_distance(true, a)
        assert sum(two for _, two in found) == edit_distance(true, b)


def test_the_tests_agree_with_scipy() -> None:
    pairs = [(3, 1), (0, 0), (2, 2), (5, 1), (1, 2), (4, 0)]
    change = [b - a for a, b in pairs]
    z = np.mean(change) / (np.std(change, ddof=1) / math.sqrt(len(change)))
    assert matched_pairs(pairs) == pytest.approx(2 * stats.norm.sf(abs(z)))
    assert sign_test(2, 9) == pytest.approx(stats.binomtest(2, 11).pvalue)
    assert sign_test(0, 0) == 1.0
    assert matched_pairs([(1, 1)] * 3) == 1.0
    assert matched_pairs([(1, 0)]) is None


def test_the_paired_interval_is_narrower_than_what_unpaired_rates_allow() -> None:
    """Days differ much, and B is better by the same on each: pairing takes the days out."""
    days = [trial.split("/")[0] for trial in TRIALS]
    first = [ErrorRate(2 * int(day[-1]) + 2, 20) for day in days]
    second = [ErrorRate(one.errors - 1, 20) for one in first]
    found, alone = paired_bootstrap(days, first, second), bootstrap_interval(days, first)
    assert found is not None
    assert alone is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((-0.05, -0.05))
    assert alone.high - alone.low > 0.1
    assert (found.p, found.interval.unit) == (1 / 2000, "days")
    same = paired_bootstrap(days, first, first)
    assert same is not None
    assert same.p == 1.0


def test_a_comparison_counts_changes_and_lists_the_sentences(make_result) -> None:
    right, wrong = "how are you today", "how were you two day"
    a = read_result(make_result("a", said([wrong, right] * 9)))
    b = read_result(make_result("b", said([right] * 17 + [wrong])))
    found = compare(a, b)
    assert found.wer is not None
    assert (found.wer.a, found.wer.b) == (ErrorRate(27, 72), ErrorRate(3, 72))
    assert (found.wer.better, found.wer.worse, found.wer.same) == (9, 1, 8)
    assert found.wer.paired is not None
    assert found.wer.paired.interval.high < 0
    assert [one.trial for one in found.changed] == [*TRIALS[::2], TRIALS[17]]
    assert (found.changed[-1].errors_a, found.changed[-1].errors_b) == (0, 3)
    assert found.per is not None


def test_results_of_other_data_are_not_compared(make_result) -> None:
    a = read_result(make_result("a", said(["yes"] * 3)))
    other = read_result(make_result("b", said(["yes"] * 3, "no thank you")))
    with pytest.raises(ResultsError, match=r"3 trials of .* have other true sentences"):
        compare(a, other)
    elsewhere = {f"u/{n}": ("yes", [("yes", -1.0)]) for n in range(3)}
    with pytest.raises(ResultsError, match="have no trial in common"):
        compare(a, read_result(make_result("c", elsewhere)))


def test_the_command_prints_both_rates_and_writes_json(make_result, tmp_path, capsys) -> None:
    a, b = make_result("a", said(["how are you"] * 18)), make_result("b", said(["today"] * 12))
    out = tmp_path / "c.json"
    assert main(["compare", str(a), str(b), "--out", str(out), "--sentences", "2"]) == 0
    shown, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "25.00 % (12/48)" in shown
    assert "75.00 % (36/48)" in shown
    assert "left out: 6 trials that only A has, 0 that only B has" in shown
    assert shown.count("true: how are you today") == 2
    assert (written["wer"]["worse"], len(written["changed"])) == (12, 12)
    assert written["wer"]["paired"]["interval"]["low"] > 0
    assert main(["compare", str(a), str(b), "--sentences", "-1"]) == 2
    assert "--sentences is -1; needed 0 or more" in capsys.readouterr().err
