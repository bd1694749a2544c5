"""Silences other libraries' log lines that repeat what our own errors say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from absl import logging


@contextmanager
def other_libraries_quiet() -> Iterator[None]:
    """Keep absl's log, which Orbax writes to, silent inside the block.

    Orbax logs a failed save in hundreds of lines, and its exception reaches the caller as well.
    """
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
