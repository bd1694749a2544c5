"""A tiny `TLG.fst` of a problem, made as published ones are: CTC rules, lexicon, n-grams."""

from __future__ import annotations

import math
from pathlib import Path

import kaldifst
from brute_force import SIL, USED, Problem

from lm_server.protocol import LM_CLASSES


def write_graph(problem: Problem, folder: Path) -> Path:
    """Writes `TLG.fst` and `words.txt`; input labels are classes counted from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    words = list(problem.lexicon)
    numbers = {word: index for index, word in enumerate(words, 1)}
    names = ["<eps> 0", *(f"{word.upper()} {number}" for word, number in numbers.items())]
    (folder / "words.txt").write_text("\n".join([*names, f"#0 {len(names)}"]) + "\n")

    tokens = []
    classes = [one for one in USED if one]
    for one in classes:
        tokens += [f"0 {one} {one + 1} {one + 1}", f"{one} {one} {one + 1} 0", f"{one} 0 1 0"]
        tokens += [f"{one} {other} {other + 1} {other + 1}" for other in classes if other != one]
    tokens += ["0 0 1 0", *(str(one) for one in (0, *classes))]

    lexicon, free = [f"0 0 {SIL + 1} 0"], 1
    finals = ["0"]
    for word, pronunciations in problem.lexicon.items():
        for phones in pronunciations:
            state = 0
            for position, phone in enumerate(phones):
                spoken = numbers[word] if position == 0 else 0
                lexicon.append(f"{state} {free} {LM_CLASSES.index(phone) + 1} {spoken}")
                state, free = free, free + 1
            lexicon.append(f"{state} 0 {SIL + 1} 0")
            finals.append(str(state))  # the last word may lack its silence

    def cost(before: str, word: str) -> float:
        direct = problem.bigrams.get((before, word))
        log10 = problem.backoffs[before] + problem.unigrams[word] if direct is None else direct
        return -log10 * math.log(10)

    grammar = []
    for state, before in enumerate(["<s>", *words]):
        grammar += [
            f"{state} {number} {number} {number} {cost(before, word)!r}"
            for word, number in numbers.items()
        ]
        grammar.append(f"{state} {cost(before, '</s>')!r}")

    grammar_fst = kaldifst.compile("\n".join(grammar) + "\n")
    lexicon_fst = kaldifst.compile("\n".join([*lexicon, *finals]) + "\n")
    kaldifst.arcsort(grammar_fst, "ilabel")
    kaldifst.arcsort(lexicon_fst, "olabel")
    both = kaldifst.compose(lexicon_fst, grammar_fst)
    tokens_fst = kaldifst.compile("\n".join(tokens) + "\n")
    kaldifst.arcsort(tokens_fst, "olabel")
    kaldifst.arcsort(both, "ilabel")
    graph = kaldifst.compose(tokens_fst, both)
    assert graph.write(str(folder / "TLG.fst"))
    return folder
