"""One reader of recorded sessions for both layouts: HDF5 as published, and packed ones.

`data.root` names a folder of either; a manifest in it says that it is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from b2txt_jax.data import hdf5, packed
from b2txt_jax.data.description import DataError
from b2txt_jax.data.trial import Trial, TrialRef


def find_sessions(root: Path | str) -> tuple[str, ...]:
    """Names of the sessions in `root`, sorted.

    Raises:
      DataError: `root` is not there, or holds no session, or packing it was not finished.
    """
    return packed.find_sessions(root) if packed.is_packed(root) else hdf5.find_sessions(root)


def index_split(
    root: Path | str,
    sessions: Sequence[str],
    split: str,
    feature_count: int = 512,
    *,
    min_bins: int = 1,
    labels_needed: bool | None = None,
) -> list[TrialRef]:
    """As `hdf5.index_split`, with the same errors, for both layouts."""
    index = packed.index_split if packed.is_packed(root) else hdf5.index_split
    return index(
        root, sessions, split, feature_count, min_bins=min_bins, labels_needed=labels_needed
    )


def split_lengths(
    root: Path | str, sessions: Sequence[str], split: str, feature_count: int = 512
) -> list[list[tuple[int, int]]]:
    """(bins, labels) of each trial, by session; labels need not be there.

    Raises:
      DataError: as `index_split`, but for a split without trials.
    """
    listed = packed.list_trials if packed.is_packed(root) else hdf5.list_trials
    refs = listed(root, sessions, split, feature_count, labels_needed=False)
    by_session: dict[str, list[tuple[int, int]]] = {name: [] for name in sessions}
    for ref in refs:
        by_session[ref.session].append((ref.bins, ref.label_length))
    return list(by_session.values())


def features_dtype(root: Path | str) -> np.dtype:
    """What features are stored as: float32, or float16 or bfloat16 in a packed folder."""
    return packed.read_manifest(root).dtype if packed.is_packed(root) else np.dtype(np.float32)


class SplitReader:
    """Reads trials of both layouts; safe to use from several threads."""

    def __init__(self, *, feature_count: int = 512, labels_needed: bool | None = None) -> None:
        self._hdf5 = hdf5.SplitReader(feature_count=feature_count, labels_needed=labels_needed)
        self._packed = packed.PackedReader()
        self._feature_count = feature_count

    def read(self, ref: TrialRef) -> Trial:
        """One trial, its features as float32, checked.

        Raises:
          DataError: as `hdf5.read_trial`; or packed data was cut off or damaged.
        """
        if ref.path.suffix != packed.SUFFIX:
            return self._hdf5.read(ref)
        return self._packed.read_into(ref, np.empty((ref.bins, self._feature_count), np.float32))

    def read_into(self, ref: TrialRef, out: np.ndarray) -> Trial:
        """As `read`, into the first rows of `out` [at least its bins, D], in the dtype of `out`.

        Returns:
          The trial; its features are a view of `out`.

        Raises:
          DataError: as `read`.
        """
        if ref.path.suffix == packed.SUFFIX:
            return self._packed.read_into(ref, out)
        trial = self._hdf5.read(ref)
        if len(trial.features) > len(out):
            raise DataError(
                f"{ref.path} {ref.key} has {len(trial.features)} bins, {ref.bins} when it was "
                "listed: the file changed; start again"
            )
        rows = out[: len(trial.features)]
        rows[...] = trial.features
        return Trial(trial.ref, rows, trial.labels, trial.sentence)

    def will_need(self, refs: Sequence[TrialRef]) -> None:
        """Starts to fetch packed trials from the disk in the background."""
        self._packed.will_need([ref for ref in refs if ref.path.suffix == packed.SUFFIX])

    def close(self) -> None:
        """Closes the files; reading again opens them again."""
        self._hdf5.close()
        self._packed.close()
