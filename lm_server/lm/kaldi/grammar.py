"""Converts Kaldi's grammars (`G.fst`, made by arpa2fst) to back-off n-gram models.

A state is a history. Its arcs are the words seen after it, its arc `#0` leads to the history
without its first word, and its final weight is that of the sentence end. The file does not name the
words of a history. They follow from the arcs: an arc of w from the history h leads to the longest
history that is a suffix of h w. So the shortest h w that leads to a state is its history. A
breadth-first search from the empty history finds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_server.lexicon.text import open_text
from lm_server.lm.arpa import NEVER, Model, ModelError, NGrams
from lm_server.lm.kaldi.openfst import Fst
from lm_server.lm.sorted_ngrams import BEGIN, END, UNKNOWN

_LN10 = np.log(10.0)
BACKOFF = "#0"
_EPSILON = 0
_NUMBER = re.compile("[0-9]{1,8}")
_ROUNDING = 1e-4
"""By how much (ln) the weight of an arc may be below 0, the probability 1."""


def read_symbols(path: Path) -> dict[str, int]:
    """Read `words.txt`, which has a word and its number on each line.

    Raises:
      ModelError: the file is missing or is not text, or a line is malformed.
    """
    found: dict[str, int] = {}
    with open_text(path, ModelError, "symbol", "the grammar's words and their numbers") as (
        lines,
        _,
    ):
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) != 2 or not _NUMBER.fullmatch(fields[1]):
                raise ModelError(
                    f"{path}, line {number}, is {line.rstrip()[:80]!r}; needed a word and its "
                    "number, of at most 8 digits"
                )
            found[fields[0]] = int(fields[1])
    if not found:
        raise ModelError(f"{path} is empty; needed the grammar's words and their numbers")
    return found


def to_model(fst: Fst, symbols: Mapping[str, int]) -> Model:
    """Convert a grammar to n-grams.

    Args:
      fst: a grammar of arpa2fst, const or vector, with states in any order. Arcs to shorter
        histories have the label `#0`, or none as older versions write them.
      symbols: words and their numbers, with `#0`.

    Raises:
      ModelError: the transducer is not such a grammar.
    """
    unknown = (fst.label < 0) | (fst.label > max(symbols.values()))
    if unknown.any():
        raise ModelError(
            f"the grammar has the word {int(fst.label[unknown][0])}, which words.txt lacks"
        )
    words = _names(fst, symbols)
    begin, end = words.index(BEGIN), words.index(END)
    number = np.full(max(symbols.values()) + 1, -1, np.int64)
    rank = {word: index for index, word in enumerate(words)}
    for word, label in symbols.items():
        if word in rank:
            number[label] = rank[word]
    labels = {symbols.get(BACKOFF, _EPSILON), _EPSILON}
    is_backoff = np.isin(fst.label, list(labels))
    _check_weights(fst, is_backoff)
    root = _root(fst, is_backoff)
    start = _after_begin(fst, is_backoff, number, begin)
    word = number[fst.label]
    if (word[~is_backoff] < 0).any():
        unnamed = int(fst.label[~is_backoff][word[~is_backoff] < 0][0])
        raise ModelError(f"the grammar has the word {unnamed}, which words.txt lacks")
    sources = fst.source[is_backoff]
    if len(np.unique(sources)) != len(sources):
        raise ModelError(
            "the grammar has states with two arcs to shorter histories: not a G.fst of arpa2fst"
        )
    followed = np.flatnonzero(~is_backoff & (word != begin) & (word != end))
    histories = _histories(fst, followed, word, root, start, begin)
    reached = sum(len(level.states) for level in histories)
    leaving = np.unique(fst.source)
    found = np.concatenate([level.states for level in histories])
    lost = np.setdiff1d(leaving, np.append(found, fst.start))
    if len(lost):
        raise ModelError(
            f"{len(lost)} of the grammar's {len(fst.final)} states cannot be reached by words "
            f"({reached} can): not a G.fst that arpa2fst made"
        )
    return Model(words, _collect(fst, is_backoff, word, histories, words))


def _check_weights(fst: Fst, is_backoff: np.ndarray) -> None:
    """Refuse weights that are no numbers, and words with a probability above 1."""
    probable = np.concatenate([fst.weight[~is_backoff], fst.final[fst.final != np.inf]])
    weights = fst.weight[is_backoff]
    # Written so that NaN is refused too.
    bad = probable[~((probable >= -_ROUNDING) & (probable < np.inf))].tolist()
    bad += weights[~np.isfinite(weights)].tolist()
    if bad:
        raise ModelError(
            f"the grammar has {len(bad)} weights that are no -ln of a probability, the first "
            f"{bad[0]:g}; needed numbers from 0: it is damaged, or not a G.fst of arpa2fst"
        )


def _names(fst: Fst, symbols: Mapping[str, int]) -> list[str]:
    """Return the model's words: <unk>, <s>, </s> and those of the grammar."""
    used = set(np.unique(fst.label).tolist())
    special = {UNKNOWN, BEGIN, END, BACKOFF}
    names = [w for w, label in symbols.items() if label in used and label and w not in special]
    return [UNKNOWN, BEGIN, END, *names]


def _root(fst: Fst, is_backoff: np.ndarray) -> int:
    """Return the state of the empty history: the only back-off target without a back-off arc."""
    shortens = np.zeros(len(fst.final), bool)
    shortens[fst.source[is_backoff]] = True
    candidates = np.unique(fst.target[is_backoff])
    candidates = candidates[~shortens[candidates]]
    if not is_backoff.any():
        candidates = np.unique(fst.source)  # a model of order 1 has one state with arcs
    if len(candidates) != 1:
        raise ModelError(
            f"the grammar has {len(candidates)} states that could be the empty history; needed one:"
            " is this a G.fst that arpa2fst made, and are words.txt and it of one model?"
        )
    return int(candidates[0])


def _after_begin(fst: Fst, is_backoff: np.ndarray, number: np.ndarray, begin: int) -> int:
    """Return the state of the history <s>: the start, or the target of its only arc, <s>."""
    leaving = np.flatnonzero((fst.source == fst.start) & ~is_backoff)
    if len(leaving) == 1 and number[fst.label[leaving[0]]] == begin:
        return int(fst.target[leaving[0]])
    return fst.start


@dataclass(frozen=True)
class _Histories:
    """States whose histories have one length.

    Attributes:
      states: int64 [N], ascending.
      words: int64 [N, length].
      arcs: int64 [N], the arc of each history's last word. -1 for <s>, which has none.
    """

    states: np.ndarray
    words: np.ndarray
    arcs: np.ndarray


def _histories(
    fst: Fst, arcs: np.ndarray, word: np.ndarray, root: int, start: int, begin: int
) -> list[_Histories]:
    """Return the states and their histories, per length from 0.

    `arcs` are those of words that others may follow.
    """
    known = np.zeros(len(fst.final), bool)
    known[root] = True
    levels = [_Histories(np.array([root]), np.zeros((1, 0), np.int64), np.array([-1]))]
    first = np.searchsorted(fst.source[arcs], np.arange(len(fst.final) + 1))
    while len(levels[-1].states):
        level = levels[-1]
        counts = first[level.states + 1] - first[level.states]
        rows = np.repeat(np.arange(len(level.states)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        taken = arcs[first[level.states][rows] + within]
        new = ~known[fst.target[taken]]
        rows, taken = rows[new], taken[new]
        states, where = np.unique(fst.target[taken], return_index=True)
        words = np.column_stack([level.words[rows[where]], word[taken[where]]])
        made = taken[where]
        if len(levels) == 1 and not known[start]:
            others = states != start
            states = np.concatenate([states[others], [start]])
            words = np.vstack([words[others], [[begin]]])
            made = np.concatenate([made[others], [-1]])
            order = np.argsort(states)
            states, words, made = states[order], words[order], made[order]
        known[states] = True
        levels.append(_Histories(states, words, made))
    return levels[:-1]


def _collect(
    fst: Fst,
    is_backoff: np.ndarray,
    word: np.ndarray,
    histories: Sequence[_Histories],
    words: Sequence[str],
) -> list[NGrams]:
    """Return the n-grams of every order: one per arc of a word, and one per final state."""
    begin, end = words.index(BEGIN), words.index(END)
    weight = np.zeros(len(fst.final), np.float32)
    weight[fst.source[is_backoff]] = fst.weight[is_backoff]
    arcs_of_words = ~is_backoff & (word != begin)
    orders: list[NGrams] = []
    for length, level in enumerate(histories):
        row_of = np.full(len(fst.final), -1, np.int64)
        row_of[level.states] = np.arange(len(level.states))
        arcs = np.flatnonzero(arcs_of_words & (row_of[fst.source] >= 0))
        ends = np.flatnonzero(np.isfinite(fst.final[level.states]))
        history = level.words[np.concatenate([row_of[fst.source[arcs]], ends])]
        last = np.concatenate([word[arcs], np.full(len(ends), end)])
        costs = np.concatenate([fst.weight[arcs], fst.final[level.states[ends]]])
        rows = np.column_stack([history, last]).astype(np.int32)
        log10 = np.minimum(-costs / _LN10, 0.0).astype(np.float32)
        backoff = np.zeros(len(rows), np.float32)
        # An n-gram that is a history has the back-off weight of the history's state.
        made = np.zeros(0, np.int64)
        if length + 1 < len(histories):
            longer = histories[length + 1]
            made = np.searchsorted(arcs, longer.arcs[longer.arcs >= 0])
            backoff[made] = -weight[longer.states[longer.arcs >= 0]] / _LN10
        if length == 0:
            every = len(words)
            by_word = np.full(every, NEVER, np.float32), np.zeros(every, np.float32)
            by_word[0][rows[:, 0]], by_word[1][rows[:, 0]] = log10, backoff
            if len(histories) > 1:
                start = histories[1].states[histories[1].arcs < 0]
                by_word[1][begin] = -weight[start[0]] / _LN10 if len(start) else 0.0
            orders.append(NGrams(np.arange(every, dtype=np.int32)[:, None], *by_word))
        else:
            orders.append(NGrams(rows, log10, backoff))
    while len(orders) > 1 and not len(orders[-1].words):
        orders.pop()
    return orders
