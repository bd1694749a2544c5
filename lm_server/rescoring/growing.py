"""Scores of sentences that grow: what a causal language model has read of them is read once.

All hypotheses of one search stand in one cache of keys and values as a tree of tokens, in which a
token sees its own ancestors alone. New words are appended to it, so that nothing is moved or read
again. A last token is read only when words follow it, since its own score needs what is before it
alone.

The finished sentences of the search begin like its unfinished ones. So their rescoring finds most
of its work done, and reads little more than last words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from lm_server.rescoring.scorer import RescoringError

if TYPE_CHECKING:
    from lm_server.rescoring.causal_lm import CausalLM

_MOST_BYTES = 100_000_000
"""Bytes of next tokens' probabilities that a search keeps (500 tokens of a vocabulary of 50,000)
before it forgets the hypotheses that are gone."""


@dataclass(slots=True, eq=False)
class _Token:
    """A token behind its parents.

    Attributes:
      token: its id.
      depth: tokens before it.
      parent: the token before it.
      total: log-probability (ln) of the text up to it.
      sees: places in the cache of the tokens before it and its own, once it is read.
      following: log-probabilities (ln) of the next token [vocab], once it is read.
    """

    token: int
    depth: int
    parent: _Token | None
    total: float | None = None
    sees: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    following: torch.Tensor | None = None
    children: dict[int, _Token] = field(default_factory=dict)


class GrowingScores:
    """Log-probabilities of the unfinished sentences of one search."""

    def __init__(self, model: CausalLM) -> None:
        """Begin with nothing read."""
        self._model = model
        self._alive = 0
        self._forget()

    def _forget(self) -> None:
        self._cache = self._model.new_cache()
        self._read = 0
        self._root = _Token(-1, -1, None)

    def score(self, sentences: Sequence[str], length_penalty: float = 0.0) -> np.ndarray:
        """Return log-probabilities (ln) of beginnings of sentences, float64 [sentences].

        They are those of `CausalLM.score` without an ending.

        Raises:
          RescoringError: a sentence has too many tokens, or the memory is too small.
        """
        sequences = self._model.tokens(sentences, ending="")
        totals = self.of_tokens(sequences)
        self._model.remember(self)
        return np.array(totals, np.float64) - length_penalty * np.array([*map(len, sequences)])

    def known(self, sequence: Sequence[int]) -> int:
        """Return how many of the first tokens have been read."""
        last, count = self._root, 0
        for token in sequence:
            child = last.children.get(token)
            if child is None or child.following is None:
                break
            last, count = child, count + 1
        return count

    def of_tokens(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return the log-probability (ln) of every sequence, of its tokens from the second on.

        Raises:
          RescoringError: the memory is too small.
        """
        with self._model.lock, torch.inference_mode():
            most = _MOST_BYTES // (4 * self._model.vocabulary)
            if self._read > max(most, 2 * self._alive):
                self._forget()
            fresh = not self._read
            while True:
                paths = [self._path(one) for one in sequences]
                try:
                    self._read_new(paths)
                    break
                except (MemoryError, RuntimeError) as error:
                    # The cache may hold half a batch.
                    self._forget()
                    fresh = True
                    self._model.shrink_batches(error)
            if fresh:
                self._alive = self._read
            return [self._total(path) for path in paths]

    def _path(self, sequence: Sequence[int]) -> list[_Token]:
        path, last = [], self._root
        for depth, token in enumerate(sequence):
            if token not in last.children:
                last.children[token] = _Token(token, depth, last)
            last = last.children[token]
            path.append(last)
        return path

    def _read_new(self, paths: Sequence[Sequence[_Token]]) -> None:
        """Let the model read what words follow and what it has not read, parents first."""
        new = {id(one): one for path in paths for one in path[:-1] if one.following is None}
        tokens = sorted(new.values(), key=lambda one: one.depth)
        size = self._model.tokens_per_batch
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            sees = np.zeros((len(part), self._read + len(part)), bool)
            for row, one in enumerate(part):
                assert one.parent is not None
                one.sees = np.append(one.parent.sees, self._read + row)
                sees[row, one.sees] = True
            logits = self._model.read(
                np.array([one.token for one in part]),
                np.array([one.depth for one in part]),
                sees,
                self._cache,
            )
            self._read += len(part)
            for one, following in zip(part, torch.log_softmax(logits.float(), -1), strict=True):
                one.following = following

    @staticmethod
    def _total(path: Sequence[_Token]) -> float:
        """Return the score of the last token's text: of its tokens from the second on."""
        total = 0.0
        for one in path:
            if one.total is None:
                before = one.parent.following if one.parent is not None else None
                one.total = total if before is None else total + float(before[one.token])
            total = one.total
        return total


def growing(model: CausalLM) -> GrowingScores:
    """Return scores for one search.

    Raises:
      RescoringError: the model cannot read trees of tokens.
    """
    if not model.trees:
        raise RescoringError(
            f"{model.name} cannot be asked during the search, since it does not accept positions "
            "and masks of its own: leave --fuse out, or use another model"
        )
    return GrowingScores(model)
