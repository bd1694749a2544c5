"""How many batches per second does the input deliver, from data larger than the page cache?

    python benchmarks/input.py [--gigabytes 8] [--cache 2] [--batches 60] [--workdir runs/input]

Writes simulated sessions with lengths like those of the published data (T15) in packed form, and a
part of them as HDF5. Reads batches of 64 trials (4 days of 16) like `b2txt train`, each format in a
fresh process on 2 cores. Deletes the data. A memory control group, if it can be made, limits the
process to --cache GB including the page cache, so that most trials come from the disk. Without it
the files' cache is dropped once, at the start.

`--consumers` emulates so many devices that share a batch, each with its rows placed on it, and
short trials in one row as training has them.

Prints per format: batches per second, CPU time per batch (more meaningful than the rate on a busy
machine), GB/s of trials without padding, the peak resident memory of the process and its anonymous
part, and the limit. `cached` reads few enough trials to stay in the page cache, which shows the
speed of the loader without the disk.

Measured on 2 cores of a cloud Xeon with a disk of 1.0 GB/s, 8 GB (HDF5: 3 GB), limit 2 GB, in
batches per second from disk / cached, and ms of CPU per batch from disk: float16 20.2 / 34.9, 64,
bfloat16 19.0 / 28.8, 71, float32 10.1 / 20.6, 112 (the disk is the limit), HDF5 3.5 / 5.4, 232.
Resident 0.7 GB (16 bits) to 1.4 GB (float32), mostly the six batches read ahead.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from b2txt_jax.config import DataConfig
from b2txt_jax.data.loader import TrainingData
from b2txt_jax.data.packed import DTYPES
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.typical import (
    FEATURES,
    SESSIONS,
    session_name,
    typical_trials,
    write_typical,
)

_GROUPS = Path("/sys/fs/cgroup/memory")
"""Control groups of version 1. With version 2 use `systemd-run --scope -p MemoryMax=2G`."""


def write(folder: Path, kind: str, gigabytes: float) -> None:
    """Write sessions of about this size, packed as `kind` or as HDF5."""
    itemsize = 4 if kind == "hdf5" else DTYPES[kind].itemsize
    bins = gigabytes * 1e9 / (FEATURES * itemsize)
    per_day = max(16, round(bins / SESSIONS / 810))
    if kind != "hdf5":
        print(f"{kind}: {write_typical(folder, kind, SESSIONS, per_day)}", flush=True)
        os.sync()
        return
    for day in range(SESSIONS):
        session = session_name(day)
        (folder / session).mkdir(parents=True)
        with h5py.File(folder / session / "data_train.hdf5", "w") as file:
            for trial in typical_trials(session, day, per_day):
                assert trial.labels is not None
                group = file.create_group(trial.ref.key)
                group["input_features"] = trial.features
                group["seq_class_ids"] = np.pad(trial.labels, (0, 500 - len(trial.labels)))
                group.attrs["n_time_steps"] = len(trial.features)
                group.attrs["seq_len"] = len(trial.labels)
                group.attrs["block_num"], group.attrs["trial_num"] = 1, trial.ref.trial
    os.sync()


def drop_cache(folder: Path) -> None:
    """Ask the kernel to drop the files' pages."""
    for path in folder.rglob("data_*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, batches: int, distinct: int, consumers: int) -> None:
    """Read batches and print one line of JSON. `distinct` > 0 repeats that many batches, and
    `consumers` > 0 places them on so many emulated devices."""
    data = DataConfig(str(folder), (), FEATURES, 4, 16, (), 64)
    sessions = open_folder(folder).sessions
    more: tuple[Any, ...] = ()
    take = lambda batch: batch  # noqa: E731
    if consumers:
        flag = f"--xla_force_host_platform_device_count={consumers}"
        os.environ |= {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
        import jax

        from b2txt_jax.config import load_config
        from b2txt_jax.training.sharding import make_mesh, place
        from b2txt_jax.training.step import packing_rules

        more = packing_rules(load_config("nejm_baseline"), len(sessions), consumers), (0, batches)
        mesh = make_mesh()
        take = lambda batch: jax.block_until_ready(place(batch, mesh))  # noqa: E731
    training = TrainingData(data, sessions, 14, lambda bins: (bins - 14) // 4 + 1, *more)
    if distinct:
        for _ in training.batches(0, 0, distinct):
            pass
    real = padded = count = 0
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    while count < batches:
        first = 0 if distinct else count
        for batch in training.batches(0, first, first + (distinct or batches)):
            take(batch)
            real += int(np.sum(batch.bins))
            padded += batch.features.shape[0] * batch.features.shape[1]
            count += 1
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    memory = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    row = FEATURES * training.features_dtype.itemsize
    print(
        json.dumps(
            {
                "rate": count / seconds,
                "cpu": sum(
                    getattr(after, kind) - getattr(before, kind)
                    for kind in ("ru_utime", "ru_stime")
                )
                / count,
                "gigabytes_per_second": real * row / seconds / 1e9,
                "megabytes": sum(a.nbytes for a in batch if a is not None) / 1e6,
                "padding": 1 - real / padded,
                "peak": int(memory["VmHWM"].split()[0]) / 1e6,
                "anonymous": int(memory["RssAnon"].split()[0]) / 1e6,
            }
        )
    )


@contextlib.contextmanager
def limited(gigabytes: float) -> Iterator[Path | None]:
    """Yield a memory control group with this limit, or None without the right to make one."""
    places = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, kind, path in places if kind == "memory"), "/")
    group = _GROUPS / own.lstrip("/") / f"b2txt-input-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(int(gigabytes * 1e9)))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of each packed set")
    parser.add_argument("--hdf5-gigabytes", type=float, default=4.0, help="size of the HDF5 set")
    parser.add_argument("--cache", type=float, default=2.0, help="GB of memory, cache included")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--workdir", type=Path, default=Path("runs/input"))
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "float16", "float32", "hdf5"])
    parser.add_argument("--consumers", type=int, nargs="+", default=[0], help="emulated devices")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, *numbers = args.measure
        measure(Path(folder), *map(int, numbers))
        return
    args.workdir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.workdir).free / 1e9
    if free < args.gigabytes + 5:
        sys.exit(f"{args.workdir} has {free:.0f} GB free; needed {args.gigabytes + 5:.0f}")
    for kind in args.kinds:
        folder = args.workdir / kind
        shutil.rmtree(folder, ignore_errors=True)
        try:
            size = args.hdf5_gigabytes if kind == "hdf5" else args.gigabytes
            write(folder, kind, size)
            ways = itertools.product((("disk", 0), ("cached", 4)), args.consumers)
            for (name, distinct), consumers in ways:
                drop_cache(folder)
                # Four batches of trials and the batches in flight must fit into the cache.
                with limited(args.cache if not distinct else 3 * args.cache) as group:
                    result = run_limited(folder, args.batches, distinct, consumers, group)
                print(
                    f"{kind:9s} {name:7s}"
                    + (f"{consumers:3d} consumers " if consumers else "")
                    + f"{result['rate']:6.1f} batches/s "
                    f"{1000 * result['cpu']:4.0f} ms of CPU per batch, "
                    f"{result['gigabytes_per_second']:.2f} GB/s of trials, "
                    f"{100 * result['padding']:.0f} % padding, "
                    f"{result['megabytes']:.0f} MB a batch, "
                    "resident at most "
                    f"{result['peak']:.2f} GB ({result['anonymous']:.2f} anonymous at the end); "
                    f"set {size:g} GB, limit "
                    + (f"{args.cache:g} GB" if group and not distinct else "none that matters"),
                    flush=True,
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run_limited(
    folder: Path, batches: int, distinct: int, consumers: int, group: Path | None
) -> dict[str, float]:
    """Measure in a fresh process inside the control group, on two cores."""

    def enter() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    numbers = map(str, (batches, distinct, consumers))
    command = [sys.executable, __file__, "--measure", str(folder), *numbers]
    done = subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
