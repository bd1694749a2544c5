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

from lm_server.hypothesis import Hypothesis
from lm_server.protocol import decode_scoring, encode_scoring
from lm_server.rescoring.answer import RescoringError, complete, posterior, word_confidences
from lm_server.rescoring.rescore import RescoringQueue
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
    answer = complete([BAT, CAT, AT], SETTINGS)
    assert [(one.sentence, one.total) for one in answer.candidates] == [
        ("the cat", -9.0),
        ("the bat", -9.5),
        ("at", -10.0),
    ]
    assert (answer.rescored, answer.problem, answer.sentence) == (False, None, "the cat")


def test_with_a_model_the_total_mixes_both() -> None:
    answer = complete([CAT, BAT, AT], SETTINGS, SCORER)
    # acoustic_scale * acoustic + (1 - alpha) * ngram + alpha * llm, by hand.
    assert [(one.sentence, one.total) for one in answer.candidates] == [
        ("the bat", -5.5 - 3.0 - 3.0),
        ("the cat", -5.0 - 3.0 - 5.0),
        ("at", -7.0 - 2.25 - 7.5),
    ]
    assert (answer.rescored, answer.problem) == (True, None)
    assert [one.hypothesis.llm for one in answer.candidates] == [-12.0, -20.0, -30.0]


def test_the_bonus_counts_once_whatever_alpha_is() -> None:
    boosted = changed(AT, bonus=50.0)
    assert complete([CAT, boosted], SETTINGS).candidates[0].total == pytest.approx(40.0)
    answer = complete([CAT, boosted], SETTINGS, SCORER)
    assert answer.candidates[0].total == pytest.approx(-7.0 - 2.25 - 7.5 + 50.0)


def test_the_context_and_the_length_penalty_reach_the_model() -> None:
    scorer = Table(dict(SCORER.scores))
    answer = complete([CAT, AT], changed(SETTINGS, length_penalty=2.0), scorer, "hello there")
    assert scorer.asked == [(("the cat", "at"), "hello there")]
    assert {one.sentence: one.hypothesis.llm for one in answer.candidates} == {
        "the cat": -24.0,
        "at": -32.0,
    }


def test_do_opt_0_asks_nobody() -> None:
    scorer = Table({})
    answer = complete([CAT], changed(SETTINGS, do_opt=0), scorer)
    assert not scorer.asked
    assert (answer.rescored, answer.problem) == (False, None)


def test_new_candidates_are_scored_and_can_win() -> None:
    one = Hypothesis(("a", "big", "hat"), -10.0, -4.0)
    other = Hypothesis(("the", "big", "cat"), -10.0, -4.0)
    scores = {"a big hat": -30.0, "the big cat": -30.0, "a big cat": -2.0, "the big hat": -30.0}
    answer = complete([one, other], changed(SETTINGS, top_candidates_to_augment=20), Table(scores))
    assert answer.sentence == "a big cat"
    assert len(answer.candidates) == 4


def test_a_candidate_without_words_is_not_scored_and_does_not_win() -> None:
    nothing = Hypothesis((), 0.0, 0.0)
    assert complete([nothing, CAT], SETTINGS).sentence == ""
    answer = complete([nothing, CAT], SETTINGS, SCORER)
    assert [one.sentence for one in answer.candidates] == ["the cat"]


def test_when_there_are_no_words_at_all_there_is_nothing_to_rescore() -> None:
    for hypotheses in ([], [Hypothesis((), -1.0, -1.0)]):
        answer = complete(hypotheses, SETTINGS, SCORER)
        assert (answer.sentence, answer.rescored, answer.problem) == ("", False, None)
    assert complete([], SETTINGS).confidence is None


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
    answer = complete([CAT, BAT], SETTINGS, scorer)
    expected = complete([CAT, BAT], SETTINGS)
    assert answer.problem is not None
    assert says in answer.problem
    assert changed(answer, problem=None) == expected
    assert [one.hypothesis.llm for one in answer.candidates] == [None, None]


def test_scores_of_the_wrong_number_are_a_failure() -> None:
    class Short(Table):
        def score(
            self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
        ) -> np.ndarray:
            return np.zeros(1)

    answer = complete([CAT, BAT], SETTINGS, Short({}))
    assert not answer.rescored
    assert "shape (1,)" in str(answer.problem)


def test_the_confidence_is_the_softmax_of_the_totals() -> None:
    answer = complete([CAT, BAT, AT], SETTINGS)
    weights = [1.0, math.exp(-0.5), math.exp(-1.0)]
    assert answer.confidence == pytest.approx(1.0 / sum(weights))
    cooler = complete([CAT, BAT, AT], changed(SETTINGS, confidence_temperature=2.0))
    weights = [1.0, math.exp(-0.25), math.exp(-0.5)]
    assert cooler.confidence == pytest.approx(1.0 / sum(weights))


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
    assert word_confidences(candidates, shares) == pytest.approx(
        (0.4 + 0.3 + 0.1, 0.4 + 0.15 + 0.1, 0.4 + 0.3 + 0.15 + 0.1)
    )


def test_an_answer_travels_as_json_and_as_scoring() -> None:
    answer = complete([CAT, BAT], SETTINGS, SCORER)
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
    assert decode_scoring(encode_scoring(answer.scoring())) == list(answer.scoring())


def test_the_queue_gives_what_complete_gives_in_the_order_of_submission() -> None:
    queue = RescoringQueue(SCORER)
    done: list[int] = []
    futures = []
    for index in range(30):
        hypotheses = [CAT, BAT] if index % 2 else [AT, CAT]
        future = queue.submit(hypotheses, SETTINGS, f"context {index % 3}")
        future.add_done_callback(lambda _, index=index: done.append(index))  # type: ignore[misc]
        futures.append((future, hypotheses))
    queue.close()
    for future, hypotheses in futures:
        assert future.result(0) == complete(hypotheses, SETTINGS, SCORER)
    assert done == list(range(30))


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
    queue = RescoringQueue(gate)
    first = queue.submit([CAT], SETTINGS)
    assert gate.entered.wait(20)
    others = [queue.submit([BAT, CAT], SETTINGS), queue.submit([AT, CAT], SETTINGS)]
    dropped = queue.submit([AT], SETTINGS)
    assert queue.waiting == 3
    assert dropped.cancel()
    assert not first.done()
    gate.go.set()
    queue.close()
    assert [one.result(0).rescored for one in (first, *others)] == [True] * 3
    assert [asked for asked, _ in gate.asked] == [("the cat",), ("the cat", "the bat", "at")]


def test_one_sentences_fault_is_not_the_others() -> None:
    gate = Gate({"the cat": -20.0, "at": -30.0})
    queue = RescoringQueue(gate)
    first = queue.submit([CAT], SETTINGS)
    assert gate.entered.wait(20)
    good, bad = queue.submit([AT], SETTINGS), queue.submit([BAT], SETTINGS)
    gate.go.set()
    queue.close()
    assert first.result(0).rescored
    assert good.result(0).rescored
    assert not bad.result(0).rescored
    assert "KeyError" in str(bad.result(0).problem)


def test_a_queue_without_a_model_gives_the_ngram_answer_and_a_closed_one_refuses() -> None:
    queue = RescoringQueue(None)
    assert queue.submit([CAT, BAT], SETTINGS).result(20) == complete([CAT, BAT], SETTINGS)
    queue.close()
    queue.close()
    with pytest.raises(RescoringError, match="closed"):
        queue.submit([CAT], SETTINGS)
