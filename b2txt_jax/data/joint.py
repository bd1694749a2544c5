"""Several folders of sessions read as one, to train one model on several participants.

`data.root` lists them with commas. Participants have different channels: a session with fewer
features than the widest has zeros after its own. A day layer's matrix then maps the session's own
features to what all sessions share, so that each day of each participant has an input layer of its
own, of its own width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.data.trial import Reader, Trial, TrialRef


def folders(root: Path | str) -> tuple[Path, ...]:
    """Return the folders that `data.root` lists. The name of one folder may hold a comma.

    >>> [str(one) for one in folders("runs/t12,runs/t15")]
    ['runs/t12', 'runs/t15']
    """
    if isinstance(root, Path) or Path(root).is_dir():
        return (Path(root),)
    return tuple(Path(one.strip()) for one in root.split(",") if one.strip()) or (Path(root),)


def absolute(root: str) -> str:
    """Return `data.root` with absolute paths."""
    return ",".join(str(one.absolute()) for one in folders(root))


def with_zeros(features: np.ndarray, count: int) -> np.ndarray:
    """Return features with zeros after them: [T, D] -> [T, count]."""
    missing = count - features.shape[-1]
    return np.pad(features, ((0, 0), (0, missing))) if missing else features


class JointReader(Reader):
    """The sessions of several folders, each read by a reader of its format."""

    suffix: ClassVar[str] = ""

    def __init__(
        self, widths: Mapping[Path, int], feature_count: int, opened: Callable[[Path, int], Reader]
    ) -> None:
        """Open the folders.

        Args:
          widths: features a bin of each folder.
          feature_count: of the trials that are read.
          opened: returns the reader of a folder with so many features.

        Raises:
          DataError: a session is in two folders, or one folder has more features.
        """
        super().__init__(next(iter(widths)), feature_count)
        widest = max(widths.values())
        if widest > feature_count:
            listed = ", ".join(f"{count} in {path}" for path, count in widths.items())
            raise DataError(
                f"the sessions have {listed} features a bin; needed at most {feature_count}: set "
                f"--config.data.feature_count={widest}, and narrower ones are padded with zeros"
            )
        self._readers = [opened(path, count) for path, count in widths.items()]
        self._owner: dict[str, Reader] = {}
        for reader in self._readers:
            for name in reader.sessions:
                if name in self._owner:
                    raise DataError(
                        f"the session {name} is in {self._owner[name].root} and in {reader.root}; "
                        "needed a name for each: rename its folder in one of them"
                    )
                self._owner[name] = reader
        kinds = {reader.dtype for reader in self._readers}
        self.dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        self.suffix = self._readers[0].suffix  # type: ignore[misc]

    @classmethod
    def holds(cls, root: Path) -> bool:
        """Return False: it is no format of its own."""
        return False

    @property
    def sessions(self) -> tuple[str, ...]:
        """Names of the sessions of all folders, sorted."""
        return tuple(sorted(self._owner))

    def together(self, session: str) -> tuple[str, ...]:
        """Return the sessions of the folder that has this one: those of one participant."""
        if session not in self._owner:
            raise self._unknown(session)
        return self._owner[session].sessions

    def width(self, session: str) -> int:
        """Return how many features a session has, before zeros."""
        if session not in self._owner:
            raise self._unknown(session)
        return self._owner[session].feature_count

    def _list(self, session: str, split: str, labels_needed: bool) -> list[TrialRef] | None:
        owner = self._owner.get(session)
        return None if owner is None else owner._list(session, split, labels_needed)

    def _warn_of_fewer(self, refs: Sequence[TrialRef], sessions: Sequence[str], split: str) -> None:
        for reader in self._readers:
            held = {name for name in sessions if self._owner.get(name) is reader}
            mine = [ref for ref in refs if ref.session in held]
            reader._warn_of_fewer(mine, sorted(held), split)

    def read_into(self, ref: TrialRef, out: np.ndarray) -> Trial:
        """Read a trial, with zeros in the features that it does not have."""
        owner = self._owner[ref.session]
        if owner.feature_count == out.shape[1]:
            return owner.read_into(ref, out)
        # A reader fills rows that lie together in memory.
        trial = owner.read_into(ref, np.empty((ref.bins, owner.feature_count), out.dtype))
        return self._padded(trial, out[: len(trial.features)])

    def sample(self, ref: TrialRef) -> Trial:
        """As in `Reader`, without reading the other bins."""
        trial = self._owner[ref.session].sample(ref)
        return self._padded(
            trial, np.empty((len(trial.features), self.feature_count), trial.features.dtype)
        )

    def _padded(self, trial: Trial, rows: np.ndarray) -> Trial:
        own = trial.features.shape[1]
        rows[:, :own], rows[:, own:] = trial.features, 0
        return dataclasses.replace(trial, features=rows)

    def will_need(self, refs: Sequence[TrialRef]) -> None:
        """Start to fetch the trials in the background."""
        for reader in self._readers:
            mine = [ref for ref in refs if self._owner[ref.session] is reader]
            if mine:
                reader.will_need(mine)

    def close(self) -> None:
        """Close the files of all folders."""
        for reader in self._readers:
            reader.close()
