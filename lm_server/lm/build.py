"""`lm-server build`: text and a lexicon -> a model folder (`lm_server.lm.folder`)."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lm_server.lexicon import text
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lexicon.vocabulary import Vocabulary, choose_vocabulary, read_word_list
from lm_server.lm.arpa import ModelError
from lm_server.lm.estimate import kneser_ney, pruning
from lm_server.lm.estimate.corpus import Corpus, read_corpus, sentences, write_ids
from lm_server.lm.folder import Stages, folder_in_place_of, report, write_description, write_model
from lm_server.lm.sorted_ngrams import BEGIN, END, UNKNOWN, SortedModel, in_order_of_ids
from lm_server.lm.trie.kenlm_binary import PLAIN, TrieForm, trie_bytes

MAX_ORDER = 5
"""Flashlight's and the `kenlm` module's readers are compiled for orders up to 6."""
_LEAST_MEMORY = 16 << 20
_MUCH_OUTSIDE = 0.1
"""Fraction of a text's words outside the vocabulary from which on a warning is printed."""
_SHOWN = 5


@dataclass(frozen=True)
class Options:
    """Options of a build beyond its text, order and lexicon.

    Attributes:
      vocabulary: number of the text's most frequent words, or a file that lists words, or None for
        the whole lexicon.
      guess: guess the pronunciations of words outside the lexicon instead of leaving them out.
      prune: count cut-offs per order (see `kneser_ney.estimate`).
      ngrams: largest number of n-grams of order 2 and up, reached by entropy pruning.
      size: largest size of the trie in bytes, reached by entropy pruning.
      form: the kind of KenLM trie.
      memory: bytes that sorting may use.
      held_out: texts to measure on. By default every hundredth sentence is kept for that.
    """

    vocabulary: int | Path | None = None
    guess: bool = False
    prune: tuple[int, ...] = ()
    ngrams: int | None = None
    size: int | None = None
    form: TrieForm = PLAIN
    memory: int = 2 << 30
    held_out: tuple[Path, ...] = ()


def build(
    texts: Sequence[Path],
    order: int,
    lexicon: str | Path,
    out: Path,
    console: Console | None = None,
    options: Options | None = None,
) -> SortedModel:
    """Build a model folder.

    Args:
      texts: files of sentences (.txt, .gz, .xz) or folders of them, see `lm_server.lexicon.text`.
      order: length of the longest n-grams, 1-5.
      lexicon: `cmudict` or a file in its format.
      out: folder to write. A model folder there is replaced.
      console: where progress is shown, by default the terminal's error output.
      options: the rest.

    Returns:
      The n-grams that were written.

    Raises:
      TextError: a text file is missing or unreadable, or no sentence of the texts can be used.
      LexiconError: the lexicon or the vocabulary cannot be used.
      EstimationError: the cut-offs are not valid.
      ModelError: `order` or the memory is out of range, or `out` is in use for something else.
    """
    options = options or Options()
    if not 1 <= order <= MAX_ORDER:
        raise ModelError(f"the order is {order}; needed 1-{MAX_ORDER} words: 3 is a good start")
    if options.memory < _LEAST_MEMORY:
        raise ModelError(f"the memory is {options.memory} bytes; needed at least {_LEAST_MEMORY}")
    if options.ngrams is not None and options.ngrams < 0:
        raise ModelError(f"the number of n-grams is {options.ngrams}; needed 0 or more")
    kneser_ney.check_prune(options.prune, order)
    files, held_out = text.find_texts(texts), text.find_texts(options.held_out)
    stages = Stages(console)
    with folder_in_place_of(out) as folder:
        work = folder / "work"
        work.mkdir()
        with stages:
            corpus, vocabulary = _read(files, held_out, lexicon, options, work, stages)
            words = vocabulary.lexicon.entries
            model, unseen, found = _estimate(corpus, vocabulary, order, options, work, stages)
            aside = sentences(corpus.held_out)
            figures = write_model(folder, model, vocabulary.lexicon, options.form, aside, stages)
        inside = sum(count for word, count in corpus.seen.items() if word in words)
        if not options.held_out and figures["perplexity"] is not None:
            figures["held_out_share"] = 0.01
        description: dict[str, Any] = {
            **figures,
            "order": order,
            "trainer": "modified Kneser-Ney",
            "words_in_text": len(words) - unseen,
            "guessed_pronunciations": vocabulary.guessed,
            "words_without_pronunciation": vocabulary.left_out,
            "cut_offs": list(options.prune),
            **found,
            "sentences": corpus.counts.sentences,
            "running_words": corpus.counts.words,
            "dropped_with_digits": corpus.counts.dropped_digits,
            "dropped_with_other_letters": corpus.counts.dropped_letters,
            "annotations_removed": corpus.counts.annotations,
            "held_out_dropped_with_digits": corpus.aside.dropped_digits,
            "held_out_dropped_with_other_letters": corpus.aside.dropped_letters,
            "times_rare_words_were_forgotten": corpus.forgotten,
            "outside_lexicon_rate": 1.0 - inside / max(corpus.seen.total(), 1),
            "unseen_word_log10": float(model.orders[0].log10[0]),
            "lexicon": str(lexicon),
            "texts": [path.name for path in files],
        }
        write_description(folder, description)
        shutil.rmtree(work)
    fallbacks = description["orders_with_fallback_discounts"]
    if fallbacks:
        stages.print(
            f"the text is too small or too regular to estimate the discounts of order "
            f"{', '.join(map(str, fallbacks))}: usual values are used"
        )
    if corpus.forgotten:
        stages.print(
            "the text has more different words than --memory holds: some rare ones were left out "
            "of the counts; give more memory if they matter"
        )
    text_of = (corpus.counts.left_out("the text"), corpus.aside.left_out("the held-out text"))
    for line in itertools.chain(*text_of):
        stages.print(line)
    outside = Counter({word: n for word, n in corpus.seen.items() if word not in words})
    if outside.total() > _MUCH_OUTSIDE * corpus.seen.total():
        often = ", ".join(word for word, _ in outside.most_common(_SHOWN))
        remedy = "a lexicon that has them" if options.guess else "--g2p, or a lexicon that has them"
        stages.print(
            f"warning: {description['outside_lexicon_rate']:.0%} of the text's words are outside "
            f"the vocabulary, most often {often}: they cannot be decoded, use {remedy}"
        )
    report(stages, out, description)
    return model


def _read(
    files: Sequence[Path],
    held_out: Sequence[Path],
    lexicon: str | Path,
    options: Options,
    work: Path,
    stages: Stages,
) -> tuple[Corpus, Vocabulary]:
    dictionary = read_lexicon(lexicon)
    stages.finish("reading the lexicon")
    wanted: int | Sequence[str] | None = (
        read_word_list(options.vocabulary)
        if isinstance(options.vocabulary, Path)
        else options.vocabulary
    )
    known = dictionary.entries.keys() | (() if isinstance(wanted, int) else (wanted or ()))
    size = sum(path.stat().st_size for path in [*files, *held_out])
    corpus = read_corpus(
        files,
        held_out,
        known,
        options.memory,
        work,
        lambda done: stages.advance("reading the text", done, size),
    )
    looked_up = 0

    def look_up(done: int, total: int) -> None:
        nonlocal looked_up
        stages.advance("choosing words", done - looked_up, total)
        looked_up = done

    vocabulary = choose_vocabulary(corpus.seen, dictionary, wanted, options.guess, look_up)
    if not vocabulary.lexicon.entries.keys() & corpus.seen.keys():
        counts = corpus.counts
        raise text.TextError(
            f"no sentence of {', '.join(map(str, files))} can be used: "
            f"{counts.sentences} sentences, {counts.dropped_digits} dropped for digits, "
            f"{counts.dropped_letters} for letters other than a-z, and none has a word of the "
            "lexicon: needed English text, one or more sentences per line"
        )
    return corpus, vocabulary


def _estimate(
    corpus: Corpus,
    vocabulary: Vocabulary,
    order: int,
    options: Options,
    work: Path,
    stages: Stages,
) -> tuple[SortedModel, int, dict[str, object]]:
    """Return the model, the number of words that the text lacks, and figures for lm.json."""
    known = vocabulary.lexicon.entries
    seen = {word: count for word, count in corpus.seen.items() if word in known}
    words = in_order_of_ids([UNKNOWN, BEGIN, END, *seen])
    ids = {word: number for number, word in enumerate(words)}
    total = corpus.seen.total() + 2 * corpus.counts.sentences
    tokens = write_ids(
        corpus.train, ids, work / "tokens", lambda n: stages.advance("numbering words", n, total)
    )
    stages.finish("numbering words")
    unseen = len(known) - len(seen)
    # All words of the lexicon and the sentence end share the mass of new words. `<unk>` then has
    # the probability of one word that the text lacks, and stands for each such word in the search.
    shares = len(known) + 1 + (unseen == 0)
    estimated = kneser_ney.estimate(
        tokens, words, order, options.memory, work, options.prune, shares, stages.advance
    )
    model = estimated.model
    found: dict[str, object] = {
        "discounts": [list(row) for row in estimated.discounts],
        "orders_with_fallback_discounts": list(estimated.fallbacks),
    }
    if options.ngrams is not None or options.size is not None:
        found["ngrams_before_entropy_pruning"] = model.counts
        model = _prune_to_size(model, estimated.followed, options)
        stages.finish("entropy pruning")
    return model, unseen, found


def _prune_to_size(
    model: SortedModel, followed: Sequence[np.ndarray], options: Options
) -> SortedModel:
    strings = sum(len(word.encode()) + 1 for word in model.words)

    def fits(counts: Sequence[int]) -> bool:
        few = options.ngrams is None or sum(counts[1:]) <= options.ngrams
        small = options.size is None or trie_bytes(counts, options.form) + strings <= options.size
        return few and small

    least = [*model.counts[:1], *(0 for _ in model.counts[1:])]
    if not fits(least):
        raise ModelError(
            f"{model.counts[0]} words alone need {trie_bytes(least, options.form) + strings} bytes "
            f"of trie, but {options.size} are allowed: allow more, or choose fewer words "
            "(--vocabulary)"
        )
    return pruning.prune(pruning.score(model, followed), fits)
