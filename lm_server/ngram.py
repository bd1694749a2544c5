"""Word n-gram models: training to ARPA (lmplz, else kaldingram), reading ARPA, the probability of
unseen words.

All probabilities inside a model are base-10 logarithms, as in ARPA and KenLM files.
"""

from __future__ import annotations

import array
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lm_server.errors import UserError
from lm_server.kenlm_trie import UNKNOWN, NGrams, TrieIndex

BEGIN, END = "<s>", "</s>"
OUTSIDE = "<outside>"
"""Stands in training text for words outside the lexicon, so that no n-gram reaches over them;
removed afterwards."""
MAX_ORDER = 5
_NEVER = -90.0
"""Trainers write about -99 for n-grams to which discounting leaves nothing."""


class ModelError(UserError, ValueError):
    """A model that cannot be built or read; says what was found, what was needed and what to do."""


@dataclass(frozen=True)
class Model:
    """A back-off n-gram model: `words[0]` is `<unk>`; `orders[k]` holds the (k+1)-grams over
    indices into `words`."""

    words: Sequence[str]
    orders: Sequence[NGrams]

    @property
    def counts(self) -> list[int]:
        """Number of n-grams per order."""
        return [len(grams.words) for grams in self.orders]


def trainer_name(order: int) -> str:
    """Which program trains a model of `order` on this machine: `lmplz`, `kaldingram` or, for order
    1, `counting`."""
    if order == 1:
        return "counting"
    return "lmplz" if shutil.which("lmplz") else "kaldingram"


def check_trainer(order: int) -> None:
    """Makes sure, before hours of reading, that there is a program to train with.

    Raises:
      ModelError: neither lmplz nor kaldingram is installed.
    """
    # It runs as a process of its own, so that nothing here would miss it.
    if trainer_name(order) == "kaldingram" and importlib.util.find_spec("kaldingram") is None:
        raise ModelError(
            f"neither lmplz nor kaldingram is installed, and a model of order {order} needs one "
            "of them; needed the server's packages: pip install 'b2txt-jax[lm]'"
        )


def train_arpa(text: Path, arpa: Path, order: int, tick: Callable[[], None] = lambda: None) -> str:
    """Trains a Kneser-Ney model of order 2-5 on `text` (one sentence of words per line) as a child
    process.

    Args:
      text: training text.
      arpa: file to write.
      order: length of the longest n-grams.
      tick: called about ten times per second while the training runs.

    Returns:
      The name of the program that trained it.

    Raises:
      ModelError: the program failed; the text holds its last lines.
    """
    trainer = trainer_name(order)
    if trainer == "lmplz":
        # Discounts cannot be estimated from very small texts; lmplz then wants to be told to fall
        # back.
        command = ["lmplz", "-o", str(order), "--text", str(text), "--arpa", str(arpa)]
        command += ["--discount_fallback", "-S", "40%", "-T", str(arpa.parent)]
    else:
        command = [sys.executable, "-m", "kaldingram.train", "--ngram-order", str(order)]
        command += ["--text", str(text), "--lm", str(arpa)]
    log = arpa.with_suffix(".log")
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
        try:
            while True:
                tick()
                try:
                    code = child.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if code != 0:
        last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
        raise ModelError(
            f"{trainer} could not train a model of order {order} (exit code {code}); "
            f"it said:\n{last}"
        )
    return trainer


def count_unigrams(sentences: Iterable[Sequence[str]]) -> Model:
    """A model of order 1 by relative frequency; `<s>` has a probability of nearly nothing, as in
    ARPA files.

    Raises:
      ModelError: there is no sentence.
    """
    counts: Counter[str] = Counter()
    for words in sentences:
        counts.update(words)
        counts[END] += 1
    counts.pop(OUTSIDE, None)
    total = counts.total()
    if not total:
        raise ModelError("the text has no sentence to count words in")
    words = [UNKNOWN, BEGIN, *counts]
    log10 = np.array([-99.0, -99.0, *np.log10(np.array(list(counts.values())) / total)], np.float32)
    return Model(
        words, [NGrams(np.arange(len(words), dtype=np.int32)[:, None], log10, np.zeros_like(log10))]
    )


def read_arpa(path: Path, progress: Callable[[int], None] = lambda lines: None) -> Model:
    """Reads a back-off model in the ARPA format; `<unk>` is added when it is absent.

    Raises:
      ModelError: the file is not in the format, or is cut short.
    """
    counts: list[int] = []
    orders: list[NGrams] = []
    words: list[str] = [UNKNOWN]
    ids: dict[str, int] = {UNKNOWN: 0}
    with path.open(encoding="latin-1") as lines:
        for line in lines:
            if line.startswith("ngram "):
                counts.append(int(line.split("=")[1]))
            elif line.startswith("\\1-grams:"):
                break
        for order in range(1, len(counts) + 1):
            grams = array.array("i")
            log10, backoff = array.array("f"), array.array("f")
            for number, line in enumerate(lines):
                if number % 65536 == 65535:
                    progress(65536)
                fields = line.split()
                if not fields:
                    continue
                if line.startswith("\\") and len(fields) == 1:
                    break
                if len(fields) not in (order + 1, order + 2):
                    raise ModelError(
                        f"{path} has the line {line.strip()!r} among its {order}-grams: not ARPA"
                    )
                log10.append(float(fields[0]))
                backoff.append(float(fields[order + 1]) if len(fields) == order + 2 else 0.0)
                if order == 1 and fields[1] not in ids:
                    ids[fields[1]] = len(words)
                    words.append(fields[1])
                grams.extend([ids[word] for word in fields[1 : order + 1]])
            rows = np.array(grams, np.int32).reshape(-1, order)
            if len(rows) != counts[order - 1]:
                raise ModelError(
                    f"{path} has {len(rows)} {order}-grams but announces "
                    f"{counts[order - 1]}: it is cut short"
                )
            orders.append(NGrams(rows, np.array(log10, np.float32), np.array(backoff, np.float32)))
    if not orders:
        raise ModelError(f"{path} has no n-grams: not ARPA")
    if 0 not in orders[0].words[:, 0]:
        orders[0] = NGrams(
            np.vstack([np.zeros((1, 1), np.int32), orders[0].words]),
            np.insert(orders[0].log10, 0, -99.0),
            np.insert(orders[0].backoff, 0, 0.0),
        )
    by_word = np.argsort(orders[0].words[:, 0], kind="stable")
    orders[0] = _select(orders[0], by_word)
    return Model(words, orders)


def without_outside(model: Model) -> Model:
    """The model without the n-grams that hold `OUTSIDE`."""
    if OUTSIDE not in model.words:
        return model
    outside = list(model.words).index(OUTSIDE)
    orders = []
    for grams in model.orders:
        kept = _select(grams, np.flatnonzero(~(grams.words == outside).any(axis=1)))
        renumbered = kept.words - (kept.words > outside)
        orders.append(replace(kept, words=renumbered.astype(np.int32)))
    return Model([word for word in model.words if word != OUTSIDE], orders)


def repair_zeros(model: Model) -> Model:
    """Gives n-grams of order 2 and more that a trainer left with no probability what backing off
    gives them.

    On small texts unmodified Kneser-Ney discounts n-grams seen once to zero; KenLM would take that
    zero at its word.
    """
    index = TrieIndex(model.orders, np.arange(len(model.words)))
    orders = [model.orders[0]]
    for level in range(1, len(model.orders)):
        grams = model.orders[level]
        zero = np.flatnonzero(grams.log10 < _NEVER)
        if len(zero):
            lower = orders[level - 1]
            rows = index.order_of_rows[level - 1]
            suffix = rows[index.find(grams.words[zero, 1:])]
            context = rows[index.find(grams.words[zero, :-1])]
            log10 = grams.log10.copy()
            log10[zero] = lower.log10[suffix] + lower.backoff[context]
            grams = replace(grams, log10=log10)
        orders.append(grams)
    return Model(model.words, orders)


def spread_unseen(model: Model, counts: Counter[str], unseen: int) -> Model:
    """Sets the probability of `<unk>` to that of one word that the text does not have, and scales
    the others.

    Good and Turing: the next word is a new one with probability (words seen once) / (words in all).
    It is shared equally by the `unseen` words of the lexicon, and one of them is never likelier
    than the rarest word seen. Without this, a word that the text lacks could not be recognised, or
    would be too cheap.

    Args:
      model: a model over the words seen.
      counts: how often the text has each word of the lexicon.
      unseen: number of words in the lexicon that the text lacks.
    """
    unigrams = model.orders[0]
    special = np.isin(
        np.arange(len(model.words)), [0, *(i for i, w in enumerate(model.words) if w == BEGIN)]
    )
    seen = 10.0 ** unigrams.log10.astype(np.float64)
    seen[special] = 0.0
    seen /= seen.sum()
    once = sum(1 for count in counts.values() if count == 1)
    new = max(once, 1) / (counts.total() + 1)
    each = min(new / max(unseen, 1), seen[~special].min())
    with np.errstate(divide="ignore"):
        log10 = np.log10(seen * (1.0 - each * unseen))
    log10[special] = -99.0
    log10[0] = np.log10(each)
    return Model(
        model.words, [replace(unigrams, log10=log10.astype(np.float32)), *model.orders[1:]]
    )


def _select(grams: NGrams, rows: np.ndarray) -> NGrams:
    return NGrams(grams.words[rows], grams.log10[rows], grams.backoff[rows])
