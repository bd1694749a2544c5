"""KenLM itself, and flashlight's reader of it, must find in our files what is in the model."""

import itertools
import math
import struct

import kenlm
import numpy as np
import pytest
from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary
from hypothesis import given
from hypothesis import strategies as st
from test_kneser_ney import MEGABYTE, as_dictionary, encode, zipf_text

from lm_server.lm.arpa import Model, NGrams, read_arpa, sort_model
from lm_server.lm.estimate.kneser_ney import estimate
from lm_server.lm.sorted_ngrams import BEGIN, END, SortedModel, murmur_hash
from lm_server.lm.trie.kenlm_binary import (
    PLAIN,
    TrieForm,
    pack_bits,
    read_header,
    read_trie,
    trie_bytes,
    write_trie,
)
from lm_server.lm.trie.quantise import train

ARPA = """\
\\data\\
ngram 1=6
ngram 2=6
ngram 3=3

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.3
-0.9\t</s>
-0.7\tthe\t-0.25
-1.1\tcat\t-0.125
-1.3\tsat

\\2-grams:
-0.2\t<s> the\t-0.4
-0.5\tthe cat\t-0.1
-0.6\tcat sat
-0.8\tcat the
-0.9\tsat </s>
-1.0\tthe </s>

\\3-grams:
-0.1\t<s> the cat
-0.15\tthe cat sat
-0.35\tcat the cat

\\end\\
"""
FORMS = [PLAIN, TrieForm(8), TrieForm(None, True), TrieForm(8, True), TrieForm(3, True)]


def quiet(path) -> kenlm.Model:
    config = kenlm.Config()
    config.show_progress = False
    config.arpa_complain = kenlm.ARPALoadComplain.NONE
    return kenlm.Model(str(path), config)


@pytest.fixture(scope="module", params=[2, 3, 5])
def estimated(request, tmp_path_factory):
    """(sentences, model) of several orders."""
    sentences = zipf_text(request.param, 3000, 300)
    tokens, words = encode(sentences)
    folder = tmp_path_factory.mktemp("estimated")
    return sentences, estimate(tokens, words, request.param, 64 * MEGABYTE, folder).model


def by_backing_off(model: dict, order: int, sentence):
    """log10 p of every word and the sentence's end, by the definition of a back-off model."""

    def score(history, word):
        gram = (*history, word)
        if gram in model:
            return math.log10(model[gram][0])
        return math.log10(model.get(history, (0, 1.0))[1]) + score(history[1:], word)

    line = (BEGIN, *sentence, END)
    return [score(line[max(0, i - order + 1) : i], line[i]) for i in range(1, len(line))]


def by_flashlight(path, words, sentence):
    """The same as flashlight's reader sees it."""
    dictionary = Dictionary()
    for word in words:
        dictionary.add_entry(word)
    model = KenLM(str(path), dictionary)
    state, scores = model.start(False), []
    for word in sentence:
        state, score = model.score(state, dictionary.get_index(word))
        scores.append(score)
    return [*scores, model.finish(state)[1]]


@pytest.mark.parametrize("form", [PLAIN, TrieForm(None, True)])
def test_without_loss_both_readers_find_every_probability(tmp_path, estimated, form):
    sentences, model = estimated
    write_trie(tmp_path / "lm.bin", model, form)
    reader, known = quiet(tmp_path / "lm.bin"), as_dictionary(model)
    assert reader.order == len(model.orders)
    shuffled = [list(np.random.default_rng(1).permutation(s)) for s in sentences[:60]]
    for sentence in [*sentences[:60], *shuffled]:
        expected = by_backing_off(known, len(model.orders), sentence)
        got = [score for score, *_ in reader.full_scores(" ".join(sentence))]
        np.testing.assert_allclose(got, expected, atol=2e-5)
    for sentence in sentences[:5]:
        expected = by_backing_off(known, len(model.orders), sentence)
        got = by_flashlight(tmp_path / "lm.bin", model.words, sentence)
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("form", [TrieForm(8), TrieForm(8, True), TrieForm(4), TrieForm(2, True)])
def test_quantised_both_readers_find_the_nearest_bin_of_every_value(tmp_path, estimated, form):
    sentences, model = estimated
    write_trie(tmp_path / "lm.bin", model, form)
    orders = [model.orders[0]]
    for order in model.orders[1:]:
        last = order is model.orders[-1]
        tables = train(order.log10, None if last else order.backoff, form.bits)
        # The nearest centre by brute force; back-offs of zero are kept.
        nearest = np.abs(tables.log10[:, None] - order.log10).argmin(axis=0)
        backoff = np.array(order.backoff)
        if not last and (backoff != 0).any():
            bins = tables.backoff[2:]
            closest = bins[np.abs(bins[:, None] - backoff).argmin(axis=0)]
            backoff = np.where(backoff == 0, backoff, closest)
        orders.append(type(order)(order.word, order.parent, tables.log10[nearest], backoff))
    known = as_dictionary(SortedModel(model.words, orders))
    reader = quiet(tmp_path / "lm.bin")
    for sentence in sentences[:60]:
        expected = by_backing_off(known, len(orders), sentence)
        got = [score for score, *_ in reader.full_scores(" ".join(sentence))]
        np.testing.assert_allclose(got, expected, atol=2e-3)
    expected = [score for score, *_ in reader.full_scores(" ".join(sentences[0]))]
    got = by_flashlight(tmp_path / "lm.bin", model.words, sentences[0])
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_size_is_known_before_the_file_is_written(tmp_path, estimated, form):
    _, model = estimated
    write_trie(tmp_path / "lm.bin", model, form)
    strings = sum(len(word) + 1 for word in model.words)
    assert (tmp_path / "lm.bin").stat().st_size == trie_bytes(model.counts, form) + strings


def test_fewer_bits_and_compressed_pointers_make_smaller_files():
    counts = [100_000, 2_000_000, 5_000_000, 3_000_000]
    sizes = [trie_bytes(counts, form) for form in FORMS]
    plain, quantised, compressed, both, coarse = sizes
    assert coarse < both < quantised < plain
    assert both < compressed < plain


def test_every_short_sentence_has_the_score_that_kenlm_reads_in_the_arpa(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    theirs = quiet(tmp_path / "lm.arpa")
    model = sort_model(read_arpa(tmp_path / "lm.arpa"))
    for form in (PLAIN, TrieForm(None, True), TrieForm(12)):
        write_trie(tmp_path / "lm.bin", model, form)
        ours = quiet(tmp_path / "lm.bin")
        for length in range(5):
            for words in itertools.product(["the", "cat", "sat", "zebra"], repeat=length):
                sentence = " ".join(words)
                got, expected = list(ours.full_scores(sentence)), list(theirs.full_scores(sentence))
                np.testing.assert_allclose(
                    [s for s, _, _ in got], [s for s, _, _ in expected], atol=1e-6
                )
                assert [rest for _, *rest in got] == [rest for _, *rest in expected]


def test_a_model_of_order_one_is_readable_and_backs_off_to_nothing(tmp_path):
    words = ["<unk>", "<s>", "</s>", "a"]
    ids = np.arange(4, dtype=np.int32)[:, None]
    log10 = np.array([-5.0, -99.0, -0.5, -0.25], np.float32)
    model = sort_model(Model(words, [NGrams(ids, log10, np.zeros(4, np.float32))]))
    for form in FORMS:
        write_trie(tmp_path / "lm.bin", model, form)
        reader = quiet(tmp_path / "lm.bin")
        assert reader.score("a a b") == pytest.approx(-0.25 - 0.25 - 5.0 - 0.5)


def test_words_in_another_order_are_refused_and_nothing_is_left(tmp_path):
    model = sort_model(
        Model(
            ["<unk>", "<s>", "</s>", "a"],
            [NGrams(np.arange(4)[:, None], np.zeros(4, np.float32), np.zeros(4, np.float32))],
        )
    )
    for words in (model.words[::-1], [*model.words[:3], model.words[1]], model.words[:3], []):
        with pytest.raises(ValueError, match=r"needed|words have"):
            write_trie(tmp_path / "lm.bin", SortedModel(words, model.orders))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [0, 1, 26])
def test_bits_that_no_reader_takes_are_refused(bits):
    with pytest.raises(ValueError, match="needed 2-25"):
        TrieForm(bits)


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=4),
    st.integers(0, 200),
    st.integers(0, 2**32),
)
def test_bits_are_packed_without_gaps_lowest_first(widths, rows, seed):
    rng = np.random.default_rng(seed)
    values = [
        rng.integers(0, 2**width, rows, np.uint64, endpoint=False)
        if width < 64
        else rng.integers(0, 2**64, rows, np.uint64)
        for width in widths
    ]
    number, place = 0, 0
    for row in range(rows):
        for column, width in zip(values, widths, strict=True):
            number |= int(column[row]) << place
            place += width
    expected = number.to_bytes((place + 7) // 8, "little")
    assert pack_bits(list(zip(values, widths, strict=True))) == expected


@given(st.binary(max_size=40))
def test_the_hash_follows_the_published_algorithm(key):
    assert murmur_hash(key) == reference_murmur(key)


def reference_murmur(key: bytes) -> int:
    """MurmurHash64A on numpy's wrapping 64-bit integers, byte by byte as in its description."""
    with np.errstate(over="ignore"):
        m, h = np.uint64(0xC6A4A7935BD1E995), np.uint64(len(key)) * np.uint64(0xC6A4A7935BD1E995)
        for i in range(0, len(key) - 7, 8):
            k = np.uint64(struct.unpack_from("<Q", key, i)[0]) * m
            h = (h ^ ((k ^ (k >> np.uint64(47))) * m)) * m
        tail = key[len(key) // 8 * 8 :]
        for i in reversed(range(len(tail))):
            h ^= np.uint64(tail[i]) << np.uint64(8 * i)
        if tail:
            h *= m
        h = (h ^ (h >> np.uint64(47))) * m
        return int(h ^ (h >> np.uint64(47)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_every_n_gram_is_read_back_from_every_kind_of_trie(tmp_path, form, order):
    tokens, words = encode(zipf_text(1, 400))
    model = estimate(tokens, words, order, MEGABYTE, tmp_path).model
    write_trie(tmp_path / "lm.bin", model, form)
    assert read_header(tmp_path / "lm.bin").kind == form.kind
    found = read_trie(tmp_path / "lm.bin")
    assert list(found.words) == list(model.words)
    assert found.counts == model.counts
    write_trie(tmp_path / "again.bin", found)
    there, again = quiet(tmp_path / "lm.bin"), quiet(tmp_path / "again.bin")
    for sentence in zipf_text(2, 50):
        text = " ".join(sentence)
        assert list(there.full_scores(text)) == list(again.full_scores(text))
    for own, there in zip(found.orders, model.orders, strict=True):
        np.testing.assert_array_equal(own.word, there.word)
        np.testing.assert_array_equal(own.parent, there.parent)
        if form.bits is None:
            np.testing.assert_array_equal(own.log10, np.minimum(there.log10, 0))
            np.testing.assert_array_equal(own.backoff.view("u4"), there.backoff.view("u4"))


def test_what_is_no_trie_is_refused_with_what_was_found(tmp_path):
    write_trie(tmp_path / "lm.bin", sort_model(read_arpa(written(tmp_path))))
    whole = (tmp_path / "lm.bin").read_bytes()
    for data, message in [
        (b"\\data\\\n", "does not begin as a KenLM binary file"),
        (whole[:60], "does not begin as a KenLM binary file"),
        (whole[:260], "cut short"),
        (whole[:-9], "spellings of"),
        (whole[:96] + b"\0" + whole[97:], "hash table"),
        (whole[:60] + b"\7" + whole[61:], "another kind of machine"),
    ]:
        (tmp_path / "bad.bin").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_trie(tmp_path / "bad.bin")


def written(folder):
    (folder / "lm.arpa").write_text(ARPA)
    return folder / "lm.arpa"
