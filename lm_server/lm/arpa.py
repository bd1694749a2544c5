"""Back-off n-gram models with their n-grams in any order: read from ARPA files, sorted for tries.

All probabilities are base-10 logarithms, as in ARPA and KenLM files.
"""

from __future__ import annotations

import array
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm_server.errors import UserError
from lm_server.lexicon.text import open_text
from lm_server.lm.sorted_ngrams import (
    BEGIN,
    END,
    UNKNOWN,
    SortedModel,
    SortedOrder,
    find_rows,
    in_order_of_ids,
    mark_contexts,
)

NEVER = -99.0
"""Stands for a probability of zero."""
DATA = "\\data\\"
"""The line with which an ARPA model begins."""
_COUNT = re.compile(r"ngram\s+(\d{1,2})\s*=\s*(\d{1,12})")
_LARGEST = 1000.0
"""Largest magnitude of a base-10 logarithm. float32 and KenLM hold far more, but no model means
it."""
_SHOWN = 80
"""Signs of a line that an error repeats."""


class ModelError(UserError, ValueError):
    """A model that cannot be built or read."""


@dataclass(frozen=True)
class NGrams:
    """All n-grams of one order.

    `words` [N, order] int32 holds indices into the model's word list, in spoken order. `log10` [N]
    float32 and `backoff` [N] float32 are base-10 logarithms. The highest order has back-offs of 0.
    """

    words: np.ndarray
    log10: np.ndarray
    backoff: np.ndarray


@dataclass(frozen=True)
class Model:
    """A back-off n-gram model: `words[0]` is `<unk>`. `orders[k]` holds the (k+1)-grams over
    indices into `words`."""

    words: Sequence[str]
    orders: Sequence[NGrams]


def read_arpa(path: Path, progress: Callable[[int], None] = lambda size: None) -> Model:
    """Read a back-off model in the ARPA format (plain, .gz or .xz). Add `<unk>` if it is absent.

    Args:
      path: the file.
      progress: called with the number of bytes (compressed) read since its last call.

    Raises:
      ModelError: the file is not in the format, or is cut short.
    """
    done = 0
    with open_text(path, ModelError, "ARPA", "an n-gram model in the ARPA format") as (
        lines,
        position,
    ):

        def show() -> None:
            nonlocal done
            progress(position() - done)
            done = position()

        model = _parse_arpa(path, iter(lines), show)
        show()
    return model


def _parse_arpa(path: Path, lines: Iterator[str], show: Callable[[], None]) -> Model:
    counts = _announced(path, lines)
    orders: list[NGrams] = []
    words: list[str] = [UNKNOWN]
    ids: dict[str, int] = {UNKNOWN: 0}
    # All loops share one iterator: each continues where the one before it stopped.
    for order in range(1, len(counts) + 1):
        grams = array.array("i")
        log10, backoff = array.array("f"), array.array("f")
        last = order == len(counts)
        following = "\\end\\" if last else f"\\{order + 1}-grams:"
        for number, line in enumerate(lines):
            if number % 65536 == 65535:
                show()
            fields = line.split()
            if not fields:
                continue
            if line.startswith("\\") and len(fields) == 1:
                if fields[0] != following:
                    raise ModelError(
                        f"{path} has {fields[0]} after its {order}-grams; needed {following}: "
                        "it is damaged, or its \\data\\ announces other orders"
                    )
                break
            if len(fields) not in (order + 1, order + 2):
                raise _fault(path, line, order, "not ARPA")
            if order == 1 and fields[1] not in ids:
                ids[fields[1]] = len(words)
                words.append(fields[1])
            try:
                log10.append(float(fields[0]))
                backoff.append(float(fields[order + 1]) if len(fields) == order + 2 else 0.0)
                grams.extend([ids[word] for word in fields[1 : order + 1]])
            except (ValueError, KeyError) as error:
                needed = "needed numbers, and words that are 1-grams too"
                raise _fault(path, line, order, f"{error}, {needed}") from error
            # Written so that NaN is refused too.
            if not -_LARGEST <= log10[-1] <= 0.0:
                needed = f"needed a log10 probability from -{_LARGEST:g} to 0, -99 for never"
                raise _fault(path, line, order, needed)
            if not abs(backoff[-1]) <= (0.0 if last else _LARGEST):
                needed = "none or 0, the order is the highest" if last else f"within {_LARGEST:g}"
                raise _fault(path, line, order, f"needed a log10 back-off weight, {needed}")
        rows = np.array(grams, np.int32).reshape(-1, order)
        if len(rows) != counts[order - 1]:
            raise ModelError(
                f"{path} has {len(rows)} {order}-grams but announces "
                f"{counts[order - 1]}: it is cut short"
            )
        if order == 1 and len(np.unique(rows)) != len(rows):
            twice = words[int(np.argmax(np.bincount(rows[:, 0])))]
            raise ModelError(f"{path} has the 1-gram {twice!r} twice; needed each once")
        orders.append(NGrams(rows, np.array(log10, np.float32), np.array(backoff, np.float32)))
    return Model(words, [_every_word(orders[0], len(words)), *orders[1:]])


def _announced(path: Path, lines: Iterator[str]) -> list[int]:
    """Read up to the first n-gram. Return the number of n-grams per order.

    What stands before the line `\\data\\`, such as a toolkit's explanations, is not read.
    """
    counts: list[int] = []
    if any(line.strip() == DATA for line in lines):
        for line in lines:
            if line.strip() == "\\1-grams:":
                break
            announced = _COUNT.fullmatch(line.strip())
            if announced and int(announced[1]) == len(counts) + 1:
                counts.append(int(announced[2]))
            elif line.strip():
                raise ModelError(
                    f"{path} has the line {line.strip()[:_SHOWN]!r} after {DATA}; needed "
                    f"`ngram {len(counts) + 1}=COUNT`: it is damaged, fetch it again"
                )
    if not counts:
        raise ModelError(f"{path} has no n-grams: not ARPA")
    return counts


def _fault(path: Path, line: str, order: int, reason: str) -> ModelError:
    return ModelError(
        f"{path} has the line {line.strip()[:_SHOWN]!r} among its {order}-grams: {reason}"
    )


def _every_word(unigrams: NGrams, words: int) -> NGrams:
    """Return one 1-gram per word, in the order of the words."""
    log10 = np.full(words, NEVER, np.float32)
    backoff = np.zeros(words, np.float32)
    log10[unigrams.words[:, 0]] = unigrams.log10
    backoff[unigrams.words[:, 0]] = unigrams.backoff
    return NGrams(np.arange(words, dtype=np.int32)[:, None], log10, backoff)


def without(model: Model, dropped: Sequence[int]) -> Model:
    """Remove some words (indices other than 0) and all n-grams that contain one of them."""
    kept = np.ones(len(model.words), bool)
    kept[list(dropped)] = False
    number = (np.cumsum(kept) - 1).astype(np.int32)
    orders = []
    for grams in model.orders:
        rows = np.flatnonzero(kept[grams.words].all(axis=1))
        orders.append(NGrams(number[grams.words[rows]], grams.log10[rows], grams.backoff[rows]))
    return Model([word for word, keep in zip(model.words, kept, strict=True) if keep], orders)


def sort_model(model: Model) -> SortedModel:
    """Sort the n-grams for a trie.

    A trie finds n-grams through their suffixes. A suffix that the model lacks, because it was
    pruned, is added with its back-off probability, as KenLM does.

    Raises:
      ModelError: `<s>` or `</s>` is missing, or the context of an n-gram.
    """
    missing = {BEGIN, END} - set(model.words)
    if missing:
        raise ModelError(f"the model lacks {' and '.join(sorted(missing))}: needed both")
    words = in_order_of_ids(model.words)
    rank = {word: number for number, word in enumerate(words)}
    ids = np.array([rank[word] for word in model.words], np.int64)
    by_order = [ids[grams.words] for grams in model.orders]
    added = _missing_suffixes(by_order, len(words))
    orders: list[SortedOrder] = []
    keys: list[np.ndarray] = []
    for level, grams in enumerate(model.orders):
        rows = np.concatenate([by_order[level], added[level]])
        fill = np.full(len(added[level]), np.nan, np.float32)
        log10 = np.concatenate([grams.log10, fill])
        backoff = np.concatenate([grams.backoff, np.zeros_like(fill)])
        parents = _rows_of(rows[:, 1:], keys, len(words))
        key = parents * len(words) + rows[:, 0]
        order = np.argsort(key, kind="stable")
        keys.append(key[order])
        if (keys[-1][1:] == keys[-1][:-1]).any():
            raise ModelError(f"the model has a {level + 1}-gram twice; needed each once")
        new = SortedOrder(
            rows[order, 0].astype(np.uint32), parents[order], log10[order], backoff[order]
        )
        if len(fill):
            blank = np.flatnonzero(np.isnan(new.log10))
            context = _rows_of(rows[order[blank], :-1], keys, len(words))
            # A context outside the model has the back-off weight 1.
            weight = np.where(context < 0, 0.0, orders[-1].backoff[context])
            new.log10[blank] = orders[-1].log10[new.parent[blank]] + weight
        orders.append(new)
    try:
        return mark_contexts(SortedModel(words, orders))
    except ValueError as error:
        raise ModelError(str(error)) from error


def _missing_suffixes(by_order: Sequence[np.ndarray], words: int) -> list[np.ndarray]:
    """Return, per order, the missing suffixes of longer n-grams: ids [N, order]."""
    added = [grams[:0] for grams in by_order]
    for level in range(len(by_order) - 1, 1, -1):
        longer = np.concatenate([by_order[level], added[level]])
        there = by_order[level - 1]
        everything = np.concatenate([there, longer[:, 1:]])
        # Number the distinct n-grams column by column, so that no key exceeds 64 bits.
        number = np.zeros(len(everything), np.int64)
        for column in range(everything.shape[1]):
            key = number * words + everything[:, column]
            number = np.unique(key, return_inverse=True)[1].reshape(-1)
        present = np.zeros(int(number.max()) + 1 if len(number) else 0, bool)
        present[number[: len(there)]] = True
        _, first = np.unique(number, return_index=True)
        added[level - 1] = everything[first[~present]]
    return added


def _rows_of(grams: np.ndarray, keys: Sequence[np.ndarray], words: int) -> np.ndarray:
    """Find n-grams, ids [N, k], among order k: rows [N], -1 if absent. Zeros for k = 0."""
    rows = np.zeros(len(grams), np.int64)
    for back in range(grams.shape[1]):
        wanted = rows * words + grams[:, -1 - back]
        rows = np.where(rows < 0, -1, find_rows(keys[back], np.where(rows < 0, -1, wanted)))
    return rows
