"""Does a large language model bring more during the search than after it?

    lm-server prepare-llm --out runs/smollm2
    python benchmarks/fusion.py --run runs/demo/run --llm runs/smollm2 --preset balanced

Prints, for the search alone, rescored at the end, and asked during the search too (`--fuse`) with
the same model: WER, n-best oracle, and seconds of CPU time of search and rescoring per sentence.
The logits are those of benchmarks/spliced_logits.py. What rescores is the same in both cases. Every
sentence has a line with the word errors of all three. Ctrl-C ends with what is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
from decoding import model_folder, parser_of
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

WAYS = ("alone", "rescored", "fused")


@dataclasses.dataclass
class Sums:
    """Of one way to decode: word errors, those of the lists' nearest, seconds of CPU time."""

    errors: int = 0
    oracle: int = 0
    searching: float = 0.0
    rescoring: float = 0.0


def rescored(found: tuple[Hypothesis, ...], settings: Settings, scorer: CausalLM) -> Hypothesis:
    """Return the best hypothesis after augmentation and rescoring."""
    candidates = augmented(found, settings)
    sentences = sentences_to_score(candidates, settings)
    scores = dict(zip(sentences, scorer.score(sentences).tolist(), strict=True))
    return ranked_answer(candidates, settings, scores).hypotheses[0]


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
    option("--alpha", type=float, default=Settings().alpha)
    option("--fuse-frames", type=int, default=Settings().fuse_frames)
    option("--fuse-hypotheses", type=int, default=Settings().fuse_hypotheses)
    args = parser.parse_args()
    settings = dataclasses.replace(
        Settings(),
        acoustic_scale=1.1 / args.sharpness,
        blank_penalty=4.0,
        alpha=args.alpha,
        fuse_frames=args.fuse_frames,
        fuse_hypotheses=args.fuse_hypotheses,
        **PRESETS[args.preset],  # type: ignore[arg-type]
    )
    import torch

    torch.set_num_threads(1)
    known, rng = read_lexicon("cmudict").entries, np.random.default_rng(args.seed)
    truth = held_out(args.sentences, args.seed, "test")
    labels = [label(one, known, args.left_out, rng) for one in truth]
    logits, reached = splice_at(labels, pieces_of(args.run), args.per, args.sharpness, args.seed)
    print(f"{len(truth)} sentences, greedy PER {reached:.1%}", flush=True)
    model = LanguageModel(model_folder(args))
    scorer = load_scorer(args.llm, "cpu", dtype=args.llm_dtype)
    searches = {"alone": model, "fused": FusedModel(model, lambda: growing(scorer))}
    sums, done = {way: Sums() for way in WAYS}, 0
    with contextlib.suppress(KeyboardInterrupt):
        for words, frames in zip(truth, logits, strict=True):
            errors = {}
            for name, of in searches.items():
                started = time.process_time()
                search = of.search(settings)
                search.step(frames)
                found = search.finish()
                searched = time.process_time()
                best = {name: found[0]}
                after = "rescored" if name == "alone" else name
                best[after] = rescored(found, settings, scorer)
                ended = time.process_time()
                for way, one in best.items():
                    errors[way] = Levenshtein.distance(words, one.words)
                    sums[way].errors += errors[way]
                    sums[way].oracle += min(Levenshtein.distance(words, one.words) for one in found)
                    sums[way].searching += searched - started
                sums[after].rescoring += ended - searched
            done += 1
            print(f"{errors} {' '.join(words)}", flush=True)
    count = sum(map(len, truth[:done]))
    print(f"{done} sentences, {count} words")
    print("| | WER | n-best oracle | s per sentence, search | rescoring |\n|---|---|---|---|---|")
    for way, of in sums.items():
        rates = f"{of.errors / count:.1%} | {of.oracle / count:.1%}"
        seconds = (of.searching / done, of.rescoring / done)
        print(f"| {way} | {rates} | {seconds[0]:.2f} | {seconds[1]:.2f} |")


if __name__ == "__main__":
    main()
