"""Does a large language model bring more during the search than after it?

    lm-server prepare-llm --out runs/smollm2
    python benchmarks/fusion.py --run runs/demo/run --llm runs/smollm2 --preset balanced

Prints, for the search alone, rescored at the end, and asked during the search too (`--fuse`) with
the same model: WER, n-best oracle, and seconds of CPU time of search and rescoring per sentence.
The logits are those of benchmarks/spliced_logits.py. What rescores is the same in both cases.
Acoustic scale and word bonus of the search alone, and with alpha those of the other two, are chosen
on development sentences, by re-ranking as `lm-server tune` does. Every sentence has a line with the
word errors of all three. Ctrl-C ends with what is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from decoding import Words, decode, model_folder, parser_of
from rapidfuzz.distance import Levenshtein
from simulated_logits import held_out, label
from spliced_logits import pieces_of, splice_at

from lm_server.hypothesis import Hypothesis
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.rescoring.causal_lm import CausalLM
from lm_server.rescoring.growing import growing
from lm_server.rescoring.load import load_scorer
from lm_server.rescoring.ranking import augmented, ranked_answer, sentences_to_score
from lm_server.search.flashlight import LanguageModel
from lm_server.search.fused import FusedModel
from lm_server.settings import PRESETS, Settings
from lm_server.tuning.lists import make_lists, rerank

TUNED = ("acoustic_scale", "word_bonus", "alpha")


@dataclasses.dataclass
class Sums:
    """Of one way to decode: word errors, those of the lists' nearest, seconds of CPU time."""

    errors: int = 0
    oracle: int = 0
    searching: float = 0.0
    rescoring: float = 0.0


def scored(
    found: Sequence[Hypothesis], settings: Settings, scorer: CausalLM
) -> tuple[tuple[Hypothesis, ...], dict[str, float]]:
    """Return the augmented hypotheses, and the model's score of each of their sentences."""
    candidates = augmented(found, settings)
    sentences = sentences_to_score(candidates, settings)
    return candidates, dict(zip(sentences, scorer.score(sentences).tolist(), strict=True))


def tuned(
    truth: Sequence[Words],
    logits: Sequence[np.ndarray],
    model: LanguageModel,
    settings: Settings,
    scorer: CausalLM,
) -> tuple[Settings, Settings]:
    """Return settings near these that suit the search alone, and those that suit rescoring."""
    found = list(decode(model, settings, logits))
    lists = make_lists(found, truth, settings)
    scores: dict[str, float] = {}
    for one in found:
        scores |= scored(one, settings, scorer)[1]
    return rerank(lists, 0)[0], rerank(lists.with_llm(scores), 0)[0]


def main() -> None:
    """Decode in all three ways and print."""
    parser = parser_of(__doc__)
    option = parser.add_argument
    option("--run", type=Path, required=True, help="a trained run")
    option("--llm", type=Path, default=Path("runs/smollm2"), help="the model's folder")
    option("--llm-dtype", default="float32", help="its numbers (default float32)")
    option("--preset", choices=tuple(PRESETS), default="accurate", help="(default accurate)")
    option("--sentences", type=int, default=40, help="sentences (default 40)")
    option("--per", type=float, default=0.104, help="greedy PER (default 0.104)")
    option("--left-out", type=float, default=0.1, help="share of silences (default 0.1)")
    option("--sharpness", type=float, default=2.5, help="factor on the logits (default 2.5)")
    option("--dev", type=int, default=40, help="sentences to choose settings on (default 40)")
    option("--nbest", type=int, default=50, help="hypotheses that are rescored (default 50)")
    option("--fuse-weight", type=float, default=Settings().fuse_weight)
    option("--fuse-frames", type=int, default=Settings().fuse_frames)
    option("--fuse-hypotheses", type=int, default=Settings().fuse_hypotheses)
    args = parser.parse_args()
    settings = dataclasses.replace(
        Settings(),
        acoustic_scale=1.1 / args.sharpness,
        blank_penalty=4.0,
        nbest=args.nbest,
        fuse_weight=args.fuse_weight,
        fuse_frames=args.fuse_frames,
        fuse_hypotheses=args.fuse_hypotheses,
        **PRESETS[args.preset],  # type: ignore[arg-type]
    )
    import torch

    torch.set_num_threads(1)
    known, pieces = read_lexicon("cmudict").entries, pieces_of(args.run)
    sets = []
    for pool, count in (("val", args.dev), ("test", args.sentences)):
        rng = np.random.default_rng(args.seed)
        truth = held_out(count, args.seed, pool)
        labels = [label(one, known, args.left_out, rng) for one in truth]
        made, reached = splice_at(labels, pieces, args.per, args.sharpness, args.seed)
        sets.append((truth, made))
        print(f"{pool}: {len(truth)} sentences, greedy PER {reached:.1%}", flush=True)
    model = LanguageModel(model_folder(args))
    scorer = load_scorer(args.llm, "cpu", dtype=args.llm_dtype)
    alone, with_model = tuned(*sets[0], model, settings, scorer)
    for name, one in (("alone", alone), ("with the model", with_model)):
        values = (f"{key} {getattr(one, key):g}" for key in TUNED)
        print(f"{name}: {', '.join(values)}", flush=True)
    truth, logits = sets[1]
    asking = FusedModel(model, lambda: growing(scorer))
    searches = {
        "alone": (model, alone),
        "rescored": (model, with_model),
        "fused": (asking, with_model),
    }
    sums, done = {way: Sums() for way in searches}, 0
    with contextlib.suppress(KeyboardInterrupt):
        for words, frames in zip(truth, logits, strict=True):
            errors = {}
            for way, (of, chosen) in searches.items():
                began = time.process_time()
                found = next(decode(of, chosen, [frames]))
                searched = time.process_time()
                if way == "alone":
                    answer = ranked_answer(augmented(found, chosen), chosen)
                else:
                    candidates, scores = scored(found, chosen, scorer)
                    answer = ranked_answer(candidates, chosen, scores)
                ended = time.process_time()
                errors[way] = Levenshtein.distance(words, answer.hypotheses[0].words)
                sums[way].errors += errors[way]
                sums[way].oracle += min(Levenshtein.distance(words, one.words) for one in found)
                sums[way].searching += searched - began
                sums[way].rescoring += ended - searched
            done += 1
            print(f"{errors} {' '.join(words)}", flush=True)
    count = sum(map(len, truth[:done]))
    print(f"{done} sentences, {count} words")
    print("| | WER | n-best oracle | s per sentence, search | rescoring |\n|---|---|---|---|---|")
    for way, total in sums.items():
        rates = f"{total.errors / count:.1%} | {total.oracle / count:.1%}"
        seconds = (total.searching / done, total.rescoring / done)
        print(f"| {way} | {rates} | {seconds[0]:.2f} | {seconds[1]:.2f} |")


if __name__ == "__main__":
    main()
