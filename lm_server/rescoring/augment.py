"""New candidates from old ones: the best of an n-best list exchange the words in which they differ.

The search often finds each of two words in some candidate, but not both in the same one. What is
paired, exchanged and scored is what the published NEJM server does.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_server.hypothesis import Hypothesis, rank


def augment(
    hypotheses: Sequence[Hypothesis], acoustic_scale: float, top: int, penalty: float
) -> tuple[Hypothesis, ...]:
    """Return the candidates and the new ones made from them, distinct, best first.

    Each two of the `top` best that have equally many words are aligned with the fewest word edits.
    Where one word replaces another, two new candidates arise: either sentence with the other's
    word. A sentence that was there, or that an earlier (better) pair has made, is not made again.

    Args:
      hypotheses: the candidates in any order.
      acoustic_scale: as they are ranked by.
      top: how many of the best take part.
      penalty: a new candidate's acoustic and n-gram scores are the pair's means m, each made worse
        by this fraction: m - penalty * |m|.
    """
    ranked = rank(hypotheses, acoustic_scale, len(hypotheses))
    known = {one.words for one in ranked}
    made: list[Hypothesis] = []
    parents = ranked[:top]
    for index, one in enumerate(parents):
        for other in parents[index + 1 :]:
            if len(one.words) != len(other.words):
                continue
            for place, counterpart in _replacements(one.words, other.words):
                for words in (
                    _exchanged(one.words, place, other.words[counterpart]),
                    _exchanged(other.words, counterpart, one.words[place]),
                ):
                    if words not in known:
                        known.add(words)
                        made.append(_child(words, one, other, penalty))
    return rank((*ranked, *made), acoustic_scale, len(known))


def _exchanged(words: tuple[str, ...], place: int, word: str) -> tuple[str, ...]:
    return (*words[:place], word, *words[place + 1 :])


def _child(
    words: tuple[str, ...], one: Hypothesis, other: Hypothesis, penalty: float
) -> Hypothesis:
    acoustic = (one.acoustic + other.acoustic) / 2
    ngram = (one.ngram + other.ngram) / 2
    return Hypothesis(
        words,
        acoustic - penalty * abs(acoustic),
        ngram - penalty * abs(ngram),
        bonus=(one.bonus + other.bonus) / 2,
    )


def _replacements(one: tuple[str, ...], other: tuple[str, ...]) -> list[tuple[int, int]]:
    """Return indices (in `one`, in `other`) of words that replace each other, first to last."""
    # Either walk below aligns the shared beginning and end to itself, so both are left out. Most
    # pairs then differ in a word or two.
    start, end = 0, len(one)
    while start < end and one[start] == other[start]:
        start += 1
    while end > start and one[end - 1] == other[end - 1]:
        end -= 1
    if end - start == 1:
        return [(start, start)]
    left, right = one[start:end], other[start:end]
    # Either direction breaks ties its own way, so the two may find different words, as published.
    pairs = zip(_replaced(left, right), _replaced(right, left), strict=False)
    return [(start + place, start + counterpart) for place, counterpart in pairs]


def _replaced(words: Sequence[str], target: Sequence[str]) -> list[int]:
    """Return the indices in `words` of what a shortest edit to `target` replaces.

    Of equally short edits: words that agree are kept before anything else, then, from the end, a
    word of the target is put in before one of `words` is left out before one is replaced.
    """
    costs = [list(range(len(target) + 1))]
    for i, word in enumerate(words, 1):
        above, row = costs[-1], [i]
        for j, wanted in enumerate(target, 1):
            row.append(
                above[j - 1] if word == wanted else 1 + min(row[j - 1], above[j], above[j - 1])
            )
        costs.append(row)
    found = []
    i, j = len(words), len(target)
    while i and j:
        if words[i - 1] == target[j - 1]:
            i, j = i - 1, j - 1
            continue
        inserted, removed, replaced = costs[i][j - 1], costs[i - 1][j], costs[i - 1][j - 1]
        if inserted <= min(removed, replaced):
            j -= 1
        elif removed <= replaced:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found.append(i)
    return found[::-1]
