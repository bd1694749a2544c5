"""Puts one search's hot words into the pronunciation trie that all searches share, unseen by them.

A hot word begins with a class of emissions that only its own search has, a copy of its first
phoneme's, and ends in another, a copy of silence's plus the word's weight. The nodes between are
reached through the first alone: other searches never enter them. Every node looks ahead to the
best 1-gram score and weight below it, so that a wanted word is not dropped before it ends.
"""

from __future__ import annotations

import heapq
import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Mapping

from flashlight.lib.text.decoder import LM, Trie

from lm_server.protocol import CLASS_COUNT, LM_CLASSES
from lm_server.search.emissions import SILENCE_ID
from lm_server.search.hot_words import MAX_HOT_WORDS, HotWord, HotWordError

_IDS = {name: index for index, name in enumerate(LM_CLASSES)}
_LOG10 = math.log(10.0)
SPARE_WORDS = 4 * MAX_HOT_WORDS
"""Words outside the vocabulary that all searches of a model together can have as hot words."""
MAX_CLASSES = 1 << 16
"""Classes of emissions that all searches of a model together can have."""


class Numbers:
    """Hands out whole numbers from `first` up to `first + count`, the least free one first."""

    def __init__(self, first: int, count: int) -> None:
        self._free = list(range(first, first + count))

    def take(self) -> int:
        """A number that nobody has.

        Raises:
          HotWordError: there is none left.
        """
        if not self._free:
            raise HotWordError(
                "all clients together have too many hot words: use fewer, or put lasting ones "
                "into the model with `lm-server build --lexicon`"
            )
        return heapq.heappop(self._free)

    def give_back(self, number: int) -> None:
        """Lets others have it."""
        heapq.heappush(self._free, number)


def spell(trie: Trie, spelling: list[int], words: list[int], log10: float) -> None:
    """Adds words that are said alike, likeliest first; `log10` is the likeliest one's 1-gram score.

    The library's own insertion keeps six words a node; the search takes any number.
    """
    node = trie.insert(spelling, words[0], log10)
    if len(words) > 1:
        node.labels = words
        node.scores = [log10] * len(words)


class HotTrie:
    """The hot words of one search, or of several that want the same; out of the trie with the last.

    Attributes:
      words: spelling of the hot words outside the vocabulary, by their index.
      sources: the class whose emission each own class copies.
      weights: what is added to the emission of an own class (ln): the weight, for an ending.
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
        """Puts the words in; `indices` has those of the vocabulary among them.

        Raises:
          HotWordError: all clients together have too many.
        """
        self._trie, self._classes, self._spare = trie, classes, spare
        self.words: dict[int, str] = {}
        self.sources: dict[int, int] = {}
        self.weights: dict[int, float] = {}
        self._entrances: list[int] = []
        # With what must be taken out, and not with this object, whose end it waits for.
        take_out = weakref.finalize(
            self, _take_out, trie, classes, spare, self._entrances, self.sources, self.words
        )
        try:
            self._insert(ngram, hot_words, indices)
        except HotWordError:
            take_out()
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
                index = self._spare.take()
                self.words[index] = word
            if hot.weight not in endings:
                endings[hot.weight] = self._own(SILENCE_ID, hot.weight)
            log10 = ngram.score(start, index)[1]
            for phones in hot.pronunciations:
                first, *rest = (_IDS[phone] for phone in phones)
                if first not in entrances:
                    entrances[first] = self._own(first, 0.0)
                    self._entrances.append(entrances[first])
                # One class for a phoneme said twice, so that a blank must stand between.
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
        number = self._classes.take()
        self.sources[number] = source
        self.weights[number] = weight
        return number

    @property
    def columns(self) -> int:
        """Columns that this search's emissions need."""
        return max(self.sources, default=CLASS_COUNT - 1) + 1


def _take_out(
    trie: Trie,
    classes: Numbers,
    spare: Numbers,
    entrances: list[int],
    sources: Mapping[int, int],
    words: Mapping[int, str],
) -> None:
    """Takes hot words out of the trie and gives their numbers back; no search has them any more."""
    root = trie.search([])
    children = root.children
    there = [one for one in entrances if children.pop(one, None) is not None]
    if there:
        root.children = children
    for one in sources:
        classes.give_back(one)
    for one in words:
        spare.give_back(one)
