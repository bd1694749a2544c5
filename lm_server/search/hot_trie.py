"""Hot words of one search inside the pronunciation trie that all searches share.

A hot word begins with a class of emissions that only its own search has: a copy of its first
phoneme's. It ends in another: a copy of silence's plus the word's weight. The nodes between are
reachable through the first alone, so other searches never enter them. Every node stores the best
1-gram score and weight below it, so that a hot word is not pruned before it ends.
"""

from __future__ import annotations

import heapq
import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lm_server.protocol import CLASS_COUNT, LM_CLASSES
from lm_server.search.emissions import SILENCE_ID
from lm_server.search.hot_words import MAX_HOT_WORDS, HotWord, HotWordError

if TYPE_CHECKING:
    from flashlight.lib.text.decoder import LM, Trie

_IDS = {name: index for index, name in enumerate(LM_CLASSES)}
_LOG10 = math.log(10.0)
SPARE_WORDS = 4 * MAX_HOT_WORDS
"""Hot words outside the vocabulary that all searches of a model together can have."""
MAX_CLASSES = 1 << 16
"""Classes of emissions that all searches of a model together can have."""


class Numbers:
    """Whole numbers from `first` to `first + count - 1`, acquired least first and released."""

    def __init__(self, first: int, count: int) -> None:
        self._free = list(range(first, first + count))

    def acquire(self) -> int:
        """Return the least free number.

        Raises:
          HotWordError: none is free.
        """
        if not self._free:
            raise HotWordError(
                "all clients together have too many hot words: use fewer, or put lasting ones "
                "into the model with `lm-server build --lexicon`"
            )
        return heapq.heappop(self._free)

    def release(self, number: int) -> None:
        """Make a number free again."""
        heapq.heappush(self._free, number)


def spell(trie: Trie, spelling: list[int], words: list[int], log10: float) -> None:
    """Add homophones, likeliest first. `log10` is the 1-gram score of the likeliest.

    The library's own insertion keeps six words a node, but its search accepts any number.
    """
    node = trie.insert(spelling, words[0], log10)
    if len(words) > 1:
        node.labels = words
        node.scores = [log10] * len(words)


class HotTrie:
    """Reference-counted hot words, removed when the last search releases them.

    Attributes:
      words: index -> spelling of the hot words outside the vocabulary.
      sources: own class -> class whose emission it copies.
      weights: own class -> number added to its emission (ln): the hot word's weight for an ending,
        else 0.
    """

    def __init__(
        self,
        trie: Trie,
        ngram: LM,
        classes: Numbers,
        spare: Numbers,
        hot_words: Mapping[str, HotWord],
        indices: Mapping[str, int],
    ) -> None:
        """Insert the words. `indices` has those that are in the vocabulary.

        Raises:
          HotWordError: all clients together have too many.
        """
        self._trie, self._classes, self._spare = trie, classes, spare
        self.words: dict[int, str] = {}
        self.sources: dict[int, int] = {}
        self.weights: dict[int, float] = {}
        self._entrances: list[int] = []
        # Its arguments must not refer to this object, or it would never be collected.
        remove = weakref.finalize(
            self, _remove, trie, classes, spare, self._entrances, self.sources, self.words
        )
        try:
            self._insert(ngram, hot_words, indices)
        except HotWordError:
            remove()
            raise

    def _insert(
        self, ngram: LM, hot_words: Mapping[str, HotWord], indices: Mapping[str, int]
    ) -> None:
        start = ngram.start(True)
        entrances: dict[int, int] = {}
        endings: dict[float, int] = {}
        spellings: dict[tuple[int, ...], list[int]] = defaultdict(list)
        best: dict[tuple[int, ...], float] = {}
        for word, hot in hot_words.items():
            index = indices.get(word)
            if index is None:
                index = self._spare.acquire()
                self.words[index] = word
            if hot.weight not in endings:
                endings[hot.weight] = self._own(SILENCE_ID, hot.weight)
            log10 = ngram.score(start, index)[1]
            for phones in hot.pronunciations:
                first, *rest = (_IDS[phone] for phone in phones)
                if first not in entrances:
                    entrances[first] = self._own(first, 0.0)
                    self._entrances.append(entrances[first])
                # A phoneme that occurs twice needs one class, so that CTC demands a blank between.
                twice = len(list(itertools.takewhile(lambda other: other == first, rest)))  # noqa: B023
                spelling = (*[entrances[first]] * (1 + twice), *rest[twice:], endings[hot.weight])
                spellings[spelling].append(index)
                for length in range(1, len(spelling) + 1):
                    ahead = log10 + hot.weight / _LOG10
                    prefix = spelling[:length]
                    best[prefix] = max(best.get(prefix, -math.inf), ahead)
        for spelling, words in spellings.items():
            spell(self._trie, list(spelling), words, best[spelling])
        for prefix, ahead in best.items():
            self._trie.search(list(prefix)).max_score = ahead

    def _own(self, source: int, weight: float) -> int:
        number = self._classes.acquire()
        self.sources[number] = source
        self.weights[number] = weight
        return number

    @property
    def columns(self) -> int:
        """Number of columns of this search's emissions."""
        return max(self.sources, default=CLASS_COUNT - 1) + 1


def _remove(
    trie: Trie,
    classes: Numbers,
    spare: Numbers,
    entrances: list[int],
    sources: Mapping[int, int],
    words: Mapping[int, str],
) -> None:
    """Remove hot words from the trie and release their numbers."""
    root = trie.search([])
    children = root.children
    there = [one for one in entrances if children.pop(one, None) is not None]
    if there:
        root.children = children
    for one in sources:
        classes.release(one)
    for one in words:
        spare.release(one)
