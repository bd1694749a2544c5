"""Scores of a known sentence under the search's own rules, without searching.

A search error is a sentence whose truth scores better than the answer. Its score is that of the
best path through its words, each in any of its pronunciations, with a silence after each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from lm_server.hypothesis import Hypothesis
from lm_server.lexicon.pronunciations import Pronunciation
from lm_server.protocol import LM_CLASSES
from lm_server.search.emissions import BLANK_ID, SILENCE_ID, Emissions
from lm_server.search.flashlight import LanguageModel
from lm_server.settings import Settings

Known = Mapping[str, tuple[int, tuple[Pronunciation, ...]]]
"""Words of a model folder with index and pronunciations, `lm_server.lm.reader.find_words`."""
_IDS = {name: index for index, name in enumerate(LM_CLASSES)}
_LOG10 = math.log(10.0)


def forced(
    model: LanguageModel, known: Known, settings: Settings, logits: np.ndarray, words: Sequence[str]
) -> Hypothesis | None:
    """Return a sentence with the scores of its best path. None if the frames cannot spell it.

    Args:
      model: a model folder in memory.
      known: at least the sentence's words.
      settings: of the search.
      logits: [frames, 41] in the language model's order.
      words: the sentence.
    """
    emissions = Emissions(settings)
    emissions.begin(settings)
    rows = emissions.of(logits)
    scaled = best_path(rows, _spelled(known, words)) + emissions.skipped
    if not math.isfinite(scaled):
        return None
    state, log10 = model.ngram.start(False), 0.0
    for word in words:
        state, score = model.ngram.score(state, known[word][0])
        log10 += score
    ngram = (log10 + model.ngram.finish(state)[1]) * _LOG10
    bonus = settings.word_bonus * len(words)
    acoustic = scaled / settings.acoustic_scale
    return Hypothesis(tuple(words), acoustic, ngram, bonus=bonus, total=scaled + ngram + bonus)


def aligned(
    known: Known, settings: Settings, logits: np.ndarray, words: Sequence[str]
) -> np.ndarray | None:
    """Return the class of every frame on a sentence's best path, int64 [frames].

    None if the frames cannot spell the sentence. See `forced`.
    """
    settings = dataclasses.replace(settings, ctc_blank_skip_threshold=1.0)
    emissions = Emissions(settings)
    emissions.begin(settings)
    classes: list[int] = []
    score = best_path(emissions.of(logits), _spelled(known, words), classes)
    return np.array(classes) if math.isfinite(score) else None


def _spelled(known: Known, words: Sequence[str]) -> list[list[list[int]]]:
    return [[[_IDS[phone] for phone in phones] for phones in known[word][1]] for word in words]


def best_path(
    emissions: np.ndarray,
    spellings: Sequence[Sequence[Sequence[int]]],
    classes: list[int] | None = None,
) -> float:
    """Return the score (ln) of the best CTC path that spells words, -inf if there is none.

    Args:
      emissions: [frames, 41].
      spellings: for each word, its pronunciations as classes, without the silence after it.
      classes: if given and there is a path, the class of each of its frames is added to it.
    """
    # A column of -1 is a pause: blanks and silences after a silence, or before the first word.
    columns: list[int] = [-1]
    before: list[list[int]] = [[0]]
    starts, pauses, ends = [0], [0], [0]

    def add(column: int, predecessors: Sequence[int]) -> int:
        columns.append(column)
        before.append([len(columns) - 1, *predecessors])
        return len(columns) - 1

    for number, pronunciations in enumerate(spellings):
        silences, ends = [], []
        for phones in pronunciations:
            last = pauses
            for place, phone in enumerate(phones):
                # A phoneme that follows itself needs a blank between.
                twice = place > 0 and phones[place - 1] == phone
                at = add(phone, last[1:] if twice else last)
                starts += [at] if number == place == 0 else []
                last = [at, add(BLANK_ID, [at])]
            silences.append(add(SILENCE_ID, last))
            # Without its first frame's self-loop: later silences are a pause.
            before[-1] = before[-1][1:]
            ends += [*last, silences[-1]]
        pauses = [*silences, add(-1, silences)]
        ends.append(pauses[-1])
    if not len(emissions):
        return -math.inf
    of_pause = np.maximum(emissions[:, SILENCE_ID], emissions[:, BLANK_ID])
    rows = np.concatenate([emissions, of_pause[:, None]], axis=1)[:, columns]
    # The last state is none: what pads lists of predecessors.
    width = max(map(len, before))
    predecessors = np.array([[*some, *[len(columns)] * (width - len(some))] for some in before])
    scores = np.full(len(columns) + 1, -np.inf)
    scores[starts] = rows[0, starts]
    states = np.arange(len(columns))
    came: list[np.ndarray] = []
    for row in rows[1:]:
        so_far = scores[predecessors]
        chosen = so_far.argmax(axis=1)
        came.append(predecessors[states, chosen])
        scores[:-1] = so_far[states, chosen] + row
    end = max(ends, key=lambda state: float(scores[state]))
    best = float(scores[end])
    if classes is not None and math.isfinite(best):
        path = [end]
        for sources in reversed(came):
            path.append(int(sources[path[-1]]))
        silent = emissions[:, SILENCE_ID] > emissions[:, BLANK_ID]
        for state, is_silence in zip(reversed(path), silent.tolist(), strict=True):
            pause = SILENCE_ID if is_silence else BLANK_ID
            classes.append(pause if columns[state] < 0 else columns[state])
    return best
