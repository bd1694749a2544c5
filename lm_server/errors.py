"""The error that a command shows to its user in one line, without a traceback."""

import tokenize
import zipfile
import zlib

DAMAGED_ARRAYS = (
    *(ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error),
    # An array's header is read as Python. A zip's flags may demand a password or an unknown
    # compression.
    *(tokenize.TokenError, SyntaxError, RuntimeError, MemoryError, OverflowError),
    KeyError,  # an array that is not there
)
"""What reading a damaged .npz file raises."""

MAX_ERROR = 2000
"""Bytes of an error that is sent or kept."""


class UserError(Exception):
    """Says what was found, what was needed and what to do next."""


def shortened(text: str, most: int = MAX_ERROR) -> str:
    """Return a text that repeats its input, fit to be sent: valid UTF-8, cut in its middle to about
    `most` bytes."""
    data = text.encode(errors="backslashreplace")
    if len(data) <= most:
        return data.decode()
    head, tail = data[: 2 * most // 3], data[-most // 4 :]
    cut = f" ... ({len(data)} bytes in all) ... "
    return head.decode(errors="ignore") + cut + tail.decode(errors="ignore")
