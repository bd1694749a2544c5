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


def statistics_file(run: Run, workdir: Path, day: str) -> Path:
    """Return where a run keeps them: for each day apart where it has several participants."""
    name = STATISTICS_FILE if len(folders(run.config.data.root)) == 1 else f"statistics.{day}.npz"
    return workdir / name


def first_statistics(run: Run, path: Path, day: str) -> Statistics:
    """Return those of the file, else those after the last recorded session, else cold ones.

    Args:
      run: the trained run.
      path: the file.
      day: the recording day whose input layer is used. The last session is that of its
        participant, and the statistics are of its own features.

    Raises:
      StatisticsError: the file cannot be used.
    """
    data, signal, width = run.config.data, run.config.signal, run.width(day)
    if signal.rolling_seconds > 0 and path.is_file():
        return read_statistics(path, width)
    if signal.rolling_seconds > 0 and all(one.is_dir() for one in folders(data.root)):
        with open_folder(data.root, data.feature_count) as recorded:
            peers = recorded.together(day)
            last = [name for name in run.sessions if name in peers][-1]
            return _own(NormalisedReader(recorded, signal).after(last), width)
    return cold(width)


def replay_statistics(run: Run, reader: Reader, first: TrialRef, path: Path | None) -> Statistics:
    """Return what a replay's first trial is normalised with, of the session's own features.

    Args:
      run: the trained run.
      reader: of the replayed session.
      first: the trial.
      path: a file. None, or not there yet: those that the trial had when it was recorded.

    Raises:
      StatisticsError: the file cannot be used.
    """
    signal, width = run.config.signal, reader.width(first.session)
    if signal.rolling_seconds <= 0:
        return cold(width)
    if path is not None and path.is_file():
        return read_statistics(path, width)
    return _own(NormalisedReader(reader, signal).before(first), width)


def _own(statistics: Statistics, width: int) -> Statistics:
    return Statistics(*(one[:width] for one in statistics))


def keep_statistics(run: Run, path: Path, statistics: Statistics) -> None:
    """Write them, where the run uses any."""
    if run.config.signal.rolling_seconds > 0:
        write_statistics(path, statistics)
