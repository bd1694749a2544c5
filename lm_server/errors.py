"""The error that a command shows to its user in one line, without a traceback."""

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
