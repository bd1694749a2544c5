"""How do order, vocabulary, pruning and quantisation change size, speed and accuracy?

    python benchmarks/language_models.py [--docs docs/language_models.md] [--sentences 100]

Builds model folders of the package's text (kept in the work folder), and decodes simulated
sentences with each in a fresh process. Measures size on disk, memory of the process after loading
(resident, including mapped files) and at its peak, seconds of CPU time to load and per sentence,
and WER at two phoneme error rates of greedy decoding. Then builds a 5-gram of a large artificial
text and measures its time and memory, and bytes per n-gram of every kind of trie, in the file and
in memory. From these it extrapolates to 100 million n-grams. --docs writes the tables into a page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from decoder import wer
from decoding import TEXT, decode, in_fresh_process, memory, parser_of, simulated

from lm_server.files.atomic_file import replacing
from lm_server.lm.build import Options, build
from lm_server.lm.reader import DESCRIPTION
from lm_server.lm.trie.kenlm_binary import PLAIN, TrieForm, trie_bytes, write_trie

MEGABYTE = 1 << 20
SMALL = TrieForm(8, compressed=True)
FORMS = {
    "plain": PLAIN,
    "compressed pointers": TrieForm(None, compressed=True),
    "8 bits": TrieForm(8),
    "8 bits, compressed pointers": SMALL,
}
PUBLISHED = {3: 60, 5: 300}
"""Gigabytes of memory that the published 3-gram and 5-gram need."""
_PER = (0.14, 0.19)
_MARKS = ("<!-- measured -->", "<!-- /measured -->")


@dataclass(frozen=True)
class Variant:
    """One model folder of the table."""

    name: str
    order: int
    options: Options = field(default_factory=Options)


VARIANTS = (
    *(Variant(f"{order}-gram", order) for order in (1, 2, 3, 4, 5)),
    Variant("3-gram, 10,000 words", 3, Options(vocabulary=10_000)),
    Variant("3-gram, 30,000 words", 3, Options(vocabulary=30_000)),
    Variant("3-gram, 8 bits", 3, Options(form=TrieForm(8))),
    Variant("3-gram, 8 bits, compressed", 3, Options(form=SMALL)),
    Variant("3-gram, 4 bits, compressed", 3, Options(form=TrieForm(4, compressed=True))),
    Variant("3-gram, cut-offs 0 0 1", 3, Options(prune=(0, 0, 1))),
    Variant("3-gram, 500,000 n-grams by entropy", 3, Options(ngrams=500_000)),
    Variant("3-gram, 100,000 n-grams by entropy", 3, Options(ngrams=100_000)),
    Variant("5-gram, cut-offs 0 0 1 1 1", 5, Options(prune=(0, 0, 1))),
    Variant("5-gram, 8 bits, compressed", 5, Options(form=SMALL)),
    Variant(
        "5-gram, 1,000,000 by entropy, 8 bits, compressed", 5, Options(ngrams=10**6, form=SMALL)
    ),
)


@dataclass(frozen=True)
class Measured:
    """Figures of one folder: sizes in bytes, times in seconds of CPU."""

    name: str
    ngrams: int
    words: int
    perplexity: float
    oov: float
    disk: int
    loaded: int
    peak: int
    loading: float
    seconds: float
    wers: tuple[float, ...]


def decode_tasks(folder: Path, logits: Sequence[Sequence[np.ndarray]]) -> Iterator[tuple]:
    """Load a folder and decode the sentences of every task."""
    from lm_server.search.load import load_model
    from lm_server.settings import Settings

    started = time.process_time()
    model = load_model(folder)
    loading, loaded = time.process_time() - started, memory("VmRSS")
    started = time.process_time()
    found = [[[h.words for h in n_best] for n_best in decode(model, Settings(), t)] for t in logits]
    seconds = (time.process_time() - started) / sum(map(len, logits))
    yield loading, loaded, memory("VmHWM"), seconds, found


def measure(variant: Variant, args: argparse.Namespace, tasks: Sequence[tuple]) -> Measured:
    """Build the folder if it does not exist, and decode with it."""
    folder = args.workdir / "".join(c if c.isalnum() else "_" for c in variant.name)
    if not (folder / DESCRIPTION).is_file():
        build(args.text, variant.order, "cmudict", folder, options=variant.options)
    description = json.loads((folder / DESCRIPTION).read_text())
    ((loading, loaded, peak, seconds, found),) = in_fresh_process(
        decode_tasks, folder, [logits for _, logits in tasks]
    )
    wers = tuple(wer(truth, one, False) for (truth, _), one in zip(tasks, found, strict=True))
    return Measured(
        variant.name,
        sum(description["ngrams"]),
        description["words"],
        description["perplexity"],
        description["oov_rate"],
        sum(path.stat().st_size for path in folder.iterdir()),
        *(loaded, peak, loading, seconds, wers),
    )


def artificial_text(tokens: int, words: int, seed: int) -> np.ndarray:
    """Return sentences of 20 words as ids from 3 (`<unk>`, `<s>`, `</s>` have 0-2).

    Words follow Zipf's law. Each is often followed by one of its few successors.
    """
    rng = np.random.default_rng(seed)
    sentences = tokens // 22

    def zipf(size: int) -> np.ndarray:
        # A density of 1 / rank is uniform in the logarithm.
        return np.minimum(np.exp(rng.random(size) * np.log(words)).astype(np.int64), words) - 1

    rows = np.zeros((sentences, 22), np.int32)
    rows[:, 0], rows[:, 21] = 1, 2
    word = zipf(sentences)
    for place in range(1, 21):
        rows[:, place] = word + 3
        successor = word * 7919 + np.exp(rng.random(sentences) * 5).astype(np.int64) * 104729
        word = np.where(rng.random(sentences) < 0.6, successor % words, zipf(sentences))
    return rows.ravel()


def estimate_large(tokens: int, budget: int, folder: Path) -> Iterator[tuple]:
    """Build the artificial 5-gram and write it as every kind of trie."""
    from lm_server.lm.estimate.kneser_ney import estimate
    from lm_server.lm.sorted_ngrams import BEGIN, END, UNKNOWN, in_order_of_ids

    plain = [UNKNOWN, BEGIN, END, *(f"w{i}" for i in range(125_000))]
    words = in_order_of_ids(plain)
    rank = {word: number for number, word in enumerate(words)}
    ids = np.array([rank[word] for word in plain], np.int32)
    text = folder / "tokens"
    ids[artificial_text(tokens, 125_000, 0)].tofile(text)
    before = memory("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    model = estimate(np.memmap(text, np.int32, "r"), words, 5, budget, folder).model
    seconds, wall, peak = time.process_time() - cpu, time.perf_counter() - wall, memory("VmHWM")
    for name, form in FORMS.items():
        write_trie(folder / f"{name}.bin", model, form)
    yield model.counts, seconds, wall, peak, before


def load_trie(path: Path) -> Iterator[tuple[int, float]]:
    """Load a trie. Yield the resident bytes that it adds to the process, and CPU seconds."""
    import kenlm

    config = kenlm.Config()
    config.show_progress = False
    before, started = memory("VmRSS"), time.process_time()
    model = kenlm.Model(str(path), config)
    model.score("w1 w2 w3")
    yield memory("VmRSS") - before, time.process_time() - started


def large_model(args: argparse.Namespace) -> list[str]:
    """Return the page's lines about large models."""
    with tempfile.TemporaryDirectory(dir=args.workdir) as name:
        folder = Path(name)
        ((counts, seconds, wall, peak, before),) = in_fresh_process(
            estimate_large, args.tokens, args.memory, folder
        )
        total = sum(counts)
        hundred = [
            counts[0],
            *(int(c * (1e8 - counts[0]) / (total - counts[0])) for c in counts[1:]),
        ]
        lines = [
            f"A 5-gram of {total / 1e6:.1f} million n-grams ({', '.join(f'{c:,}' for c in counts)} "
            f"of order 1-5) of an artificial text of {args.tokens / 1e6:.0f} million words was "
            f"estimated in {seconds:.0f} s of CPU time ({wall:.0f} s on a busy machine) with "
            f"`--memory {args.memory / 1e6:.0f}M`: the process had {before / 1e6:.0f} MB before, "
            f"and {peak / 1e6:.0f} MB at most.",
            "",
            "| trie | file | bytes per n-gram | resident once loaded | loaded in | 100 million "
            "n-grams |",
            "|---|---|---|---|---|---|",
        ]
        for form_name, form in FORMS.items():
            path = folder / f"{form_name}.bin"
            size = path.stat().st_size
            ((resident, loading),) = in_fresh_process(load_trie, path)
            scaled = trie_bytes(hundred, form) * resident / size
            lines.append(
                f"| {form_name} | {size / 1e6:.0f} MB | {size / total:.2f} | "
                f"{resident / 1e6:.0f} MB | {loading:.2f} s | {scaled / 1e9:.2f} GB |"
            )
    return lines


def table(rows: Sequence[Measured]) -> list[str]:
    """Return the table of folders in Markdown."""
    lines = [
        "| model | n-grams | words | perplexity | outside | disk | memory loaded | at most | "
        "load | per sentence | WER at 14 % | WER at 19 % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.ngrams:,} | {row.words:,} | {row.perplexity:.0f} | "
            f"{row.oov:.1%} | {row.disk / 1e6:.1f} MB | {row.loaded / 1e6:.0f} MB | "
            f"{row.peak / 1e6:.0f} MB | {row.loading:.1f} s | {row.seconds:.3f} s | "
            + " | ".join(f"{one:.1%}" for one in row.wers)
            + " |"
        )
    for order, gigabytes in PUBLISHED.items():
        lines.append(
            f"| published {order}-gram (TLG.fst, Kaldi) | | 125,000 | | | | {gigabytes} GB | | | | "
            "| |"
        )
    return lines


def write_docs(page: Path, lines: Sequence[str]) -> None:
    """Replace the lines between the page's marks."""
    text = page.read_text()
    before, rest = text.split(_MARKS[0])
    _, after = rest.split(_MARKS[1])
    with replacing(page) as path:
        path.write_text(f"{before}{_MARKS[0]}\n" + "\n".join(lines) + f"\n{_MARKS[1]}{after}")


def main() -> None:
    """Build, decode, print and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--docs", type=Path, help="page to write the tables into")
    parser.add_argument("--sentences", type=int, default=100, help="per error rate (default 100)")
    parser.add_argument("--text", type=Path, nargs="+", default=[TEXT])
    parser.add_argument("--tokens", type=int, default=6_000_000, help="of the artificial text")
    parser.add_argument("--memory", type=int, default=500 * 10**6, help="for estimating it")
    parser.set_defaults(workdir=Path("runs/benchmarks/language_models"))
    parser.add_argument(
        "--only", nargs="+", help="only variants that have one of these in the name"
    )
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    tasks = [simulated("test", args.sentences, per, args.seed)[:2] for per in _PER]
    chosen = [v for v in VARIANTS if not args.only or any(part in v.name for part in args.only)]
    rows = []
    for variant in chosen:
        rows.append(measure(variant, args, tasks))
        print(json.dumps(dataclasses.asdict(rows[-1])), file=sys.stderr, flush=True)
    lines = [*table(rows), ""]
    print("\n".join(lines), flush=True)
    lines += large_model(args)
    print("\n".join(lines))
    if args.docs:
        write_docs(args.docs, lines)


if __name__ == "__main__":
    main()
