"""Claims about class confusions: learned from what was said, applied once, written if they help."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from rich.console import Console
from small_model import LEXICON, say
from test_offline import write

import lm_server
from lm_server.files.logits_file import read_logits
from lm_server.protocol import LM_CLASSES, SILENCE, to_rnn_order
from lm_server.search.emissions import Emissions, log_probabilities
from lm_server.search.forced import aligned, best_path, forced
from lm_server.search.load import load_model
from lm_server.serving.parameters import changed_settings
from lm_server.settings import Settings, SettingsError, read_settings, write_settings
from lm_server.settings.confusion import Confusion, of_matrix
from lm_server.tuning import lists as tuning
from lm_server.tuning import report
from lm_server.tuning import tuner as tuner_module
from lm_server.tuning.confusions import Aligned, learn
from lm_server.tuning.references import read_references
from lm_server.tuning.tuner import Tuner

K, T = LM_CLASSES.index("K"), LM_CLASSES.index("T")
SAID = ("the cat sat on the mat", "a cat had a hat", "the dog saw the cat", "the bat ran")
SPELLINGS = {}
for line in LEXICON.splitlines():
    SPELLINGS.setdefault(line.split()[0], []).append(tuple(line.split()[1:]))
KNOWN = {word: (index, tuple(SPELLINGS[word])) for index, word in enumerate(sorted(SPELLINGS))}


def exchange(share=0.3):
    """K and T for each other."""
    matrix = np.eye(41)
    matrix[[K, T], [K, T]] = 1.0 - share
    matrix[[K, T], [T, K]] = share
    return of_matrix(matrix)


def noisy(sentence, seed=0):
    logits = say(sentence.split(), strength=6.0)
    return logits + np.random.default_rng(seed).normal(0, 2.0, logits.shape).astype(np.float32)


def premixed(logits, confusion):
    """Logits whose softmax is that of `logits`, mixed."""
    p = np.exp(logits.astype(float))
    p /= p.sum(1, keepdims=True)
    return np.log(p @ np.array(confusion.rows))


def test_what_is_learned_of_sure_posteriors_is_their_count():
    rng = np.random.default_rng(0)
    shown, said = rng.integers(0, 41, (2, 40_000)) % 3
    sure = np.full((len(shown), 41), -60.0)
    sure[np.arange(len(shown)), shown] = 0.0
    parts = [Aligned((sure[:9]), (said[:9])), Aligned((sure[9:],), (said[9:],))]
    parts[0] = Aligned((sure[:4], sure[4:9]), (said[:4], said[4:9]))
    found = learn(*parts).matrix
    counts = np.zeros((3, 3))
    np.add.at(counts, (shown, said), 1)
    np.testing.assert_allclose(found[:3, :3], counts / counts.sum(1, keepdims=True), atol=1e-3)
    # Classes that were never shown stand for themselves.
    assert (np.diag(found)[3:] > 0.95).all()


def test_what_is_learned_makes_what_was_said_likelier_than_no_confusion_does():
    rng = np.random.default_rng(1)
    said = rng.integers(0, 41, 3000)
    logits = rng.normal(0, 2.0, (3000, 41))
    logits[np.arange(3000), np.where((said == K) & (rng.random(3000) < 0.5), T, said)] += 6.0
    before = log_probabilities(logits, Settings())
    after = log_probabilities(logits, Settings(confusion=learn(Aligned((before,), (said,)))))
    rows = np.arange(3000)
    assert after[rows, said].sum() > before[rows, said].sum()
    assert after[said == K, K].mean() > before[said == K, K].mean() + 0.5


def test_the_alignment_is_the_best_path_and_spells_the_sentence():
    rng = np.random.default_rng(2)
    frames = rng.normal(0, 1.0, (5, 41))
    settings = Settings(acoustic_scale=1.0, silence_penalty=1.0)
    found = aligned(KNOWN, settings, frames, ["the"])
    emissions = Emissions(settings)
    emissions.begin(settings)
    rows = emissions.of(frames)
    blank, silence = 0, LM_CLASSES.index(SILENCE)
    ids = [[LM_CLASSES.index(p) for p in phones] for phones in SPELLINGS["the"]]

    def spells(path):
        kept = [a for a, b in zip(path, (None, *path), strict=False) if a != b]
        kept = [one for one in kept if one != blank]
        while kept and kept[0] == silence:
            kept = kept[1:]
        while kept and kept[-1] == silence:
            kept = kept[:-1]
        return kept in ids

    used = sorted({blank, silence, *(p for phones in ids for p in phones)})
    every = [path for path in itertools.product(used, repeat=5) if spells(path)]
    best = max(every, key=lambda path: sum(rows[np.arange(5), path]))
    assert found.tolist() == list(best)
    assert best_path(rows, [ids]) == pytest.approx(sum(rows[np.arange(5), best]))
    assert aligned(KNOWN, settings, frames[:1], ["the"]) is None


@pytest.mark.parametrize("backend", ["flashlight", "pyctcdecode"])
def test_a_search_with_a_confusion_finds_what_it_finds_in_mixed_logits(model_folder, backend):
    model = load_model(model_folder, backend)
    plain, logits = Settings(acoustic_scale=1.0, max_active=50), noisy("the cat sat")

    def found(settings, frames):
        search = model.search(settings)
        for start in range(0, len(frames), 7):
            search.step(frames[start : start + 7].astype(np.float32))
        return search.finish()

    with_it = found(dataclasses.replace(plain, confusion=exchange()), logits)
    expected = found(plain, premixed(logits, exchange()))
    assert with_it[0].words == expected[0].words
    # Of homophones with equal totals, any may be in the list, in any order.
    np.testing.assert_allclose(
        [one.total for one in with_it[:20]], [one.total for one in expected[:20]], atol=1e-3
    )
    acoustic = {one.words: one.acoustic for one in expected}
    both = [one for one in with_it if one.words in acoustic]
    assert len(both) > 10
    for one in both:
        assert one.acoustic == pytest.approx(acoustic[one.words], abs=1e-3)
    assert with_it[0].acoustic != pytest.approx(found(plain, logits)[0].acoustic, abs=1e-3)
    if backend == "flashlight":
        settings = dataclasses.replace(plain, confusion=exchange())
        truth = forced(model, KNOWN, settings, logits, with_it[0].words)
        assert truth.acoustic == pytest.approx(with_it[0].acoustic, abs=1e-2)


def test_decoding_with_a_file_applies_its_confusion_and_clients_settings_keep_it(
    model_folder, tmp_path
):
    file = tmp_path / "settings.json"
    write_settings(file, Settings(acoustic_scale=1.0, confusion=exchange()))
    logits = noisy("the cat sat")
    answer = lm_server.load(model_folder, settings=file).decode(to_rnn_order(logits))
    other = lm_server.load(model_folder, settings={"acoustic_scale": 1.0})
    mixed = to_rnn_order(premixed(logits, exchange()).astype(np.float32))
    expected = other.decode(mixed)
    assert answer.sentence == expected.sentence
    assert answer.hypotheses[0].total == pytest.approx(expected.hypotheses[0].total, abs=1e-3)
    kept = changed_settings(read_settings(file), {"acoustic_scale": b"2", "preset": b"fast"})
    assert (kept.acoustic_scale, kept.max_active, kept.confusion) == (2.0, 100, exchange())


def test_files_keep_the_confusion_and_refuse_what_is_none(tmp_path):
    file = tmp_path / "settings.json"
    settings = Settings(alpha=0.3, confusion=exchange())
    write_settings(file, settings)
    assert read_settings(file) == settings
    content = json.loads(file.read_text())
    assert content["format"] == 3
    for rows, says in (
        ([[1.0]], "shape"),
        ("abc", "no table"),
        ([[0.5] * 41] * 41, "no distribution"),
        ([[float("nan")] * 41] * 41, "no distribution"),
    ):
        file.write_text(json.dumps(content | {"confusion": rows}))
        with pytest.raises(SettingsError, match=says):
            read_settings(file)
    file.write_text(json.dumps({"format": 2, "settings": {"alpha": 0.3}}))
    assert read_settings(file) == Settings(alpha=0.3)


def test_confusions_differ_by_their_rows():
    assert exchange(0.3) == exchange(0.3) != exchange(0.2)
    assert str(Settings(confusion=exchange(0.3))) != str(Settings(confusion=exchange(0.2)))
    assert exchange(0.4).weakened(0.5).matrix[K, T] == pytest.approx(0.2)
    assert exchange(0.4).likeliest(1) == [("T", "K", 0.4)] or exchange(0.4).likeliest(1) == [
        ("K", "T", 0.4)
    ]
    assert Confusion.of([list(row) for row in exchange().rows]) == exchange()


@pytest.mark.parametrize("confused", [True, False])
def test_tuning_writes_a_confusion_where_it_is_expected_to_help(
    model_folder, tmp_path, monkeypatch, confused
):
    monkeypatch.setattr(tuning, "_SAMPLES", 100)
    monkeypatch.setattr(tuner_module, "_LEAST_LEARNED", 8)
    logits = []
    for seed, sentence in enumerate(SAID * 4):
        one = noisy(sentence, seed)
        if confused:
            # What was a K is a T, and the other way round, so surely that no text helps.
            one[:, [K, T]] = one[:, [T, K]]
            one *= 3.0
        logits.append(one)
    file = tmp_path / "val.npz"
    write(file, SAID * 4)
    np.savez(
        file,
        logits=to_rnn_order(np.concatenate(logits)),
        frames=[len(one) for one in logits],
        trial=[f"day/{index}" for index in range(len(logits))],
        sentence=list(SAID * 4),
    )
    tuner = Tuner(
        load_model(model_folder),
        read_logits(file),
        read_references(file),
        tmp_path / "cache",
        1,
        console=Console(quiet=True),
    )
    result = tuner.run(Settings(acoustic_scale=0.5, max_active=50), 4, lambda: None)
    text, about = report.as_text(result), report.about(result)["confusion"]
    assert result.confusion is not None
    if confused:
        assert result.confusion[1] < result.confusion[0]
        shown = {(one["said"], one["shown"]) for one in about["likeliest"][:2]}
        assert shown == {("K", "T"), ("T", "K")}
        assert "K shown as T" in text
        assert result.wer < result.default_errors / result.words
    else:
        assert result.settings.confusion is None
        assert "class confusion: none" in text
        assert not about["used"]


@pytest.mark.parametrize(("rate", "kept"), [(0.9, False), (0.1, True)])
def test_a_confusion_that_the_same_sentences_have_taught_is_what_to_beat_and_no_choice(
    model_folder, tmp_path, monkeypatch, rate, kept
):
    monkeypatch.setattr(tuning, "_SAMPLES", 20)
    monkeypatch.setattr(tuning, "expected_errors", lambda *_: 0.5)
    file = tmp_path / "val.npz"
    write(file, SAID)
    with np.load(file) as arrays:
        np.savez(file, **arrays, sentence=list(SAID))
    tuner = Tuner(
        load_model(model_folder),
        read_logits(file),
        read_references(file),
        tmp_path / "cache",
        1,
        console=Console(quiet=True),
    )
    taught = Settings(max_active=50, confusion=exchange())
    result = tuner.run(taught, 1, lambda: None, {taught: rate})
    assert result.tried
    assert all(one.lists.settings.confusion is None for one in result.tried)
    assert (result.settings.confusion == taught.confusion) is kept
    assert result.expected == (rate if kept else 0.5)


def test_too_few_sentences_teach_no_confusion(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "_SAMPLES", 20)
    file = tmp_path / "val.npz"
    write(file, SAID)
    with np.load(file) as arrays:
        np.savez(file, **arrays, sentence=[*SAID[:3], "the giraffe"])
    tuner = Tuner(
        load_model(model_folder),
        read_logits(file),
        read_references(file),
        tmp_path / "cache",
        1,
        console=Console(quiet=True),
    )
    result = tuner.run(Settings(max_active=50), 2, lambda: None)
    assert result.confusion is None
    assert result.settings.confusion is None
    assert "3 sentences can be spelled by the vocabulary" in capsys.readouterr().err
