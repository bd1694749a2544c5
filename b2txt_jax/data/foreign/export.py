"""Writes recorded sessions as NWB files, for archives such as DANDI.

Each session becomes OUT/<session>.nwb: features as regular time series of 20 ms bins, and a table
of trials with sentence, phonemes, block and split. What the sessions do not hold comes from a file
of yours (--metadata): who was recorded, where, when, and in which unit features are. Nothing of
that is made up. `b2txt import nwb` reads the files back.

Recordings of a participant may be shared with consent and ethical approval only.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress

from b2txt_jax import __version__
from b2txt_jax.data.description import DataError
from b2txt_jax.data.fingerprint import fingerprint
from b2txt_jax.data.foreign.nwb import BLOCK, PHONEMES, SILENCE, SPLIT, TEXT
from b2txt_jax.data.foreign.nwb_file import BIN_SECONDS, opened
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.trial import DEFAULT_FEATURES, SPLITS, Reader, Trial
from b2txt_jax.phonemes import PHONEME_IDS, SILENCE_ID
from lm_server.files.atomic_file import replacing

_NEEDED = ("session_description", "institution", "lab", "unit", "subject", "sessions")
_SUBJECT = ("subject_id", "species", "sex", "age")
_OPTIONAL = (
    *("experimenter", "experiment_description", "keywords", "related_publications", "notes"),
    *("protocol", "data_collection", "surgery", "stimulus_notes", "series"),
)
_EXAMPLE = """session_description: sentences that a participant attempted to speak
institution: ...
lab: ...
unit: z-score
subject: {subject_id: ..., species: Homo sapiens, sex: M/F/O/U, age: P45Y}
sessions:
  %s: {session_start_time: 2023-08-13T10:00:00-07:00}"""
_NAMES = {number: name for name, number in PHONEME_IDS.items()} | {SILENCE_ID: SILENCE}
_COLUMNS = {
    TEXT: "sentence, as it was shown. Empty in a split without labels",
    PHONEMES: f"ARPAbet without stress, {SILENCE} is silence after a word",
    BLOCK: "block of sentences",
    "trial_num": "number within the block",
    SPLIT: "train, val or test",
}


@dataclass(frozen=True)
class _Part:
    """Columns of the features that are a time series of their own."""

    name: str
    first: int
    last: int
    description: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `b2txt export`."""
    parser.add_argument(
        "--nwb", type=Path, required=True, metavar="OUT", help="folder for the NWB files"
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="folder of sessions, such as hdf5_data_final"
    )
    parser.add_argument(
        "--metadata",
        type=Path,
        required=True,
        help=f"YAML with {', '.join(_NEEDED)}; its errors show an example",
    )
    parser.add_argument(
        "--features", type=int, default=DEFAULT_FEATURES, help=f"a bin (default {DEFAULT_FEATURES})"
    )
    parser.add_argument(
        "--session", action="append", default=[], help="only this one; again for each"
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt export`."""
    for path in export_nwb(args.source, args.nwb, args.metadata, args.features, args.session):
        print(path)
    return 0


def export_nwb(
    source: Path,
    out: Path,
    metadata: Path,
    features: int = DEFAULT_FEATURES,
    sessions: Sequence[str] = (),
) -> list[Path]:
    """Write an NWB file for each session of a folder. Return their paths.

    Args:
      source: folder of sessions.
      out: folder for the files. A session whose file is there is not written again, if it was
        written of the same metadata and trials.
      metadata: YAML file of what the sessions do not hold.
      features: a bin.
      sessions: which. Empty: all.

    Raises:
      DataError: a session cannot be read, the metadata lack something, or a file that is there
        was written of others.
    """
    _pynwb()  # Not after the first session has been read.
    with open_folder(source, features) as reader:
        chosen = tuple(sessions) or reader.sessions
        about = _metadata(metadata, chosen)
        parts = _parts(about, features, metadata)
        out.mkdir(parents=True, exist_ok=True)
        written = []
        with Progress(console=Console(stderr=True)) as progress:
            for session in progress.track(chosen, description="exporting"):
                path = out / f"{session}.nwb"
                identifier = _identifier(reader, session, about, parts)
                if path.is_file():
                    _check_written(path, identifier)
                else:
                    _write(reader, session, path, about, parts, identifier)
                written.append(path)
    return written


def _pynwb() -> Any:
    try:
        import pynwb
    except ImportError as error:
        raise DataError(
            f"export to NWB needs the package pynwb, which cannot be used here ({error}); install "
            "it: pip install '.[nwb]' -c constraints.txt"
        ) from error
    return pynwb


def _metadata(path: Path, sessions: Sequence[str]) -> dict[str, Any]:
    """Return the user's metadata, checked to be whole.

    Raises:
      DataError: the file cannot be read, something is missing, or it is of no use here.
    """
    example = "; an example:\n" + _EXAMPLE % sessions[0]
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read ({error}); needed YAML{example}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds {type(found).__name__}; needed keys and values{example}")
    subject = found.get("subject")
    held = subject if isinstance(subject, dict) else {}
    times = found.get("sessions")
    known = times if isinstance(times, dict) else {}
    missing = [key for key in _NEEDED if not found.get(key)]
    missing += [f"subject.{key}" for key in _SUBJECT if not held.get(key)]
    missing += [f"sessions.{name}.session_start_time" for name in sessions if name not in known]
    unknown = sorted(set(map(str, found)) - {*_NEEDED, *_OPTIONAL})
    unknown += [f"subject.{key}" for key in held if key not in (*_SUBJECT, "description")]
    if missing or unknown:
        raise DataError(
            f"{path} lacks {', '.join(missing) or 'nothing'}, and has unknown keys "
            f"{', '.join(unknown) or 'none'}; needed all of {', '.join(_NEEDED)}, which nothing "
            f"but you can know{example}"
        )
    for name in sessions:
        _start(known[name], name, path)
    return found


def _start(session: Any, name: str, path: Path) -> datetime.datetime:
    """Return when a session began, with its time zone."""
    value = session.get("session_start_time") if isinstance(session, Mapping) else None
    try:
        found = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
        if isinstance(found, datetime.datetime) and found.tzinfo is not None:
            return found
    except ValueError:
        pass
    raise DataError(
        f"{path}: sessions.{name}.session_start_time is {value!r}; needed a date and a time with "
        "its zone, such as 2023-08-13T10:00:00-07:00"
    )


def _parts(about: Mapping[str, Any], features: int, path: Path) -> list[_Part]:
    """Return the time series that the features become: those listed, or one."""
    listed = about.get("series") or [{"name": "features", "columns": [0, features]}]
    found: list[_Part] = []
    for one in listed if isinstance(listed, list) else [listed]:
        columns = one.get("columns") if isinstance(one, Mapping) else None
        pair = columns if isinstance(columns, list) and len(columns) == 2 else [0, 0]
        fits = all(isinstance(edge, int) for edge in pair) and 0 <= pair[0] < pair[1] <= features
        if not isinstance(one, Mapping) or not isinstance(one.get("name"), str) or not fits:
            raise DataError(
                f"{path}: series holds {one!r}; needed a name and columns [first, last + 1] of the "
                f"{features} features, such as {{name: threshold_crossings, columns: [0, 256]}}"
            )
        found.append(
            _Part(one["name"], pair[0], pair[1], str(one.get("description", "neural features")))
        )
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: series has the names {names}; needed a different one for each")
    return found


def _identifier(
    reader: Reader, session: str, about: Mapping[str, Any], parts: Sequence[_Part]
) -> str:
    """Return the file's identifier: participant, session, and a checksum of what is written."""
    refs = [
        ref for split in SPLITS for ref in reader.find_trials([session], split, labels_needed=False)
    ]
    written = [
        {key: value for key, value in about.items() if key not in ("sessions", "series")},
        about["sessions"][session],
        [asdict(part) for part in parts],
        fingerprint(reader, refs),
    ]
    # Dates that YAML has read are no JSON.
    text = json.dumps(written, sort_keys=True, default=str)
    checksum = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{about['subject']['subject_id']} {session} {checksum}"


def _check_written(path: Path, identifier: str) -> None:
    """Raise DataError where the file was written of other metadata or trials."""
    with opened(path) as file:
        found = file["identifier"][()]
    before = found.decode(errors="replace") if isinstance(found, bytes) else str(found)
    if before != identifier:
        raise DataError(
            f"{path} is there, and was written of other metadata, series or trials (its identifier "
            f"is {before!r}, not {identifier!r}); needed the same: remove it, or give another --nwb"
        )


def _write(
    reader: Reader,
    session: str,
    path: Path,
    about: Mapping[str, Any],
    parts: Sequence[_Part],
    identifier: str,
) -> None:
    """Write a session's file, whole or not at all."""
    pynwb = _pynwb()
    trials = [
        (split, reader.read(ref))
        for split in SPLITS
        for ref in reader.find_trials([session], split, labels_needed=False)
    ]
    if not trials:
        raise DataError(f"{reader.root} has no trial of {session}; needed at least one to export")
    more = {key: about[key] for key in _OPTIONAL if key in about and key != "series"}
    file = pynwb.NWBFile(
        session_description=about["session_description"],
        identifier=identifier,
        session_start_time=_start(about["sessions"][session], session, path),
        session_id=session,
        institution=about["institution"],
        lab=about["lab"],
        source_script=f"b2txt export, b2txt_jax {__version__}",
        source_script_file_name="b2txt",
        subject=pynwb.file.Subject(**about["subject"]),
        **more,
    )
    for name, description in _COLUMNS.items():
        file.add_trial_column(name=name, description=description)
    start = 0
    for split, trial in trials:
        stop = start + len(trial.features)
        file.add_trial(
            start_time=start * BIN_SECONDS, stop_time=stop * BIN_SECONDS, **_row(split, trial)
        )
        start = stop
    together = np.concatenate([trial.features for _, trial in trials])
    for part in parts:
        file.add_acquisition(
            pynwb.TimeSeries(
                name=part.name,
                data=pynwb.H5DataIO(together[:, part.first : part.last], compression="gzip"),
                unit=about["unit"],
                starting_time=0.0,
                rate=1 / BIN_SECONDS,
                description=part.description,
                comments="Bins of 20 ms. Trials are laid end to end: what lay between them is not "
                "recorded, so that times count bins and are no clock's.",
            )
        )
    with replacing(path) as unfinished, pynwb.NWBHDF5IO(unfinished, "w") as stream:
        stream.write(file)


def _row(split: str, trial: Trial) -> dict[str, Any]:
    labels = [] if trial.labels is None else trial.labels.tolist()
    return {
        TEXT: trial.sentence or "",
        PHONEMES: " ".join(_NAMES[number] for number in labels),
        BLOCK: trial.ref.block,
        "trial_num": trial.ref.trial,
        SPLIT: split,
    }
