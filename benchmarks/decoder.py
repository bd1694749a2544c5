"""How good, fast and small is the search with the whole CMU dictionary and a 3-gram model?

    python benchmarks/decoder.py [--sentences 120] [--per 0.14 0.19] [--workdir runs/benchmarks]

Builds the model once (kept in the work folder), simulates logits for sentences that the model's
text does not have, at a stated phoneme error rate of greedy decoding, and decodes them in a fresh
process on one core. Printed per error rate: WER, WER of the best candidate in the n-best list
(oracle), share of sentences right, seconds per sentence of CPU time, peak
memory of the decoding process and its loading time. Given several values of settings, it tries
every combination.

The simulated logits are what a trained CTC model might give: a phoneme is a segment of 2-5 frames
whose middle frames speak for it and for phonemes articulated alike, with the blank between; noise
makes confusions, deletions and insertions. They know nothing of the sentences' words. Real logits
need their own settings (acoustic_scale, blank_penalty).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import lzma
import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from lm_server import build_lm
from lm_server.lexicon import read_lexicon
from lm_server.offline import read_logits
from lm_server.protocol import CLASS_COUNT, LM_CLASSES, SILENCE, to_lm_order
from lm_server.text import normalise

_CORPUS = Path(__file__).parents[1] / "b2txt_jax" / "data" / "corpus"
_IDS = {name: index for index, name in enumerate(LM_CLASSES)}
_SETTINGS = {
    "acoustic_scale": float,
    "blank_penalty": float,
    "beam": float,
    "max_active": int,
}
_ALIKE = (
    "P B M",
    "T D N",
    "K G NG",
    "F V TH DH",
    "S Z SH ZH CH JH",
    "L R ER",
    "W UW UH OW",
    "Y IY IH",
    "EH AE EY IH",
    "AA AO AH AW",
    "AY OY EY",
    "AH UH IH EH",
    "HH F TH",
)
"""Phonemes that differ in one feature of articulation are heard for each other."""


def label(words: Sequence[str], lexicon: dict[str, tuple[tuple[str, ...], ...]]) -> list[int]:
    """Words -> class ids in the language model's order, a silence after each word."""
    return [i for word in words for i in [*(_IDS[p] for p in lexicon[word][0]), _IDS[SILENCE]]]


def similarity() -> np.ndarray:
    """[41, 41]: 1 on the diagonal, 0.6 for phonemes articulated alike, 0 otherwise."""
    alike = np.eye(CLASS_COUNT)
    for group in _ALIKE:
        for one, other in itertools.permutations([_IDS[p] for p in group.split()], 2):
            alike[one, other] = 0.6
    return alike


def simulate(ids: Sequence[int], strength: float, rng: np.random.Generator) -> np.ndarray:
    """Logits [frames, 41] in the language model's order for a label; `strength` is the evidence in
    a frame, in ln."""
    alike = similarity()
    frames = [np.zeros((2, CLASS_COUNT))]
    frames[0][:, 0] = 6.0
    for one in ids:
        length = int(rng.integers(2, 6))
        segment = np.zeros((length, CLASS_COUNT))
        segment[:, 0] = 6.0
        middle = slice((length - 1) // 2, length // 2 + 1)
        evidence = strength * alike[one] + rng.normal(0.0, 1.7, CLASS_COUNT)
        segment[middle] += evidence
        segment[middle, 0] = 0.55 * strength + rng.normal(0.0, 1.7)
        frames.append(segment)
    logits = np.concatenate(frames) + rng.normal(0.0, 0.5, (sum(map(len, frames)), CLASS_COUNT))
    return logits.astype(np.float32)


def greedy(logits: np.ndarray) -> list[int]:
    """Best class per frame, repeats and blanks removed."""
    best = logits.argmax(axis=1)
    return [int(c) for c, before in zip(best, [0, *best[:-1]], strict=True) if c not in (0, before)]


def simulate_at(
    labels: Sequence[Sequence[int]], per: float, seed: int
) -> tuple[list[np.ndarray], float]:
    """Logits of every label such that greedy decoding has a phoneme error rate of about `per`; and
    the rate reached."""
    low, high = 1.0, 30.0
    for _ in range(12):
        strength = (low + high) / 2
        rng = np.random.default_rng(seed)
        logits = [simulate(ids, strength, rng) for ids in labels]
        errors = sum(
            Levenshtein.distance(greedy(x), list(ids))
            for x, ids in zip(logits, labels, strict=True)
        )
        reached = errors / sum(map(len, labels))
        low, high = (strength, high) if reached > per else (low, strength)
    return logits, reached


def held_out(count: int, seed: int, name: str) -> list[tuple[str, ...]]:
    """Sentences of the package's pool `name`, all of whose words the dictionary has."""
    known = read_lexicon("cmudict").entries
    lines = lzma.decompress((_CORPUS / f"{name}.txt.xz").read_bytes()).decode().splitlines()
    found = []
    for line in np.random.default_rng(seed).permutation(lines):
        words = normalise(str(line).split("\t", 1)[1], known)
        if not isinstance(words, str) and all(word in known for word in words):
            found.append(words)
        if len(found) == count:
            break
    return found


def decode(folder: str, grid: list[dict[str, float]], logits: list[np.ndarray], answers) -> None:  # type: ignore[no-untyped-def]
    """Runs in a fresh process: decodes every sentence and reports times and memory."""
    started = time.perf_counter()
    from lm_server.beam_search import BeamSearch, LanguageModel
    from lm_server.settings import Settings

    model = LanguageModel(Path(folder))
    loaded = time.perf_counter() - started
    for change in grid:
        settings = dataclasses.replace(Settings(), **change)  # type: ignore[arg-type]
        search = BeamSearch(model, settings)
        started = time.process_time()
        found = []
        for one in logits:
            search.begin()
            search.step(one)
            found.append([h.words for h in search.finish()])
        seconds = (time.process_time() - started) / len(logits)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answers.put((change, found, seconds, peak, loaded))


def wer(
    truth: Sequence[tuple[str, ...]], found: Sequence[Sequence[tuple[str, ...]]], oracle: bool
) -> float:
    """Word errors over words; of the best candidate, or of the one nearest to the truth."""
    errors = 0
    for words, candidates in zip(truth, found, strict=True):
        chosen = (candidates if oracle else candidates[:1]) or [()]
        errors += min(Levenshtein.distance(words, candidate) for candidate in chosen)
    return errors / sum(map(len, truth))


def _tasks(
    args: argparse.Namespace,
) -> Iterator[tuple[list[tuple[str, ...]], list[np.ndarray], str]]:
    """Sentences with their logits: those of a file, or simulated ones at every error rate."""
    known = dict(read_lexicon("cmudict").entries)
    if args.logits is not None:
        file = read_logits(args.logits)
        with np.load(args.logits) as fields:
            sentences = [normalise(str(sentence), known) for sentence in fields["sentence"]]
        chosen = [i for i, words in enumerate(sentences) if not isinstance(words, str)]
        truth = [tuple(sentences[i]) for i in chosen]
        yield truth, [to_lm_order(file.of(i)) for i in chosen], str(args.logits)
        return
    truth = held_out(args.sentences, args.seed, args.pool)
    labels = [label(words, known) for words in truth]
    for per in args.per:
        logits, reached = simulate_at(labels, per, args.seed)
        yield truth, logits, f"greedy PER {reached:.1%}"


def main() -> None:
    """Builds, simulates, decodes, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sentences", type=int, default=120, help="held-out sentences per error rate (default 120)"
    )
    parser.add_argument(
        "--per", type=float, nargs="+", default=[0.14, 0.19], help="error rates of greedy decoding"
    )
    parser.add_argument("--logits", type=Path, help="a file of `b2txt infer --split val` instead")
    parser.add_argument("--lm", type=Path, help="a model folder instead of the one built here")
    parser.add_argument(
        "--order", type=int, default=3, help="order of the n-gram model (default 3)"
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[_CORPUS / "language_model.txt.xz"], help="its text"
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/benchmarks"), help="where the model is kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", default="val", help="pool of sentences (val, test; default val)")
    for name, kind in _SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, nargs="+", help="values to try instead of the default")
    args = parser.parse_args()
    folder = args.lm or args.workdir / f"lm{args.order}"
    if not (folder / build_lm.DESCRIPTION).is_file():
        build_lm.build(args.text, args.order, "cmudict", folder)
    description = json.loads((folder / build_lm.DESCRIPTION).read_text())
    print(
        f"{description['words']} words, order {description['order']}, "
        f"perplexity {description['perplexity']:.0f}"
    )
    tried = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name)}
    grid = [dict(zip(tried, one, strict=True)) for one in itertools.product(*tried.values())]
    for truth, logits, title in _tasks(args):
        frames = sum(map(len, logits)) / len(logits)
        print(f"{title}, {len(truth)} sentences, {frames:.0f} frames each", flush=True)
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        child = context.Process(target=decode, args=(str(folder), grid, logits, answers))
        child.start()
        for _ in grid:
            change, found, seconds, peak, loaded = answers.get()
            right = sum(
                candidates[:1] == [words] for words, candidates in zip(truth, found, strict=True)
            ) / len(truth)
            print(
                f"  {change or 'defaults'}: WER {wer(truth, found, False):.1%}, "
                f"oracle {wer(truth, found, True):.1%}, right {right:.0%}, "
                f"{seconds:.3f} s per sentence, peak {peak:.0f} MB, loaded in {loaded:.1f} s",
                flush=True,
            )
        child.join()


if __name__ == "__main__":
    main()
