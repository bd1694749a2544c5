"""The T12 speech recordings of the 2024 competition (Willett et al. 2023), MATLAB files.

`{train,test,competitionHoldOut}/t12.YYYY.MM.DD.mat` hold one session each. The published baseline
uses threshold crossings at -4.5 RMS (`tx1`) and spike band power of the 128 channels in area 6v,
z-scored per block. Its `test` is our `val`, and the hold-out without labels our `test`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.data.foreign.recording import (
    Format,
    Recording,
    Utterance,
    matrix,
    numbers,
    read_mat,
    texts,
)

CHANNELS = 128
"""The first ones: both arrays in area 6v. Area 44 follows, which holds little about speech."""
_SPLITS = {"train": "train", "test": "val", "competitionHoldOut": "test"}
_NAME = re.compile(r"t12\.\d{4}\.\d{2}\.\d{2}\.mat")


@dataclass(frozen=True)
class _File(Recording):
    path: Path
    session: str
    split: str
    log: bool

    def sentences(self) -> Sequence[str]:
        if self.split == "test":
            return ()
        return texts(self._read("sentenceText")["sentenceText"], f"{self.path}: `sentenceText`")

    def utterances(self) -> Iterator[Utterance]:
        found = self._read("tx1", "spikePow", "blockIdx")
        sentences: Sequence[str | None] = self.sentences()
        crossings, power = (found[name].reshape(-1) for name in ("tx1", "spikePow"))
        blocks = numbers(found["blockIdx"], f"{self.path}: `blockIdx`")
        if self.split == "test":
            sentences = [None] * len(crossings)
        counts = {len(one) for one in (crossings, power, blocks, sentences)}
        if len(counts) > 1:
            raise DataError(
                f"{self.path} has {len(crossings)} trials in `tx1`, {len(power)} in `spikePow`, "
                f"{len(blocks)} in `blockIdx` and {len(sentences)} in `sentenceText`; needed as "
                "many in each"
            )
        rows = zip(crossings, power, blocks, sentences, strict=True)
        for index, (tx, sp, block, text) in enumerate(rows):
            where = f"{self.path}: trial {index} of"
            first = matrix(tx, f"{where} `tx1`", CHANNELS)[:, :CHANNELS]
            second = matrix(sp, f"{where} `spikePow`", CHANNELS)[:, :CHANNELS]
            if len(first) != len(second):
                raise DataError(
                    f"{where} `tx1` has {len(first)} bins, of `spikePow` {len(second)}; needed as "
                    "many in both"
                )
            if self.log:
                first, second = np.log1p(first), np.log(np.maximum(second, 1e-6))
            yield Utterance(int(block), np.concatenate([first, second], axis=1), text)

    def _read(self, *names: str) -> dict[str, np.ndarray]:
        return read_mat(self.path, names)


class T12(Format):
    """The competition's folders of MATLAB files."""

    name = "t12"
    help = "folder with train/, test/, competitionHoldOut/ and t12.YYYY.MM.DD.mat in them"

    def __init__(self, log: bool = False) -> None:
        self.log = log
        """Take logarithms first: log(1 + crossings), log(power)."""

    def recordings(self, source: Path) -> list[Recording]:
        """List the sessions of the three folders."""
        found: list[Recording] = [
            _File(path, path.stem, split, self.log)
            for folder, split in _SPLITS.items()
            for path in sorted((source / folder).glob("*.mat"))
            if _NAME.fullmatch(path.name)
        ]
        if not found:
            raise DataError(
                f"{source} holds no T12 recording; needed the folders {', '.join(_SPLITS)} with "
                "files such as t12.2022.04.28.mat: name the unpacked folder competitionData"
            )
        return found
