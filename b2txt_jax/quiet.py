"""Silences other libraries' lines that repeat what our own errors say."""

from __future__ import annotations

import logging as standard_logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from absl import logging


@contextmanager
def other_libraries_quiet() -> Iterator[None]:
    """Keep absl's log and TensorStore's late reads and writes silent inside the block.

    Orbax logs a failed save in hundreds of lines, and its exception reaches the caller as well.
    TensorStore's other operations then come back to an event loop that Orbax has closed, each with
    a traceback. Of several arrays that fail, Orbax raises the first: asyncio logs the others when
    their tasks are collected, which may be after the block.
    """
    before, hook = logging.get_verbosity(), sys.unraisablehook

    def quiet(fault: sys.UnraisableHookArgs) -> None:
        if str(fault.exc_value) != "Event loop is closed":
            hook(fault)

    standard_logging.getLogger("asyncio").addFilter(_not_of_a_save)
    logging.set_verbosity(logging.FATAL)
    sys.unraisablehook = quiet
    try:
        yield
    finally:
        logging.set_verbosity(before)
        sys.unraisablehook = hook


def _not_of_a_save(record: standard_logging.LogRecord) -> bool:
    """Return whether a record is of anything but an array that Orbax saves."""
    return "async_serialize" not in record.getMessage()
