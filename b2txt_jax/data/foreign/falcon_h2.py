"""The handwriting of participant T5 in the FALCON benchmark, task H2 (DANDI 000950), NWB files.

`binned_spikes` holds counts of 192 channels in bins of 20 ms, one trial after the other: a gap in
the times of more than 21 ms ends a trial. `eval_mask` is false for bins to leave out. The table of
trials has the text (`cue`, with `>` for a space and `~` for a full stop) and `block_num`.

A participant who writes forms letters. So labels are letters here, not phonemes: ids 1 to 26 for a
to z, then `'`, `,`, `.` and `?`, and the silence's for a space. Error rates are of characters then.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from b2txt_jax.data.description import DataError
from b2txt_jax.data.foreign.nwb_file import BIN_SECONDS, Trials, opened, series_of
from b2txt_jax.data.foreign.recording import Format, Recording, Utterance, by_block, matrix
from b2txt_jax.phonemes import SILENCE_ID

_DATE = re.compile(r"(\d{4})[.-]?(\d{2})[.-]?(\d{2})")
_LONGEST_STEP = 0.021
"""Seconds between bins of one trial, at most (the benchmark's own reader)."""
LETTERS = {letter: 1 + index for index, letter in enumerate(string.ascii_lowercase + "',.?")} | {
    " ": SILENCE_ID
}


@dataclass(frozen=True)
class _Part(Recording):
    path: Path
    session: str
    split: str
    val_blocks: int

    def sentences(self) -> Sequence[str]:
        return ()  # Labels are letters, which every word has.

    def utterances(self) -> Iterator[Utterance]:
        with opened(self.path) as file:
            trials = Trials(file, self.path)
            series, mask = series_of(file, self.path, ("binned_spikes", "eval_mask"))
            cues, blocks = trials.texts("cue"), trials.whole_numbers("block_num")
            if abs(series.width - BIN_SECONDS) > _LONGEST_STEP - BIN_SECONDS:
                raise DataError(
                    f"{series.where} has a bin every {1000 * series.width:.4g} ms; needed 20 ms"
                )
            kept = np.asarray(mask.data).reshape(-1).astype(bool)
            if len(kept) != len(series.times):
                raise DataError(
                    f"{mask.where} has {len(kept)} bins, binned_spikes {len(series.times)}; needed "
                    "as many"
                )
            ends = np.flatnonzero(np.diff(series.times) > _LONGEST_STEP) + 1
            edges = [0, *map(int, ends), len(kept)]
            if len(edges) - 1 != len(cues):
                raise DataError(
                    f"{self.path} has {len(cues)} trials in its table, and gaps of more than 21 ms "
                    f"make {len(edges) - 1} of `binned_spikes`; needed as many: take the whole file"
                )
            splits = by_block(blocks, self.val_blocks)
            for index, (cue, split) in enumerate(zip(cues, splits, strict=True)):
                if split != self.split:
                    continue
                where = f"{self.path}: trial {index}"
                span = slice(edges[index], edges[index + 1])
                counts = matrix(series.data[span][kept[span]], f"{where} of `binned_spikes`")
                text, labels = _written(cue, where)
                yield Utterance(blocks[index], counts, text, labels)


def _written(cue: str | None, where: str) -> tuple[str, np.ndarray]:
    """Return a cue's text and its letters."""
    text = (cue or "").lower().replace(">", " ").replace("~", ".").strip()
    wrong = sorted(set(text) - set(LETTERS))
    if not text or wrong:
        raise DataError(
            f"{where} has the cue {cue!r}; needed one of a to z, >, ~, ?, comma and apostrophe"
        )
    return text, np.array([LETTERS[letter] for letter in text], np.int32)


class FalconH2(Format):
    """A folder of the data set's files for calibration, at any depth."""

    name = "falcon-h2"
    help = "folder with the *calib*.nwb of FALCON's task H2 (DANDI 000950)"

    def __init__(self, val_blocks: int = 1) -> None:
        self.val_blocks = val_blocks

    def recordings(self, source: Path) -> list[Recording]:
        """List a recording for each file and split. The other files repeat trials of these."""
        found: list[Recording] = []
        for path in sorted(source.rglob("*calib*.nwb")):
            date = _DATE.search(path.name)
            if date is None:
                raise DataError(
                    f"{path} has no date in its name; needed one such as ses-20220518 for the "
                    "session's name: rename the file or move it away"
                )
            session = f"t5.{'.'.join(date.groups())}"
            with opened(path) as file:
                held = by_block(Trials(file, path).whole_numbers("block_num"), self.val_blocks)
            found += [
                _Part(path, session, split, self.val_blocks)
                for split in ("train", "val")
                if split in held
            ]
        if not found:
            raise DataError(
                f"{source} holds no file of FALCON's task H2; needed files such as "
                "sub-T5-held-in-calib_ses-20220518.nwb: get them with `dandi download "
                "DANDI:000950`"
            )
        return found
