"""Claims about tuning: references, re-ranking equal to real answers, held-out honesty, resuming."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import answer_of
from rich.console import Console
from small_model import say

from lm_server.__main__ import main
from lm_server.files.logits_file import Logits, read_logits
from lm_server.hypothesis import Hypothesis
from lm_server.protocol import to_rnn_order
from lm_server.search.fused import FusedModel
from lm_server.search.interface import SearchModel
from lm_server.search.load import default_settings, load_model
from lm_server.settings import (
    Settings,
    SettingsError,
    expected_wer,
    read_settings,
    write_settings,
)
from lm_server.tuning import lists as tuning
from lm_server.tuning import report as tune_report
from lm_server.tuning import tuner as tuner_module
from lm_server.tuning.cache import digest
from lm_server.tuning.references import ReferencesError, read_references, word_errors
from lm_server.tuning.tuner import Tuner

SENTENCES = (
    "the cat sat on the mat",
    "the dog saw the cat",
    "a cat had a hat",
    "the bat was on the mat",
    "the dog ate the hat",
    "a dog had two hat",
    "the cat ran to the dog",
    "the dog ran",
)


def noisy(sentence: str, seed: int) -> np.ndarray:
    """Logits in which some phonemes are hard to tell."""
    clean = say(sentence.split(), strength=4.0)
    return clean + np.random.default_rng(seed).normal(0.0, 2.6, clean.shape).astype(np.float32)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SAMPLES", 250)


@pytest.fixture(scope="module")
def logits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune") / "val.npz"
    logits = [noisy(sentence, seed) for seed, sentence in enumerate(SENTENCES * 2)]
    np.savez(
        path,
        logits=to_rnn_order(np.concatenate(logits)),
        frames=[len(one) for one in logits],
        trial=[f"day/{index}" for index in range(len(logits))],
        sentence=[f"{one.capitalize()}." for one in SENTENCES * 2],
    )
    return path


@pytest.fixture(scope="module")
def model(model_folder: Path) -> SearchModel:
    return load_model(model_folder)


@dataclasses.dataclass
class Knowing:
    """A model that knows what people say; counts what it is asked."""

    likely: frozenset[str]
    name: str = "knowing"
    asked: int = 0

    def score(
        self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
    ) -> np.ndarray:
        self.asked += len(sentences)
        return np.array([-1.0 if one in self.likely else -60.0 for one in sentences])


def tuner(model: SearchModel, logits: Logits, references: Path, cache: Path) -> Tuner:
    return Tuner(model, logits, read_references(references), cache, 1, console=Console(quiet=True))


def test_a_folder_of_other_weights_or_pronunciations_of_the_same_size_is_another(
    tmp_path: Path,
) -> None:
    def folder(weights: int, trie: int, described: str) -> str:
        path = tmp_path / f"{weights}{trie}{len(described)}"
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes([weights]) * 100_000)
        (path / "lm.bin").write_bytes(bytes([trie]) * 100_000)
        (path / "lm.json").write_text(described)
        return digest(path)

    assert folder(1, 1, "{}") != folder(2, 1, "{}")
    assert folder(3, 1, "{}") != folder(3, 2, "{}")
    # A checksum in lm.json spares the reading of n-grams.
    assert folder(4, 1, '{"crc32": 7}') != folder(5, 1, '{"crc32": 7}')
    assert folder(6, 1, '{"crc32": 7}') == folder(6, 2, '{"crc32": 7}')


def test_word_errors_are_counted_as_the_published_evaluation_does(tmp_path: Path) -> None:
    file = tmp_path / "refs.txt"
    file.write_text("day/1\tWell-known, isn't it?\nday/2\t'Tis -- over\n")
    found = read_references(file)
    assert found["day/1"] == ("well-known", "isn't", "it")
    assert word_errors(found["day/1"], "well-known isn't") == 1


def test_references_are_read_from_every_format(tmp_path: Path, logits_file: Path) -> None:
    tab, lines, table = tmp_path / "a.txt", tmp_path / "a.jsonl", tmp_path / "a.csv"
    tab.write_text("day/0\tThe cat.\n\nday/1\tA dog\n")
    rows = [{"trial": "day/0", "sentence": "The cat."}, {"trial": "day/1", "sentence": "A dog"}]
    lines.write_text("\n".join(map(json.dumps, rows)))
    table.write_text('id,trial,sentence\n0,day/0,"The cat."\n1,day/1,A dog\n')
    expected = {"day/0": ("the", "cat"), "day/1": ("a", "dog")}
    for path in (tab, lines, table):
        assert read_references(path) == expected
    assert read_references(logits_file)["day/1"] == tuple(SENTENCES[1].split())


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "day/0 the cat\n", "line 1"),
        ("a.txt", "day/0\tthe cat\nday/0\tthe cat\n", "twice"),
        ("a.txt", "", "no sentences"),
        ("a.jsonl", '{"trial": "x"}', "line 1"),
        ("a.jsonl", '{"trial": "x", "sentence": null}', "line 1"),
        ("a.csv", "trial,sentence\nx,a\ny\n", "line 3"),
        ("a.csv", "trial,sentence\nx,well, yes\n", "line 2.*quotes"),
        ("a.csv", "id,text\n1,2\n", "columns"),
        ("a.npz", "no archive", "cannot be read"),
    ],
)
def test_unusable_references_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ReferencesError, match=says):
        read_references(tmp_path / name)


def test_reranking_equals_the_answer_with_those_settings() -> None:
    rng = np.random.default_rng(0)
    vocabulary = ["a", "b", "c"]
    found, references = [], []
    for _ in range(30):
        words = {tuple(rng.choice(vocabulary, rng.integers(0, 4))) for _ in range(6)}
        some = [
            Hypothesis(one, rng.uniform(-30, 0), rng.uniform(-20, 0), bonus=0.5 * len(one))
            for one in sorted(words)
        ]
        found.append(tuple(some) if rng.random() < 0.9 else ())
        references.append(tuple(rng.choice(vocabulary, 3)))
    searched = Settings(word_bonus=0.5, acoustic_scale=1.0)
    lists = tuning.make_lists(found, references, searched)
    scores = {one: float(rng.uniform(-40, 0)) for some in lists.sentences for one in some}
    for scorer, used in ((None, lists), (scores, lists.with_llm(scores))):
        for _ in range(20):
            # Augmentation is the search's, so its scale stays; the answer is then the same.
            bonus, alpha = float(rng.uniform(-2, 2)), float(rng.uniform())
            settings = dataclasses.replace(searched, word_bonus=bonus, alpha=alpha)
            rebonused = [
                [dataclasses.replace(h, bonus=bonus * len(h.words)) for h in some] for some in found
            ]
            table = None if scorer is None else _Table(scorer)
            expected = [
                word_errors(reference, answer_of(some, settings, table).sentence)
                for reference, some in zip(references, rebonused, strict=True)
            ]
            assert used.errors_of_best(settings).tolist() == expected


class _Table:
    name = "table"

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    def score(
        self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
    ) -> np.ndarray:
        return np.array([self.scores[one] for one in sentences])


def test_reranking_finds_a_scale_at_which_the_right_candidates_win() -> None:
    # The true sentence has the better acoustics by 3 and the worse n-gram score by 4.
    right, wrong = Hypothesis(("a",), -10.0, -8.0), Hypothesis(("b",), -13.0, -4.0)
    settings = Settings(acoustic_scale=1.0, top_candidates_to_augment=0)
    lists = tuning.make_lists([(right, wrong)] * 4, [("a",)] * 4, settings)
    assert lists.errors_of_best(settings).sum() == 4
    found, errors = tuning.rerank(lists, 0)
    assert errors == 0
    assert found.acoustic_scale > 4 / 3


def test_the_expected_rate_does_not_believe_the_luck_of_the_chosen() -> None:
    # Six searches that toss coins: the luckiest looks better than chance, and is not.
    settings = Settings(top_candidates_to_augment=0)
    rng = np.random.default_rng(0)
    lists = []
    for _ in range(6):
        found = []
        for _ in range(40):
            pair = [Hypothesis(("a",), 0.0, -1.0), Hypothesis(("b",), 0.0, -1.5)]
            swap = rng.random() < 0.5
            found.append([Hypothesis(one.words, 0.0, -2.5 - one.ngram) for one in pair])
            found[-1] = found[-1] if swap else pair
        lists.append(tuning.make_lists(found, [("a",)] * 40, settings))
    chosen = min(tuning.rerank(one, 0)[1] for one in lists) / 40
    assert chosen < 0.45
    assert tuning.expected_errors(lists, 0) > chosen + 0.03


def test_calibration_lowers_the_log_loss_of_confidences_that_are_too_sure() -> None:
    # Half of the sentences are wrong, but the totals are 8 apart.
    some = (Hypothesis(("a",), -2.0, 0.0), Hypothesis(("b",), -10.0, 0.0))
    settings = Settings(acoustic_scale=1.0, top_candidates_to_augment=0)
    references = [("a",), ("b",)] * 10
    lists = tuning.make_lists([some] * 20, references, settings)
    temperature, before, after = tuning.calibrate(lists, settings)
    assert after < before
    calibrated = dataclasses.replace(settings, confidence_temperature=temperature)
    assert answer_of(some, calibrated).confidence == pytest.approx(0.5, abs=0.1)


def test_tuning_lowers_errors_and_goes_on_from_its_cache(
    model: SearchModel, logits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = read_logits(logits_file)
    bad = Settings(acoustic_scale=0.05, blank_penalty=50.0)
    knowing = Knowing(frozenset(SENTENCES))
    cache = tmp_path / "cache"
    first = tuner(model, logits, logits_file, cache)
    searches = []
    search = first._search
    monkeypatch.setattr(
        first, "_search", lambda one, some: searches.append(one) or search(one, some)
    )
    result = first.run(bad, 6, lambda: (knowing, ["knowing"]))
    assert result.default_errors > 10
    assert result.errors < result.default_errors / 2
    assert len(searches) in (7, 8)  # the re-ranking of the last one may be searched too
    assert knowing.asked
    # What is reported is what those settings really give.
    assert result.errors == sum(
        word_errors(
            tuple(sentence.split()),
            answer_of(some, result.settings, knowing).sentence,
        )
        for sentence, some in zip(SENTENCES * 2, search(result.settings, logits), strict=True)
    )
    asked = knowing.asked
    again = tuner(model, logits, logits_file, cache)
    monkeypatch.setattr(again, "_search", None)
    repeated = again.run(bad, 6, lambda: (knowing, ["knowing"]))
    assert repeated.settings == result.settings
    assert tune_report.about(repeated) == tune_report.about(result)
    assert knowing.asked == asked, "a score was asked for twice"


@pytest.mark.slow
def test_an_interrupted_cache_is_mended(
    model: SearchModel, logits_file: Path, tmp_path: Path
) -> None:
    logits = read_logits(logits_file)
    knowing = Knowing(frozenset(SENTENCES))
    whole = tuner(model, logits, logits_file, tmp_path).run(
        Settings(), 2, lambda: (knowing, ["knowing"])
    )
    for file in tmp_path.iterdir():
        file.write_text(file.read_text()[:-30])
    mended = tuner(model, logits, logits_file, tmp_path).run(
        Settings(), 2, lambda: (knowing, ["knowing"])
    )
    assert mended.settings == whole.settings


def test_the_command_writes_settings_that_decode_reads(
    model_folder: Path, logits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "settings.json"
    common = ["--lm", str(model_folder), "--logits", str(logits_file), "--workers", "1"]
    assert main(["tune", *common, "--out", str(out), "--searches", "3", "--nbest", "7"]) == 0
    text = capsys.readouterr().out
    assert "WER to expect" in text
    settings = read_settings(out)
    assert settings.nbest == 7
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    about = json.loads(out.read_text())["about"]
    assert about["sentences"] == 16
    by_blank = [(one["blank_penalty"], one["wer_reranked"]) for one in about["searches"]]
    assert about["blank_penalty_of_searches"] == [
        pytest.approx(pair, abs=1e-6) for pair in sorted(by_blank)
    ]
    shown = text.split("WER by blank_penalty")[1].splitlines()[1].split("  ")[1:]
    assert shown == [f"{blank:.3g}: {wer:.2%}" for blank, wer in sorted(by_blank)]
    decoded = tmp_path / "decoded.jsonl"
    options = ["--out", str(decoded), "--settings", str(out)]
    assert main(["decode", *common, *options]) == 0
    lines = [json.loads(line) for line in decoded.read_text().splitlines()]
    errors = sum(
        word_errors(tuple(sentence.split()), line["sentence"])
        for sentence, line in zip(SENTENCES * 2, lines, strict=True)
    )
    assert errors == round(about["wer"] * about["words"])


@pytest.mark.slow
def test_settings_name_the_checkpoint_of_their_logits_and_decode_warns_of_another(
    model_folder: Path, logits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made_by(step: int, parameters: str) -> Path:
        path = tmp_path / f"{step}.npz"
        with np.load(logits_file) as file:
            np.savez(path, **file, step=step, weights="raw", parameters=parameters, split="val")
        return path

    first, second = made_by(200, "aa"), made_by(400, "bb")
    out = tmp_path / "settings.json"
    common = ["--lm", str(model_folder), "--workers", "1"]
    tune = ["tune", *common, "--logits", str(first), "--out", str(out), "--searches", "1"]
    assert main(tune) == 0
    assert "n-best oracle" in capsys.readouterr().out
    about = json.loads(out.read_text())["about"]
    assert about["checkpoint"] == {
        **{"step": 200, "weights": "raw"},
        **{"parameters": "aa", "split": "val"},
    }
    assert about["lm_crc32"] == zlib.crc32((model_folder / "lm.json").read_bytes())
    for logits, warned in ((first, False), (second, True), (logits_file, False)):
        decode = ["decode", *common, "--logits", str(logits), "--out", str(tmp_path / "x.jsonl")]
        assert main([*decode, "--settings", str(out)]) == 0
        text = "was tuned for step 200 (raw), and the logits are of step 400 (raw)"
        assert (text in capsys.readouterr().err) is warned


def test_score_counts_what_decode_finds_and_the_nearest_of_each_list(
    model_folder: Path, logits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded = tmp_path / "decoded.jsonl"
    lm = ["--lm", str(model_folder), "--acoustic-scale", "0.05"]
    decode = ["decode", *lm, "--logits", str(logits_file), "--out", str(decoded), "--workers", "1"]
    assert main(decode) == 0
    lines = [json.loads(line) for line in decoded.read_text().splitlines()]
    lists = [[one["sentence"] for one in line["nbest"]] for line in lines]
    errors = [
        [word_errors(tuple(sentence.split()), text) for text in texts]
        for sentence, texts in zip(SENTENCES * 2, lists, strict=True)
    ]
    capsys.readouterr()
    none = tmp_path / "none.npz"
    assert main(["score", *lm, "--logits", str(logits_file), str(none)]) == 1
    found, missing = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["errors"] == sum(one[0] for one in errors) > 0
    assert found["oracle_errors"] == sum(map(min, errors)) < found["errors"]
    assert found["words"] == sum(len(sentence.split()) for sentence in SENTENCES * 2)
    assert found["wer"] == found["errors"] / found["words"]
    assert (found["trials"], found["failed"], found["first_problem"]) == (16, 0, None)
    assert missing["file"] == str(none)
    assert "there is no logits file" in missing["error"]


@pytest.mark.slow
@pytest.mark.parametrize("expected", [0.9, pytest.param(0.0, marks=pytest.mark.slow)])
def test_settings_that_are_expected_to_be_worse_than_those_in_use_are_not_chosen(
    model: SearchModel,
    logits_file: Path,
    tmp_path: Path,
    expected: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "expected_errors", lambda *_: expected)
    base = Settings(acoustic_scale=0.7)
    other = Settings(acoustic_scale=1.1)
    result = tuner(model, read_logits(logits_file), logits_file, tmp_path).run(
        base, 3, lambda: None, {other: 0.0}
    )
    in_use = list(result.tried[:2])
    assert [one.lists.settings for one in in_use] == [base, other]
    text = tune_report.as_text(result)
    if expected:
        best = min(in_use, key=lambda one: one.errors)
        temperature = result.settings.confidence_temperature
        assert result.settings == dataclasses.replace(
            best.lists.settings, confidence_temperature=temperature
        )
        assert result.expected == best.errors / result.words
        assert f"90.00% against {result.expected:.2%}" in text
    else:
        assert "in use" not in text
        assert result.expected == 0.0
    about = tune_report.about(result)
    assert about["expected_wer"] <= about["wer_before"]


@pytest.mark.slow
def test_a_file_that_was_tuned_on_the_same_sentences_counts_with_the_rate_that_it_expects(
    model: SearchModel, logits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own rate on them is luck. So it is kept only if a new one is expected to be worse.
    path = tmp_path / "settings.json"
    write_settings(path, Settings(), {"logits_sha256": "aa", "expected_wer": 0.3})
    assert (expected_wer(path, "aa"), expected_wer(path, "bb")) == (0.3, 0.0)
    lucky, bad = Settings(acoustic_scale=1.2), Settings(acoustic_scale=0.01)
    one = tuner(model, read_logits(logits_file), logits_file, tmp_path / "cache")
    for rate, kept in ((0.4, False), (0.6, True)):
        monkeypatch.setattr(tuning, "expected_errors", lambda *_, rate=rate: rate)
        result = one.run(bad, 2, lambda: None, {lucky: 0.5})
        assert (result.kept == rate) is kept
        assert result.expected == (0.5 if kept else rate)


@pytest.mark.slow
def test_a_hopeless_corner_is_abandoned_after_the_first_sentences(
    model: SearchModel, logits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner_module, "_LEAST_HEAD", 8)
    one = tuner(model, read_logits(logits_file), logits_file, tmp_path)
    searched = []
    search = one._search
    monkeypatch.setattr(
        one, "_search", lambda s, some: searched.append(len(some.trials)) or search(s, some)
    )
    good = one._try(Settings())
    corner = Settings(acoustic_scale=0.01, blank_penalty=1e6)
    hopeless = one._try_unless_hopeless(corner, good)
    assert searched == [16, 8]
    assert hopeless.rate > 2 * good.rate
    near = one._try_unless_hopeless(Settings(acoustic_scale=1.4), good)
    assert searched == [16, 8, 8, 8]
    # The parts together are what one search of all finds.
    assert (
        near.errors
        == one._judged(
            tuning.make_lists(
                search(near.lists.settings, one._logits), one._references, near.lists.settings
            )
        ).errors
    )
    one._try_unless_hopeless(corner, good)
    assert len(searched) == 4, "what is known was searched again"


def test_the_widest_search_within_the_budget_is_chosen_and_timed_once(
    model: SearchModel,
    logits_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = tuner(model, read_logits(logits_file), logits_file, tmp_path)
    timed = []
    monkeypatch.setattr(one, "_seconds", lambda s: timed.append(s) or s.max_active / 1000)
    base = Settings(acoustic_scale=1.3)
    for budget, active in ((0.25, 200), (0.2, 200), (0.6, 500), (9.0, 1500)):
        chosen, seconds = one._widest(base, budget)
        assert (chosen.max_active, chosen.acoustic_scale) == (active, 1.3)
        assert seconds[0] == (100, 14.0, 0.1)
    assert len(timed) == 4
    assert not capsys.readouterr().err
    assert one._widest(base, 0.01)[0].max_active == 100
    assert "more than the budget of 0.01" in capsys.readouterr().err
    assert one._widest(base, None) == (base, ())
    result = one.run(base, 1, lambda: None, budget=0.25)
    assert [
        result.tried[0].lists.settings.max_active,
        *{t.lists.settings.max_active for t in result.tried[1:]},
    ] == [500, 200], "the scales were not found at the width that is used"
    assert "max_active 500, beam 25: 0.500 s of CPU per sentence" in tune_report.as_text(result)


def test_trials_without_a_sentence_are_counted_and_none_at_all_is_an_error(
    model: SearchModel, logits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = tmp_path / "some.txt"
    some.write_text("day/3\tthe bat\n")
    tuner(model, read_logits(logits_file), some, tmp_path / "cache")
    assert "15 trials have no true sentence" in capsys.readouterr().err
    some.write_text("other/3\tthe bat\n")
    with pytest.raises(ReferencesError, match="same names"):
        tuner(model, read_logits(logits_file), some, tmp_path / "cache")


def test_settings_files_keep_every_setting_and_refuse_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    settings = Settings(alpha=0.3, acoustic_scale=0.325, nbest=7)
    write_settings(path, settings, {"wer": 0.1})
    assert read_settings(path) == settings
    path.write_text(json.dumps({"format": 2, "settings": {"alpha": 1}}))
    assert read_settings(path) == Settings(alpha=1.0)
    path.write_text(json.dumps({"format": 2, "settings": {"acoustic_scale": 0.4}}))
    wfst = read_settings(path, default_settings("wfst"), "wfst")
    assert (wfst.acoustic_scale, wfst.max_active, wfst.beam) == (0.4, 7000, 17.0)
    write_settings(path, settings, {"backend": "flashlight"})
    assert read_settings(path, backend="flashlight") == settings
    with pytest.raises(SettingsError, match="tuned for the search flashlight, and this is wfst"):
        read_settings(path, default_settings("wfst"), "wfst")
    for values, says in (
        ({"alfa": 1}, "alfa"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"alpha": "x"}, "needed a number"),
        ({"alpha": True}, "needed a number"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"nbest": 1.5}, "whole number"),
    ):
        path.write_text(json.dumps({"format": 2, "settings": values}))
        with pytest.raises(SettingsError, match=says):
            read_settings(path)
    for text in ("", "[]", '{"format": 4, "settings": {}}', '{"format": 2}'):
        path.write_text(text)
        with pytest.raises(SettingsError):
            read_settings(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_settings(tmp_path / "nowhere.json")


@dataclasses.dataclass
class Likes:
    """A model that is asked during the search, and likes how people begin sentences."""

    asked: int = 0

    def score(self, sentences: Sequence[str], length_penalty: float = 0.0) -> np.ndarray:
        self.asked += len(sentences)
        begun = [any(one.startswith(some) for one in SENTENCES) for some in sentences]
        return np.where(begun, -1.0, -60.0)


Asking = tuple[Tuner, Knowing, Likes, FusedModel]


@pytest.fixture
def asking(model: SearchModel, logits_file: Path, tmp_path: Path) -> Asking:
    """A tuner, what rescores, what is asked during the search, and the model that asks it."""
    likes = Likes()
    fused = FusedModel(model, lambda: likes)
    one = tuner(model, read_logits(logits_file), logits_file, tmp_path)
    return one, Knowing(frozenset(SENTENCES)), likes, fused


@pytest.mark.parametrize("helps", [True, False])
def test_settings_that_are_kept_name_the_way_to_search_that_has_their_rate(
    asking: Asking, monkeypatch: pytest.MonkeyPatch, helps: bool
) -> None:
    one, knowing, _, fused = asking
    monkeypatch.setattr(one, "_expected", lambda choices: 1.0)
    really, errors = one._asked, 0 if helps else 1000

    def asked(*of: Any) -> tuner_module.Tried:
        return dataclasses.replace(really(*of), errors=errors)

    monkeypatch.setattr(one, "_asked", asked)
    base = Settings(acoustic_scale=0.05, blank_penalty=50.0, fuse_weight=0.7)
    in_use = {base: 0.02}
    result = one.run(base, 1, lambda: (knowing, ["knowing"]), in_use, fused=lambda: fused)
    assert result.kept == 1.0
    assert result.settings.fuse_weight == (0.7 if helps else 0.0)
    text = tune_report.as_text(result)
    assert ("use --fuse with fuse_weight 0.7" if helps else "leave --fuse out") in text
    # What they were chosen on still counts.
    assert result.expected >= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("helps", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_asking_during_the_search_is_written_only_if_it_is_expected_to_help(
    asking: Asking, monkeypatch: pytest.MonkeyPatch, helps: bool
) -> None:
    one, knowing, likes, fused = asking

    def expected(choices: Sequence[tuner_module.Tried]) -> float:
        fuses = choices[0].lists.settings.fuse_weight != 0.7
        return 0.0 if fuses is helps else 0.01

    monkeypatch.setattr(one, "_expected", expected)
    bad = Settings(acoustic_scale=0.05, blank_penalty=50.0, fuse_weight=0.7)
    result = one.run(bad, 2, lambda: (knowing, ["knowing"]), fused=lambda: fused)
    assert likes.asked
    assert result.fusion == ((0.01, 0.0) if helps else (0.0, 0.01))
    text = tune_report.as_text(result)
    if helps:
        assert result.settings.fuse_weight in (1.0, 0.5)
        assert f"--fuse with fuse_weight {result.settings.fuse_weight:g}" in text
        found = one._search(result.settings, one._logits, fused)
        assert result.errors == sum(
            word_errors(tuple(said.split()), answer_of(some, result.settings, knowing).sentence)
            for said, some in zip(SENTENCES * 2, found, strict=True)
        )
    else:
        assert result.settings.fuse_weight == 0.0
        assert "leave --fuse out" in text
        asked = likes.asked
        one._search(result.settings, one._logits, fused)
        assert likes.asked == asked, "a weight of 0 has no question"
