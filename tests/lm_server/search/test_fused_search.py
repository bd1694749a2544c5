"""A large language model asked during the search: exact sums, what it brings, and its failures."""

import dataclasses
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small_model import say
from test_causal_lm import make
from test_offline import write

from lm_server.__main__ import main
from lm_server.rescoring.growing import GrowingScores, growing
from lm_server.rescoring.load import load_scorer
from lm_server.search.fused import FusedModel, _FusedScores
from lm_server.search.interface import BackendError
from lm_server.search.load import load_model
from lm_server.settings import Settings
from lm_server.tuning import lists as tuning_lists

SAID = ["the", "cat", "sat", "on", "the", "mat"]
VAGUE = Settings(acoustic_scale=1.0, blank_penalty=1.0, alpha=0.5)


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_scorer(make(tmp_path_factory.mktemp("llm") / "gpt2", "gpt2"), "cpu")


class Prefers:
    """A stand-in that likes one word, and counts what it is asked."""

    def __init__(self, word="too", go=None, fails=False):
        self.word, self.go, self.fails, self.asked = word, go, fails, []

    def score(self, sentences, length_penalty=0.0):
        if self.go is not None:
            self.go.wait(30)
        if self.fails:
            raise RuntimeError("no memory")
        self.asked.append(list(sentences))
        return np.array([-5.0 * len(s.split()) + 30.0 * (self.word in s) for s in sentences])


def test_little_memory_means_smaller_batches_with_the_same_scores(tiny, monkeypatch):
    sentences = ["the cat sat on the mat", "the cat sat", "a dog had two hats", "the bat"]
    expected = growing(tiny).score(sentences)
    read, sizes = type(tiny).read, []

    def limited(self, tokens, positions, sees, cache):
        found = read(self, tokens, positions, sees, cache)
        sizes.append(len(tokens))
        # As a CPU says it, and after the cache has changed.
        if self.tokens_per_batch > 64 and len(sizes) < 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return found

    monkeypatch.setattr(type(tiny), "read", limited)
    monkeypatch.setattr(tiny, "tokens_per_batch", 128)
    scores = growing(tiny)
    np.testing.assert_allclose(scores.score(sentences), expected, atol=1e-4)
    assert tiny.tokens_per_batch == 64
    assert len(sizes) == 2

    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(type(tiny), "read", broken)
    with pytest.raises(RuntimeError, match="do not fit"):
        scores.score(["a zebra"])


def searched(model, logits, settings=VAGUE, chunk=7):
    search = model.search(settings)
    for start in range(0, len(logits), chunk):
        search.step(logits[start : start + chunk])
    return search.finish()


def noisy(words, seed=0):
    logits = say(words, strength=6.0)
    return logits + np.random.default_rng(seed).normal(0, 1.5, logits.shape).astype(np.float32)


def test_words_that_are_appended_score_as_whole_sentences_do(tiny):
    scores = growing(tiny)
    texts = ["the", "the cat", "a dog", "the cat sat", "a", "the cat sat on the mat", "the cat ran"]
    got = np.concatenate([scores.score(texts[at : at + 2]) for at in range(0, len(texts), 2)])
    np.testing.assert_allclose(got, tiny.score(texts), atol=1e-4)
    read = scores._read
    np.testing.assert_allclose(scores.score(texts), got)
    assert scores._read == read, "what was read is read again"
    scores._alive = -1
    scores._model, scores._read = tiny, 10**9
    np.testing.assert_allclose(scores.score(texts), got, atol=1e-4)
    assert scores._read == read, "it has not forgotten"


def test_a_finished_sentence_is_scored_from_what_the_search_has_read(tiny, monkeypatch):
    finished = ["the cat sat on the mat", "the cat sat on the bat", "a zebra"]
    expected = tiny.score(finished)
    scores = growing(tiny)
    for text in ("the cat", "the cat sat on", "the cat sat on the", "the cat sat on the mat"):
        scores.score([text])
    forward, read = type(tiny.network).forward, []

    def counted(self, *args, **kwargs):
        read.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny.network), "forward", counted)
    np.testing.assert_allclose(tiny.score(finished[:2]), expected[:2], atol=1e-4)
    mats = [set(one[:-1]) for one in tiny.tokens(finished[:2])]
    assert sum(read) < min(map(len, mats)) / 2, "what the search has read is read again"
    read.clear()
    np.testing.assert_allclose(tiny.score(finished), expected, atol=1e-4)
    assert sum(read) > min(map(len, mats)), "what nobody needs any more is kept"
    # A context comes before all of it, so that nothing which was read can be used.
    before = tiny.score(finished, "we talk of animals")
    scores.score(finished)
    np.testing.assert_allclose(tiny.score(finished, "we talk of animals"), before, atol=1e-4)


def test_finished_sentences_of_which_little_was_read_go_into_the_same_batch(tiny, monkeypatch):
    finished = ["the cat sat on the mat", "the bat ran to the dog and a cat"]
    expected = tiny.score(finished)
    scores = growing(tiny)
    scores.score(["the cat sat on the"])
    assert scores.known(tiny.tokens(finished)[1]) < len(tiny.tokens(finished)[1]) / 2
    forward, batches = type(tiny.network).forward, []

    def counted(self, *args, **kwargs):
        batches.append(kwargs["input_ids"].numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny.network), "forward", counted)
    np.testing.assert_allclose(tiny.score(finished), expected, atol=1e-4)
    assert len(batches) == 1


def test_a_score_that_comes_after_the_next_word_still_counts_in_full(model):
    ids = {word: number for number, word in enumerate(model.words)}
    scores = _FusedScores(model.ngram)
    the, _ = scores.score(scores.start(False), ids["the"])
    cat, _ = scores.score(the, ids["cat"])
    alone = scores.finish(cat)[1]
    scores.history([ids["the"]]).own = -1.5
    assert scores.finish(cat)[1] == pytest.approx(alone - 1.5)
    # What the model says of the whole replaces it.
    scores.history([ids["the"], ids["cat"]]).own = -0.5
    assert scores.finish(cat)[1] == pytest.approx(alone - 0.5)


def test_what_the_model_has_lowered_makes_room_for_the_next_best(model):
    """Of homophones at a sentence's end, one is asked at a time. No word follows with which the
    difference would be paid."""
    asked = []

    class Dislikes:
        def score(self, sentences, length_penalty=0.0):
            asked.extend(sentences)
            return np.array([-40.0 * one.endswith(" to") for one in sentences])

    settings = dataclasses.replace(VAGUE, fuse_hypotheses=1, fuse_frames=1)
    searched(FusedModel(model, Dislikes), say(["the", "dog", "ran", "to"], frames=4), settings)
    assert {"the dog ran too", "the dog ran two"} & set(asked[asked.index("the dog ran to") :])


@pytest.mark.parametrize("beam", ["lattice_beam", "fuse_beam"])
def test_what_an_answer_would_leave_out_is_not_asked(model, beam):
    logits, asked, answers = noisy(SAID), [], []
    for width in (3.0, 1e6):
        prefers = Prefers()
        settings = dataclasses.replace(VAGUE, **{"fuse_beam": 1e6, beam: width})
        answers.append(searched(FusedModel(model, lambda one=prefers: one), logits, settings))
        asked.append({sentence for batch in prefers.asked for sentence in batch})
    assert " ".join(SAID) in asked[0]
    assert len(asked[0]) < len(asked[1]) / 2
    assert {one.words for one in answers[0]} < {one.words for one in answers[1]}


def test_where_the_model_has_said_nothing_its_beam_leaves_nothing_out(model):
    logits, go = noisy(SAID), threading.Event()
    settings = dataclasses.replace(VAGUE, fuse_beam=0.5)
    alone = searched(model, logits, settings)
    assert len(alone) > 5
    fails = FusedModel(model, lambda: Prefers(fails=True))
    assert searched(fails, logits, settings) == alone
    late = FusedModel(model, lambda: Prefers(go=go), aside=True)
    assert searched(late, logits, settings) == alone
    go.set()
    late.close()
    assert len(searched(FusedModel(model, Prefers), logits, settings)) < len(alone)


def test_scores_stay_apart_and_are_those_of_the_search_alone(model, tiny):
    logits = noisy(SAID)
    alone = {one.words: one for one in searched(model, logits)}
    settings = dataclasses.replace(VAGUE, fuse_beam=1e6)
    fused = searched(FusedModel(model, lambda: growing(tiny)), logits, settings)
    both = [(one, alone[one.words]) for one in fused if one.words in alone]
    assert len(both) > 5
    for one, other in both:
        assert one.ngram == pytest.approx(other.ngram, abs=1e-3)
        assert one.total == pytest.approx(other.total, abs=1e-2)
        assert one.llm is None


def test_a_narrow_search_keeps_what_the_model_prefers_and_loses_it_without(model):
    """Homophones that the acoustics cannot tell apart, the better one unlikely in the text."""
    settings = Settings(acoustic_scale=1.0, blank_penalty=1.0, max_active=5, fuse_frames=5)
    logits = say(["the", "dog", "ran", "to", "the", "cat", "and", "the", "cat", "ran"])
    alone = searched(model, logits, settings)
    prefers = Prefers("too")
    fused = searched(FusedModel(model, lambda: prefers), logits, settings)
    assert not any("too" in one.words for one in alone)
    assert any("too" in one.words for one in fused)
    assert all(len(batch) <= settings.fuse_hypotheses for batch in prefers.asked)


def test_the_chunks_do_not_decide_when_the_model_is_asked(model, tiny):
    fused = FusedModel(model, lambda: growing(tiny))
    logits = noisy(SAID, 1)
    assert searched(fused, logits, chunk=1) == searched(fused, logits, chunk=1000)


def test_weight_zero_or_no_rescoring_is_the_search_alone(model):
    logits = noisy(SAID, 2)
    alone = searched(model, logits)
    off = Settings(acoustic_scale=1.0, blank_penalty=1.0, do_opt=0)
    prefers = Prefers()
    assert searched(FusedModel(model, lambda: prefers), logits, off) == alone
    assert prefers.asked == []


def test_a_model_that_fails_leaves_the_search_alone_and_is_named(model, caplog):
    logits = noisy(SAID, 3)
    fused = searched(FusedModel(model, lambda: Prefers(fails=True)), logits)
    assert fused == searched(model, logits)
    assert "no memory" in caplog.text


def test_scores_beside_the_search_are_used_when_they_come_and_never_waited_for(model):
    logits, go = noisy(SAID, 4), threading.Event()
    late = FusedModel(model, lambda: Prefers(go=go), aside=True)
    assert searched(late, logits) == searched(model, logits)
    go.set()
    late.close()
    # With a thread that has always finished, it is what asking at once finds.
    quick = FusedModel(model, Prefers, aside=True)
    quick._executor.submit = lambda *work: _finished(work)
    prompt = searched(quick, logits)
    assert {one.words for one in prompt} & {
        one.words for one in searched(FusedModel(model, Prefers), logits)
    }
    quick.close()


def _finished(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(*work)


def test_another_search_cannot_be_fused(model):
    class Other:
        backend = "wfst"

    with pytest.raises(BackendError, match=r"the search wfst cannot ask .* --backend flashlight"):
        FusedModel(Other(), Prefers)


def test_decode_fuses(model_folder, tmp_path, capsys):
    logits = tmp_path / "logits.npz"
    write(logits, [" ".join(SAID), "a dog ran"])
    llm = str(make(tmp_path / "llm", "gpt2"))
    out = tmp_path / "out.jsonl"
    common = ["decode", "--lm", str(model_folder), "--logits", str(logits), "--out", str(out)]
    assert main([*common, "--fuse"]) == 2
    assert "--fuse needs a large language model to ask: add --llm DIR" in capsys.readouterr().err
    assert main([*common, "--llm", llm, "--fuse", "--fuse-frames", "4"]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 2
    for answer in answers:
        assert answer["rescored"]
        for one in answer["nbest"]:
            assert math.isfinite(one["llm"])
            assert one["ngram"] < 0


@pytest.mark.slow
def test_score_and_tune_ask_during_the_search_too(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tuning_lists, "_SAMPLES", 20)
    truth, val, out = [" ".join(SAID), "a dog ran"], tmp_path / "val.npz", tmp_path / "s.json"
    write(val, truth)
    with np.load(val) as arrays:
        np.savez(val, **arrays, sentence=truth)
    llm = ["--llm", str(make(tmp_path / "llm", "gpt2")), "--llm-device", "cpu"]
    common = ["--lm", str(model_folder), "--logits", str(val), *llm, "--fuse"]
    asked = []
    score = GrowingScores.score
    monkeypatch.setattr(
        GrowingScores, "score", lambda self, *rest: asked.append(rest) or score(self, *rest)
    )
    assert main(["score", *common]) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == 0
    assert asked
    asked.clear()
    assert main(["tune", *common, "--out", str(out), "--searches", "1", "--workers", "1"]) == 0
    assert asked
    about = json.loads(out.read_text())["about"]["asking_during_the_search"]
    assert set(about) == {"expected_wer_rescored", "expected_wer_asked"}
    assert "leave --fuse out" in capsys.readouterr().out
    asked.clear()
    assert main(["score", *common, "--settings", str(out)]) == 0
    assert not asked
    assert "--fuse is given, but fuse_weight is 0" in capsys.readouterr().err
