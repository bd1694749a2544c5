"""`lm-server import --kenlm`: a KenLM binary file, used where it lies, with its lexicon -> a model
folder (`lm_server.lm.folder`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import kenlm
from rich.console import Console

from lm_server.lexicon.pronunciations import Lexicon, LexiconError, Pronunciation, is_word
from lm_server.lexicon.text import Counts, find_texts, open_text, read_words
from lm_server.lm.arpa import ModelError
from lm_server.lm.folder import (
    Stages,
    folder_in_place_of,
    measure,
    report,
    write_description,
    write_lexicon,
)
from lm_server.lm.kaldi.importer import Dropped, read_own_lexicon
from lm_server.lm.reader import LEXICON, TRIE
from lm_server.lm.trie.kenlm_binary import read_header
from lm_server.protocol import BLANK, PHONEMES

MAX_ORDER = 6
"""Flashlight's and the `kenlm` module's readers are compiled for orders up to this."""
_KINDS = ("probing", "probing with rest costs", "trie", "quantised trie", "compressed trie")
_BLANKS = frozenset((BLANK, "<blank>", "<blk>", "<eps>", "_", "-", "#"))
_SILENCES = frozenset(("SIL", "sil", "<sil>", "|", " | "))


def read_tokens(path: Path) -> tuple[str, ...]:
    """Return the classes of a file with one token a line, in our names (`protocol.LM_CLASSES`).

    Raises:
      LexiconError: they are not the blank, the silence and the 39 phonemes, each once.
    """
    with open_text(path, LexiconError, "token", "one token per line") as (lines, _):
        found = [line.rstrip("\r\n") for line in lines if line.strip()]
    names = tuple(
        BLANK if one in _BLANKS else " | " if one in _SILENCES else one.strip() for one in found
    )
    wanted = {BLANK, " | ", *PHONEMES}
    if set(names) != wanted or len(names) != len(wanted):
        strange = sorted(set(names) - wanted) or sorted(
            {one for one in names if names.count(one) > 1}
        )
        missing = sorted(wanted - set(names))
        raise LexiconError(
            f"{path} has {len(names)} tokens, of which {', '.join(strange) or 'none'} are not as "
            f"needed and {', '.join(missing) or 'none'} are missing; needed a blank, SIL and the "
            f"39 phonemes {' '.join(PHONEMES)}"
        )
    return names


def import_kenlm(
    model: Path,
    lexicon: Path,
    out: Path,
    tokens: Path | None = None,
    console: Console | None = None,
    held_out: Sequence[Path] = (),
) -> None:
    """Make a model folder whose `lm.bin` is a link to the file.

    Args:
      model: a KenLM binary file of any kind. It is neither copied nor read as a whole.
      lexicon: words, each with its phonemes. Silences among them are allowed.
      out: folder to write. A model folder there is replaced.
      tokens: the file of classes that the lexicon is written in, checked only.
      console: where progress is shown, by default the terminal's error output.
      held_out: texts to measure the model on, see `lm_server.lexicon.text`.

    Raises:
      ModelError, LexiconError, TextError: something is missing or cannot be used.
    """
    if not model.is_file():
        raise ModelError(f"there is no {model}; needed a KenLM binary file: check the path")
    try:
        header = read_header(model)
        if len(header.counts) > MAX_ORDER:
            raise ValueError(f"its order is {len(header.counts)}, the readers' most {MAX_ORDER}")
        config = kenlm.Config()
        config.load_method = kenlm.LoadMethod.LAZY
        reader = kenlm.Model(str(model), config)
    # Of a damaged file KenLM's message may hold its bytes.
    except (ValueError, OSError, RuntimeError) as error:
        raise ModelError(
            f"{model} cannot be used as a KenLM binary file ({error}): make one with KenLM's "
            "`build_binary`, or import the ARPA file with `lm-server import-kaldi`"
        ) from error
    if tokens is not None:
        read_tokens(tokens)
    texts, aside = find_texts(held_out), Counts()
    dropped, stages = Dropped(), Stages(console)
    with folder_in_place_of(out) as folder:
        with stages:
            entries = _usable(read_own_lexicon(lexicon, dropped), dropped)
            stages.finish("reading the lexicon")
            seen = sum(word in reader for word in entries)
            if not seen:
                raise ModelError(
                    f"none of the {len(entries)} words of {lexicon} is in {model}; needed the "
                    "lexicon of that model, both in lower case"
                )
            (folder / TRIE).symlink_to(model.resolve())
            start = kenlm.State()
            reader.NullContextWrite(start)
            likely = {word: reader.BaseScore(start, word, kenlm.State()) for word in entries}
            write_lexicon(folder / LEXICON, Lexicon(entries), likely, min(likely.values()))
            stages.finish("looking up words")
            said = []
            for words, change in read_words(texts, entries):
                aside += change
                said += [words] if words is not None else []
            figures = measure(reader, said, entries)
            stages.finish("measuring on held-out sentences")
        kind = header.kind
        description = {
            "order": len(header.counts),
            "words": len(entries),
            "pronunciations": Lexicon(entries).pronunciations,
            "ngrams": list(header.counts),
            "compressed_pointers": kind in (4, 5),
            # No checksum: reading it would last minutes, at every start.
            "bytes": model.stat().st_size,
            **figures,
            "trainer": "imported",
            "imported_from": str(model.resolve()),
            "kenlm_kind": _KINDS[kind] if kind < len(_KINDS) else "quantised compressed trie",
            "guessed_pronunciations": 0,
            "words_in_model": seen,
            "dropped_words": {why: len(words) for why, words in dropped.words.items()},
        }
        write_description(folder, description)
    for line in itertools.chain(dropped.lines(), aside.left_out("the held-out text")):
        stages.print(line)
    if seen < len(entries):
        stages.print(
            f"{len(entries) - seen} of {len(entries)} words of the lexicon are not in the model: "
            "they have the probability of its <unk>"
        )
    stages.print(f"{out / TRIE} is a link to {model.resolve()}: keep that file where it is")
    report(stages, out, description)


def _usable(
    said: dict[str, tuple[Pronunciation, ...]], dropped: Dropped
) -> dict[str, tuple[Pronunciation, ...]]:
    for word in [word for word in said if not is_word(word)]:
        dropped.add("no words of a-z, apostrophe and hyphen", word)
        del said[word]
    if not said:
        raise LexiconError("the lexicon has no word of a-z, apostrophe and hyphen; needed English")
    return said
