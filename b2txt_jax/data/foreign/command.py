"""Writes recordings of other formats as HDF5 sessions in the published T15 layout.

Features are z-scored per block of sentences, over the bins of its trials. Labels are the
words' pronunciations in the CMU dictionary, unless the recording has its own. Sessions with fewer
channels can be padded with zeros (--pad-to). After an interruption the same command continues. A
session that was written of other files than those that are there now is refused.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console
from rich.progress import Progress

from b2txt_jax.data.description import DataError
from b2txt_jax.data.foreign.falcon_h2 import FalconH2
from b2txt_jax.data.foreign.inner_speech import InnerSpeech
from b2txt_jax.data.foreign.nwb import BLOCK, TEXT, Nwb, NwbSettings
from b2txt_jax.data.foreign.recording import Format, Labeller, Recording, Utterance, z_scored
from b2txt_jax.data.foreign.t12 import T12
from b2txt_jax.data.foreign.t12_pickle import T12Pickle
from b2txt_jax.data.hdf5 import session_file
from b2txt_jax.data.write_hdf5 import PADDED_LABEL, write_trial
from lm_server.files.atomic_file import replacing

FOLDER = "hdf5_data_final"
_SETTINGS, _SOURCES = "import.json", "import_sources.json"
FORMATS: tuple[type[Format], ...] = (T12, T12Pickle, InnerSpeech, FalconH2, Nwb)
_CLAIMED = (
    *("format", "pad_to", "log", "val_blocks", "skip_cue", "skip_unknown"),
    *("series", "text", "block", "as_is"),
)
"""Options that decide what is written."""
_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `b2txt import`."""
    parser.add_argument(
        "format",
        choices=[one.name for one in FORMATS],
        metavar="FORMAT",
        help="; ".join(f"{one.name}: {one.help}" for one in FORMATS),
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="folder of the recordings, or file"
    )
    parser.add_argument("--out", type=Path, required=True, help=f"folder; sessions go to {FOLDER}")
    parser.add_argument("--lexicon", type=Path, help="pronunciations: WORD PHONEME ... a line")
    parser.add_argument(
        "--skip-unknown", action="store_true", help="leave out trials with words of no known sound"
    )
    parser.add_argument("--pad-to", type=int, help="features, with zeros in the missing channels")
    parser.add_argument("--log", action="store_true", help="t12: logarithms before the z-score")
    parser.add_argument(
        "--val-blocks",
        type=int,
        default=1,
        help="where a format has no splits: last blocks of a file (nwb: of a session) for val "
        "(default 1)",
    )
    parser.add_argument(
        "--skip-cue", action="append", default=[], help="inner-speech: a cue without words"
    )
    parser.add_argument(
        "--series",
        action="append",
        default=[],
        help="nwb: a time series of features; again for each, in the order of the features",
    )
    parser.add_argument("--text", default=TEXT, help=f"nwb: column of sentences (default {TEXT})")
    parser.add_argument("--block", default=BLOCK, help=f"nwb: column of blocks (default {BLOCK})")
    parser.add_argument("--as-is", action="store_true", help="nwb: no z-score")


def run(args: argparse.Namespace) -> int:
    """Run `b2txt import`."""
    written = import_recordings(
        _format(args),
        args.source,
        args.out,
        args.lexicon,
        args.skip_unknown,
        args.pad_to,
        {name: getattr(args, name) for name in _CLAIMED} | {"skip_cue": sorted(args.skip_cue)},
    )
    print(f"{args.out / FOLDER}: {written.total()} trials")
    for (session, split), count in sorted(written.items()):
        print(f"  {session} {split}: {count}")
    return 0


def _format(args: argparse.Namespace) -> Format:
    """Return the chosen format with its settings.

    Raises:
      DataError: an option belongs to another format, and would not be used, or is out of range.
    """
    if args.val_blocks < 0 or (args.val_blocks != 1 and args.format in (T12.name, T12Pickle.name)):
        raise DataError(
            f"--val-blocks is {args.val_blocks} for {args.format}; needed 0 or more, and none for "
            "a format that has splits"
        )
    nwb = NwbSettings(tuple(args.series), args.text, args.block, args.as_is, args.val_blocks)
    kinds: tuple[Format, ...] = (
        T12(args.log),
        T12Pickle(),
        InnerSpeech(args.val_blocks, args.skip_cue),
        FalconH2(args.val_blocks),
        Nwb(nwb),
    )
    needs: dict[str, tuple[Any, type[Format]]] = {
        "--log": (args.log, T12),
        "--skip-cue": (args.skip_cue, InnerSpeech),
        "--series, --text, --block, --as-is": (
            nwb != NwbSettings(val_blocks=args.val_blocks),
            Nwb,
        ),
    }
    for options, (used, kind) in needs.items():
        if used and args.format != kind.name:
            raise DataError(
                f"{options} belong to the format {kind.name}, and this is {args.format}; needed "
                "the command without them"
            )
    return next(kind for kind in kinds if kind.name == args.format)


def import_recordings(
    kind: Format,
    source: Path,
    out: Path,
    lexicon: Path | None = None,
    skip_unknown: bool = False,
    pad_to: int | None = None,
    settings: dict[str, object] | None = None,
) -> Counter[tuple[str, str]]:
    """Write all recordings in `source`. Return how many trials each (session, split) has.

    Raises:
      DataError: a recording is damaged, a word has no pronunciation, or `out` holds other data.
    """
    recordings = kind.recordings(source)
    files: dict[tuple[str, str], Path] = {}
    for one in recordings:
        other = files.setdefault((one.session, one.split), one.path)
        if other != one.path:
            raise DataError(
                f"{other} and {one.path} both hold the session {one.session}, {one.split}; needed "
                "one file for it: move the other away"
            )
    labeller = Labeller(lexicon)
    sentences = [sentence for one in recordings for sentence in one.sentences()]
    if not sentences and (lexicon is not None or skip_unknown):
        raise DataError(
            f"--lexicon and --skip-unknown are about pronunciations, and none is needed: {source} "
            "has labels of its own; needed the command without them"
        )
    unknown = Counter(word for sentence in sentences for word in labeller.unknown(sentence))
    if unknown and not skip_unknown:
        shown = ", ".join(word for word, _ in unknown.most_common(_SHOWN))
        raise DataError(
            f"{len(unknown)} words have no pronunciation: {shown}"
            f"{' ...' if len(unknown) > _SHOWN else ''}; needed one for each: give --lexicon FILE "
            "with lines such as `hello HH AH L OW`, or leave their trials out with --skip-unknown"
        )
    if lexicon is not None:
        settings = {**(settings or {}), "lexicon": _checksum(lexicon)}
    _claim(out, settings or {})
    sources = _Sources(out)
    written: Counter[tuple[str, str]] = Counter()
    width: dict[int, Path] = {}
    console = Console(stderr=True)
    left_out = 0
    with Progress(console=console) as progress:
        for one in progress.track(recordings, description="importing"):
            path = session_file(out / FOLDER, one.session, one.split)
            if not path.is_file():
                sources.add(path, one)
                left_out += _write(one, path, labeller, pad_to)
            else:
                sources.check(path, one)
            with h5py.File(path) as file:
                written[one.session, one.split] = len(file)
                for group in file.values():
                    width.setdefault(group["input_features"].shape[1], one.path)
                    break
    if left_out:
        console.print(f"{left_out} trials left out: a word of theirs has no pronunciation")
    if len(width) > 1:
        listed = ", ".join(f"{count} in {path}" for count, path in width.items())
        raise DataError(
            f"the sessions have different numbers of features: {listed}; needed one for all: "
            f"import them with --pad-to {max(width)} to another folder"
        )
    for count in width:
        print(f"{count} features a bin: train with --config.data.feature_count={count}")
    return written


def _write(one: Recording, path: Path, labeller: Labeller, pad_to: int | None) -> int:
    """Write a file of trials, whole or not at all. Return how many were left out."""
    kept: list[Utterance] = []
    left_out = 0
    for utterance in one.utterances():
        text = utterance.sentence
        if text is not None and utterance.labels is None and labeller.unknown(text):
            left_out += 1
        else:
            kept.append(utterance)
    features = [utterance.features for utterance in kept]
    if not one.normalised:
        features = _normalised(kept)
    if pad_to is not None:
        features = [_padded(value, pad_to, one.path) for value in features]
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers: Counter[int] = Counter()
    with replacing(path) as unfinished, h5py.File(unfinished, "w") as file:
        for index, (utterance, value) in enumerate(zip(kept, features, strict=True)):
            labels = utterance.labels
            if labels is None and utterance.sentence is not None:
                labels = labeller(utterance.sentence)
            if labels is not None and not 0 < len(labels) <= PADDED_LABEL:
                raise DataError(
                    f"{one.path}: the sentence {utterance.sentence!r} has {len(labels)} phonemes; "
                    f"needed 1 to {PADDED_LABEL}: leave the trial out"
                )
            write_trial(
                file.create_group(f"trial_{index:04d}"),
                one.session,
                utterance.block,
                numbers[utterance.block] if utterance.trial is None else utterance.trial,
                value,
                labels,
                utterance.sentence,
            )
            numbers[utterance.block] += 1
    return left_out


def _normalised(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """Z-score each block, in the order of the trials."""
    by_block: dict[int, list[int]] = {}
    for index, one in enumerate(utterances):
        by_block.setdefault(one.block, []).append(index)
    found: list[np.ndarray] = [np.empty(0)] * len(utterances)
    for members in by_block.values():
        block = z_scored([utterances[index].features for index in members])
        for index, value in zip(members, block, strict=True):
            found[index] = value
    return found


def _padded(features: np.ndarray, wanted: int, path: Path) -> np.ndarray:
    """Return [T, wanted]: both halves (crossings, power) keep their first places."""
    count = features.shape[1]
    if count > wanted or wanted % 2 or count % 2:
        raise DataError(
            f"--pad-to {wanted} does not fit {path} with {count} features; needed an even number "
            f"of at least {count}"
        )
    out = np.zeros((len(features), wanted), np.float32)
    out[:, : count // 2] = features[:, : count // 2]
    out[:, wanted // 2 : wanted // 2 + count // 2] = features[:, count // 2 :]
    return out


class _Sources:
    """The record, in the output's folder, of the files that each session was written of."""

    def __init__(self, out: Path) -> None:
        self._path = out / _SOURCES
        found = json.loads(self._path.read_bytes()) if self._path.is_file() else {}
        self._known: dict[str, list[str]] = found
        self._checksum = functools.cache(_checksum)

    def _of(self, one: Recording) -> list[str]:
        return [f"{path.name} (checksum {self._checksum(path)})" for path in one.paths]

    def add(self, path: Path, one: Recording) -> None:
        """Keep the files that a session is going to be written of."""
        self._known[f"{path.parent.name}/{path.name}"] = self._of(one)
        with replacing(self._path) as unfinished:
            unfinished.write_text(json.dumps(self._known, indent=2) + "\n")

    def check(self, path: Path, one: Recording) -> None:
        """Raise DataError where a session was written of other files."""
        before = self._known.get(f"{path.parent.name}/{path.name}")
        now = self._of(one)
        if before is not None and before != now:
            raise DataError(
                f"{path} was written of {', '.join(before)}, and there are now {', '.join(now)}; "
                f"needed the same: remove all splits of {one.session}, or give another --out"
            )


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _claim(out: Path, settings: dict[str, object]) -> None:
    """Keep the settings in `out`, or check that those there agree."""
    path = out / _SETTINGS
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if path.is_file() and path.read_text() != text:
        raise DataError(
            f"{out} holds an import with other settings ({path}); needed the same, or another --out"
        )
    if not path.is_file() and (out / FOLDER).exists():
        raise DataError(f"{out / FOLDER} holds other data; needed a new folder: another --out")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(text)
