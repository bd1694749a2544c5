"""Recorded trials, and the interface of what reads them from a folder of sessions.

A data format is one `Reader`: `hdf5.py` and `packed.py` are two. `reader.py` lists the formats and
chooses one when a folder is opened.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from b2txt_jax.data.description import FILE_NAME, DataError, DataWarning, trials_of

SPLITS = ("train", "val", "test")
DEFAULT_FEATURES = 512
"""Features per 20 ms bin of the published recordings."""
TRAIN_ONLY = frozenset(
    f"t15.{date}" for date in ("2023.08.11", "2024.03.03", "2024.04.25", "2024.04.28")
)
"""Published sessions without val and test files (NEJM reference, section 1)."""
TRIAL_KEY = re.compile(r"trial_(\d+)")
"""Names of trials, by which gaps are found."""


@dataclass(frozen=True)
class TrialRef:
    """Where a trial is, and its attributes. `label_length` is 0 without labels."""

    session: str
    key: str
    path: Path
    bins: int
    label_length: int
    block: int
    trial: int

    @property
    def name(self) -> str:
        """`t15.2023.08.13/trial_0007`."""
        return f"{self.session}/{self.key}"


@dataclass(frozen=True)
class Trial:
    """One trial: features [T, 512], labels int32 [L] without padding, the sentence as text.

    Features are float32, or have the dtype of the array that they were read into.
    """

    ref: TrialRef
    features: np.ndarray
    labels: np.ndarray | None
    sentence: str | None


class Reader(ABC):
    """A folder of recorded sessions in one format. Several threads may read at once."""

    suffix: ClassVar[str]
    """Of the files with features: `data_train` + suffix."""

    def __init__(self, root: Path | str, feature_count: int = DEFAULT_FEATURES) -> None:
        """Raise DataError unless `root` is a folder."""
        self.root = existing_folder(root)
        self.feature_count = feature_count
        self.dtype = np.dtype(np.float32)
        """Of the stored features: float32, or float16 or bfloat16 of a folder packed so."""

    @classmethod
    @abstractmethod
    def holds(cls, root: Path) -> bool:
        """Return whether the sessions in `root` are of this format."""

    @classmethod
    def features(cls, root: Path) -> int:
        """Return how many features a bin the sessions in `root` have, by the first one found.

        A format that may be read beside others, in several folders at once, defines it.

        Raises:
          DataError: none can be read.
        """
        raise DataError(
            f"{root} is read by {cls.__name__}, which cannot be one of several folders: give it "
            "alone as data.root, or define its method `features`"
        )

    def width(self, session: str) -> int:
        """Return how many features a session has. Zeros follow them where others have more.

        Raises:
          DataError: there is no such session.
        """
        return self.feature_count

    def together(self, session: str) -> tuple[str, ...]:
        """Return the sessions of the participant whose this one is, sorted.

        Raises:
          DataError: there is no such session.
        """
        return self.sessions

    @property
    @abstractmethod
    def sessions(self) -> tuple[str, ...]:
        """Names of the sessions, sorted.

        Raises:
          DataError: there is none.
        """

    @abstractmethod
    def _list(self, session: str, split: str, labels_needed: bool) -> list[TrialRef] | None:
        """List the trials of a session's split by number. None: it has no file of this split.

        Raises:
          DataError: a trial's shapes or attributes do not fit, or it has no labels where needed.
        """

    @abstractmethod
    def read_into(self, ref: TrialRef, out: np.ndarray) -> Trial:
        """Read a trial's features into the first rows of `out` [at least its bins, D].

        Args:
          ref: from `find_trials` of this folder.
          out: C-contiguous, of any float type.

        Returns:
          The checked trial. Its features are a view of `out`.

        Raises:
          DataError: the trial cannot be read, is damaged, or changed since it was listed.
        """

    def find_trials(
        self,
        sessions: Sequence[str],
        split: str,
        *,
        min_bins: int = 1,
        labels_needed: bool | None = None,
    ) -> list[TrialRef]:
        """List a split's trials by session, then by trial number. Features are not read.

        A session without a file of this split adds none: the published set has such sessions.

        Args:
          sessions: in the order wanted.
          split: train, val or test.
          min_bins: bins of 20 ms that a trial must have (the patch size of the model).
          labels_needed: whether a trial without labels is an error. By default in train only.

        Raises:
          DataError: unknown session or split, or a trial whose shapes or attributes do not fit.
        """
        check_split(split)
        needed = split == "train" if labels_needed is None else labels_needed
        found: list[TrialRef] = []
        for session in sessions:
            refs = self._list(session, split, needed)
            if refs is None and session not in self.sessions:
                raise self._unknown(session)
            found += refs or []
        for ref in found:
            if ref.bins < min_bins:
                raise too_short(f"{ref.path} {ref.key}", ref.bins, min_bins)
        return found

    def trials(
        self,
        sessions: Sequence[str],
        split: str,
        *,
        min_bins: int = 1,
        labels_needed: bool | None = None,
    ) -> list[TrialRef]:
        """Return what `find_trials` returns, at least one trial. Warn of what seems to be missing.

        Raises:
          DataError: as `find_trials`, or there is no trial at all.
        """
        refs = self.find_trials(sessions, split, min_bins=min_bins, labels_needed=labels_needed)
        if not refs:
            raise DataError(
                f"{self.root} has no {split} trial in the {len(sessions)} sessions asked for; "
                f"needed at least one session with a data_{split}{self.suffix} that is not empty: "
                "check data.sessions and the split"
            )
        warn_of_missing(refs, sessions, split)
        self._warn_of_fewer(refs, sessions, split)
        return refs

    def _warn_of_fewer(self, refs: Sequence[TrialRef], sessions: Sequence[str], split: str) -> None:
        """Issue a DataWarning where the table of blocks counts more trials than there are.

        No gap in the numbers shows that a file has lost its last trials.
        """
        described = trials_of(self.root, sessions, split)
        if described is None:
            return
        wanted, together = described
        found, what = len(refs), split
        if together:
            other = "val" if split == "test" else "test"
            found += len(self.find_trials(sessions, other, labels_needed=False))
            what = "val and test"
        if found < wanted:
            warnings.warn(
                f"there are {found} {what} trials, and {FILE_NAME} counts {wanted}: a file may "
                "have lost its last trials, after which ids of a submission are off; copy it again",
                DataWarning,
                stacklevel=3,
            )

    def lengths(self, sessions: Sequence[str], split: str) -> list[list[tuple[int, int]]]:
        """Return (bins, labels) of each trial, by session. Labels are optional.

        Raises:
          DataError: as `find_trials`.
        """
        by_session: dict[str, list[tuple[int, int]]] = {name: [] for name in sessions}
        for ref in self.find_trials(sessions, split, labels_needed=False):
            by_session[ref.session].append((ref.bins, ref.label_length))
        return list(by_session.values())

    def read(self, ref: TrialRef) -> Trial:
        """Read one trial with float32 features.

        Raises:
          DataError: as `read_into`.
        """
        return self.read_into(ref, np.empty((ref.bins, self.feature_count), np.float32))

    def sample(self, ref: TrialRef) -> Trial:
        """Read one trial with the features of the bins `sampled(ref)` alone, float32.

        Raises:
          DataError: as `read_into`.
        """
        trial = self.read(ref)
        return dataclasses.replace(trial, features=trial.features[sampled(ref)])

    def will_need(self, refs: Sequence[TrialRef]) -> None:  # noqa: B027  a hint, free to ignore
        """Start to fetch trials from the disk in the background, where the format can."""

    def close(self) -> None:  # noqa: B027  a format without open files has nothing to do
        """Close the files. Reading opens them again."""

    def _unknown(self, session: str) -> DataError:
        names = self.sessions
        near = difflib.get_close_matches(session, names, n=3, cutoff=0.3) or list(names[:3])
        return DataError(
            f"the session {session!r} has no data_train, data_val or data_test{self.suffix} in "
            f"{self.root}; nearest of its {len(names)} sessions: {', '.join(near)}: correct "
            "data.sessions"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sampled(ref: TrialRef) -> list[int]:
    """Return the first, middle and last bin of a trial."""
    return sorted({0, ref.bins // 2, ref.bins - 1})


def frames_needed(labels: np.ndarray) -> int:
    """Return the frames that CTC needs for `labels` [L], unpadded.

    One frame each, and one for the blank between equal neighbours. `training/ctc.py` has the same
    rule for padded rows inside the jitted step, where shapes may not depend on values.
    """
    labels = np.asarray(labels)
    return int(len(labels) + np.count_nonzero(labels[1:] == labels[:-1]))


def warn_of_missing(refs: Sequence[TrialRef], sessions: Sequence[str], split: str) -> None:
    """Issue a DataWarning for trials that a split seems to lack.

    Args:
      refs: the trials that were found, each session's by number.
      sessions: where they were looked for.
      split: train, val or test.
    """
    numbers: dict[str, list[int]] = {name: [] for name in sessions}
    for ref in refs:
        if match := TRIAL_KEY.fullmatch(ref.key):
            numbers[ref.session].append(int(match.group(1)))
    filled = {ref.session for ref in refs}
    # Training itself names the sessions that it has no trial of.
    empty = [name for name in sessions if name not in filled | TRAIN_ONLY and split != "train"]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(sessions)} sessions have no {split} trial: {listed(empty)}; "
            f"their data_{split} was not copied, or is empty",
            DataWarning,
            stacklevel=3,
        )
    holes = [
        (name, before + 1, after - 1)
        for name, found in numbers.items()
        for before, after in itertools.pairwise([-1, *found])
        if after - before > 1
    ]
    if holes:
        shown = [
            f"{name}/trial_{first:04d}" + (f" to trial_{last:04d}" if last > first else "")
            for name, first, last in holes
        ]
        ids = "; ids of a submission after a missing trial are off" if split == "test" else ""
        warnings.warn(
            f"{sum(last - first + 1 for _, first, last in holes)} {split} trials are missing "
            f"between others: {listed(shown)}{ids}",
            DataWarning,
            stacklevel=3,
        )


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_split(split: str) -> None:
    """Raise DataError unless `split` is train, val or test."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; needed one of {', '.join(SPLITS)}")


def existing_folder(root: Path | str) -> Path:
    """Return `root` as a path.

    Raises:
      DataError: it is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"the data folder {root} is not there; needed the folder with the sessions "
            "(hdf5_data_final): correct data.root, or write sessions with `b2txt simulate`"
        )
    return root


def too_short(where: str, bins: int, min_bins: int) -> DataError:
    """Return the error for a trial with fewer bins than the model needs for a frame."""
    return DataError(
        f"{where}: the trial has {bins} bins; the model needs {min_bins}: drop the trial "
        "or change the model's settings (of a GRU model.patch_size)"
    )
