"""Reads recorded sessions in the published T15 layout, and checks what it reads.

    ROOT/<session>/data_{train,val,test}.hdf5, each with groups trial_0000, trial_0001, ...
      input_features  float [T, 512]  features per 20 ms bin
      seq_class_ids   int [>= L]      phoneme classes padded with 0 (absent without labels)
      transcription   int [>= chars]  character codes padded with 0 (absent without labels)
      attributes n_time_steps, seq_len, sentence_label, session, block_num, trial_num

All that the published loader reads is read here too: any width of integer or float, text as bytes
or str, rows after `n_time_steps`, labels padded to any length, further groups and attributes.
Refused is what would train or score wrongly in silence: see `Hdf5Reader.read`.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from b2txt_jax.data.description import DataError, DataWarning
from b2txt_jax.data.trial import (
    DEFAULT_FEATURES,
    TRIAL_KEY,
    Reader,
    Trial,
    TrialRef,
    check_split,
    listed,
    sampled,
)
from b2txt_jax.phonemes import SILENCE_ID

_ENDINGS = re.compile(r"data_(train|val|test)\.(hdf5?|h5|he5|partial)(\..+)?", re.IGNORECASE)
"""Files of trials and what they are renamed to, `.partial` while they are written."""
_OPEN_FILES = 16


def session_file(root: Path | str, session: str, split: str) -> Path:
    """Return the path of a session's file of one split, whether it exists or not.

    Raises:
      DataError: `split` is none of train, val, test.
    """
    check_split(split)
    return Path(root) / session / f"data_{split}.hdf5"


class Hdf5Reader(Reader):
    """Reads the published layout and keeps the last few files open."""

    suffix = ".hdf5"

    def __init__(
        self,
        root: Path | str,
        feature_count: int = DEFAULT_FEATURES,
        open_files: int = _OPEN_FILES,
    ) -> None:
        super().__init__(root, feature_count)
        self._open_files = open_files
        self._files: OrderedDict[Path, h5py.File] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def holds(cls, root: Path) -> bool:
        """Return whether a session in `root` has an HDF5 file."""
        return any(root.glob("*/data_*.hdf5"))

    @classmethod
    def features(cls, root: Path) -> int:
        """Return the features of the first trial in the folder."""
        for path in sorted(root.glob("*/data_*.hdf5")):
            with _open(path) as file, _readable(path):
                for key in _trial_keys(file)[:1]:
                    return int(_dataset(file[key], "input_features", _where(path, key)).shape[-1])
        raise DataError(
            f"{root} holds no trial; needed sessions with data_train.hdf5: correct data.root"
        )

    @property
    def sessions(self) -> tuple[str, ...]:
        """Names of the folders that hold a file of trials, sorted. Hidden ones are no sessions."""
        names: list[str] = []
        others: list[str] = []
        for folder in sorted(self.root.glob("[!.]*")):
            if not folder.exists():
                raise _dangling(folder)
            if folder.is_dir():
                held = any(_ENDINGS.fullmatch(path.name) for path in folder.iterdir())
                (names if held else others).append(folder.name)
        if not names:
            raise DataError(
                f"{self.root} holds no session; needed folders such as t15.2023.08.13 with "
                "data_train.hdf5: point data.root at hdf5_data_final, or write sessions with "
                "`b2txt simulate`"
            )
        if others:
            warnings.warn(
                f"no sessions, since they hold no data_train.hdf5, data_val.hdf5 or "
                f"data_test.hdf5: {listed(others)} ({len(others)} folders of {self.root})",
                DataWarning,
                stacklevel=2,
            )
        return tuple(names)

    def _list(self, session: str, split: str, labels_needed: bool) -> list[TrialRef] | None:
        path = session_file(self.root, session, split)
        if not path.is_file():
            _check_nothing_instead(path, split)
            return None
        with _open(path) as file, _readable(path):
            return [
                _reference(file[key], session, path, self.feature_count, labels_needed)
                for key in _trial_keys(file)
            ]

    def read(self, ref: TrialRef) -> Trial:
        """Read and check one trial.

        Raises:
          DataError: an unreadable file, a missing dataset or attribute, a wrong shape or type, NaN
            or infinite features, a label id outside 1..40, `seq_len` or `n_time_steps` beyond the
            data, or no labels where they are needed.
        """
        with self._lock:
            file = self._file(ref.path)
            with _readable(ref.path):
                return self._read(ref, file)

    def sample(self, ref: TrialRef) -> Trial:
        """As in `Reader`, without reading the other bins."""
        with self._lock:
            file = self._file(ref.path)
            with _readable(ref.path):
                return self._read(ref, file, sampled(ref))

    def read_into(self, ref: TrialRef, out: np.ndarray) -> Trial:
        """Read as `Reader` says, and raise what `read` raises."""
        trial = self.read(ref)
        if len(trial.features) > len(out):
            raise DataError(
                f"{ref.path} {ref.key} has {len(trial.features)} bins, {ref.bins} when it was "
                "listed: the file changed; start again"
            )
        rows = out[: len(trial.features)]
        rows[...] = trial.features
        return Trial(trial.ref, rows, trial.labels, trial.sentence)

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _read(self, ref: TrialRef, file: h5py.File, bins: list[int] | None = None) -> Trial:
        if ref.key not in file:
            raise DataError(f"{ref.path} has no {ref.key}: the file changed since it was listed")
        group = file[ref.key]
        # The attributes are read again: the file may not be the one that was listed. Labels that
        # it had then must still be there.
        ref = _reference(group, ref.session, ref.path, self.feature_count, ref.label_length > 0)
        stored = _read(group["input_features"], ref, bins or slice(0, ref.bins))
        features = stored.astype(np.float32, copy=False)
        _check_finite(features, ref)
        labels = None
        if "seq_class_ids" in group and "seq_len" in group.attrs:
            found = _read(group["seq_class_ids"], ref, slice(0, ref.label_length))
            _check_labels(found, _where(ref.path, ref.key))
            labels = found.astype(np.int32)
        return Trial(ref, features, labels, _sentence(group, ref))

    def _file(self, path: Path) -> h5py.File:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = _open(path)
            if len(self._files) > self._open_files:
                self._files.popitem(last=False)[1].close()
        return self._files[path]


def _dangling(path: Path) -> DataError:
    return DataError(
        f"{path} is a link to {os.readlink(path)}, which is not there; needed what it leads to: "
        "copy it again, or remove the link to do without"
    )


def _check_nothing_instead(path: Path, split: str) -> None:
    """Raise DataError where something stands in for a file that is not there."""
    if path.exists():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise DataError(f"{path} is {kind}; needed an HDF5 file of recorded trials")
    if path.is_symlink():
        raise _dangling(path)
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        match = _ENDINGS.fullmatch(other.name)
        if match and match.group(1).lower() == split:
            raise DataError(
                f"{other} is there, and no {path.name}; needed that name: if it is whole, rename "
                "it (unpack it first if it is compressed), otherwise move it elsewhere"
            )


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise DataError(
            f"{path} is not there; needed an HDF5 file of recorded trials: check data.root"
        )
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) cannot be opened as HDF5 ({error}); needed a "
            "whole HDF5 file: copy or download it again"
        ) from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise what h5py raises on damaged contents as an error that names the file."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{path} opens but cannot be read ({error}); needed a whole HDF5 file: copy or "
            "download it again"
        ) from error


def _trial_keys(file: h5py.File) -> list[str]:
    matches = (TRIAL_KEY.fullmatch(key) for key in file)
    return [m.group() for m in sorted((m for m in matches if m), key=lambda m: int(m.group(1)))]


def _reference(
    group: h5py.Group, session: str, path: Path, feature_count: int, labels_needed: bool
) -> TrialRef:
    """Return a trial's reference, its shapes and attributes checked."""
    where = _where(path, group.name)
    check_own(group, path, where)
    features = _dataset(group, "input_features", where)
    if features.ndim != 2 or features.shape[1] != feature_count:
        found = f"={features.shape[1]}" if features.ndim == 2 else ""
        raise DataError(
            f"{where}: `input_features` is {list(features.shape)}; needed [T, {feature_count}]: "
            f"these are other features than the model's; set --config.data.feature_count{found}, "
            "or take the published files"
        )
    if features.dtype.kind not in "fiu":
        raise DataError(f"{where}: `input_features` is {features.dtype}; needed float32 numbers")
    bins = _integer(group, "n_time_steps", where)
    if not 1 <= bins <= features.shape[0]:
        raise DataError(
            f"{where}: `n_time_steps` is {bins}; needed 1 to {features.shape[0]}, the rows of "
            "`input_features`: the trial was cut off; leave it out or copy the file again"
        )
    return TrialRef(
        session,
        group.name.strip("/"),
        path,
        bins,
        _label_length(group, where, labels_needed),
        _integer(group, "block_num", where),
        _integer(group, "trial_num", where),
    )


def _label_length(group: h5py.Group, where: str, needed: bool) -> int:
    """Return the label's length by `seq_len`, or 0 for a trial without labels."""
    present = ("seq_class_ids" in group, "seq_len" in group.attrs)
    if not needed and not all(present):
        return 0
    ids = _dataset(group, "seq_class_ids", where)
    length = _integer(group, "seq_len", where)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"{where}: `seq_class_ids` is {ids.dtype} {list(ids.shape)}; needed integers [L]"
        )
    if not 0 <= length <= ids.shape[0]:
        raise DataError(
            f"{where}: `seq_len` is {length}; needed 0 to {ids.shape[0]}, the length of "
            "`seq_class_ids`: the label was cut off; leave the trial out or write its label again"
        )
    # Here too, so that a wrong label is found before anything is compiled.
    _check_labels(ids[:length], where)
    return length


def _check_finite(features: np.ndarray, ref: TrialRef) -> None:
    finite = np.isfinite(features)
    if finite.all():
        return
    time, channel = (int(i) for i in np.argwhere(~finite)[0])
    raise DataError(
        f"{_where(ref.path, ref.key)}: `input_features` has {int((~finite).sum())} NaN or "
        f"infinite values, the first ({features[time, channel]}) in bin {time}, feature "
        f"{channel}; needed finite numbers: repair or leave out the trial (a z-score over a "
        "silent channel gives NaN)"
    )


def _check_labels(labels: np.ndarray, where: str) -> None:
    wrong = np.flatnonzero((labels < 1) | (labels > SILENCE_ID))
    if wrong.size:
        raise DataError(
            f"{where}: `seq_class_ids` has the id {int(labels[wrong[0]])} at "
            f"position {int(wrong[0])} of {len(labels)}; needed 1 to {SILENCE_ID} (1-39 phonemes, "
            f"{SILENCE_ID} silence; 0 is the blank and pads after seq_len): write the label again"
        )


def _sentence(group: h5py.Group, ref: TrialRef) -> str | None:
    """Return the sentence by `sentence_label`, else by the character codes, else None."""
    text = group.attrs.get("sentence_label")
    where = _where(ref.path, ref.key)
    if text is not None:
        if np.size(text) != 1:
            raise DataError(f"{where}: the attribute `sentence_label` is {text!r}; needed one text")
        text = np.asarray(text).reshape(-1)[0] if np.ndim(text) else text
        try:
            # h5py returns bytes that are not UTF-8 as half surrogate pairs.
            return bytes.decode(text.encode() if isinstance(text, str) else text)
        except (TypeError, UnicodeError) as error:
            raise DataError(
                f"{where}: the attribute `sentence_label` is {text!r} ({error}); needed UTF-8 text"
            ) from error
    if "transcription" not in group:
        return None
    codes = _read(_dataset(group, "transcription", where), ref, slice(None))
    if codes.ndim != 1 or codes.dtype.kind not in "iuf" or not _all_characters(codes):
        raise DataError(
            f"{where}: `transcription` is {codes.dtype} {list(codes.shape)}, not all character "
            "codes; needed integers [characters], padded with 0: write it again"
        )
    ends = np.flatnonzero(codes == 0)
    return "".join(chr(int(code)) for code in codes[: ends[0] if ends.size else None])


def _all_characters(codes: np.ndarray) -> bool:
    return bool(((codes >= 0) & (codes <= sys.maxunicode)).all())


def _dataset(group: h5py.Group, name: str, where: str) -> h5py.Dataset:
    found = group.get(name) if isinstance(group, h5py.Group) else None
    if not isinstance(found, h5py.Dataset):
        held = sorted(group) if isinstance(group, h5py.Group) else []
        raise DataError(
            f"{where} has no dataset `{name}`, only {held}; needed for this split: take a file "
            "that has it"
        )
    check_own(found, Path(group.file.filename), f"{where}: `{name}`")
    return found


def check_own(found: h5py.Group | h5py.Dataset, path: Path, where: str) -> None:
    """Raise DataError where HDF5 would read another file than the one that was opened.

    Links, virtual datasets and external storage may name any file of this machine.
    """
    elsewhere = found.file.filename if Path(found.file.filename) != path else None
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        sources = found.virtual_sources() if found.is_virtual else []
        elsewhere = found.external[0][0] if found.external else sources and sources[0].file_name
    if elsewhere:
        raise DataError(
            f"{where} is not in this file, but in {elsewhere}; needed one file with all of its "
            "data: copy what it refers to into it (h5py: file.copy(..., expand_external=True))"
        )


def _integer(group: h5py.Group, name: str, where: str) -> int:
    if name not in group.attrs:
        raise DataError(
            f"{where} has no attribute `{name}`, only {sorted(group.attrs)}; needed a whole number"
        )
    value: Any = group.attrs[name]
    number = np.asarray(value).reshape(-1)
    fits = number.size == 1 and number.dtype.kind in "iuf" and bool(np.isfinite(number[0]))
    if not fits or number[0] != np.floor(number[0]):
        raise DataError(f"{where}: the attribute `{name}` is {value!r}; needed one whole number")
    return int(number[0])


def _read(dataset: h5py.Dataset, ref: TrialRef, rows: slice | list[int]) -> np.ndarray:
    try:
        return np.asarray(dataset[rows])
    except (OSError, RuntimeError) as error:
        # A damaged chunk. Other trials of the file may be whole, so the error names this one.
        raise DataError(
            f"{_where(ref.path, ref.key)}: `{dataset.name.rsplit('/', 1)[-1]}` cannot be read "
            f"({error}); needed a whole HDF5 file: copy or download it again"
        ) from error


def _where(path: Path, key: str) -> str:
    return f"{path} {key.strip('/')}"
