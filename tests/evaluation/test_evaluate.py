"""Claims about what an evaluation counts, names and writes."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from spoken import logits_of

from b2txt_jax.evaluation.command import write_results
from b2txt_jax.evaluation.evaluate import (
    Evaluation,
    Failure,
    evaluate,
    submission_texts,
    write_evaluation,
)
from b2txt_jax.evaluation.submission import SubmissionWarning
from b2txt_jax.metrics import ErrorRate
from b2txt_jax.phonemes import sentence_to_ids
from lm_server.client.answers import Result
from lm_server.hypothesis import Answer, Hypothesis

NAMES = ["t15.2023.08.13/trial_0000", "t15.2023.08.13/trial_0001", "t15.2023.08.18/trial_0000"]
SAID = ["The cat sat.", "How are you?", "Yes!"]
HEARD = [["the", "cat", "sat"], ["how", "are"], ["yes"]]


def results(*sentences: str | None, reason: str | None = None) -> list[Result]:
    """The language model's answers. None: it failed."""
    found = []
    for name, sentence in zip(NAMES, sentences, strict=True):
        if sentence is None:
            found.append(Result(name, None, reason, 0.0))
        else:
            best = Hypothesis(tuple(sentence.split()), -1.0, -1.0, total=-2.0)
            other = Hypothesis(("other",), -5.0, -5.0, total=-10.0)
            found.append(Result(name, Answer((best, other)), None, 0.25))
    return found


def evaluated(**changes: Any) -> Evaluation:
    given: dict[str, Any] = {
        "split": "val",
        "results": results("the cat sat", "how old are you", "no"),
        "logits": [logits_of(words) for words in HEARD],
        "labels": [sentence_to_ids(text) for text in (HEARD[0], ["how", "are", "you"], HEARD[2])],
        "sentences": SAID,
        "corpora": ["Random", "Harvard", "Random"],
        "settings": {"lm": "3-gram"},
    }
    return evaluate(**{**given, **changes})


def test_word_errors_are_counted_in_all_per_session_and_per_corpus() -> None:
    wer = evaluated().wer
    assert wer is not None
    assert wer.all == ErrorRate(2, 7)
    assert wer.per_session == {
        "t15.2023.08.13": ErrorRate(1, 6),
        "t15.2023.08.18": ErrorRate(1, 1),
    }
    assert wer.per_corpus == {"Random": ErrorRate(1, 4), "Harvard": ErrorRate(1, 3)}


def test_phoneme_errors_count_the_silence_of_a_missed_word() -> None:
    per = evaluated().per
    assert per is not None
    assert per.all.errors == len(sentence_to_ids(["you"])) == 3
    assert per.all.length == sum(
        len(sentence_to_ids(w.split())) for w in ("the cat sat", "how are you", "yes")
    )


def test_words_without_language_model_come_from_the_greedy_phonemes() -> None:
    without = evaluated().wer_without_lm
    assert without is not None
    assert without.all == ErrorRate(1, 7)  # "you" was not heard


def test_a_failed_trial_is_named_and_has_all_its_words_wrong() -> None:
    result = evaluated(
        results=results("the cat sat", None, "yes", reason="timed out"),
    )
    assert result.failed == (Failure(NAMES[1], "timed out"),)
    assert result.wer is not None
    assert result.wer.all == ErrorRate(3, 7)
    assert result.sentences[1].decoded is None
    assert result.sentences[1].rate == ErrorRate(3, 3)


def test_a_trial_without_candidates_is_a_failure_even_if_nobody_said_so() -> None:
    answers = results("the cat sat", None, "yes")
    answers[2] = Result(NAMES[2], Answer(()), None, 0.1)
    result = evaluated(results=answers)
    assert [failure.trial for failure in result.failed] == NAMES[1:]


def test_failing_never_improves_the_rate() -> None:
    good, failed = evaluated().wer, evaluated(results=results(None, None, None)).wer
    assert good is not None
    assert failed is not None
    assert failed.all == ErrorRate(7, 7)
    assert failed.all.errors > good.all.errors


def test_the_test_split_has_sentences_and_no_rates() -> None:
    written = evaluated(split="test", labels=None, sentences=None, corpora=None).to_json()
    assert written["per"] is written["wer"] is written["wer_without_lm"] is None
    assert written["wer_oracle"] is None
    assert written["sentences"][1] == {
        "trial": NAMES[1],
        "true": None,
        "decoded": "how old are you",
        "errors": None,
        "oracle_errors": None,
        "words": None,
        "phoneme_errors": None,
        "phonemes": None,
        "corpus": None,
        "seen": None,
    }


def test_sentences_of_the_train_split_are_counted_apart_by_the_rules_of_the_wer() -> None:
    result = evaluated(train_sentences=["the cat -- sat!", "YES", "how are you now"])
    assert result.wer is not None
    assert result.per is not None
    # "the cat - sat" has a dash of its own by the published rules, so it is another sentence.
    assert [row.seen for row in result.sentences] == [False, False, True]
    seen, unseen = result.wer.seen, result.wer.unseen
    assert seen is not None
    assert unseen is not None
    assert (seen.all, seen.trials) == (ErrorRate(1, 1), 1)
    assert (unseen.all, unseen.trials) == (ErrorRate(1, 6), 2)
    assert unseen.per_session == {"t15.2023.08.13": ErrorRate(1, 6)}
    assert unseen.per_corpus == {"Random": ErrorRate(0, 3), "Harvard": ErrorRate(1, 3)}
    assert result.per.seen is not None
    assert result.per.seen.all == ErrorRate(0, len(sentence_to_ids(["yes"])))
    written = result.to_json()
    for kind in ("per", "wer", "wer_oracle", "wer_without_lm"):
        halves = written[kind]["seen"], written[kind]["unseen"]
        assert [half["trials"] for half in halves] == [1, 2]
        for part in ("errors", "length"):
            assert sum(half["all"][part] for half in halves) == written[kind]["all"][part]


def test_without_train_sentences_the_halves_are_unknown_and_none_is_seen_of_an_empty_split() -> (
    None
):
    unknown, none = evaluated().wer, evaluated(train_sentences=[]).wer
    assert unknown is not None
    assert none is not None
    assert unknown.seen is unknown.unseen is None
    assert "seen" not in unknown.to_json()
    assert none.seen is not None
    assert (none.seen.all, none.seen.trials, none.seen.interval) == (ErrorRate(0, 0), 0, None)


def test_the_oracle_is_the_hypothesis_of_the_list_that_is_nearest_to_the_truth() -> None:
    answers = results("the cat sat", None, "no")
    better = Hypothesis(("yes",), -9.0, -9.0, total=-18.0)
    assert answers[2].answer is not None
    best = answers[2].answer.hypotheses
    answers[2] = Result(NAMES[2], Answer((*best, better)), None, 0.25)
    result = evaluated(results=answers)
    assert result.wer is not None
    assert result.wer_oracle is not None
    # The failed trial has no list: all of its three words stay wrong.
    assert [row.oracle and row.oracle.errors for row in result.sentences] == [0, 3, 0]
    assert (result.wer.all, result.wer_oracle.all) == (ErrorRate(4, 7), ErrorRate(3, 7))


def test_intervals_of_few_days_are_of_trials_in_all_and_in_the_halves() -> None:
    wer = evaluated(train_sentences=["yes"]).wer
    assert wer is not None
    assert wer.interval is not None
    assert (wer.interval.unit, wer.interval.units, wer.interval.days) == ("trials", 3, 2)
    written = wer.to_json()["interval"]
    assert (written["level"], written["draws"], written["low"]) == (0.95, 2000, 0.0)
    assert wer.seen is not None
    assert wer.seen.interval is None  # one trial


def test_unknown_corpora_are_told_apart_and_no_corpora_make_no_groups() -> None:
    some, none = evaluated(corpora=["Random", None, "Random"]).wer, evaluated(corpora=None).wer
    assert some is not None
    assert none is not None
    assert list(some.per_corpus) == ["Random", "unknown"]
    assert none.per_corpus == {}


def test_the_file_holds_errors_length_and_rate_of_each_group(tmp_path: Path) -> None:
    path = tmp_path / "new" / "evaluation.json"
    write_evaluation(path, evaluated())
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["wer"]["all"] == {"errors": 2, "length": 7, "rate": pytest.approx(2 / 7)}
    assert written["wer"]["per_corpus"]["Harvard"]["errors"] == 1
    assert written["split"] == "val"
    assert written["trials"] == 3
    assert written["failed"] == []
    assert written["settings"] == {"lm": "3-gram"}
    assert written["seconds_per_sentence"] == 0.25
    assert written["sentences"][2] == {
        "trial": NAMES[2],
        "true": "Yes!",
        "decoded": "no",
        "errors": 1,
        "oracle_errors": 1,
        "words": 1,
        "phoneme_errors": 0,
        "phonemes": 4,
        "corpus": "Random",
        "seen": None,
    }
    assert list(path.parent.iterdir()) == [path]


def test_a_session_without_any_word_has_no_rate_in_the_file() -> None:
    written = evaluated(sentences=["The cat sat.", "How are you?", "..."]).to_json()
    group = written["wer"]["per_session"]["t15.2023.08.18"]
    assert group == {"errors": 1, "length": 0, "rate": None}


def test_settings_that_json_cannot_hold_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_evaluation(tmp_path / "e.json", evaluated(settings={"scale": float("nan")}))
    assert list(tmp_path.iterdir()) == []


def test_a_submission_keeps_the_row_of_a_failed_trial() -> None:
    result = evaluated(results=results("the cat sat", None, "yes"))
    assert submission_texts(result) == ["the cat sat", "", "yes"]


def test_empty_rows_of_a_submission_are_counted_and_named(tmp_path: Path) -> None:
    with pytest.warns(
        SubmissionWarning, match=rf"2 of 3 rows .* have no text.*{NAMES[0]}, {NAMES[1]}"
    ):
        write_results(tmp_path, evaluated(results=results("", None, "yes")))
    with warnings.catch_warnings(action="error"):
        write_results(tmp_path, evaluated())


@pytest.mark.parametrize("what", ["logits", "labels", "sentences", "corpora"])
def test_lists_of_another_length_are_refused_by_name(what: str) -> None:
    with pytest.raises(ValueError, match=f"found 0 {what} for 3 trials"):
        evaluated(**{what: []})
