"""`lm-server import-kaldi`: a Kaldi language model (words.txt and G.fst, or an ARPA) -> a model
folder (`model_folder`)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from lm_server.lexicon.g2p import pronounce
from lm_server.lexicon.pronunciations import (
    Lexicon,
    LexiconError,
    Pronunciation,
    is_word,
    read_lexicon,
)
from lm_server.lexicon.text import (
    DAMAGED_ARCHIVE,
    SUFFIXES,
    Counts,
    find_texts,
    open_text,
    read_words,
)
from lm_server.lm.arpa import NEVER, Model, ModelError, read_arpa, sort_model, without
from lm_server.lm.folder import (
    DESCRIPTION,
    LEXICON,
    TRIE,
    Stages,
    folder_in_place_of,
    measure,
    progress_columns,
    write_description,
    write_lexicon,
)
from lm_server.lm.kaldi.grammar import read_symbols, to_model
from lm_server.lm.kaldi.openfst import read_fst
from lm_server.lm.reader import checksum
from lm_server.lm.sorted_ngrams import BEGIN, END, UNKNOWN, SortedModel
from lm_server.lm.trie.kenlm_binary import PLAIN, TrieForm, write_trie
from lm_server.protocol import PHONEMES

GRAMMAR, SYMBOLS = "G.fst", "words.txt"
_LEXICONS = ("lexicon.txt", "lexicon_numbers.txt", "lexiconp.txt", "dict/lexicon.txt")
_SILENCES = frozenset(("SIL", "<SIL>", "!SIL", "SPN", "SP", "|", "<eps>"))
_UNKNOWNS = ("<unk>", "<UNK>", "[UNK]", "<SPOKEN_NOISE>", "<spoken_noise>")
UNKNOWN_PHONEMES = "lexicon entries with unknown phonemes"
"""Why lines of a lexicon are dropped."""
_VARIANTS = 2
_SHOWN = 5


@dataclass
class Dropped:
    """What an import leaves out, and why."""

    words: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, word: str) -> None:
        """Notes a word."""
        self.words.setdefault(reason, []).append(word)

    def lines(self) -> Iterator[str]:
        """One line per reason."""
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
    """Makes a model folder.

    Args:
      source: a folder with words.txt and G.fst, a grammar file with words.txt beside it, or an ARPA
        file (.arpa, .lm, also .gz or .xz) or a folder with one.
      out: folder to write; a model folder there is replaced.
      lexicon: words and their phonemes, silences allowed; by default one that lies in the folder.
      guess: pronounce words that neither the lexicon nor CMU has by rule of thumb.
      form: the kind of KenLM trie.
      console: where progress is shown; by default the terminal's error output.
      held_out: texts to measure the model on, see `lm_server.lexicon.text`.

    Raises:
      ModelError, FstError, LexiconError, TextError: something is missing or cannot be used.
    """
    console = console or Console(stderr=True)
    grammar, symbols = _find_grammar(source)
    texts = find_texts(held_out)
    dropped = Dropped()
    with folder_in_place_of(out) as folder:
        with Progress(*progress_columns(), console=console) as progress:
            stages = Stages(progress)
            model = _read(grammar, symbols, stages)
            said = _read_lexicons(lexicon or _find_lexicon(grammar.parent), dropped, stages)
            model, entries, guessed = _match(model, said, guess, dropped, stages)
            sorted_model = _with_unknown(sort_model(model))
            stages.finish("sorting n-grams")
            total = sum(sorted_model.counts)
            write_trie(
                folder / TRIE,
                sorted_model,
                form,
                lambda rows: stages.advance("writing the KenLM trie", rows, total),
            )
            stages.finish("writing the KenLM trie")
            chosen = Lexicon(entries)
            write_lexicon(folder / LEXICON, chosen, sorted_model)
            aside = Counts()

            def spoken() -> Iterator[tuple[str, ...]]:
                nonlocal aside
                for words, change in read_words(texts, entries):
                    aside += change
                    if words is not None:
                        yield words

            quality = measure(folder / TRIE, spoken(), entries)
        write_description(
            folder / DESCRIPTION,
            {
                "order": len(sorted_model.orders),
                "trainer": "imported",
                "imported_from": grammar.name,
                "words": len(chosen),
                "pronunciations": chosen.pronunciations,
                "guessed_pronunciations": guessed,
                "dropped_words": {why: len(words) for why, words in dropped.words.items()},
                "ngrams": sorted_model.counts,
                "quantised_bits": form.bits,
                "compressed_pointers": form.compressed,
                "bytes": (folder / TRIE).stat().st_size,
                "crc32": checksum(folder / TRIE),
                "held_out_dropped_with_digits": aside.dropped_digits,
                "held_out_dropped_with_other_letters": aside.dropped_letters,
                **quality,
            },
        )
    for line in dropped.lines():
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if aside.dropped_digits or aside.dropped_letters:
        console.print(
            f"not measured on: {aside.dropped_digits} held-out sentences with digits, "
            f"{aside.dropped_letters} with letters other than a-z",
            highlight=False,
            soft_wrap=True,
        )
    perplexity, outside = quality["perplexity"], quality["oov_rate"]
    measured = (
        ""
        if perplexity is None or outside is None
        else f"; perplexity {perplexity:.0f} on {quality['held_out_sentences']} held-out sentences,"
        f" of whose words {outside:.2%} are outside the vocabulary"
    )
    console.print(
        f"{out}: order {len(sorted_model.orders)}, {len(chosen)} words ({guessed} with guessed "
        f"pronunciations), n-grams {sorted_model.counts}{measured}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _find_grammar(source: Path) -> tuple[Path, Path | None]:
    """The grammar or ARPA file, and for a grammar its words.txt."""
    if source.is_file():
        if source.suffix != ".fst" and not _is_arpa(source) and not _is_fst(source):
            raise ModelError(
                f"{source} is neither a grammar (OpenFst, such as {GRAMMAR}) nor an ARPA file by "
                "its name (.arpa, .lm, also .gz or .xz): give one of these; of text a model is "
                "made with `lm-server build`"
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
    """Whether a file is an ARPA model by its name, or by its beginning."""
    bare = path.with_suffix("") if path.suffix in SUFFIXES and path.suffix != ".txt" else path
    if not path.is_file() or path.suffix == ".fst":
        return False
    return bare.suffix in (".arpa", ".lm", ".arpabo")


def _is_fst(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == struct.pack("<i", 2125659606)


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
    """CMU's words, and before them those of the model's own lexicon."""
    said = dict(read_lexicon("cmudict").entries)
    if path is not None:
        said |= _read_own_lexicon(path, dropped)
    stages.finish("reading lexicons")
    return said


def _read_own_lexicon(path: Path, dropped: Dropped) -> dict[str, tuple[Pronunciation, ...]]:
    """A lexicon in Kaldi's format.

    Raises:
      LexiconError: it is missing, no text, or without one line that can be used.
    """
    needed = "needed lines `word PH PH ...` with ARPAbet phonemes"
    own: dict[str, list[Pronunciation]] = {}
    if not path.is_file():
        raise LexiconError(f"there is no lexicon file {path}: check the path")
    try:
        with open_text(path) as (lines, _):
            for word, phones in kaldi_entries(lines, dropped):
                variants = own.setdefault(word, [])
                if phones not in variants:
                    variants.append(phones)
    except UnicodeDecodeError as error:
        raise LexiconError(
            f"{path} is not UTF-8 text ({error}); {needed}: check the path"
        ) from error
    except DAMAGED_ARCHIVE as error:
        raise LexiconError(
            f"{path} is a damaged archive ({error}): fetch or pack it again"
        ) from error
    if not own:
        strange = dropped.words.get(UNKNOWN_PHONEMES, [])
        what = f", {len(strange)} lines have unknown phonemes" if strange else ""
        raise LexiconError(f"{path} holds no word with its phonemes{what}; {needed}")
    return {word: tuple(variants) for word, variants in own.items()}


def kaldi_entries(lines: Iterable[str], dropped: Dropped) -> Iterator[tuple[str, Pronunciation]]:
    """Lines `word [probability] PH PH ...` of a Kaldi lexicon -> words with their phonemes, without
    silences, stress and marks of position (`AH0_B`)."""
    for line in lines:
        fields = line.split()
        if len(fields) < 2:
            continue
        word, *rest = fields
        if rest[0].replace(".", "", 1).replace("e-", "", 1).isdigit():
            rest = rest[1:]
        phones = tuple(
            one.rpartition("_")[0].rstrip("012") if one[-2:-1] == "_" else one.rstrip("012")
            for one in rest
            if one not in _SILENCES and not one.startswith("#")
        )
        if not phones:
            continue  # Silence said as a word.
        if not set(phones) <= set(PHONEMES):
            dropped.add(UNKNOWN_PHONEMES, word)
            continue
        yield word.lower(), phones


def _match(
    model: Model,
    said: Mapping[str, tuple[Pronunciation, ...]],
    guess: bool,
    dropped: Dropped,
    stages: Stages,
) -> tuple[Model, dict[str, tuple[Pronunciation, ...]], int]:
    """The model in lower case without the words that cannot be said, its words' pronunciations, and
    how many of these are guesses."""
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
        elif guess and (found := _guess(name)):
            entries[name] = found
            guessed += 1
        else:
            dropped.add("without a pronunciation", model.words[index])
            out.append(index)
    if not entries:
        raise ModelError("the model has no word that can be said; needed English words")
    _take_unknown(model, out)
    kept = without(Model(names, model.orders), out)
    return kept, entries, guessed


def _take_unknown(model: Model, out: Sequence[int]) -> None:
    """Gives `<unk>` the probability of the word by which Kaldi models say it, if it has none."""
    log10 = model.orders[0].log10
    if log10[0] <= NEVER:
        found = [i for i in out if model.words[i] in _UNKNOWNS and log10[i] > NEVER]
        if found:
            log10[0] = log10[found[0]]


def _with_unknown(model: SortedModel) -> SortedModel:
    """The model with a probability for `<unk>`: at most that of its rarest word, because hot words
    that it lacks are scored by it."""
    log10 = np.array(model.orders[0].log10)
    real = log10[log10 > NEVER]
    log10[0] = min(log10[0] if log10[0] > NEVER else 0.0, real.min() if len(real) else 0.0)
    first = model.orders[0]
    unigrams = type(first)(first.word, first.parent, log10, first.backoff)
    return SortedModel(model.words, [unigrams, *model.orders[1:]])


def _guess(word: str) -> tuple[Pronunciation, ...]:
    try:
        return pronounce(word, _VARIANTS)
    except LexiconError:
        return ()
