"""How do the width of the search and its stand-in for silences do on a trained model's logits?

    python benchmarks/spliced_logits.py --run runs/demo/run

Prints WER, n-best oracle, the share of wrong sentences that are search errors, and seconds per
sentence on logits of sentences that nobody attempted, spliced from those of a trained model.

Real softmax outputs have confusions, deletions and insertions of their own kind. The true labels of
a run's validation trials are aligned to their logits (CTC, best path), and the logits are cut
halfway between the frames of neighbouring labels. A new sentence takes for each of its labels one
piece of that label at random. The share of pieces that alone decode to something else sets the
phoneme error rate. A factor on the logits makes them sharper or softer.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from decoder import wer
from decoding import Words, best_of, decode, model_folder, parser_of
from rapidfuzz.distance import Levenshtein
from simulated_logits import greedy, held_out, label

import b2txt_jax
from lm_server.hypothesis import Hypothesis
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm.reader import find_words
from lm_server.protocol import CLASS_COUNT, LM_CLASSES, to_lm_order
from lm_server.search.flashlight import LanguageModel
from lm_server.search.forced import forced
from lm_server.settings import PRESETS, Settings

SEARCHES: dict[str, dict[str, float]] = {
    "before presets": dict(PRESETS["fast"]),
    **{name: dict(preset) for name, preset in PRESETS.items()},
    "accurate, every silence demanded": {"silence_penalty": 1000},
}
BEFORE = "before presets"
"""The search whose price of a missing silence shrank with the acoustic scale, as it once did."""
TASKS = ((1.0, 0.0), (2.5, 0.0), (2.5, 0.1))
"""Factors on the logits, and shares of silences left out."""


def align(log_probabilities: np.ndarray, labels: Sequence[int]) -> list[int]:
    """Return a frame of each label on the best path: the one where the label is likeliest.

    Raises:
      ValueError: there are too few frames.
    """
    states = np.zeros(2 * len(labels) + 1, int)
    states[1::2] = labels
    skips = np.zeros(len(states), bool)
    skips[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(len(states), -np.inf)
    score[:2] = log_probabilities[0, states[:2]]
    back = np.zeros((len(log_probabilities), len(states)), int)
    for frame in range(1, len(log_probabilities)):
        moved = np.stack([score, np.roll(score, 1), np.where(skips, np.roll(score, 2), -np.inf)])
        moved[1, 0] = moved[2, :2] = -np.inf
        back[frame] = moved.argmax(0)
        score = moved.max(0) + log_probabilities[frame, states]
    state = len(states) - 1 if score[-1] >= score[-2] else len(states) - 2
    if not np.isfinite(score[state]):
        raise ValueError(f"{len(log_probabilities)} frames cannot spell {len(labels)} labels")
    best: dict[int, int] = {}
    for frame in range(len(log_probabilities) - 1, -1, -1):
        place = state // 2
        if state % 2 and (
            place not in best
            or log_probabilities[frame, states[state]]
            > log_probabilities[best[place], states[state]]
        ):
            best[place] = frame
        state -= back[frame, state]
    return [best[place] for place in range(len(labels))]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces of logits [frames, 41] by label, those that decode to it alone and the others."""

    right: dict[int, list[np.ndarray]]
    wrong: dict[int, list[np.ndarray]]
    starts: list[np.ndarray]
    """What comes before a first label."""

    def share(self, label: int) -> float:
        """Return the share of wrong pieces of a label."""
        return len(self.wrong[label]) / (len(self.wrong[label]) + len(self.right[label]))


def cut(trials: Iterable[tuple[np.ndarray, Sequence[int]]]) -> Pieces:
    """Cut logits [frames, 41] in the language model's order into the pieces of their labels."""
    right: dict[int, list[np.ndarray]] = defaultdict(list)
    wrong: dict[int, list[np.ndarray]] = defaultdict(list)
    starts = []
    for logits, labels in trials:
        shifted = logits - logits.max(1, keepdims=True)
        frames = align(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), labels)
        borders = [0, *((one + other + 1) // 2 for one, other in itertools.pairwise(frames))]
        borders.append(len(logits))
        lead = max(frames[0] - 1, 0)
        starts.append(logits[:lead])
        borders[0] = lead
        for one, (first, end) in zip(labels, itertools.pairwise(borders), strict=True):
            piece = logits[first:end]
            (right if greedy(piece) == [one] else wrong)[one].append(piece)
    return Pieces(right, wrong, starts)


def splice(
    labels: Sequence[int], pieces: Pieces, factor: float, rng: np.random.Generator
) -> np.ndarray:
    """Return logits [frames, 41] of labels, with `factor` times the wrong pieces of the run."""
    found = [pieces.starts[rng.integers(len(pieces.starts))]]
    for one in labels:
        wrong = rng.random() < min(factor * pieces.share(one), 0.9)
        kind = pieces.wrong if wrong and pieces.wrong[one] else pieces.right
        some = kind[one] or pieces.wrong[one]
        if not some:
            raise ValueError(f"the run's trials have no {LM_CLASSES[one]}")
        found.append(some[rng.integers(len(some))])
    return np.concatenate(found)


def splice_at(
    labels: Sequence[Sequence[int]], pieces: Pieces, per: float, sharpness: float, seed: int
) -> tuple[list[np.ndarray], float]:
    """Splice logits with a phoneme error rate of greedy decoding near `per`.

    Return the logits of every sentence, times `sharpness`, and the rate reached.
    """
    low, high = 0.0, 10.0
    for _ in range(12):
        factor = (low + high) / 2
        rng = np.random.default_rng(seed)
        logits = [splice(ids, pieces, factor, rng) for ids in labels]
        errors = sum(
            Levenshtein.distance(greedy(x), list(ids))
            for x, ids in zip(logits, labels, strict=True)
        )
        reached = errors / sum(map(len, labels))
        low, high = (low, factor) if reached > per else (factor, high)
    return [(sharpness * one).astype(np.float32) for one in logits], reached


def pieces_of(run: Path) -> Pieces:
    """Return the pieces of a run's validation trials."""
    return cut(_trials(run))


def halves_of(run: Path) -> tuple[Pieces, Pieces]:
    """Return the pieces of either half of a run's validation trials.

    Labels that a half lacks have the pieces of both.
    """
    trials = _trials(run)
    whole, middle = cut(trials), len(trials) // 2
    halves = cut(trials[:middle]), cut(trials[middle:])
    for half in halves:
        for one in {*whole.right, *whole.wrong} - {*half.right, *half.wrong}:
            half.right[one], half.wrong[one] = whole.right[one], whole.wrong[one]
    return halves


def _trials(run: Path) -> list[tuple[np.ndarray, list[int]]]:
    order = to_lm_order(np.arange(CLASS_COUNT)[None])[0].tolist()
    return [
        (to_lm_order(trial.logits), [order.index(one) for one in trial.labels.tolist()])
        for trial in b2txt_jax.load_run(run).logits("val")
        if trial.labels is not None
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run")
    parser.add_argument("--sentences", type=int, default=100, help="sentences (default 100)")
    parser.add_argument("--per", type=float, default=0.104, help="greedy PER (default 0.104)")
    args = parser.parse_args()
    model = LanguageModel(model_folder(args))
    known, pieces = read_lexicon("cmudict").entries, pieces_of(args.run)
    dev = held_out(args.sentences // 2, args.seed, "val")
    test = held_out(args.sentences, args.seed, "test")

    known_words = find_words(model.folder, {word for one in test for word in one})

    def words_of(lists: Iterable[Sequence[Hypothesis]]) -> list[list[Words]]:
        return [[one.words for one in some] for some in lists]

    def search_errors(
        lists: Iterable[Sequence[Hypothesis]], logits: list[np.ndarray], settings: Settings
    ) -> float:
        """Return the share of wrong sentences whose truth has a better total than the answer."""
        wrong = lost = 0
        for words, one, some in zip(test, logits, lists, strict=True):
            truth = forced(model, known_words, settings, one, words)
            wrong += some[0].words != words
            lost += truth is not None and (truth.total or 0.0) > (some[0].total or 0.0) + 0.01
        return lost / max(wrong, 1)

    print("| search | " + " | ".join(f"x {x:g}, {y:.0%} left out" for x, y in TASKS) + " |")
    print("|---|" + "---|" * len(TASKS))
    for name, change in SEARCHES.items():
        cells = []
        for sharpness, dropped in TASKS:
            rng = np.random.default_rng(args.seed)
            logits, other = (
                splice_at(
                    [label(one, known, dropped, rng) for one in truth],
                    *(pieces, args.per, sharpness, args.seed),
                )[0]
                for truth in (dev, test)
            )
            tried = [
                dataclasses.replace(
                    Settings(silence_penalty=2.5 * scale / sharpness)
                    if name == BEFORE
                    else Settings(),
                    acoustic_scale=scale / sharpness,
                    blank_penalty=4.0,
                    **change,  # type: ignore[arg-type]
                )
                for scale in (0.8, 1.1, 1.5)
            ]
            reached = [
                wer(dev, words_of(decode(model, settings, logits)), False) for settings in tried
            ]
            tuned = tried[best_of(np.array(reached))[0]]
            began = time.process_time()
            lists = list(decode(model, tuned, other))
            seconds = (time.process_time() - began) / len(test)
            rates = [100 * wer(test, words_of(lists), oracle) for oracle in (False, True)]
            lost = search_errors(lists, other, tuned)
            cells.append(f"{rates[0]:.1f} / {rates[1]:.1f} %, {lost:.0%}, {seconds:.3f} s")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
