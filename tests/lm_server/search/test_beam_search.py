"""The search finds what listing every path finds, in whatever chunks the frames come."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import say

from lm_server.lm.arpa import Model, NGrams, read_arpa, sort_model
from lm_server.lm.trie.kenlm_binary import write_trie
from lm_server.protocol import LM_CLASSES, SILENCE, ProtocolError
from lm_server.search.emissions import scaled_log_probabilities
from lm_server.search.flashlight import (
    BeamSearch,
    LanguageModel,
    ModelFolderError,
)
from lm_server.search.interface import MAX_UTTERANCE_FRAMES
from lm_server.search.load import load_model
from lm_server.settings import Settings, SettingsError

BLANK, SIL = 0, LM_CLASSES.index(SILENCE)
AH, T, Z = (LM_CLASSES.index(name) for name in ("AH", "T", "Z"))

# A lexicon and a bigram model small enough to list all paths: "at" and "att" are homophones.
TINY_LEXICON = {"a": [(AH,)], "at": [(AH, T)], "att": [(AH, T)], "ta": [(T, AH), (T,)]}
TINY_ARPA = """\
\\data\\
ngram 1=7
ngram 2=5

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.3
-0.9\t</s>
-0.6\ta\t-0.25
-0.8\tat\t-0.125
-1.2\tatt
-1.1\tta\t-0.4

\\2-grams:
-0.2\t<s> ta
-0.4\tta a
-0.5\ta </s>
-0.35\tat </s>
-0.7\ta att

\\end\\
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "lm.arpa").write_text(TINY_ARPA)
    write_trie(folder / "lm.bin", sort_model(read_arpa(folder / "lm.arpa")))
    lines = [
        f"{word} {' '.join(LM_CLASSES[i] for i in phones)}\n"
        for word, said in TINY_LEXICON.items()
        for phones in said
    ]
    (folder / "lexicon.txt").write_text("".join(lines))
    description = {
        "format": 1,
        "order": 2,
        "words": len(TINY_LEXICON),
        "pronunciations": len(lines),
    }
    (folder / "lm.json").write_text(json.dumps(description))
    return LanguageModel(folder)


@pytest.fixture(scope="module")
def model(model_folder):
    return LanguageModel(model_folder)


def some_logits(rng, frames):
    """Random logits in which only the five classes in use have a chance."""
    logits = np.full((frames, 41), -300.0, np.float32)
    logits[:, [BLANK, SIL, AH, T, Z]] = rng.normal(0.0, 3.0, (frames, 5))
    return logits


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 9), max_size=6),
    st.integers(0, 40),
)
@settings(max_examples=40)
def test_frames_in_any_chunks_give_the_same_answer(tiny, seed, cuts, frames):
    logits = some_logits(np.random.default_rng(seed), frames)
    search = BeamSearch(tiny, Settings())
    search.step(logits)
    offline = search.finish()
    position, partial = 0, ()
    for cut in [*cuts, frames]:
        partial = search.step(logits[position : position + cut])
        position = min(position + cut, frames)
    streamed = search.finish()
    # Exactly equal scores ("at att" and "att at") have no order where the beam cuts them off.
    assert [(h.acoustic, h.ngram) for h in streamed] == [(h.acoustic, h.ngram) for h in offline]
    assert [h.words for h in streamed[:5]] == [h.words for h in offline[:5]]
    assert bool(offline) == bool(frames)
    search.step(logits)
    assert search.step(logits[:0]) == partial


@pytest.mark.parametrize("sentence", ["the cat sat on the mat", "a dog had two hats", "zebra"])
def test_clear_logits_give_their_sentence(model, sentence):
    words = [word if word != "hats" else "hat" for word in sentence.split()]
    search = BeamSearch(model, Settings())
    search.step(say(words))
    assert search.finish()[0].words == tuple(words)


def test_a_partial_sentence_grows_word_by_word_and_never_needs_the_end(model):
    search = BeamSearch(model, Settings())
    words = ["the", "cat", "sat", "on", "the", "mat"]
    seen = [search.step(say([word])) for word in words]
    assert seen == [tuple(words[: i + 1]) for i in range(len(words))]


def test_silence_before_between_and_after_words_changes_nothing(model):
    silence = np.zeros((5, 41), np.float32)
    silence[:, SIL] = 9.0
    blank = np.zeros((3, 41), np.float32)
    blank[:, BLANK] = 9.0
    search = BeamSearch(model, Settings())
    pauses = [silence, blank, silence, say(["the", "cat"]), silence, blank, silence, say(["ran"])]
    for part in [*pauses, blank, silence, silence]:
        search.step(part)
    assert search.finish()[0].sentence == "the cat ran"


def test_silence_alone_is_an_empty_sentence(model):
    silence = np.zeros((20, 41), np.float32)
    silence[:, SIL] = 9.0
    search = BeamSearch(model, Settings())
    search.step(silence)
    assert search.finish()[0].words == ()


def test_a_last_word_without_its_silence_is_in_the_sentence(model):
    search = BeamSearch(model, Settings())
    cut = say(["the", "cat", "sat"], gap=0, last_silence=False)
    assert search.step(cut) == ("the", "cat")
    best = search.finish()[0]
    assert best.words == ("the", "cat", "sat")
    # The closing frame adds nothing to the acoustic score: it stays that of the frames given.
    expected = scaled_log_probabilities(cut, Settings(acoustic_scale=1.0)).max(axis=1).sum()
    assert best.acoustic == pytest.approx(expected, rel=1e-4)


def test_a_sentence_that_ends_inside_a_word_keeps_the_words_before(model):
    search = BeamSearch(model, Settings(beam=30.0))
    # "Z IY B" begins "zebra" and is no word itself.
    logits = np.concatenate([say(["the", "cat"]), say(["zebra"])[:9]])
    search.step(logits)
    best = search.finish()[0]
    assert best.words[:2] == ("the", "cat")
    assert -400 < best.acoustic <= 0
    assert -100 < best.ngram < 0


def test_finishing_starts_a_new_sentence(model):
    search = BeamSearch(model, Settings())
    for _ in range(2):
        search.step(say(["the", "cat"]))
        assert search.finish()[0].sentence == "the cat"
    assert search.finish() == ()


def test_beginning_drops_the_sentence_under_way(model):
    search = BeamSearch(model, Settings())
    search.step(say(["the", "dog"]))
    search.begin()
    search.step(say(["a", "cat"]))
    assert search.finish()[0].sentence == "a cat"


def test_all_homophones_are_found_not_only_the_six_that_a_trie_node_holds(tmp_path):
    words = [f"{letter}ee" for letter in "abcdefghijklmn"]
    unigrams = ["<unk>", "<s>", "</s>", *words]
    log10 = np.array([-7, -99, -1, *(-1.5 - 0.1 * i for i in range(len(words)))], np.float32)
    ids = np.arange(len(unigrams), dtype=np.int32)[:, None]
    model = Model(unigrams, [NGrams(ids, log10, np.zeros_like(log10))])
    write_trie(tmp_path / "lm.bin", sort_model(model))
    (tmp_path / "lexicon.txt").write_text("".join(f"{word} IY\n" for word in words))
    description = {"format": 1, "order": 1, "words": len(words), "pronunciations": len(words)}
    (tmp_path / "lm.json").write_text(json.dumps(description))
    search = BeamSearch(LanguageModel(tmp_path), Settings())
    logits = np.zeros((6, 41), np.float32)
    logits[:3, LM_CLASSES.index("IY")] = logits[3:, SIL] = 12.0
    search.step(logits)
    found = [h for h in search.finish() if len(h.words) == 1]
    assert [h.words[0] for h in found] == words
    assert len({round(h.acoustic, 6) for h in found}) == 1


def test_nbest_is_distinct_best_first_and_no_longer_than_asked(model):
    rng = np.random.default_rng(0)
    logits = say(["the", "cat", "sat"], strength=9.0)
    logits = logits + rng.normal(0, 4, logits.shape)
    answers = {}
    for nbest in (1, 5, 100):
        search = BeamSearch(model, Settings(nbest=nbest, beam=40.0))
        search.step(logits.astype(np.float32))
        answers[nbest] = search.finish()
        assert len(answers[nbest]) <= nbest
    assert len({h.words for h in answers[100]}) == len(answers[100]) > 5
    assert answers[5] == answers[100][:5]
    assert answers[1] == answers[100][:1]


def test_the_acoustic_score_does_not_depend_on_the_acoustic_scale(model):
    scores = []
    for scale in (0.3, 1.0, 3.0):
        search = BeamSearch(model, Settings(acoustic_scale=scale))
        search.step(say(["the", "cat"]))
        best = search.finish()[0]
        assert best.sentence == "the cat"
        scores.append(best.acoustic)
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)


@given(st.integers(0, 1000), st.floats(0.1, 3.0), st.floats(0.1, 100.0))
def test_the_emissions_are_the_published_formula(seed, scale, penalty):
    logits = np.random.default_rng(seed).normal(0, 5, (2, 41)).astype(np.float32)
    got = scaled_log_probabilities(logits, Settings(scale, penalty))
    for frame, row in zip(logits.tolist(), got.tolist(), strict=True):
        total = math.fsum(math.exp(x) for x in frame)
        expected = [scale * (x - math.log(total)) for x in frame]
        expected[0] -= scale * math.log(penalty)
        assert row == pytest.approx(expected, abs=1e-9)


def test_extreme_logits_are_searched_like_others(model):
    search = BeamSearch(model, Settings())
    assert search.step(say(["the", "cat"]) * np.float32(1e30)) == ("the", "cat")
    best = search.finish()[0]
    assert best.sentence == "the cat"
    assert math.isfinite(best.acoustic)


@pytest.mark.parametrize("bad", [np.zeros((3, 40)), np.zeros(41), np.full((2, 41), np.nan)])
def test_bad_frames_are_refused_and_the_sentence_goes_on(model, bad):
    search = BeamSearch(model, Settings())
    search.step(say(["the"]))
    with pytest.raises(ProtocolError):
        search.step(bad.astype(np.float32))
    search.step(say(["cat"]))
    assert search.finish()[0].sentence == "the cat"


def test_a_sentence_without_end_is_refused_before_memory_is_full(model):
    search = BeamSearch(model, Settings())
    search.step(say(["the"]))
    with pytest.raises(ProtocolError, match=f"at most {MAX_UTTERANCE_FRAMES}"):
        search.step(np.zeros((MAX_UTTERANCE_FRAMES, 41), np.float32))
    assert search.finish()[0].sentence == "the"


@pytest.mark.parametrize("name", ["acoustic_scale", "blank_penalty", "beam", "max_active", "nbest"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_settings_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(SettingsError, match=f"{name} is .*; needed"):
        Settings(**{name: value})


def test_counts_must_be_whole_numbers():
    with pytest.raises(SettingsError, match=r"nbest is 1\.5; needed a whole number"):
        Settings(nbest=1.5)


def test_a_folder_that_is_no_model_is_refused_with_the_way_to_make_one(tmp_path, model_folder):
    def refused(reason):
        with pytest.raises(ModelFolderError, match=reason):
            LanguageModel(tmp_path / "lm")

    refused("there is no model folder .*lm-server build")
    (tmp_path / "lm").mkdir()
    refused(r"lm\.json is missing")
    for name in ("lm.json", "lexicon.txt", "lm.bin"):
        refused(r"is missing in it: make one with `lm-server build")
        (tmp_path / "lm" / name).write_bytes((model_folder / name).read_bytes())
    LanguageModel(tmp_path / "lm")
    (tmp_path / "lm" / "lm.bin").write_bytes((model_folder / "lm.bin").read_bytes()[:200])
    refused(r"lm\.bin has 200 bytes, but lm\.json says \d+")
    (tmp_path / "lm" / "lm.json").write_text('{"format": 99}')
    refused("has format 99; this version reads 1")
    (tmp_path / "lm" / "lm.json").write_text("{")
    refused(r"lm\.json cannot be read")
    (tmp_path / "lm" / "lm.json").write_text("[1]")
    refused(r"lm\.json holds a list; needed an object")
    whole = json.loads((model_folder / "lm.json").read_text())
    for name in ("order", "words", "pronunciations"):
        left = {key: value for key, value in whole.items() if key != name}
        (tmp_path / "lm" / "lm.json").write_text(json.dumps(left))
        refused(rf"lm\.json has the {name} None; needed a whole number: .*lm-server build")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda lines: lines[:9],
            r"has \d words, but lm\.json says 20: it is damaged or cut short",
        ),
        (lambda lines: lines[:-1], "but lm.json says"),
        # Cut within a word that then equals an earlier one.
        (lambda lines: [*lines[:-1], "a"], "line 22, is 'a'; needed a word and its phonemes"),
        (lambda lines: [*lines, "a AH"], "line 23, has the word 'a' for a second time"),
        (lambda lines: [*lines[:3], "", *lines[3:]], "line 4, is ''; needed a word"),
        (lambda lines: [*lines[:3], "b QQ", *lines[3:]], "line 4, is 'b QQ'; needed a word"),
    ],
)
def test_a_damaged_lexicon_in_a_model_folder_is_refused_by_its_line(
    tmp_path, model_folder, damage, reason
):
    shutil.copytree(model_folder, tmp_path / "lm")
    path = tmp_path / "lm" / "lexicon.txt"
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    with pytest.raises(ModelFolderError, match=rf"lexicon\.txt.*{reason}.*build the model again"):
        LanguageModel(tmp_path / "lm")


@pytest.mark.slow
def test_the_acoustic_score_of_a_long_sentence_is_within_what_its_frames_allow(model_folder):
    # No path is likelier than the likeliest class of every frame, here ln(1/41) in each.
    search = BeamSearch(LanguageModel(model_folder), Settings())
    for frames in (1000, 2000, 5000):
        search.step(np.zeros((frames, 41), np.float32))
        for one in search.finish():
            assert one.acoustic <= -frames * np.log(41) * (1 - 1e-4)


@pytest.mark.parametrize("backend", ["flashlight", "pyctcdecode"])
def test_an_n_gram_model_of_random_bytes_is_refused_in_one_line(tmp_path, model_folder, backend):
    shutil.copytree(model_folder, tmp_path / "lm")
    size = (tmp_path / "lm" / "lm.bin").stat().st_size
    # As an older folder, whose description says nothing of the file.
    about = json.loads((tmp_path / "lm" / "lm.json").read_text())
    del about["bytes"], about["crc32"]
    (tmp_path / "lm" / "lm.json").write_text(json.dumps(about))
    for seed in range(3):
        content = np.random.default_rng(seed).bytes(size)
        (tmp_path / "lm" / "lm.bin").write_bytes(content)
        with pytest.raises(ModelFolderError, match="build the model again"):
            load_model(tmp_path / "lm", backend)


@pytest.mark.parametrize("backend", ["flashlight", "pyctcdecode"])
def test_an_n_gram_model_that_is_not_the_folders_own_is_refused(tmp_path, model_folder, backend):
    shutil.copytree(model_folder, tmp_path / "lm")
    path = tmp_path / "lm" / "lm.bin"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    with pytest.raises(ModelFolderError, match=r"checksum .*build the model again"):
        load_model(tmp_path / "lm", backend)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ModelFolderError, match=rf"has {len(whole) + 1} bytes, but .*{len(whole)}"):
        load_model(tmp_path / "lm", backend)
    path.write_bytes(whole)
    load_model(tmp_path / "lm", backend)
    with pytest.raises(ModelFolderError, match=r"lm\.bin is a file; .*give the one"):
        load_model(path, backend)
