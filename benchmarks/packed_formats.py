"""Our packed sessions against ArrayRecord with Grain: processor time and rate of reading batches.

    python benchmarks/packed_formats.py [--gigabytes 1] [--batches 30] [--rounds 3]

Writes the same trials, with lengths like the recordings', in both formats, float16, uncompressed.
ArrayRecord has a file per session, and a record per trial: the features' bytes. Both then read the
same batches of 64 trials (4 days of 16) into arrays padded to the same bucket, alternately, from
the page cache, with the same number of threads. Grain reads with `MapDataset` and its own threads.
Prints medians. Processor time means more than the rate on a busy machine. Needs `grain` and
`array_record`, which are no part of the package's extras.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from b2txt_jax.config import DataConfig
from b2txt_jax.data.loader import TrainingData, batches_ahead, bucket_of, reading_threads
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.typical import FEATURES, SESSIONS, session_name, typical_trials, write_typical

DTYPE = np.dtype(np.float16)


def write_array_records(folder: Path, trials: int) -> list[str]:
    """Write a file of records per session. Return the paths, by day."""
    paths = []
    for day in range(SESSIONS):
        paths.append(str(folder / f"{session_name(day)}.array_record"))
        writer = ArrayRecordWriter(paths[-1], "group_size:1,uncompressed")
        for trial in typical_trials(session_name(day), day, trials):
            writer.write(trial.features.astype(DTYPE).tobytes())
        writer.close()
    return paths


def grain_batches(
    paths: list[str], ours: TrainingData, batches: int
) -> Callable[[], Iterator[np.ndarray]]:
    """Return a function that yields the features of the batches of `ours`, read by Grain."""
    source = grain.sources.ArrayRecordDataSource(paths)
    every = itertools.chain.from_iterable(ours.refs_of_day)
    place = {ref.name: number for number, ref in enumerate(every)}

    def load(step: int) -> np.ndarray:
        refs = [ref for _, ref in ours.rows(0, step)]
        bins, _ = bucket_of(refs, ours.buckets)
        features = np.zeros((len(refs), bins, FEATURES), DTYPE)
        records = source.__getitems__([place[ref.name] for ref in refs])
        for row, record in zip(features, records, strict=True):
            trial = np.frombuffer(record, DTYPE).reshape(-1, FEATURES)
            row[: len(trial)] = trial
        return features

    ahead = batches_ahead(64 * ours.buckets[-1][0] * FEATURES * DTYPE.itemsize)
    options = grain.ReadOptions(num_threads=reading_threads(), prefetch_buffer_size=ahead)
    return lambda: iter(grain.MapDataset.range(batches).map(load).to_iter_dataset(options))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="of each, after one more")
    args = parser.parse_args()
    trials = max(16, round(args.gigabytes * 1e9 / (FEATURES * DTYPE.itemsize) / SESSIONS / 810))
    folder = Path(tempfile.mkdtemp(prefix="b2txt-formats-"))
    try:
        write_typical(folder / "packed", "float16", SESSIONS, trials)
        paths = write_array_records(folder, trials)
        data = DataConfig(str(folder / "packed"), (), FEATURES, 4, 16, (), 64)
        sessions = open_folder(data.root).sessions
        ours = TrainingData(data, sessions, 14, lambda bins: (bins - 14) // 4 + 1)
        read_by = {
            "packed": lambda: (batch.features for batch in ours.batches(0, 0, args.batches)),
            "ArrayRecord and Grain": grain_batches(paths, ours, args.batches),
        }
        for one, other in zip(*(read() for read in read_by.values()), strict=True):
            assert np.array_equal(one, other), "the formats hold different trials"
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in read_by}
        for _ in range(args.rounds):
            for name, read in read_by.items():
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in read():
                    pass
                spent = time.perf_counter() - wall, time.process_time() - cpu
                seconds[name].append(spent)
        for name, found in seconds.items():
            wall, cpu = (statistics.median(one) / args.batches for one in zip(*found, strict=True))
            print(f"{name}: {1000 * cpu:.0f} ms of CPU a batch, {1 / wall:.1f} batches/s")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
