"""The folder of a calibrated run: its sessions, its checkpoint, its report."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py

from b2txt_jax.calibration.calibrate import Calibrated
from b2txt_jax.data.hdf5 import Hdf5Reader
from b2txt_jax.data.joint import absolute
from b2txt_jax.data.trial import SPLITS, Reader
from b2txt_jax.data.write_hdf5 import write_trial
from b2txt_jax.interop.convert import write_workdir
from b2txt_jax.interop.nejm import Run as Converted
from b2txt_jax.interop.weights import fresh_state
from b2txt_jax.training.checkpoint import BestScore
from lm_server.files.atomic_file import replacing

REPORT_FILE = "calibration.json"
SESSIONS_FOLDER = "sessions"


@contextmanager
def joined_sessions(
    out: Path, old: Path, old_days: Sequence[str], new: Reader, recorded: str, session: str
) -> Iterator[Path]:
    """Yield a folder with the sessions of the old days and the new one, for `data.root`.

    It is OUT/sessions, with links, where the block ends without an exception. HDF5 sessions are
    linked, others are written as HDF5. An old day that is not there as HDF5 has an empty file, so
    that the other days can be evaluated.

    Args:
      out: folder of the new run.
      old: `data.root` of the trained run, which may not be there.
      old_days: its sessions.
      new: reader of the new day.
      recorded: the new day's name in `new`.
      session: its name in the run.
    """
    with _building(out) as building:
        for name in old_days:
            if any((old / name).glob("data_*.hdf5")):
                (building / name).symlink_to((old / name).resolve())
            else:
                (building / name).mkdir()
                h5py.File(building / name / "data_val.hdf5", "w").close()
        _add_session(building, new, recorded, session)
        yield building


@contextmanager
def session_alone(out: Path, new: Reader, recorded: str, session: str) -> Iterator[Path]:
    """Yield a folder with the new session alone, one of several of `data.root`.

    It is OUT/sessions where the block ends without an exception. See `joined_sessions`.
    """
    with _building(out) as building:
        _add_session(building, new, recorded, session)
        yield building


@contextmanager
def _building(out: Path) -> Iterator[Path]:
    """Yield an empty folder. It becomes OUT/sessions where the block ends without an exception."""
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield building
        out.mkdir(exist_ok=True)
        os.replace(building, out / SESSIONS_FOLDER)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _add_session(folder: Path, new: Reader, recorded: str, session: str) -> None:
    if isinstance(new, Hdf5Reader):
        (folder / session).symlink_to((new.root / recorded).resolve())
    else:
        _write_session(folder / session, new, recorded, session)


def _write_session(folder: Path, reader: Reader, recorded: str, session: str) -> None:
    folder.mkdir()
    for split in SPLITS:
        refs = reader.find_trials([recorded], split, labels_needed=False)
        if not refs:
            continue
        with h5py.File(folder / f"data_{split}.hdf5", "w") as file:
            for number, ref in enumerate(refs):
                trial = reader.read(ref)
                group = file.create_group(f"trial_{number:04d}")
                place = ref.block, ref.trial
                write_trial(group, session, *place, trial.features, trial.labels, trial.sentence)


def write_run(out: Path, root: str, calibrated: Calibrated, step: int) -> None:
    """Write a run's folder: configuration, checkpoint, report. It may hold the sessions already.

    Args:
      out: the folder.
      root: of the sessions, as of `data.root`.
      calibrated: the model.
      step: optimizer steps of the trained run. Those of the calibration are added.
    """
    config = calibrated.config
    config = replace(config, data=replace(config.data, root=absolute(root)))
    step += calibrated.report["settings"]["steps"]
    per = calibrated.report["per"]["after"]
    best = BestScore(math.inf if per is None else per, math.inf, step)
    write_workdir(out, Converted(config, fresh_state(config, calibrated.params, step), best))
    write_report(out, calibrated.report)


def write_report(out: Path, report: dict[str, Any]) -> None:
    """Write the report beside the run."""
    with replacing(out / REPORT_FILE) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n")
