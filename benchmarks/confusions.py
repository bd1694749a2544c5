"""Do a model's known confusions, or a floor under its classes, lower the word error rate?

    python benchmarks/confusions.py --run runs/demo/run

Learns from the greedy phonemes of spliced development sentences (`spliced_logits`) how often each
class stands for another, and mixes the posteriors of test sentences with it: (1 - share) * p +
share * p @ confusion, then (1 - floor) * p + floor / 41. Prints WER and n-best oracle of test
sentences for each share and floor. The acoustic scale is chosen on the development sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from decoder import wer
from decoding import decode, model_folder, parser_of
from rapidfuzz.distance import Levenshtein
from simulated_logits import greedy, held_out, label
from spliced_logits import pieces_of, splice_at

from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.protocol import CLASS_COUNT
from lm_server.search.load import load_model
from lm_server.settings import Settings

MIXTURES = ((0.0, 0.0), (0.1, 0.0), (0.5, 0.0), (0.0, 1e-3), (0.0, 1e-2))
"""Shares of the confusion, and floors."""
SCALES = (0.3, 0.45, 0.7, 1.0, 1.5)
"""Acoustic scales to choose from. What is mixed is softer, and needs a larger one."""


def confusion(logits: Sequence[np.ndarray], labels: Sequence[Sequence[int]]) -> np.ndarray:
    """Return P(true class | greedy class), [41, 41]. The blank stands for itself."""
    counts = 1e-9 * np.eye(CLASS_COUNT)
    for one, truth in zip(logits, labels, strict=True):
        found = greedy(one)
        for step in Levenshtein.opcodes(found, list(truth)):
            if step.tag in ("equal", "replace"):
                for place, other in zip(
                    range(step.src_start, step.src_end),
                    range(step.dest_start, step.dest_end),
                    strict=True,
                ):
                    counts[found[place], truth[other]] += 1
            elif step.tag == "delete":
                counts[found[step.src_start : step.src_end], 0] += 1
    return counts / counts.sum(1, keepdims=True)


def mixed(logits: np.ndarray, matrix: np.ndarray, share: float, floor: float) -> np.ndarray:
    """Return log-probabilities [frames, 41] mixed with a confusion and a floor."""
    p = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float64)
    p /= p.sum(1, keepdims=True)
    p = (1 - share) * p + share * p @ matrix
    p = (1 - floor) * p + floor / CLASS_COUNT
    return np.log(np.maximum(p, 1e-300)).astype(np.float32)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run")
    parser.add_argument("--sentences", type=int, default=100, help="sentences (default 100)")
    parser.add_argument("--sharpness", type=float, default=2.5, help="of logits (default 2.5)")
    parser.add_argument("--dropped", type=float, default=0.1, help="silences (default 0.1)")
    args = parser.parse_args()
    model = load_model(model_folder(args))
    known, pieces = read_lexicon("cmudict").entries, pieces_of(args.run)
    rng = np.random.default_rng(args.seed)
    sets = []
    for pool in ("val", "test"):
        truth = held_out(args.sentences, args.seed, pool)
        labels = [label(one, known, args.dropped, rng) for one in truth]
        sets.append((truth, labels, splice_at(labels, pieces, 0.104, args.sharpness, 0)[0]))
    (dev, labels, heard), (test, _, other) = sets
    matrix = confusion(heard, labels)
    print("| share of the confusion | floor | WER | n-best oracle |\n|---|---|---|---|")
    for share, floor in MIXTURES:

        def lists(
            logits: Sequence[np.ndarray],
            scale: float,
            share: float = share,
            floor: float = floor,
        ) -> list[list[tuple[str, ...]]]:
            settings = Settings(acoustic_scale=scale, blank_penalty=4.0)
            ready = (mixed(one, matrix, share, floor) for one in logits)
            return [[one.words for one in some] for some in decode(model, settings, ready)]

        best = min(SCALES, key=lambda scale: wer(dev, lists(heard, scale), False))
        found = lists(other, best)
        rates = [100 * wer(test, found, oracle) for oracle in (False, True)]
        print(f"| {share:g} | {floor:g} | {rates[0]:.1f} % | {rates[1]:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
