"""Packs sessions once into files that training reads at random, several times faster than HDF5.

OUT/packed.json is written last. OUT can then be used as data.root instead of the HDF5 folder. After
an interruption the same command continues: finished files are checked and kept. Length buckets are
chosen from all trials and printed. data.buckets = () uses them. float16 and bfloat16 halve disk
space, reading and the transfer to the device. The training step computes in float32 in every case.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from b2txt_jax.config import ConfigError, load_config
from b2txt_jax.data.batches.buckets import BucketChoice
from b2txt_jax.data.description import FILE_NAME, DataError
from b2txt_jax.data.hdf5 import Hdf5Reader, session_file
from b2txt_jax.data.pack import PackSettings as PackSettings
from b2txt_jax.data.pack import whole_file, write_manifest, write_split
from b2txt_jax.data.packed import (
    DTYPES,
    MANIFEST,
    SUFFIX,
    PackedSplit,
    check_size,
    index_path,
    load_split,
)
from b2txt_jax.data.trial import SPLITS, Reader, TrialRef, listed, warn_of_missing

_LOCK = ".prepare.lock"


@dataclass(frozen=True)
class Prepared:
    """Contents of the folder after a call of `prepare`."""

    sessions: int
    trials: int
    kept: int
    """Whole files of an earlier call."""
    written: int
    """Files."""
    size: int
    """Bytes of features."""
    choice: BucketChoice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `b2txt prepare`."""
    parser.add_argument("--root", type=Path, help="folder of HDF5 sessions (default: the config's)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of the packed features; float32 (the default) packs them bit for bit; of the others, "
        "float16 rounds z-scores 8 times less than bfloat16, which holds any size of value",
    )
    parser.add_argument(
        "--config",
        help="configuration: its sessions, feature count, patch size and batches are used",
    )
    parser.epilog = "Any key of the configuration, when one is given: --config.section.key=value."


def run(args: argparse.Namespace) -> int:
    """Run `b2txt prepare`."""
    settings, root = PackSettings(dtype=args.dtype), args.root
    overrides = getattr(args, "overrides", [])
    if args.config is not None:
        config = load_config(args.config, overrides)
        root = root or Path(config.data.root)
        settings = PackSettings(
            args.dtype,
            config.data.sessions,
            config.data.feature_count,
            config.model.least_bins,
            config.data.days_per_batch,
            config.data.trials_per_day,
            config.data.plan,
        )
    elif overrides:
        raise ConfigError(f"found {overrides[0]} without --config; needed both, or neither")
    if root is None:
        raise ConfigError("found neither --root nor --config; needed the folder of HDF5 sessions")
    done = prepare(root, args.out, settings)
    print(
        f"{done.sessions} sessions, {done.trials} trials, {done.size / 1e9:.2f} GB as "
        f"{settings.dtype} in {args.out} ({done.written} files written, {done.kept} kept)"
    )
    print(done.choice)
    return 0


def prepare(
    root: Path | str, out: Path | str, settings: PackSettings, console: Console | None = None
) -> Prepared:
    """Pack the HDF5 sessions in `root` into `out`, continuing an earlier call that was interrupted.

    Raises:
      DataError: a trial cannot be used, `out` holds something else, the disk is full, or another
        call is writing there.
    """
    root, out = Path(root), Path(out)
    reader = Hdf5Reader(root, settings.feature_count)
    sessions = settings.sessions or reader.sessions
    _check_out(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    with reader, _locked(out), _progress(console) as progress:
        kept, todo = _sort_out(reader, out, sessions, settings, progress)
        _warn_of_missing(sessions, kept, todo)
        _check_space(out, todo, settings)
        if todo:
            (out / MANIFEST).unlink(missing_ok=True)
        task = progress.add_task("packing trials", total=sum(len(refs) for refs in todo.values()))
        packed = dict(kept)
        for (session, split), refs in todo.items():
            packed[session, split] = write_split(
                out,
                session,
                split,
                (reader.read(ref) for ref in refs),
                settings,
                _source(session_file(root, session, split)),
                lambda: progress.advance(task),
            )
        choice = write_manifest(out, packed, settings)
        _copy_description(root, out)
    return Prepared(
        len({session for session, _ in packed}),
        sum(len(split.trials) for split in packed.values()),
        len(kept),
        len(todo),
        sum(split.size for split in packed.values()),
        choice,
    )


def _sort_out(
    reader: Reader, out: Path, sessions: Sequence[str], settings: PackSettings, progress: Progress
) -> tuple[dict[tuple[str, str], PackedSplit], dict[tuple[str, str], list[TrialRef]]]:
    """Return (session, split) -> whole packed split, and (session, split) -> trials to pack."""
    kept: dict[tuple[str, str], PackedSplit] = {}
    todo: dict[tuple[str, str], list[TrialRef]] = {}
    task = progress.add_task("listing files", total=len(sessions) * len(SPLITS))
    for session in sessions:
        for split in SPLITS:
            source = session_file(reader.root, session, split)
            found = _kept(out, session, split, source, settings, progress)
            if found is not None:
                kept[session, split] = found
            else:
                refs = reader.find_trials([session], split, min_bins=settings.min_bins)
                if source.is_file():
                    todo[session, split] = refs
            progress.advance(task)
    return kept, todo


def _warn_of_missing(
    sessions: Sequence[str],
    kept: Mapping[tuple[str, str], PackedSplit],
    todo: Mapping[tuple[str, str], Sequence[TrialRef]],
) -> None:
    found = {place: [one.ref for one in split.trials.values()] for place, split in kept.items()}
    for wanted in SPLITS:
        places = {**found, **todo}.items()
        refs = [ref for (_, split), some in places if split == wanted for ref in some]
        if refs:
            warn_of_missing(refs, sessions, wanted)


def _kept(
    out: Path, session: str, split: str, source: Path, settings: PackSettings, progress: Progress
) -> PackedSplit | None:
    """Return a session's split as packed before, if it is of this source and whole."""
    if not source.is_file() or not index_path(out, session, split).is_file():
        return None
    try:
        packed = load_split(out, session, split, None)
        if (packed.source, packed.feature_count) != (_source(source), settings.feature_count):
            return None
        if any(trial.ref.bins < settings.min_bins for trial in packed.trials.values()):
            return None  # listing the source names the trial that is too short
        check_size(packed)
        _verify(packed)
    except DataError as error:
        progress.console.print(f"packing again: {error}", soft_wrap=True)
        return None
    return packed


def _verify(packed: PackedSplit) -> None:
    """Raise DataError at the first trial that does not match its checksum."""
    row = packed.feature_count * packed.dtype.itemsize
    with packed.path.open("rb") as file:
        for trial in packed.trials.values():
            file.seek(trial.offset)
            if zlib.crc32(file.read(trial.ref.bins * row)) != trial.crc32:
                raise DataError(f"{packed.path} {trial.ref.key} does not match its checksum")


def _check_out(out: Path, settings: PackSettings) -> None:
    """Raise DataError when `out` holds something that must not be mixed with the packed files."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; needed a folder: choose another --out")
    if any(out.glob("*/data_*.hdf5")):
        raise DataError(
            f"{out} holds HDF5 sessions; packed ones need a folder of their own: choose another "
            "--out"
        )
    own = (out / MANIFEST, out / _LOCK, *out.glob(f"*/data_*{SUFFIX}*"))
    others = sorted(path.name for path in out.glob("[!.]*"))
    if others and not any(path.exists() for path in own):
        raise DataError(
            f"{out} holds what `b2txt prepare` did not write: {listed(others)}; needed a new or "
            "empty folder, or one that it was writing: choose another --out"
        )
    for path in sorted(out.glob("*/data_*.json")):
        try:
            found = json.loads(path.read_bytes()).get("dtype")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # damaged: it is packed again
        if found != settings.dtype:
            raise DataError(
                f"{out} holds sessions packed as {found}; {settings.dtype} was asked for: choose "
                "another --out, or delete that folder"
            )


def _check_space(
    out: Path, todo: Mapping[tuple[str, str], Sequence[TrialRef]], settings: PackSettings
) -> None:
    row = settings.feature_count * DTYPES[settings.dtype].itemsize
    needed = sum(ref.bins * row for refs in todo.values() for ref in refs)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(
            f"the disk of {out} has {free / 1e9:.2f} GB free; needed {needed / 1e9:.2f} GB: free "
            "space, choose another --out, or halve it with --dtype bfloat16"
        )


def _source(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"file": path.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _copy_description(root: Path, out: Path) -> None:
    """Copy the table that names the corpus of each block, where there is one."""
    for folder in (root, root.resolve().parent):
        if (folder / FILE_NAME).is_file():
            with whole_file(out / FILE_NAME) as file:
                file.write((folder / FILE_NAME).read_bytes())
            return


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock the folder for this call. The system releases the lock of a killed process."""
    with (out / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another `b2txt prepare` is writing to {out}; wait for it or choose another --out"
            ) from error
        yield


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
