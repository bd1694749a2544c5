"""A recorded trial, and where it is; what the readers give and the loader takes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from b2txt_jax.data.description import DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class TrialRef:
    """Where a trial is and what its attributes say; label_length is 0 without labels."""

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
    """One trial: features [T, 512], labels int32 [L] unpadded, the sentence as text.

    Features are float32; those of a batch made of packed sessions may be float16 or bfloat16.
    """

    ref: TrialRef
    features: np.ndarray
    labels: np.ndarray | None
    sentence: str | None


def frames_needed(labels: np.ndarray) -> int:
    """Frames that CTC needs for `labels` [L]: one each, and a blank between equal neighbours."""
    labels = np.asarray(labels)
    return int(len(labels) + np.count_nonzero(labels[1:] == labels[:-1]))


def check_split(split: str) -> None:
    """Raises DataError unless `split` is train, val or test."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; needed one of {', '.join(SPLITS)}")


def existing_folder(root: Path | str) -> Path:
    """`root` as a path.

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


def unknown_session(root: Path, session: str, what: str, names: Sequence[str]) -> DataError:
    """The error for a session that `root` does not have, with the nearest that it has."""
    near = difflib.get_close_matches(session, names, n=3, cutoff=0.3) or list(names[:3])
    return DataError(
        f"the session {session!r} has no {what} in {root}; "
        f"nearest of its {len(names)} sessions: {', '.join(near)}: correct data.sessions"
    )


def no_trials(root: Path | str, split: str, sessions: Sequence[str], file: str) -> DataError:
    """The error for a split without a single trial."""
    return DataError(
        f"{root} has no {split} trial in the {len(sessions)} sessions asked for; needed at "
        f"least one session with a {file} that is not empty: check data.sessions "
        "and the split"
    )


def too_short(where: str, bins: int, min_bins: int) -> DataError:
    """The error for a trial shorter than one patch."""
    return DataError(
        f"{where}: the trial has {bins} bins; one patch needs {min_bins}: drop the trial or "
        "lower model.patch_size"
    )
