"""`lm-server adapt`: n-gram models, a person's sentences and words -> one model folder.

Nothing that is there is estimated anew: the models are interpolated (`lm_server.lm.interpolate`).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import kenlm
import numpy as np
from rich.console import Console

from lm_server.lexicon.g2p import guess_pronunciations
from lm_server.lexicon.pronunciations import (
    Lexicon,
    LexiconError,
    Pronunciation,
    fields_of,
    parse_lexicon,
    read_lexicon,
)
from lm_server.lexicon.text import UNKNOWN, find_texts, open_text, read_words
from lm_server.lm.arpa import NEVER, ModelError
from lm_server.lm.estimate import kneser_ney
from lm_server.lm.folder import Stages, folder_in_place_of, report, write_description, write_model
from lm_server.lm.interpolate import best_weights, interpolate
from lm_server.lm.kaldi.importer import import_kaldi
from lm_server.lm.reader import DESCRIPTION, LEXICON, TRIE, read_description
from lm_server.lm.sorted_ngrams import BEGIN, END, SortedModel, SortedOrder, in_order_of_ids
from lm_server.lm.trie.kenlm_binary import TrieForm, read_trie, write_trie

_MEMORY = 1 << 28
_FOLDS = 5
"""Parts of the person's sentences, each of which is scored by a model of the others."""
_SHOWN = 20

Sentence = tuple[str, ...]


@dataclass(frozen=True)
class Sources:
    """What a model is made of.

    Attributes:
      models: model folders or ARPA files, the one to adapt first.
      texts: the person's sentences.
      words: the person's words, or files of lines `WORD [PH PH ...]`.
      held_out: text to choose the weights on. By default the person's sentences, each scored by a
        model of the others.
      weights: of the models and of the person's sentences, instead of the best ones.
    """

    models: Sequence[Path]
    texts: Sequence[Path] = ()
    words: Sequence[str] = ()
    held_out: Sequence[Path] = ()
    weights: Sequence[float] | None = None


def adapt(sources: Sources, out: Path, console: Console | None = None) -> None:
    """Write a model folder.

    Args:
      sources: what it is made of.
      out: folder to write. A model folder there is replaced, the adapted one too.
      console: where progress is shown, by default the terminal's error output.

    Raises:
      ModelError, ModelFolderError, LexiconError, TextError: something cannot be used.
    """
    texts, held_out = find_texts(sources.texts), find_texts(sources.held_out)
    parts = len(sources.models) + bool(texts)
    _check(sources, parts)
    stages = Stages(console)
    with folder_in_place_of(out) as folder:
        work = folder / "work"
        work.mkdir()
        # Shows progress of its own.
        folders = [
            _folder(path, work / f"model{i}", console) for i, path in enumerate(sources.models)
        ]
        with stages:
            described = read_description(folders[0])
            entries = _entries(folders)
            added = _own_words(sources.words, entries)
            said, seen = _sentences(texts, entries)
            guessed, unsaid = _guess(seen, entries)
            aside = _sentences(held_out, entries)[0]
            stages.finish("reading lexicons and sentences")
            models = [_ngrams(path) for path in folders]
            stages.finish("reading n-grams")
            tries = [path / TRIE for path in folders]
            if texts:
                order = len(models[0].orders)
                models.append(_estimated(said, len(entries), order, work / "own"))
                tries.append(work / "own.bin")
                write_trie(tries[-1], models[-1])
            scores = None
            if aside:
                scores = np.stack([_scores(trie, aside, entries) for trie in tries], axis=1)
            elif texts:
                scores = _cross_validated(tries[:-1], said, entries, len(models[0].orders), work)
            weights = _weights(sources.weights, scores, parts)
            stages.finish("choosing weights")
            there = {word for one in models for word in one.words}
            fresh = [word for word in added if word not in there]
            mixed = models[0]
            if parts > 1 or fresh:
                mixed = _mixed(models, weights, fresh, len(entries))
            stages.finish("interpolating")
            bits = described.get("quantised_bits")
            form = TrieForm(
                bits if isinstance(bits, int) else None,
                described.get("compressed_pointers") is True,
            )
            figures = write_model(folder, mixed, Lexicon(entries), form, aside, stages)
        before = described.get("guessed_pronunciations")
        description = {
            **figures,
            "trainer": "interpolated",
            "models": [*map(str, sources.models), *map(str, texts)],
            "weights": [round(float(one), 4) for one in weights],
            "guessed_pronunciations": (before if isinstance(before, int) else 0) + len(guessed),
            "added_words": len(added) + len(guessed),
        }
        write_description(folder, description)
        shutil.rmtree(work)
    for what, words in (
        ("added with guessed pronunciations", guessed),
        ("left out, no pronunciation can be guessed", unsaid),
    ):
        if words:
            more = ", ..." if len(words) > _SHOWN else ""
            stages.print(
                f"{len(words)} words of the text are {what}: {', '.join(words[:_SHOWN])}{more}"
            )
    names = [path.name for path in sources.models] + ["own sentences"] * bool(texts)
    shares = ", ".join(f"{name} {w:.3f}" for name, w in zip(names, weights, strict=True))
    stages.print(f"weights: {shares}")
    if scores is not None and len(scores):
        mean = np.log10((10.0**scores) @ weights).mean()
        stages.print(
            f"perplexity of {len(scores)} held-out words and sentence ends: "
            f"{10 ** -scores[:, 0].mean():.0f} before, {10**-mean:.0f} now"
        )
    report(stages, out, description)


def _check(sources: Sources, parts: int) -> None:
    weights = sources.weights
    if parts == 1 and not sources.words:
        raise ModelError(
            "there is nothing to add to the model: needed --with, --text or --vocabulary-add"
        )
    if weights is not None and (
        len(weights) != parts or min(weights) < 0 or not abs(sum(weights) - 1.0) < 1e-3
    ):
        raise ModelError(
            f"the weights are {' '.join(f'{one:g}' for one in weights)}; needed {parts}, from 0 to "
            "1 and 1 together: for the model, for each one of --with, and for the text, if any"
        )
    if weights is None and len(sources.models) > 1 and not sources.texts and not sources.held_out:
        raise ModelError(
            "several models and no text to choose their weights on: needed --held-out FILE with "
            "sentences as they will be spoken, or --weights"
        )


def _folder(source: Path, work: Path, console: Console | None) -> Path:
    """Return a model folder of a source, which an ARPA file or a grammar is first made to."""
    if source.is_dir() and (source / DESCRIPTION).is_file():
        return source
    import_kaldi(source, work, console=console)
    return work


def _ngrams(folder: Path) -> SortedModel:
    try:
        return read_trie(folder / TRIE)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"the n-grams of {folder / TRIE} cannot be read: {error}; build or import the model "
            "again"
        ) from error


def _entries(folders: Sequence[Path]) -> dict[str, tuple[Pronunciation, ...]]:
    """Return the words of all models. The first model's pronunciations of a word are used."""
    entries: dict[str, tuple[Pronunciation, ...]] = {}
    for folder in folders:
        entries = dict(read_lexicon(folder / LEXICON).entries) | entries
    return entries


def _own_words(given: Sequence[str], entries: dict[str, tuple[Pronunciation, ...]]) -> list[str]:
    """Add words to `entries`. Return them.

    Raises:
      LexiconError: one is no word, or has no pronunciation and none can be guessed.
    """
    added: dict[str, None] = {}
    for one in given:
        path = Path(one)
        lines = [one]
        if path.is_file():
            with open_text(path, LexiconError, "word list", "lines `WORD [PH PH ...]`") as (
                all_,
                _,
            ):
                lines = list(all_)
        for line in lines:
            word, *phones = fields_of(line) or [""]
            if not word:
                continue
            if phones:
                own = parse_lexicon([line], str(one)).entries.get(word, ())
            else:
                own = entries.get(word) or guess_pronunciations(word)
            if not own:
                raise LexiconError(
                    f"--vocabulary-add {one}: {word!r} is no word whose pronunciation can be "
                    "guessed; needed letters a-z, apostrophes and hyphens, or a file of lines "
                    "`WORD PH PH ...`: check the spelling or the path"
                )
            entries[word] = tuple(dict.fromkeys([*own, *entries.get(word, ())]))
            added[word] = None
    return list(added)


def _sentences(
    texts: Sequence[Path], known: Mapping[str, object]
) -> tuple[list[Sentence], Counter[str]]:
    """Return the sentences of texts, and how often each word is in them.

    Raises:
      ModelError: no sentence can be used.
    """
    found = [words for words, _ in read_words(texts, known.keys()) if words is not None]
    if texts and not found:
        raise ModelError(
            f"no sentence of {', '.join(map(str, texts))} can be used; needed English text, one or "
            "more sentences per line"
        )
    return found, Counter(word for words in found for word in words)


def _guess(
    seen: Mapping[str, int], entries: dict[str, tuple[Pronunciation, ...]]
) -> tuple[list[str], list[str]]:
    """Add the words of the person's text that the lexicon lacks. Return these, and the others."""
    unknown = sorted(word for word in seen if word not in entries and word != UNKNOWN)
    guesses = {word: guess_pronunciations(word) for word in unknown}
    entries.update({word: said for word, said in guesses.items() if said})
    return [w for w in unknown if guesses[w]], [w for w in unknown if not guesses[w]]


def _estimated(
    sentences: Sequence[Sentence], vocabulary: int, order: int, folder: Path
) -> SortedModel:
    """Return a Kneser-Ney model of a few sentences. Unseen words share the mass of new ones."""
    folder.mkdir()
    words = in_order_of_ids(
        [UNKNOWN, BEGIN, END, *{w for one in sentences for w in one} - {UNKNOWN}]
    )
    ids = {word: number for number, word in enumerate(words)}
    tokens = np.array([ids[w] for one in sentences for w in (BEGIN, *one, END)], np.int32)
    return kneser_ney.estimate(
        tokens, words, order, _MEMORY, folder, vocabulary=vocabulary + 1
    ).model


def _scores(trie: Path, sentences: Sequence[Sentence], known: Mapping[str, object]) -> np.ndarray:
    """Return log10 probabilities of all words of the lexicon and sentence ends, in order."""
    model = kenlm.Model(str(trie))
    return np.array(
        [
            score
            for words in sentences
            for word, (score, _, _) in zip(
                [*words, END],
                model.full_scores(" ".join(w if w in known else UNKNOWN for w in words)),
                strict=True,
            )
            if word in known or word == END
        ]
    )


def _cross_validated(
    tries: Sequence[Path],
    sentences: Sequence[Sentence],
    known: Mapping[str, object],
    order: int,
    work: Path,
) -> np.ndarray | None:
    """Return the scores of the person's sentences, under the models and one of the others.

    None if there is one sentence.
    """
    found = []
    for fold in range(min(_FOLDS, len(sentences)) if len(sentences) > 1 else 0):
        others = [one for i, one in enumerate(sentences) if i % _FOLDS != fold]
        own = work / f"fold{fold}.bin"
        write_trie(own, _estimated(others, len(known), order, work / f"fold{fold}"))
        part = sentences[fold::_FOLDS]
        found.append(np.stack([_scores(trie, part, known) for trie in [*tries, own]], axis=1))
    return np.concatenate(found) if found else None


def _weights(given: Sequence[float] | None, scores: np.ndarray | None, parts: int) -> np.ndarray:
    if given is not None:
        return np.array(given) / sum(given)
    if scores is None:
        # One sentence is not much to go by.
        return (
            np.array([1.0]) if parts == 1 else np.array([0.9, *[0.1 / (parts - 1)] * (parts - 1)])
        )
    return best_weights(scores)


def _mixed(
    models: Sequence[SortedModel], weights: np.ndarray, fresh: Sequence[str], vocabulary: int
) -> SortedModel:
    """Interpolate the models, and give every word that none has the share of an average word."""
    if not fresh:
        return interpolate(models, weights.tolist())
    words = in_order_of_ids([UNKNOWN, BEGIN, END, *fresh])
    log10 = np.array([-np.log10(len(fresh)) if w in set(fresh) else NEVER for w in words])
    ids = np.arange(len(words))
    nothing = np.zeros(len(words), np.float32)
    uniform = SortedModel(
        words, [SortedOrder(ids.astype(np.uint32), 0 * ids, log10.astype(np.float32), nothing)]
    )
    share = len(fresh) / vocabulary
    return interpolate([*models, uniform], [*(weights * (1 - share)).tolist(), share])
