"""Does a class confusion, or a floor under all classes, lower the word error rate?

    python benchmarks/confusions.py --run runs/demo/run

Splices logits (`spliced_logits`) of development and test sentences from different halves of the
run's validation trials, so that what is learned of the one is no memory of the other. Learns a
confusion of the development sentences as `lm-server tune` does. Prints WER and n-best oracle of the
test sentences without it, with a floor, and with several shares of it. Acoustic scale and word
bonus are chosen on the development sentences, by re-ranking searches at a few scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from decoding import Words, decode, model_folder, parser_of
from simulated_logits import held_out, label
from spliced_logits import halves_of, splice_at

from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm.reader import find_words
from lm_server.protocol import CLASS_COUNT
from lm_server.search.emissions import log_probabilities
from lm_server.search.flashlight import LanguageModel
from lm_server.search.forced import aligned
from lm_server.settings import PRESETS, Settings
from lm_server.settings.confusion import Confusion, of_matrix
from lm_server.tuning.confusions import Aligned, learn
from lm_server.tuning.lists import Lists, make_lists, rerank

FLOOR = 1e-3
SHARES = (0.1, 0.3, 1.0)
SCALES = (1.1, 1.6, 2.2)
"""Acoustic scales to search with, for logits as they are. What is mixed is softer, and needs a
larger one."""


def learned(
    model: LanguageModel, settings: Settings, truth: Sequence[Words], logits: Sequence[np.ndarray]
) -> Confusion:
    """Return the confusion that sentences with these logits teach."""
    known = find_words(model.folder, {word for one in truth for word in one})
    pairs = [
        (log_probabilities(frames, settings), said)
        for words, frames in zip(truth, logits, strict=True)
        if all(word in known for word in words)
        and (said := aligned(known, settings, frames, words)) is not None
    ]
    return learn(Aligned(tuple(one for one, _ in pairs), tuple(one for _, one in pairs)))


def main() -> None:
    """Splice, learn, tune and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a trained run")
    parser.add_argument("--dev", type=int, default=60, help="sentences to learn from (default 60)")
    parser.add_argument("--sentences", type=int, default=80, help="test sentences (default 80)")
    parser.add_argument("--sharpness", type=float, default=2.5, help="of logits (default 2.5)")
    parser.add_argument("--left-out", type=float, default=0.1, help="silences (default 0.1)")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="balanced", help="(default balanced)"
    )
    args = parser.parse_args()
    model = LanguageModel(model_folder(args))
    known = read_lexicon("cmudict").entries
    sets = []
    for pool, count, pieces in zip(
        ("val", "test"), (args.dev, args.sentences), halves_of(args.run), strict=True
    ):
        rng = np.random.default_rng(args.seed)
        truth = held_out(count, args.seed, pool)
        labels = [label(one, known, args.left_out, rng) for one in truth]
        sets.append((truth, splice_at(labels, pieces, 0.104, args.sharpness, args.seed)[0]))
    (dev, heard), (test, other) = sets
    base = dataclasses.replace(
        Settings(acoustic_scale=SCALES[0] / args.sharpness, blank_penalty=4.0),
        **PRESETS[args.preset],  # type: ignore[arg-type]
    )
    whole = learned(model, base, dev, heard)
    ways: dict[str, Confusion | None] = {
        "none": None,
        f"floor {FLOOR:g}": of_matrix((1 - FLOOR) * np.eye(CLASS_COUNT) + FLOOR / CLASS_COUNT),
        **{f"{share:g} of the confusion": whole.weakened(share) for share in SHARES},
    }

    def lists(truth: Sequence[Words], logits: Sequence[np.ndarray], settings: Settings) -> Lists:
        return make_lists(list(decode(model, settings, logits)), truth, settings)

    print("| | WER | n-best oracle |\n|---|---|---|")
    for name, confusion in ways.items():
        points = [
            dataclasses.replace(base, acoustic_scale=scale / args.sharpness, confusion=confusion)
            for scale in SCALES
        ]
        ranked = [rerank(lists(dev, heard, one), 0) for one in points]
        best, _ = min(ranked, key=lambda one: one[1])
        found = lists(test, other, best)
        rates = [
            100 * float(errors.sum()) / sum(map(len, test))
            for errors in (found.errors_of_best(best), found.oracle())
        ]
        print(f"| {name} | {rates[0]:.1f} % | {rates[1]:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
