"""Makes `lm_server/lexicon/resources/g2p.bin` and `g2p.txt` from the CMU dictionary, and reports
the accuracy of the method.

    python scripts/make_g2p.py [--order 6] [--ngrams 400000] [--out FILE]

A model of nine tenths of the words is evaluated on the last tenth. The shipped model is trained on
all words.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zlib
from pathlib import Path

from rich.progress import Progress

from lm_server.lexicon import g2p
from lm_server.lexicon.pronunciations import read_lexicon
from lm_server.lm.estimate import g2p_training

_RESOURCES = Path(__file__).parents[1] / "lm_server" / "lexicon" / "resources"


def main() -> None:
    """Measure, train and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--order", type=int, default=6, help="letters of the longest n-gram (default 6)"
    )
    parser.add_argument("--ngrams", type=int, default=400_000, help="n-grams that are kept")
    parser.add_argument("--out", type=Path, default=_RESOURCES / "g2p.bin", help="file to write")
    parser.add_argument("--words", type=int, help="held-out words to pronounce (default: all)")
    args = parser.parse_args()
    entries = read_lexicon("cmudict").entries
    # One word in ten, by a hash that does not depend on the order of the dictionary.
    held_out = {word for word in entries if zlib.crc32(word.encode()) % 10 == 0}
    seen = [(word, said) for word in entries if word not in held_out for said in entries[word]]
    everything = [(word, one) for word, said in entries.items() for one in said]
    with tempfile.TemporaryDirectory() as name, Progress() as progress:
        folder = Path(name)
        task = progress.add_task("aligning nine tenths", total=8)
        path = folder / "tenths.bin"
        advance = lambda done: progress.advance(task, done)  # noqa: E731
        g2p_training.train(seen, path, args.order, args.ngrams, folder, advance)
        model = g2p.read_model(path)
        truth = {word: entries[word] for word in sorted(held_out)[: args.words]}
        task = progress.add_task("pronouncing the last tenth", total=len(truth))
        started, said = time.perf_counter(), {}
        for word in truth:
            said[word] = g2p.pronounce(word, 3, model)
            progress.advance(task)
        seconds = (time.perf_counter() - started) / len(truth)
        task = progress.add_task("aligning all words", total=8)
        figures = g2p_training.train(everything, args.out, args.order, args.ngrams, folder, advance)
    words, phones = g2p_training.errors(said, truth)
    among = sum(bool(set(said[word]) & set(variants)) for word, variants in truth.items())
    print(
        f"{len(truth)} held-out words: {words:.1%} wrong, {phones:.1%} phoneme errors, right among "
        f"the best three {among / len(truth):.1%}, {1000 * seconds:.1f} ms per word"
    )
    print(f"{args.out}: {figures}, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
