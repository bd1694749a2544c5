"""Reads sessions packed by `b2txt prepare`: flat files of features with checksums.

    ROOT/packed.json                         the manifest, written last
    ROOT/<session>/data_<split>.features     trials' features one after another, [bins, 512] each
    ROOT/<session>/data_<split>.json         offsets, checksums, labels, sentences, numbers

Why flat files and not ArrayRecord: a trial's bytes are the bytes of its rows of the batch. One
`preadv` puts them there without a copy, a parse or a lock, and any tool can read them. They are not
mapped into memory: what is read counts as page cache, which the kernel bounds, and not as memory of
the process. Every trial has a CRC-32, checked when a process reads it for the first time. The
manifest has the CRC-32 of each index and of itself.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.data.trial import DEFAULT_FEATURES, Reader, Trial, TrialRef, check_split, sampled

MANIFEST = "packed.json"
SUFFIX = ".features"
FORMAT = 1
"""Incremented when older folders cannot be read any more."""
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class PackedTrial:
    """One trial of a packed split. Its features are `bins * row bytes` from `offset` (bytes)."""

    ref: TrialRef
    offset: int
    crc32: int
    labels: np.ndarray | None
    """int32 [L], read-only. None without labels."""
    sentence: str | None


@dataclass(frozen=True)
class PackedSplit:
    """The index of one session's split."""

    path: Path
    """Of the features."""
    dtype: np.dtype
    feature_count: int
    size: int
    """Bytes of the file with the features."""
    source: Mapping[str, Any]
    """File name, bytes and time of change of what was packed."""
    trials: Mapping[str, PackedTrial]
    """By key, in the order of the source."""


@dataclass(frozen=True)
class Manifest:
    """What a packed folder holds."""

    dtype: np.dtype
    feature_count: int
    indices: Mapping[tuple[str, str], int]
    """(session, split) -> CRC-32 of its index."""
    buckets: tuple[tuple[int, int], ...]
    """(bins, labels) as chosen when it was packed."""

    @classmethod
    def features(cls, root: Path) -> int:
        """Return what the manifest has."""
        return read_manifest(root).feature_count

    @property
    def sessions(self) -> tuple[str, ...]:
        """Sorted names."""
        return tuple(sorted({session for session, _ in self.indices}))


def features_path(root: Path | str, session: str, split: str) -> Path:
    """Return the path of the features of a session's split, whether it exists or not."""
    check_split(split)
    return Path(root) / session / f"data_{split}{SUFFIX}"


def index_path(root: Path | str, session: str, split: str) -> Path:
    """Return the path of the index of a session's split, whether it exists or not."""
    return features_path(root, session, split).with_suffix(".json")


def read_manifest(root: Path | str) -> Manifest:
    """Read the manifest.

    Raises:
      DataError: it is missing, damaged, or of a format that this version does not know.
    """
    path = Path(root) / MANIFEST
    values = _read_json(path, None)
    _check_format(path, values)
    with _understood(path):
        if values.pop("crc32") != checksum_of(values):
            raise DataError(f"{path} does not match its checksum: {_AGAIN}")
        return Manifest(
            DTYPES[values["dtype"]],
            values["feature_count"],
            {
                (session, split): summary["index_crc32"]
                for session, splits in values["sessions"].items()
                for split, summary in splits.items()
            },
            tuple((bins, labels) for bins, labels in values["buckets"]),
        )


def checksum_of(values: Mapping[str, Any]) -> int:
    """Return the CRC-32 of the manifest's values without its own checksum."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def load_split(root: Path, session: str, split: str, crc32: int | None) -> PackedSplit:
    """Read the index of a session's split.

    Args:
      root: of the packed folder.
      session: its name.
      split: train, val or test.
      crc32: the checksum of the index. None: not checked.

    Raises:
      DataError: the index is missing or damaged.
    """
    path = index_path(root, session, split)
    values = _read_json(path, crc32)
    _check_format(path, values)
    features = features_path(root, session, split)
    with _understood(path):
        return PackedSplit(
            features,
            DTYPES[values["dtype"]],
            values["feature_count"],
            values["bytes"],
            values["source"],
            {trial["key"]: _trial(features, session, trial) for trial in values["trials"]},
        )


def check_size(split: PackedSplit) -> None:
    """Raise DataError unless the file with the features has the size that its index states."""
    try:
        size = split.path.stat().st_size
    except OSError as error:
        raise DataError(f"{split.path} is not there ({error}); {_AGAIN}") from error
    if size == split.size:
        return
    row = split.feature_count * split.dtype.itemsize
    cut = [key for key, t in split.trials.items() if t.offset + t.ref.bins * row > size]
    first = f": {cut[0]} is the first of {len(cut)} trials cut off" if cut else ""
    raise DataError(f"{split.path} has {size} bytes; needed {split.size}{first}; {_AGAIN}")


class PackedReader(Reader):
    """Reads trials of a packed folder at random. Threads read at once, without a lock."""

    suffix = SUFFIX

    def __init__(self, root: Path | str, feature_count: int = DEFAULT_FEATURES) -> None:
        """Read the manifest.

        Raises:
          DataError: it is damaged, or the folder has other features.
        """
        super().__init__(root, feature_count)
        self.manifest = read_manifest(self.root)
        self.dtype = self.manifest.dtype
        if self.manifest.feature_count != feature_count:
            raise DataError(
                f"{root} has {self.manifest.feature_count} features per bin; needed "
                f"{feature_count}: these are other features than the model's; set "
                f"--config.data.feature_count={self.manifest.feature_count}, or pack other sessions"
            )
        self._splits: dict[tuple[str, str], PackedSplit] = {}
        self._files: dict[Path, _OpenFile] = {}
        self._lock = threading.Lock()
        # Not at exit: threads that read ahead may still be reading.
        weakref.finalize(self, _close_all, self._files).atexit = False

    @classmethod
    def holds(cls, root: Path) -> bool:
        """Return whether `b2txt prepare` wrote `root`.

        Raises:
          DataError: packing was begun and not finished.
        """
        if (root / MANIFEST).is_file():
            return True
        if any(root.glob(f"*/data_*{SUFFIX}*")) and not any(root.glob("*/data_*.hdf5")):
            raise DataError(
                f"{root} has packed files but no {MANIFEST}, which `b2txt prepare` writes last: it "
                "was interrupted; call it again with the same arguments, and it goes on"
            )
        return False

    @property
    def sessions(self) -> tuple[str, ...]:
        """Names of the packed sessions, sorted."""
        return self.manifest.sessions

    def _list(self, session: str, split: str, labels_needed: bool) -> list[TrialRef] | None:
        if (session, split) not in self.manifest.indices:
            return None
        packed = self._split(session, split)
        check_size(packed)
        for trial in packed.trials.values():
            if labels_needed and trial.labels is None:
                raise DataError(
                    f"{packed.path} {trial.ref.key} has no labels; needed for this split: pack "
                    "others"
                )
        return [trial.ref for trial in packed.trials.values()]

    def will_need(self, refs: Sequence[TrialRef]) -> None:
        """Ask the kernel to fetch trials from the disk, all at once and in the background."""
        for ref in refs:
            file = self._file(ref.path)
            trial = _packed_trial(file.split, ref)
            size = trial.ref.bins * file.split.feature_count * file.split.dtype.itemsize
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.descriptor, trial.offset, size, os.POSIX_FADV_WILLNEED)

    def read_into(self, ref: TrialRef, out: np.ndarray) -> Trial:
        """As in `Reader`. The kernel fills an `out` of the packed dtype, without a copy.

        Raises:
          DataError: the file ends too early, or the trial does not match its checksum.
        """
        file = self._file(ref.path)
        trial = _packed_trial(file.split, ref)
        rows = out[: trial.ref.bins]
        direct = out.dtype == file.split.dtype
        stored = rows if direct else np.empty(rows.shape, file.split.dtype)
        if rows.shape != (trial.ref.bins, file.split.feature_count):
            raise DataError(
                f"{ref.path} {ref.key} is [{trial.ref.bins}, {file.split.feature_count}]; there is "
                f"room for {list(out.shape)}: the folder changed since it was listed; start again"
            )
        octets = stored.view(np.uint8).data.cast("B")
        _read_exactly(file.descriptor, octets, trial.offset, f"{ref.path} {ref.key}")
        if ref.key not in file.checked:
            if zlib.crc32(octets) != trial.crc32:
                raise DataError(
                    f"{ref.path} {ref.key} does not match its checksum: the file was damaged "
                    f"after it was written; {_AGAIN}"
                )
            file.checked.add(ref.key)
        if not direct:
            rows[...] = stored
        return Trial(trial.ref, rows, trial.labels, trial.sentence)

    def sample(self, ref: TrialRef) -> Trial:
        """As in `Reader`, without reading the other bins, and so without the trial's checksum."""
        file = self._file(ref.path)
        trial = _packed_trial(file.split, ref)
        bins = sampled(trial.ref)
        rows = np.empty((len(bins), file.split.feature_count), file.split.dtype)
        for row, at in zip(rows, bins, strict=True):
            offset = trial.offset + at * row.nbytes
            octets = row.view(np.uint8).data.cast("B")
            _read_exactly(file.descriptor, octets, offset, f"{ref.path} {ref.key}")
        return Trial(trial.ref, rows.astype(np.float32, copy=False), trial.labels, trial.sentence)

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        with self._lock:
            _close_all(self._files)

    def _split(self, session: str, split: str) -> PackedSplit:
        place = session, split
        if place not in self._splits:
            self._splits[place] = load_split(
                self.root, session, split, self.manifest.indices.get(place)
            )
        return self._splits[place]

    def _file(self, path: Path) -> _OpenFile:
        found = self._files.get(path)
        if found is not None:
            return found
        with self._lock:
            if path not in self._files:
                packed = self._split(path.parent.name, path.stem.removeprefix("data_"))
                check_size(packed)
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._files[path] = _OpenFile(packed, descriptor, set())
            return self._files[path]


@dataclass(frozen=True)
class _OpenFile:
    split: PackedSplit
    descriptor: int
    checked: set[str]
    """Keys of the trials whose checksum was verified."""


_AGAIN = (
    "delete it and call `b2txt prepare` with the same arguments, which packs again what is missing "
    "or damaged"
)


def _close_all(files: dict[Path, _OpenFile]) -> None:
    while files:
        os.close(files.popitem()[1].descriptor)


def _packed_trial(split: PackedSplit, ref: TrialRef) -> PackedTrial:
    if ref.key not in split.trials:
        raise DataError(f"{ref.path} has no {ref.key}: the folder changed since it was listed")
    return split.trials[ref.key]


def _read_exactly(descriptor: int, octets: memoryview, offset: int, where: str) -> None:
    done = 0
    while done < len(octets):
        try:
            count = os.preadv(descriptor, [octets[done:]], offset + done)
        except OSError as error:
            raise DataError(
                f"{where} cannot be read ({error}); needed a readable disk: {_AGAIN}"
            ) from error
        if count == 0:
            raise DataError(
                f"{where}: the file ends {len(octets) - done} bytes before the trial does: it was "
                f"cut off; {_AGAIN}"
            )
        done += count


def _check_format(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {values.get('format')}; this version reads {FORMAT}: pack the "
            "sessions again with `b2txt prepare` into another folder"
        )


def _trial(features: Path, session: str, values: Mapping[str, Any]) -> PackedTrial:
    labels = None
    if values["labels"] is not None:
        labels = np.array(values["labels"], np.int32)
        labels.setflags(write=False)
    ref = TrialRef(
        session,
        values["key"],
        features,
        values["bins"],
        0 if labels is None else len(labels),
        values["block"],
        values["trial"],
    )
    return PackedTrial(ref, values["offset"], values["crc32"], labels, values["sentence"])


def _read_json(path: Path, crc32: int | None) -> dict[str, Any]:
    try:
        octets = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    if crc32 is not None and zlib.crc32(octets) != crc32:
        raise DataError(f"{path} does not match its checksum in {MANIFEST}: {_AGAIN}")
    try:
        values = json.loads(octets)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no table of values; {_AGAIN}")
    return values


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Raise what a table of another form causes as an error that names its file."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} lacks what was needed ({error!r}); {_AGAIN}") from error
