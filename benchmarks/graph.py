"""Builds a model folder and, from the same words and n-grams, a graph like the published ones.

    python benchmarks/graph.py --out DIR
    python benchmarks/decoder.py --lm DIR/lm --graph DIR

The graph, TLG.fst and words.txt, is for the search wfst. Like the published graphs, it requires a
silence after every word but the last, and needs minutes and gigabytes of memory to build.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter, defaultdict
from pathlib import Path

import kaldifst
from decoding import TEXT

from lm_server.lm.build import Options, build
from lm_server.lm.sorted_ngrams import SortedModel
from lm_server.protocol import CLASS_COUNT, LM_CLASSES, SILENCE

_LABEL = {name: index + 1 for index, name in enumerate(LM_CLASSES)}
_BACKOFF = CLASS_COUNT + 1
"""Input label of the lexicon's #0. Those of #1 and so on, which distinguish homophones, follow."""


def grammar(model: SortedModel, numbers: dict[str, int]) -> kaldifst.StdVectorFst:
    """Convert the n-grams to an acceptor of words, with one state per n-gram below the top order.

    A back-off reads #0. Words that the model lacks have the score of its unknown word.
    """
    ids = {word: index for index, word in enumerate(model.words)}
    top = len(model.orders)
    # State 0 is the empty history; those of order k follow those of order k - 1.
    offsets = [0, 1]
    for order in model.orders[:-1]:
        offsets.append(offsets[-1] + len(order))
    number_of = [numbers.get(word, 0) for word in model.words]
    begin, end = ids["<s>"], ids["</s>"]
    first = offsets[1] + begin
    arcs: list[str] = []
    finals: list[str] = []
    last: list[int] = []
    context: list[int] = []
    rows: dict[tuple[int, int], int] = {}
    for level, order in enumerate(model.orders, 1):
        costs = (-math.log(10) * order.log10).tolist()
        words, parents = order.word.tolist(), order.parent.tolist()
        if level == 1:
            last, context = list(range(len(order))), [0] * len(order)
            sources = [0] * len(order)
        else:
            last = [last[parent] for parent in parents]
            if level == 2:
                context = words
            else:
                pairs = zip(words, parents, strict=True)
                context = [rows[word, context[parent]] for word, parent in pairs]
            sources = [offsets[level - 1] + row for row in context]
        rows = {pair: row for row, pair in enumerate(zip(words, parents, strict=True))}
        for row, (source, word, cost) in enumerate(zip(sources, last, costs, strict=True)):
            target = offsets[level] + row if level < top else offsets[level - 1] + parents[row]
            if word == end:
                finals.append(f"{source} {cost:.5f}")
            elif number_of[word]:
                number = number_of[word]
                arcs.append(f"{source} {target} {number} {number} {cost:.5f}")
        if level < top:
            below = [0] * len(order) if level == 1 else [offsets[level - 1] + p for p in parents]
            backoffs = (-math.log(10) * order.backoff).tolist()
            arcs += [
                f"{offsets[level] + row} {state} {numbers['#0']} 0 {cost:.5f}"
                for row, (state, cost) in enumerate(zip(below, backoffs, strict=True))
            ]
    unseen = -math.log(10) * float(model.orders[0].log10[0])
    for name, number in numbers.items():
        if name not in ids and name != "#0":
            arcs.append(f"0 0 {number} {number} {unseen:.5f}")
    # The state of the first line is the start state.
    start = next(index for index, arc in enumerate(arcs) if arc.startswith(f"{first} "))
    arcs[0], arcs[start] = arcs[start], arcs[0]
    return kaldifst.compile("\n".join([*arcs, *finals]) + "\n")


def lexicon(path: Path, numbers: dict[str, int]) -> tuple[kaldifst.StdVectorFst, int]:
    """Return a transducer from phonemes and silences to words, and its number of #1, #2 ..."""
    lines = [f"0 0 {_LABEL[SILENCE]} 0", f"0 0 {_BACKOFF} {numbers['#0']}", "0"]
    alike: Counter[str] = Counter()
    free, most = 1, 0
    for line in path.open(encoding="utf-8"):
        word, _, said = line.strip().partition(" ")
        alike[said] += 1
        most = max(most, alike[said])
        labels = [*(_LABEL[phone] for phone in said.split()), _BACKOFF + alike[said]]
        state = 0
        for position, label in enumerate(labels):
            lines.append(f"{state} {free} {label} {numbers[word] if position == 0 else 0}")
            state, free = free, free + 1
        lines += [f"{state} 0 {_LABEL[SILENCE]} 0", f"{state}"]
    return kaldifst.compile("\n".join(lines) + "\n"), most


def tokens(disambiguators: int) -> kaldifst.StdVectorFst:
    """Return CTC's transducer from classes of frames to phonemes. #0, #1 ... read nothing."""
    labels = range(2, CLASS_COUNT + 1)
    lines = ["0 0 1 0"]
    lines += [f"0 0 0 {_BACKOFF + number}" for number in range(disambiguators + 1)]
    for one in labels:
        lines += [f"0 {one} {one} {one}", f"{one} {one} {one} 0", f"{one} 0 1 0", f"{one}"]
        lines += [f"{one} {other} {other} {other}" for other in labels if other != one]
        lines += [f"{one} {one} 0 {_BACKOFF + number}" for number in range(disambiguators + 1)]
    return kaldifst.compile("\n".join([*lines, "0"]) + "\n")


def main() -> None:
    """Build the graph and print the time of each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--order", type=int, default=3, help="of the n-gram model (default 3)")
    parser.add_argument("--ngrams", type=int, help="prune to so many n-grams")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    started = time.perf_counter()

    def report(what: str, graph: kaldifst.StdVectorFst) -> None:
        seconds = time.perf_counter() - started
        print(f"{seconds:6.0f} s: {what}, {graph.num_states} states", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    folder, options = args.out / "lm", Options(ngrams=args.ngrams)
    model = build([TEXT], args.order, "cmudict", folder, options=options)
    numbers: dict[str, int] = defaultdict(lambda: len(numbers) + 1)
    for line in (folder / "lexicon.txt").open(encoding="utf-8"):
        _ = numbers[line.partition(" ")[0]]
    _ = numbers["#0"]
    names = ["<eps> 0", *(f"{word} {number}" for word, number in numbers.items())]
    (args.out / "words.txt").write_text("\n".join(names) + "\n")
    numbers = dict(numbers)
    words_graph = grammar(model, numbers)
    kaldifst.arcsort(words_graph, "ilabel")
    report("n-grams", words_graph)
    said, most = lexicon(folder / "lexicon.txt", numbers)
    kaldifst.arcsort(said, "olabel")
    both = kaldifst.compose(said, words_graph)
    del said, words_graph
    report("with lexicon", both)
    kaldifst.determinize_star(both, use_log=True)
    report("determinised", both)
    kaldifst.arcsort(both, "ilabel")
    classes = tokens(most)
    kaldifst.arcsort(classes, "olabel")
    graph = kaldifst.compose(classes, both)
    report("with CTC", graph)
    if not graph.write(str(args.out / "TLG.fst")):
        raise SystemExit(f"cannot write {args.out}/TLG.fst")
    print(f"{(args.out / 'TLG.fst').stat().st_size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
