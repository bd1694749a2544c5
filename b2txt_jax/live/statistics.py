"""What the first bin of a recording under way is normalised with, and what is kept for the next."""

from __future__ import annotations

from pathlib import Path

from b2txt_jax.data.joint import folders
from b2txt_jax.data.normalised import NormalisedReader
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import Reader, TrialRef
from b2txt_jax.inference.run import Run
from b2txt_jax.signal.rolling import Statistics, cold, read_statistics, write_statistics

STATISTICS_FILE = "statistics.npz"
"""In a run's folder: those after the last bin that was decoded live."""


def first_statistics(run: Run, path: Path, day: str | None = None) -> Statistics:
    """Return those of the file, else those after the last recorded session, else cold ones.

    Args:
      run: the trained run.
      path: the file.
      day: the recording day whose input layer is used. The last session is that of its
        participant. None: the run's last day.

    Raises:
      StatisticsError: the file cannot be used.
    """
    data, signal = run.config.data, run.config.signal
    if signal.rolling_seconds > 0 and path.is_file():
        return read_statistics(path, data.feature_count)
    if signal.rolling_seconds > 0 and all(one.is_dir() for one in folders(data.root)):
        with open_folder(data.root, data.feature_count) as recorded:
            peers = recorded.together(day or run.sessions[-1])
            last = [name for name in run.sessions if name in peers][-1]
            return NormalisedReader(recorded, signal).after(last)
    return cold(data.feature_count)


def replay_statistics(run: Run, reader: Reader, first: TrialRef, path: Path | None) -> Statistics:
    """Return what a replay's first trial is normalised with.

    Args:
      run: the trained run.
      reader: of the replayed session.
      first: the trial.
      path: a file. None, or not there yet: those that the trial had when it was recorded.

    Raises:
      StatisticsError: the file cannot be used.
    """
    data, signal = run.config.data, run.config.signal
    if signal.rolling_seconds <= 0:
        return cold(data.feature_count)
    if path is not None and path.is_file():
        return read_statistics(path, data.feature_count)
    return NormalisedReader(reader, signal).before(first)


def keep_statistics(run: Run, path: Path, statistics: Statistics) -> None:
    """Write them, where the run uses any."""
    if run.config.signal.rolling_seconds > 0:
        write_statistics(path, statistics)
