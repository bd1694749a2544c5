"""Opens a folder of recorded sessions with the reader of its format."""

from __future__ import annotations

from pathlib import Path

from b2txt_jax.config import SignalConfig
from b2txt_jax.data.hdf5 import Hdf5Reader
from b2txt_jax.data.normalised import NormalisedReader
from b2txt_jax.data.packed import PackedReader
from b2txt_jax.data.sentence_log import SentenceLogReader
from b2txt_jax.data.trial import DEFAULT_FEATURES, Reader, existing_folder
from b2txt_jax.signal.rolling import changes

FORMATS: tuple[type[Reader], ...] = (PackedReader, SentenceLogReader, Hdf5Reader)
"""In the order of asking. The last one is the published layout, which also reports empty folders.

A new format is one file with a `Reader` and one entry here.
"""


def open_folder(
    root: Path | str, feature_count: int = DEFAULT_FEATURES, signal: SignalConfig | None = None
) -> Reader:
    """Return a reader of the sessions in `root`, whatever their format.

    Args:
      root: the folder that holds one folder per session, such as `data.root`.
      feature_count: features per 20 ms bin that trials must have.
      signal: the configured normalisation, which trials get as they are read. None: none.

    Raises:
      DataError: `root` is no folder, packing it was not finished, or it has other features.
    """
    root = existing_folder(root)
    chosen = next((kind for kind in FORMATS if kind.holds(root)), FORMATS[-1])
    reader = chosen(root, feature_count)
    return NormalisedReader(reader, signal) if signal and changes(signal) else reader
