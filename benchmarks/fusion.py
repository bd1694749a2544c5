"""Does a large language model bring more during the search than after it?

    lm-server prepare-llm --out runs/smollm2
    python benchmarks/fusion.py --run runs/demo/run --llm runs/smollm2 --preset balanced

Prints, for the search alone, rescored at the end, and asked during the search too (`--fuse`) with
the same model: WER, n-best oracle, and seconds of CPU time of search and rescoring per sentence,
with mean, median and 90th percentile of both together.
The logits are those of benchmarks/spliced_logits.py, with development and test sentences from
different halves of the run's trials. What rescores is the same in both cases. Acoustic scale and
word bonus of the search alone, and with alpha those of the other two, are chosen on development
sentences: by re-ranking lists as `lm-server tune` does, and by a search with what that has found.
Every sentence has a line with the word errors of all three. Ctrl-C ends with what is done.
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
from spliced_logits import halves_of, splice_at

from b2txt_jax.evaluation.intervals import paired_bootstrap
from b2txt_jax.metrics import ErrorRate
from lm_server.hypothesis import Hypothesis
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.rescoring.causal_lm import CausalLM
from lm_server.rescoring.growing import growing
from lm_server.rescoring.load import load_scorer
from lm_server.rescoring.ranking import augmented, ranked_answer, sentences_to_score
from lm_server.search.flashlight import LanguageModel
from lm_server.search.fused import FusedModel
from lm_server.settings import PRESETS, Settings
from lm_server.tuning.lists import Lists, make_lists, rerank

TUNED = ("acoustic_scale", "word_bonus", "alpha")
_ROUNDS = 2
"""Further searches of the development sentences, each with what re-ranking the last has found."""


@dataclasses.dataclass
class Sums:
    """Of one way to decode: word errors of every sentence, those of the lists' nearest, seconds of
    CPU time."""

    errors: list[int] = dataclasses.field(default_factory=list)
    oracle: int = 0
    searching: list[float] = dataclasses.field(default_factory=list)
    rescoring: list[float] = dataclasses.field(default_factory=list)

    def seconds(self) -> str:
        """Return the mean of either part, and mean, median and 90th percentile of both."""
        whole = np.add(self.searching, self.rescoring)
        parts = f"{np.mean(self.searching):.2f} | {np.mean(self.rescoring):.2f}"
        spread = ", ".join(f"{value:.2f}" for value in np.quantile(whole, (0.5, 0.9)))
        return f"{parts} | {whole.mean():.2f}, {spread}"


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
    """Return settings near these that suit the search alone, and those that suit rescoring.

    They have the fewest word errors in a search of their own, since what re-ranking prefers need
    not suit the search.
    """
    scores: dict[str, float] = {}

    def searched(settings: Settings, rescored: bool) -> Lists:
        lists = make_lists(list(decode(model, settings, logits)), truth, settings)
        return with_scores(lists) if rescored else lists

    def with_scores(lists: Lists) -> Lists:
        new = [one for some in lists.sentences for one in some if one and one not in scores]
        if new:
            scores.update(zip(new, scorer.score(new).tolist(), strict=True))
        return lists.with_llm(scores)

    first = searched(settings, False)
    chosen = []
    for lists in (first, with_scores(first)):
        tried = [lists]
        for _ in range(_ROUNDS):
            tried.append(searched(rerank(tried[-1], 0)[0], lists.rescored))
        errors = [int(one.errors_of_best(one.settings).sum()) for one in tried]
        best = tried[int(np.argmin(errors))].settings
        name = "with the model" if lists.rescored else "alone"
        values = (f"{key} {getattr(best, key):g}" for key in TUNED)
        print(f"{name}: {', '.join(values)}, development errors {errors}", flush=True)
        chosen.append(best)
    return chosen[0], chosen[1]


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
    option("--nbest", type=int, default=100, help="hypotheses that are rescored (default 100)")
    option(
        "--lattice-beam",
        type=float,
        default=Settings().lattice_beam,
        help="what is worse than the best by more (ln) is neither asked nor rescored",
    )
    option("--fuse-weight", type=float, default=Settings().fuse_weight)
    option("--fuse-frames", type=int, default=Settings().fuse_frames)
    option("--fuse-hypotheses", type=int, default=Settings().fuse_hypotheses)
    option("--fuse-beam", type=float, default=Settings().fuse_beam)
    args = parser.parse_args()
    settings = dataclasses.replace(
        Settings(),
        acoustic_scale=1.1 / args.sharpness,
        blank_penalty=4.0,
        nbest=args.nbest,
        lattice_beam=args.lattice_beam,
        fuse_weight=args.fuse_weight,
        fuse_frames=args.fuse_frames,
        fuse_hypotheses=args.fuse_hypotheses,
        fuse_beam=args.fuse_beam,
        **PRESETS[args.preset],  # type: ignore[arg-type]
    )
    import torch

    torch.set_num_threads(1)
    known, halves = read_lexicon("cmudict").entries, halves_of(args.run)
    sets = []
    pools = (("val", args.dev), ("test", args.sentences))
    for (pool, count), pieces in zip(pools, halves, strict=True):
        rng = np.random.default_rng(args.seed)
        truth = held_out(count, args.seed, pool)
        labels = [label(one, known, args.left_out, rng) for one in truth]
        made, reached = splice_at(labels, pieces, args.per, args.sharpness, args.seed)
        sets.append((truth, made))
        print(f"{pool}: {len(truth)} sentences, greedy PER {reached:.1%}", flush=True)
    model = LanguageModel(model_folder(args))
    scorer = load_scorer(args.llm, "cpu", dtype=args.llm_dtype)
    alone, with_model = tuned(*sets[0], model, settings, scorer)
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
                sums[way].errors.append(errors[way])
                sums[way].oracle += min(Levenshtein.distance(words, one.words) for one in found)
                sums[way].searching.append(searched - began)
                sums[way].rescoring.append(ended - searched)
            done += 1
            print(f"{errors} {' '.join(words)}", flush=True)
    count = sum(map(len, truth[:done]))
    print(f"{done} sentences, {count} words")
    print("| | WER | n-best oracle | s per sentence, search | rescoring | mean, median, 90 % |")
    print("|---|---|---|---|---|---|")
    for way, total in sums.items():
        rates = f"{sum(total.errors[:done]) / count:.1%} | {total.oracle / count:.1%}"
        print(f"| {way} | {rates} | {total.seconds()} |")
    for way in ("alone", "rescored"):
        one, other = (
            [
                ErrorRate(*pair)
                for pair in zip(sums[of].errors[:done], map(len, truth[:done]), strict=True)
            ]
            for of in (way, "fused")
        )
        found = paired_bootstrap([""] * done, one, other)
        print(f"fused minus {way}: {found.interval if found else 'unknown'}")


if __name__ == "__main__":
    main()
