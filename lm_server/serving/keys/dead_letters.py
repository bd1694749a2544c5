"""Entries and jobs that were set aside because they end or break what handles them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from lm_server.errors import shortened

KEPT = 100
"""Dead letters that the stream keeps, about."""
_MOST_BYTES = 300_000
_MOST_FIELDS = 20


def dead_letter(
    process: str, stream: str, entry_id: str, reason: str, fields: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Return the fields of a dead letter: why, from where, and the entry's own as `field:NAME`.

    An entry of more than 20 fields or 300,000 bytes is cut, and `cut` has its number of bytes.
    """
    about = {
        "reason": shortened(reason),
        "stream": stream,
        "entry_id": entry_id,
        "process": process,
        "time": f"{time.time():.3f}",
    }
    found = {name: value.encode() for name, value in about.items()}
    size, left = sum(len(name) + len(value) for name, value in fields.items()), _MOST_BYTES
    for name, value in list(fields.items())[:_MOST_FIELDS]:
        found[f"field:{shortened(name, 100)}"] = value[:left]
        left -= len(value[:left])
    if len(fields) > _MOST_FIELDS or size > _MOST_BYTES:
        found["cut"] = str(size).encode()
    return found
