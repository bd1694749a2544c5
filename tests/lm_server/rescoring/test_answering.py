"""Claims about answers: mixing, ranking, confidences, and what a failing model does."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed

import numpy as np
import pytest
from answers import answer_of

from lm_server.hypothesis import Hypothesis, Word
from lm_server.protocol import decode_scoring, encode_scoring
from lm_server.rescoring.answering import Answering
from lm_server.rescoring.ranking import posterior, word_confidences
from lm_server.rescoring.scorer import RescoringError
from lm_server.search.sliced import finished
from lm_server.settings import Settings

SETTINGS = Settings(acoustic_scale=0.5, alpha=0.25, top_candidates_to_augment=0)
CAT = Hypothesis(("the", "cat"), -10.0, -4.0)
BAT = Hypothesis(("the", "bat"), -11.0, -4.0)
AT = Hypothesis(("at",), -14.0, -3.0)


@dataclass
class Table:
    """A scorer that knows its sentences; the length penalty counts words."""

    scores: dict[str, float]
    name: str = "table"
    asked: list[tuple[tuple[str, ...], str]] = field(default_factory=list)

    def score(
        self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
    ) -> np.ndarray:
        self.asked.append((tuple(sentences), context))
        return np.array([self.scores[s] - length_penalty * len(s.split()) for s in sentences])


class Broken:
    name = "broken"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def score(
        self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
    ) -> np.ndarray:
        raise self.error


SCORER = Table({"the cat": -20.0, "the bat": -12.0, "at": -30.0})


def test_without_a_model_the_total_is_the_searchs() -> None:
    answer = answer_of([BAT, CAT, AT], SETTINGS)
    assert [(one.sentence, one.total) for one in answer.hypotheses] == [
        ("the cat", -9.0),
        ("the bat", -9.5),
        ("at", -10.0),
    ]
    assert (answer.rescored, answer.problem, answer.sentence) == (False, None, "the cat")


def test_with_a_model_the_total_mixes_both() -> None:
    answer = answer_of([CAT, BAT, AT], SETTINGS, SCORER)
    # acoustic_scale * acoustic + (1 - alpha) * ngram + alpha * llm, by hand.
    assert [(one.sentence, one.total) for one in answer.hypotheses] == [
        ("the bat", -5.5 - 3.0 - 3.0),
        ("the cat", -5.0 - 3.0 - 5.0),
        ("at", -7.0 - 2.25 - 7.5),
    ]
    assert (answer.rescored, answer.problem) == (True, None)
    assert [one.llm for one in answer.hypotheses] == [-12.0, -20.0, -30.0]


def test_the_bonus_counts_once_whatever_alpha_is() -> None:
    boosted = changed(AT, bonus=50.0)
    assert answer_of([CAT, boosted], SETTINGS).hypotheses[0].total == pytest.approx(40.0)
    answer = answer_of([CAT, boosted], SETTINGS, SCORER)
    assert answer.hypotheses[0].total == pytest.approx(-7.0 - 2.25 - 7.5 + 50.0)


def test_the_context_and_the_length_penalty_reach_the_model() -> None:
    scorer = Table(dict(SCORER.scores))
    answer = answer_of([CAT, AT], changed(SETTINGS, length_penalty=2.0), scorer, "hello there")
    assert scorer.asked == [(("the cat", "at"), "hello there")]
    assert {one.sentence: one.llm for one in answer.hypotheses} == {
        "the cat": -24.0,
        "at": -32.0,
    }


def test_do_opt_0_asks_nobody() -> None:
    scorer = Table({})
    answer = answer_of([CAT], changed(SETTINGS, do_opt=0), scorer)
    assert not scorer.asked
    assert (answer.rescored, answer.problem) == (False, None)


def test_new_candidates_are_scored_and_can_win() -> None:
    one = Hypothesis(("a", "big", "hat"), -10.0, -4.0)
    other = Hypothesis(("the", "big", "cat"), -10.0, -4.0)
    scores = {"a big hat": -30.0, "the big cat": -30.0, "a big cat": -2.0, "the big hat": -30.0}
    answer = answer_of([one, other], changed(SETTINGS, top_candidates_to_augment=20), Table(scores))
    assert answer.sentence == "a big cat"
    assert len(answer.hypotheses) == 4


def test_a_candidate_without_words_is_not_scored_and_does_not_win() -> None:
    nothing = Hypothesis((), 0.0, 0.0)
    assert answer_of([nothing, CAT], SETTINGS).sentence == ""
    answer = answer_of([nothing, CAT], SETTINGS, SCORER)
    assert [one.sentence for one in answer.hypotheses] == ["the cat"]


def test_when_there_are_no_words_at_all_there_is_nothing_to_rescore() -> None:
    for hypotheses in ([], [Hypothesis((), -1.0, -1.0)]):
        answer = answer_of(hypotheses, SETTINGS, SCORER)
        assert (answer.sentence, answer.rescored, answer.problem) == ("", False, None)
    assert answer_of([], SETTINGS).confidence is None


@pytest.mark.parametrize(
    ("scorer", "says"),
    [
        (Broken(RescoringError("out of memory on cuda")), "out of memory on cuda"),
        (Broken(ValueError("odd shape")), "ValueError: odd shape"),
        (Broken(MemoryError()), "MemoryError"),
        (Table({"the cat": math.nan, "the bat": -1.0}), "no finite score"),
        (Table({"the cat": -1.0, "the bat": -math.inf}), "no finite score"),
        (Table({"the cat": -1.0}), "KeyError"),
    ],
)
def test_a_failing_model_gives_the_ngram_answer_and_says_why(
    scorer: Broken | Table, says: str
) -> None:
    answer = answer_of([CAT, BAT], SETTINGS, scorer)
    expected = answer_of([CAT, BAT], SETTINGS)
    assert answer.problem is not None
    assert says in answer.problem
    assert changed(answer, problem=None) == expected
    assert [one.llm for one in answer.hypotheses] == [None, None]


def test_scores_of_the_wrong_number_are_a_failure() -> None:
    class Short(Table):
        def score(
            self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
        ) -> np.ndarray:
            return np.zeros(1)

    answer = answer_of([CAT, BAT], SETTINGS, Short({}))
    assert not answer.rescored
    assert "shape (1,)" in str(answer.problem)


def test_the_confidence_is_the_softmax_of_the_totals() -> None:
    answer = answer_of([CAT, BAT, AT], SETTINGS)
    weights = [1.0, math.exp(-0.5), math.exp(-1.0)]
    assert answer.confidence == pytest.approx(1.0 / sum(weights))
    cooler = answer_of([CAT, BAT, AT], changed(SETTINGS, confidence_temperature=2.0))
    weights = [1.0, math.exp(-0.25), math.exp(-0.5)]
    assert cooler.confidence == pytest.approx(1.0 / sum(weights))


def test_minimum_bayes_risk_answers_with_the_fewest_expected_word_errors() -> None:
    """The likeliest shares no word with the others, which share most of theirs."""
    lone = Hypothesis(("at",), -10.0, 0.0)
    one, other = (Hypothesis(("the", w, "sat"), -10.2, 0.0) for w in ("cat", "bat"))
    likeliest = answer_of([lone, one, other], SETTINGS)
    answer = answer_of([lone, one, other], changed(SETTINGS, minimum_bayes_risk=1))
    shares = dict(zip(("at", "bat", "cat"), posterior([-5.0, -5.1, -5.1], 1.0), strict=True))
    assert (likeliest.sentence, answer.sentence) == ("at", "the bat sat")
    # Errors to expect: 3 of the lone one, of the pair 1 each of the other, 3 of the lone one.
    assert 3 * (shares["bat"] + shares["cat"]) > shares["cat"] + 3 * shares["at"]
    assert [h.sentence for h in answer.hypotheses] == ["the bat sat", "the cat sat", "at"]
    assert answer.confidence == pytest.approx(shares["bat"])
    both = shares["bat"] + shares["cat"]
    assert answer.word_confidences == pytest.approx((both, shares["bat"], both))
    assert {h.sentence: h.total for h in answer.hypotheses} == {
        h.sentence: h.total for h in likeliest.hypotheses
    }


def test_candidates_past_the_hundredth_are_not_compared_and_stay_behind() -> None:
    """All but the likeliest are alike, so that comparing them would put one of them first."""
    words = [("x",), *(("the", "cat", "sat", *("on",) * n) for n in range(120))]
    many = [Hypothesis(some, -30.0 * n, 0.0) for n, some in enumerate(words)]
    answer = answer_of(many, changed(SETTINGS, minimum_bayes_risk=1, confidence_temperature=1e3))
    assert answer.hypotheses[0].words != ("x",)
    assert [h.words for h in answer.hypotheses[100:]] == words[100:]


def test_the_posterior_survives_totals_far_apart() -> None:
    assert posterior([-1e4, -2e4, -1e4], 1.0).tolist() == [0.5, 0.0, 0.5]


def test_a_words_confidence_is_the_mass_of_the_candidates_that_agree_there() -> None:
    candidates = [
        ("the", "cat", "sat"),
        ("the", "bat", "sat"),
        ("cat", "sat"),
        ("the", "cat", "sat", "down"),
        ("a", "dog"),
    ]
    shares = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    # "cat sat" lacks `the` only; the fourth has all three; the last none.
    assert finished(word_confidences(candidates, shares)) == pytest.approx(
        (0.4 + 0.3 + 0.1, 0.4 + 0.15 + 0.1, 0.4 + 0.3 + 0.15 + 0.1)
    )


def test_an_answer_travels_as_json_and_as_scoring() -> None:
    answer = answer_of([CAT, BAT], SETTINGS, SCORER)
    back = json.loads(json.dumps(answer.as_json(), allow_nan=False))
    assert back["sentence"] == "the bat"
    assert back["nbest"][0] == {
        "sentence": "the bat",
        "acoustic": -11.0,
        "ngram": -4.0,
        "bonus": 0.0,
        "llm": -12.0,
        "total": -11.5,
    }
    assert len(back["word_confidences"]) == 2
    assert answer.words == tuple(map(Word, ("the", "bat"), answer.word_confidences))
    assert decode_scoring(encode_scoring(answer.hypotheses)) == list(answer.hypotheses)


def test_rescored_answers_come_in_the_order_of_submission() -> None:
    answering = Answering(SCORER)
    done: list[int] = []
    submitted = []
    for index in range(30):
        hypotheses = [CAT, BAT] if index % 2 else [AT, CAT]
        pending = answering.submit(hypotheses, SETTINGS, f"context {index % 3}")
        pending.on_done(lambda index=index: done.append(index))  # type: ignore[misc]
        submitted.append((pending, hypotheses))
    answering.close()
    for pending, hypotheses in submitted:
        assert pending.done()
        assert pending.result() == answer_of(hypotheses, SETTINGS, SCORER)
    assert done == list(range(30))
    pending.on_done(lambda: done.append(30))
    assert done[-1] == 30


class Gate(Table):
    """Waits in its first batch until it is let on."""

    def __init__(self, scores: dict[str, float]) -> None:
        super().__init__(scores)
        self.entered, self.go = threading.Event(), threading.Event()

    def score(
        self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
    ) -> np.ndarray:
        self.entered.set()
        assert self.go.wait(20)
        return super().score(sentences, context, length_penalty)


def test_what_waits_during_a_batch_goes_into_the_next_one_together() -> None:
    gate = Gate(dict(SCORER.scores))
    answering = Answering(gate)
    first = answering.submit([CAT], SETTINGS)
    assert gate.entered.wait(20)
    others = [answering.submit([BAT, CAT], SETTINGS), answering.submit([AT, CAT], SETTINGS)]
    unwanted = answering.submit([AT], SETTINGS)
    assert answering.waiting == 3
    unwanted.deadline = 0.0
    assert not unwanted.result().rescored
    assert not first.done()
    assert not first.wait(0.01)
    gate.go.set()
    answering.close()
    assert [one.result().rescored for one in (first, *others)] == [True] * 3
    assert [asked for asked, _ in gate.asked] == [("the cat",), ("the cat", "the bat", "at")]


def test_one_sentences_fault_is_not_the_others() -> None:
    gate = Gate({"the cat": -20.0, "at": -30.0})
    answering = Answering(gate)
    first = answering.submit([CAT], SETTINGS)
    assert gate.entered.wait(20)
    good, bad = answering.submit([AT], SETTINGS), answering.submit([BAT], SETTINGS)
    gate.go.set()
    answering.close()
    assert first.result().rescored
    assert good.result().rescored
    assert not bad.result().rescored
    assert "KeyError" in str(bad.result().problem)


def test_a_late_rescoring_gives_the_ngram_answer_for_good() -> None:
    gate = Gate(dict(SCORER.scores))
    answering = Answering(gate, seconds=0.05)
    called: list[bool] = []
    pending = answering.submit([CAT, BAT], SETTINGS)
    pending.on_done(lambda: called.append(True))
    late = pending.result()
    assert pending.done()
    assert late.problem == "the large language model took longer than 0.05 s"
    assert changed(late, problem=None) == answer_of([CAT, BAT], SETTINGS)
    gate.go.set()
    answering.close()
    assert pending.result() is late
    assert called == [True]


def test_a_callback_that_fails_does_not_end_the_rescoring() -> None:
    def broken() -> None:
        raise ValueError("a caller's fault")

    answering = Answering(SCORER)
    answering.submit([CAT], SETTINGS).on_done(broken)
    assert answering.submit([BAT], SETTINGS).result().rescored
    answering.close()


def test_without_a_model_the_answer_is_there_at_once() -> None:
    answering = Answering()
    pending = answering.submit([CAT, BAT], SETTINGS)
    assert pending.done()
    assert pending.result() == answer_of([CAT, BAT], SETTINGS)
    answering.close()
    answering.close()


def test_after_the_end_the_answer_is_the_ngram_models_and_says_so() -> None:
    answering = Answering(SCORER)
    answering.close()
    answer = answering.submit([CAT, BAT], SETTINGS).result()
    assert "closed" in str(answer.problem)
    assert changed(answer, problem=None) == answer_of([CAT, BAT], SETTINGS)
