"""Fingerprints of recorded data: enough of each trial to notice that another call reads others.

A session's file is known by its number of trials and by two checksums: of every trial's number,
length, block and labels, and of the features of its first, middle and last bin. To read all
features would take longer than a start may.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.data.trial import Reader, TrialRef, listed
from lm_server.files.atomic_file import regular, replacing

DATA_FILE = "data.json"
"""Name in a run's folder of the fingerprint of what it is trained on."""


def fingerprint(reader: Reader, refs: Iterable[TrialRef]) -> dict[str, Any]:
    """Return the dtype of the features, and the trials and checksums of each session's file.

    Raises:
      DataError: a trial cannot be read.
    """
    files: dict[str, dict[str, int]] = {}
    for ref in refs:
        name = f"{ref.session}/{ref.path.stem}"
        entry = files.setdefault(name, {"trials": 0, "labels": 0, "features": 0})
        trial = reader.sample(ref)
        labels = [] if trial.labels is None else trial.labels.tolist()
        known = json.dumps([ref.key, ref.bins, ref.block, ref.trial, labels, trial.sentence])
        features = np.ascontiguousarray(trial.features, np.float32)
        entry["trials"] += 1
        entry["labels"] = zlib.crc32(known.encode(), entry["labels"])
        entry["features"] = zlib.crc32(features.tobytes(), entry["features"])
    return {"dtype": str(reader.dtype), "files": files}


def short(found: dict[str, Any]) -> str:
    """Return eight hexadecimal digits of a fingerprint, for records.

    >>> short({"dtype": "float32", "files": {}})
    '531a82e0'
    """
    return f"{zlib.crc32(json.dumps(found, sort_keys=True).encode()):08x}"


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe each session's file that is not the same.

    Features are not compared where they are packed as another dtype, which rounds them.
    """
    found = []
    for name in sorted({*before["files"], *now["files"]}):
        old, new = before["files"].get(name), now["files"].get(name)
        if old is None or new is None:
            found.append(f"{name} is {'new' if old is None else 'missing'}")
        elif old["trials"] != new["trials"]:
            found.append(f"{name} had {old['trials']} trials, has {new['trials']}")
        elif old["labels"] != new["labels"]:
            found.append(f"{name} has other lengths, labels or sentences")
        elif old["features"] != new["features"] and before["dtype"] == now["dtype"]:
            found.append(f"{name} has other features")
    return found


def check_same_data(workdir: Path, now: dict[str, Any]) -> None:
    """Check that a run goes on with the data that it began with. A run may have no fingerprint.

    Raises:
      DataError: data differ, or the fingerprint of the run cannot be read.
      OSError: a FIFO or a device is in its place.
    """
    path = workdir / DATA_FILE
    if not regular(path).is_file():
        return
    try:
        changed = differences(json.loads(path.read_bytes()), now)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no fingerprint of data ({error!r}); delete it to go on without"
        ) from error
    if changed:
        raise DataError(
            f"the data are not those that {workdir} was trained on: {listed(changed)}. Needed the "
            f"same ones: restore them or give another --workdir. To go on with the changed data, "
            f"delete {path}"
        )


def write_fingerprint(workdir: Path, found: dict[str, Any]) -> None:
    """Write a run's fingerprint, whole or not at all."""
    with replacing(workdir / DATA_FILE) as unfinished:
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
