"""The inner-speech recordings of Kunz et al. 2025 (T12, T15, T16, T17), MATLAB files.

`<participant>.<date>_<task>_raw.mat` holds one task of a session as one long recording: threshold
crossings `binnedTX` and `spikePow` [bins, channels], `blockNum` [bins], and trials by their first
and last bin, counted from 1, in `goTrialEpochs`. `trialCues` counts from 1 into `cueList`. Bins are
10 or 20 ms (`binSize`). There are no splits: the last blocks of a file become `val`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.data.foreign.recording import (
    Format,
    Recording,
    Utterance,
    by_block,
    matrix,
    numbers,
    read_mat,
    texts,
)

BIN_MS = 20
_NAME = re.compile(r"(?P<session>[A-Za-z0-9]+\.\d{4}\.\d{2}\.\d{2})_(?P<task>.+)_raw\.mat")
_TRIALS = ("goTrialEpochs", "trialCues", "cueList", "blockNum")


@dataclass(frozen=True)
class _File(Recording):
    path: Path
    session: str
    split: str
    val_blocks: int
    skipped: frozenset[str]

    def sentences(self) -> Sequence[str]:
        return [text for _, _, text in self._trials(read_mat(self.path, _TRIALS))]

    def utterances(self) -> Iterator[Utterance]:
        found = read_mat(self.path, ("binnedTX", "spikePow", "binSize", *_TRIALS))
        crossings = matrix(found["binnedTX"], f"{self.path}: `binnedTX`")
        power = matrix(found["spikePow"], f"{self.path}: `spikePow`")
        blocks = numbers(found["blockNum"], f"{self.path}: `blockNum`")
        if not len(crossings) == len(power) == len(blocks):
            raise DataError(
                f"{self.path} has {len(crossings)} bins in `binnedTX`, {len(power)} in `spikePow` "
                f"and {len(blocks)} in `blockNum`; needed as many in each"
            )
        size = numbers(found["binSize"], f"{self.path}: `binSize`")
        if size.shape != (1,) or size[0] not in (BIN_MS, BIN_MS // 2):
            raise DataError(f"{self.path}: `binSize` is {size.tolist()} ms; needed 10 or 20")
        merged = BIN_MS // int(size[0])
        for start, stop, text in self._trials(found):
            whole = (stop - start) // merged * merged
            if not whole:
                raise DataError(
                    f"{self.path}: the trial at bin {start + 1} is shorter than {BIN_MS} ms; "
                    "needed at least one bin"
                )
            span = slice(start, start + whole)
            # Crossings are counts, which add up. Power is a mean.
            counts = crossings[span].reshape(-1, merged, crossings.shape[1]).sum(axis=1)
            means = power[span].reshape(-1, merged, power.shape[1]).mean(axis=1)
            features = np.concatenate([counts, means], axis=1)
            yield Utterance(int(blocks[start]), features, text)

    def _trials(self, found: dict[str, Any]) -> list[tuple[int, int, str]]:
        """Return (first bin, end, sentence) of the trials in this split, bins counted from 0."""
        epochs = np.asarray(found["goTrialEpochs"])
        blocks = numbers(found["blockNum"], f"{self.path}: `blockNum`")
        cues = texts(found["cueList"], f"{self.path}: `cueList`")
        chosen = numbers(found["trialCues"], f"{self.path}: `trialCues`")
        if epochs.ndim != 2 or epochs.shape[1] != 2 or len(epochs) != len(chosen):
            raise DataError(
                f"{self.path}: `goTrialEpochs` is {list(epochs.shape)} and `trialCues` has "
                f"{len(chosen)} values; needed [trials, 2] and a cue for each trial"
            )
        spans = numbers(epochs, f"{self.path}: `goTrialEpochs`").reshape(-1, 2)
        wrong = np.flatnonzero(
            (spans[:, 0] < 1) | (spans[:, 1] < spans[:, 0]) | (spans[:, 1] > len(blocks))
        )
        if wrong.size:
            first, last = spans[wrong[0]]
            raise DataError(
                f"{self.path}: trial {wrong[0]} of `goTrialEpochs` is [{first}, {last}]; needed "
                f"bins from 1 to {len(blocks)}, the first before the last"
            )
        if chosen.size and not (chosen.min() >= 1 and chosen.max() <= len(cues)):
            raise DataError(
                f"{self.path}: `trialCues` goes from {chosen.min()} to {chosen.max()}; needed 1 to "
                f"{len(cues)}, the entries of `cueList`"
            )
        kept = [
            (int(first) - 1, int(last), cues[cue - 1])
            for (first, last), cue in zip(spans, chosen, strict=True)
            if cues[cue - 1] not in self.skipped
        ]
        # Of the trials with words: a last block without any would leave no trial for validation.
        splits = by_block([int(blocks[first]) for first, _, _ in kept], self.val_blocks)
        return [one for one, split in zip(kept, splits, strict=True) if split == self.split]


class InnerSpeech(Format):
    """A folder of `<participant>.<date>_<task>_raw.mat`."""

    name = "inner-speech"
    help = "folder with <participant>.<date>_<task>_raw.mat of Kunz et al. 2025"

    def __init__(self, val_blocks: int = 1, skipped: Sequence[str] = ()) -> None:
        self.val_blocks = val_blocks
        self.skipped = frozenset(skipped)
        """Cues without words, such as "do nothing"."""

    def recordings(self, source: Path) -> list[Recording]:
        """List a recording for each file and split."""
        found: list[Recording] = []
        for path in sorted(source.glob("*_raw.mat")):
            match = _NAME.fullmatch(path.name)
            if match is None:
                raise DataError(
                    f"{path} has another name than <participant>.<YYYY.MM.DD>_<task>_raw.mat; "
                    "needed it for the session's name: rename the file or move it away"
                )
            session = f"{match['session']}_{match['task']}"
            splits = ("train", "val") if self.val_blocks else ("train",)
            found += [
                _File(path, session, split, self.val_blocks, self.skipped) for split in splits
            ]
        if not found:
            raise DataError(
                f"{source} holds no inner-speech recording; needed files such as "
                "t15.2024.01.01_words_raw.mat"
            )
        self._check_skipped(sorted({one.path for one in found}))
        return found

    def _check_skipped(self, paths: Sequence[Path]) -> None:
        """Raise DataError where a cue to skip is in no file: its trials would become sentences."""
        if not self.skipped:
            return
        held = {
            cue
            for path in paths
            for cue in texts(read_mat(path, ("cueList",))["cueList"], f"{path}: `cueList`")
        }
        missing = sorted(self.skipped - held)
        if missing:
            raise DataError(
                f"--skip-cue {', '.join(map(repr, missing))} is in no file; needed one of "
                f"{', '.join(map(repr, sorted(held)))}, as the files write them"
            )
