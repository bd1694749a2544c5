"""New candidates from old ones: the best of an n-best list exchange the words in which they differ.

The search often finds each of two words in some candidate, but not both in the same one. What is
paired, exchanged and scored is what the published NEJM server does.
"""

from __future__ import annotations

from collections.abc import Sequence

from lm_server.hypothesis import Hypothesis, rank
from lm_server.search.sliced import Sliced

_MOST_WORDS = 2_000_000
"""Words compared and made for one sentence, some 2 s of work."""
_PAIR_WORDS = 50_000
"""Words compared at once for one pair, so that every sentence of up to 150 words is aligned."""
_SLICE_WORDS = 20_000
"""Words compared between two yields."""
_FAR = 1 << 30


def augment(
    hypotheses: Sequence[Hypothesis], acoustic_scale: float, top: int, penalty: float
) -> Sliced[tuple[Hypothesis, ...]]:
    """Return the candidates and the new ones made from them, distinct, best first. Yield in
    between.

    Each two of the `top` best that have equally many words are aligned with the fewest word edits.
    Where one word replaces another, two new candidates arise: either sentence with the other's
    word. A sentence that was there, or that an earlier (better) pair has made, is not made again.

    The work is bounded. Of long sentences, two that differ in very many words exchange none, and
    the worst pairs may be left out.

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
    left = _MOST_WORDS
    due = left - _SLICE_WORDS
    for index, one in enumerate(parents):
        for other in parents[index + 1 :]:
            if len(one.words) != len(other.words):
                continue
            if left < due:
                yield
                due = left - _SLICE_WORDS
            pairs, compared = _replacements(one.words, other.words)
            # Made one by one: a child has as many words as its parents.
            left -= compared + len(one.words) * (1 + 2 * len(pairs))
            if left < 0:
                break
            for place, counterpart in pairs:
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


def _replacements(
    one: tuple[str, ...], other: tuple[str, ...]
) -> tuple[list[tuple[int, int]], int]:
    """Return indices (in `one`, in `other`) of words that replace each other, first to last, and
    the number of words compared. None replace each other where too many would be compared."""
    # Either walk below aligns the shared beginning and end to itself, so both are left out. Most
    # pairs then differ in a word or two.
    start, end = 0, len(one)
    while start < end and one[start] == other[start]:
        start += 1
    while end > start and one[end - 1] == other[end - 1]:
        end -= 1
    if end - start == 1:
        return [(start, start)], 0
    left, right = one[start:end], other[start:end]
    band, compared = 4, 0
    while len(left) * (band + 1) <= _PAIR_WORDS:
        # What costs at most `band` edits strays at most so far from the diagonal. So what is found
        # is what the whole table of costs would show.
        costs = _costs(left, right, band)
        compared += len(left) * (2 * band + 1)
        if costs[-1][band + 1] <= band:
            # Either direction breaks ties its own way, so the two may find different words, as
            # published.
            forth = _replaced(left, right, costs, band)
            back = _replaced(right, left, _costs(right, left, band), band)
            pairs = zip(forth, back, strict=False)
            return [(start + place, start + counterpart) for place, counterpart in pairs], compared
        band *= 2
    return [], compared


def _costs(words: Sequence[str], target: Sequence[str], band: int) -> list[list[int]]:
    """Return the edits between beginnings of two sentences of equal length.

    The edits between `i` words and `j` words of the target are in row i, column j - i + band + 1.
    """
    size = len(target)
    costs = [[_FAR] * (band + 1) + list(range(band + 1)) + [_FAR]]
    for i, word in enumerate(words, 1):
        above, row = costs[-1], [_FAR] * (2 * band + 3)
        if i <= band:
            row[band + 1 - i] = i
        for j in range(max(1, i - band), min(size, i + band) + 1):
            at = j - i + band + 1
            row[at] = (
                above[at]
                if word == target[j - 1]
                else 1 + min(row[at - 1], above[at + 1], above[at])
            )
        costs.append(row)
    return costs


def _replaced(
    words: Sequence[str], target: Sequence[str], costs: list[list[int]], band: int
) -> list[int]:
    """Return the indices in `words` of what a shortest edit to `target` replaces.

    Of equally short edits: words that agree are kept before anything else, then, from the end, a
    word of the target is put in before one of `words` is left out before one is replaced.
    """
    found = []
    i, j = len(words), len(target)
    while i and j:
        if words[i - 1] == target[j - 1]:
            i, j = i - 1, j - 1
            continue
        at = j - i + band + 1
        inserted, removed, replaced = costs[i][at - 1], costs[i - 1][at + 1], costs[i - 1][at]
        if inserted <= min(removed, replaced):
            j -= 1
        elif removed <= replaced:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found.append(i)
    return found[::-1]
