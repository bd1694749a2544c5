"""`lm-server import-kaldi`: a Kaldi language model (words.txt and G.fst, or an ARPA) -> a model
folder (`lm_server.lm.folder`)."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from lm_server.lexicon.g2p import guess_pronunciations
from lm_server.lexicon.pronunciations import (
    Lexicon,
    LexiconError,
    Pronunciation,
    fields_of,
    is_word,
    read_lexicon,
)
from lm_server.lexicon.text import (
    SUFFIXES,
    Counts,
    beginning,
    find_texts,
    open_text,
    read_words,
)
from lm_server.lm.arpa import DATA, NEVER, Model, ModelError, read_arpa, sort_model, without
from lm_server.lm.folder import Stages, folder_in_place_of, report, write_description, write_model
from lm_server.lm.kaldi.grammar import read_symbols, to_model
from lm_server.lm.kaldi.openfst import MAGIC, read_fst
from lm_server.lm.sorted_ngrams import BEGIN, END, UNKNOWN, SortedModel
from lm_server.lm.trie.kenlm_binary import PLAIN, TrieForm
from lm_server.protocol import PHONEMES

GRAMMAR, SYMBOLS = "G.fst", "words.txt"
_LEXICONS = ("lexicon.txt", "lexicon_numbers.txt", "lexiconp.txt", "dict/lexicon.txt")
_SILENCES = frozenset(("SIL", "<SIL>", "!SIL", "SPN", "SP", "|", "<eps>"))
_UNKNOWNS = ("<unk>", "<UNK>", "[UNK]", "<SPOKEN_NOISE>", "<spoken_noise>")
UNKNOWN_PHONEMES = "lexicon entries with unknown phonemes"
"""Reason why lines of a lexicon are dropped."""
_SHOWN = 5


@dataclass
class Dropped:
    """Words that an import leaves out, by reason."""

    words: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, word: str) -> None:
        """Record a word."""
        self.words.setdefault(reason, []).append(word)

    def lines(self) -> Iterator[str]:
        """Yield one line per reason."""
        for reason, words in self.words.items():
            more = ", ..." if len(words) > _SHOWN else ""
            yield f"dropped {len(words)} words ({reason}): {', '.join(words[:_SHOWN])}{more}"


def import_kaldi(
    source: Path,
    out: Path,
    lexicon: Path | None = None,
    guess: bool = True,
    form: TrieForm = PLAIN,
    console: Console | None = None,
    held_out: Sequence[Path] = (),
) -> None:
    """Make a model folder.

    Args:
      source: a folder with words.txt and G.fst, a grammar file with words.txt beside it, an ARPA
        file of any name (also .gz or .xz), or a folder with one.
      out: folder to write. A model folder there is replaced.
      lexicon: words and their phonemes, silences allowed. By default one that lies in the folder.
      guess: guess the pronunciations of words that neither the lexicon nor CMU has.
      form: the kind of KenLM trie.
      console: where progress is shown, by default the terminal's error output.
      held_out: texts to measure the model on, see `lm_server.lexicon.text`.

    Raises:
      ModelError, FstError, LexiconError, TextError: something is missing or cannot be used.
    """
    grammar, symbols = _find_grammar(source)
    texts = find_texts(held_out)
    dropped, stages, aside = Dropped(), Stages(console), Counts()
    with folder_in_place_of(out) as folder:
        with stages:
            read = _read(grammar, symbols, stages)
            said = _read_lexicons(lexicon or _find_lexicon(grammar.parent), dropped, stages)
            matched, entries, guessed = _match(read, said, guess, dropped, stages)
            model = _with_unknown(sort_model(matched))
            stages.finish("sorting n-grams")

            def spoken() -> Iterator[tuple[str, ...]]:
                nonlocal aside
                for words, change in read_words(texts, entries):
                    aside += change
                    if words is not None:
                        yield words

            figures = write_model(folder, model, Lexicon(entries), form, spoken(), stages)
        description = {
            **figures,
            "trainer": "imported",
            "imported_from": grammar.name,
            "guessed_pronunciations": guessed,
            "dropped_words": {why: len(words) for why, words in dropped.words.items()},
            "held_out_dropped_with_digits": aside.dropped_digits,
            "held_out_dropped_with_other_letters": aside.dropped_letters,
        }
        write_description(folder, description)
    for line in itertools.chain(dropped.lines(), aside.left_out("the held-out text")):
        stages.print(line)
    report(stages, out, description)


def _find_grammar(source: Path) -> tuple[Path, Path | None]:
    """Return the grammar or ARPA file, and for a grammar its words.txt."""
    if source.is_file():
        if source.suffix != ".fst" and not _is_arpa(source) and not _is_fst(source):
            raise ModelError(
                f"{source} is neither a grammar (OpenFst, such as {GRAMMAR}) nor an ARPA file "
                f"(with a line {DATA}, also packed as .gz or .xz): give one of these; of text a "
                "model is made with `lm-server build`"
            )
        grammar = source
    elif (source / GRAMMAR).is_file():
        grammar = source / GRAMMAR
    elif source.is_dir():
        found = sorted(path for path in source.iterdir() if _is_arpa(path))
        if len(found) != 1:
            what = "none" if not found else ", ".join(path.name for path in found)
            raise ModelError(
                f"{source} has no {GRAMMAR}, and of ARPA files it has {what}; needed {SYMBOLS} and "
                f"{GRAMMAR}, or one ARPA file: name the file itself if there are several"
            )
        grammar = found[0]
    else:
        raise ModelError(
            f"there is no {source}; needed a folder with {SYMBOLS} and {GRAMMAR}, or an ARPA file"
        )
    return grammar, None if _is_arpa(grammar) else grammar.parent / SYMBOLS


def _is_arpa(path: Path) -> bool:
    """Return whether a file is an ARPA model by its name or by its beginning."""
    if not path.is_file() or _is_fst(path):
        return False
    packed = path.suffix.lower() in SUFFIXES and path.suffix.lower() != ".txt"
    bare = path.with_suffix("") if packed else path
    if bare.suffix.lower() in (".arpa", ".lm", ".arpabo"):
        return True
    return any(line.strip() == DATA.encode() for line in beginning(path).splitlines())


def _is_fst(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<i", MAGIC)


def _read(grammar: Path, symbols: Path | None, stages: Stages) -> Model:
    if symbols is None:
        size = grammar.stat().st_size
        return read_arpa(grammar, lambda done: stages.advance("reading the ARPA", done, size))
    numbers = read_symbols(symbols)
    fst = read_fst(grammar, lambda done, total: stages.advance("reading the grammar", done, total))
    model = to_model(fst, numbers)
    stages.finish("finding the n-grams")
    return model


def _find_lexicon(folder: Path) -> Path | None:
    places = [place / name for place in (folder, folder.parent) for name in _LEXICONS]
    return next((path for path in places if path.is_file()), None)


def _read_lexicons(
    path: Path | None, dropped: Dropped, stages: Stages
) -> dict[str, tuple[Pronunciation, ...]]:
    """Return CMU's pronunciations, overridden by those of the model's own lexicon."""
    said = dict(read_lexicon("cmudict").entries)
    if path is not None:
        said |= read_own_lexicon(path, dropped)
    stages.finish("reading lexicons")
    return said


def read_own_lexicon(path: Path, dropped: Dropped) -> dict[str, tuple[Pronunciation, ...]]:
    """Read a lexicon in Kaldi's format.

    Raises:
      LexiconError: it is missing, is not text, or has no usable line.
    """
    needed = "lines `word PH PH ...` with ARPAbet phonemes"
    own: dict[str, list[Pronunciation]] = {}
    with open_text(path, LexiconError, "lexicon", needed) as (lines, _):
        for word, phones in kaldi_entries(lines, dropped):
            variants = own.setdefault(word, [])
            if phones not in variants:
                variants.append(phones)
    if not own:
        strange = dropped.words.get(UNKNOWN_PHONEMES, [])
        what = f", {len(strange)} lines have unknown phonemes" if strange else ""
        raise LexiconError(f"{path} holds no word with its phonemes{what}; needed {needed}")
    return {word: tuple(variants) for word, variants in own.items()}


def kaldi_entries(lines: Iterable[str], dropped: Dropped) -> Iterator[tuple[str, Pronunciation]]:
    """Yield words and phonemes of a Kaldi lexicon's lines `word [probability] PH PH ...`.

    Silences, stress, marks of position (`AH0_B`), disambiguation (`#1`) and comments are removed.
    """
    for line in lines:
        fields = fields_of(line)
        if len(fields) < 2:
            continue
        word, *rest = fields
        if rest[0].replace(".", "", 1).replace("e-", "", 1).isdigit():
            rest = rest[1:]
        phones = tuple(
            one.rpartition("_")[0].rstrip("012") if one[-2:-1] == "_" else one.rstrip("012")
            for one in rest
            if one not in _SILENCES
        )
        if not phones:
            continue  # a word that stands for silence
        if not set(phones) <= set(PHONEMES):
            dropped.add(UNKNOWN_PHONEMES, word)
            continue
        yield word, phones


def _match(
    model: Model,
    said: Mapping[str, tuple[Pronunciation, ...]],
    guess: bool,
    dropped: Dropped,
    stages: Stages,
) -> tuple[Model, dict[str, tuple[Pronunciation, ...]], int]:
    """Match the model's words with pronunciations.

    Returns:
      The model in lower case without words that have no pronunciation, the pronunciations of its
      words, and the number of words whose pronunciations are guesses.
    """
    names = [word if word in (UNKNOWN, BEGIN, END) else word.lower() for word in model.words]
    likely = np.argsort(-model.orders[0].log10, kind="stable")
    entries: dict[str, tuple[Pronunciation, ...]] = {}
    out, guessed = [], 0
    for index in likely.tolist():
        name = names[index]
        stages.advance("looking up words", 1, len(names))
        if name in (UNKNOWN, BEGIN, END) and name == model.words[index]:
            continue
        if not is_word(name):
            dropped.add("no words of a-z, apostrophe and hyphen", model.words[index])
            out.append(index)
        elif name in entries:
            dropped.add("written as a likelier word but for capitals", model.words[index])
            out.append(index)
        elif name in said:
            entries[name] = said[name]
        elif guess and (found := guess_pronunciations(name)):
            entries[name] = found
            guessed += 1
        else:
            dropped.add("without a pronunciation", model.words[index])
            out.append(index)
    if not entries:
        raise ModelError("no word of the model has a pronunciation; needed English words")
    _take_unknown(model, out)
    kept = without(Model(names, model.orders), out)
    return kept, entries, guessed


def _take_unknown(model: Model, out: Sequence[int]) -> None:
    """Copy the probability of Kaldi's word for unknown words to `<unk>`, if `<unk>` has none."""
    log10 = model.orders[0].log10
    if log10[0] <= NEVER:
        found = [i for i in out if model.words[i] in _UNKNOWNS and log10[i] > NEVER]
        if found:
            log10[0] = log10[found[0]]


def _with_unknown(model: SortedModel) -> SortedModel:
    """Limit the probability of `<unk>` to that of the rarest word.

    Hot words that the model lacks are scored as `<unk>`.
    """
    log10 = np.array(model.orders[0].log10)
    real = log10[log10 > NEVER]
    log10[0] = min(log10[0] if log10[0] > NEVER else 0.0, real.min() if len(real) else 0.0)
    first = model.orders[0]
    unigrams = type(first)(first.word, first.parent, log10, first.backoff)
    return SortedModel(model.words, [unigrams, *model.orders[1:]])
