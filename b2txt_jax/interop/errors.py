"""The error of conversions, and values from files in its texts."""

import reprlib
from typing import Any

from b2txt_jax.errors import UserError

_BOUNDED = reprlib.Repr()
_BOUNDED.maxlevel = 2  # a small file can hold lists in lists whose full text has 2^60 entries


class ConversionError(UserError, ValueError):
    """A file, run or setting that cannot be converted."""


def shortened(value: Any) -> str:
    """Return the beginning of a value's text, whatever a file made the value.

    >>> shortened([1, [2, [3, [4]]]])
    '[1, [2, [...]]]'
    """
    text = _BOUNDED.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
