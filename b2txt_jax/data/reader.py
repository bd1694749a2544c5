"""Opens a folder of recorded sessions with the reader of its format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from b2txt_jax.config import SignalConfig
from b2txt_jax.data.description import DataError
from b2txt_jax.data.hdf5 import Hdf5Reader
from b2txt_jax.data.joint import JointReader, folders
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
    root: Path | str,
    feature_count: int = DEFAULT_FEATURES,
    signal: SignalConfig | None = None,
    narrower: bool = False,
) -> Reader:
    """Return a reader of the sessions in `root`, whatever their format.

    Args:
      root: the folder that holds one folder per session, such as `data.root`, or several with
        commas between them.
      feature_count: features per 20 ms bin that trials must have. Of several folders, the most.
      signal: the configured normalisation, which trials get as they are read. None: none.
      narrower: whether a single folder may have fewer features too, which zeros follow.

    Raises:
      DataError: `root` is no folder or lists one twice, packing it was not finished, or it has
        other features.
    """

    def opened(folder: Path, count: int) -> Reader:
        reader = format_of(folder)(folder, count)
        return NormalisedReader(reader, signal) if signal and changes(signal) else reader

    listed = [existing_folder(one) for one in folders(root)]
    if len({one.resolve() for one in listed}) < len(listed):
        raise DataError(f"data.root lists a folder twice: {root}; needed each participant's once")
    if len(listed) == 1 and not narrower:
        return opened(listed[0], feature_count)
    widths = {one: format_of(one).features(one) for one in listed}
    return JointReader(widths, feature_count, opened)


def format_of(folder: Path) -> type[Reader]:
    """Return the kind of reader of a folder.

    Raises:
      DataError: packing it was not finished.
    """
    return next((kind for kind in FORMATS if kind.holds(folder)), FORMATS[-1])


def session_widths(
    root: Path | str, sessions: Sequence[str], feature_count: int
) -> tuple[int, ...]:
    """Return how many features each session has of its own, or () where all have all of them."""
    with open_folder(root, feature_count) as reader:
        found = tuple(reader.width(name) for name in sessions)
    return found if min(found) < feature_count else ()
