"""The source that `--source` names, by the scheme of its URL."""

from __future__ import annotations

from collections.abc import Callable

from b2txt_jax.live.sources.interface import Source, SourceError
from b2txt_jax.live.sources.lsl import LslStream
from b2txt_jax.live.sources.redis_stream import RedisStream

SOURCES: dict[str, Callable[[str, int], Source]] = {
    "redis": RedisStream,
    "rediss": RedisStream,
    "unix": RedisStream,
    "lsl": LslStream,
}
"""Scheme -> (URL, features of a bin) -> source. A new source is one file and one entry here."""


def open_source(url: str, features: int) -> Source:
    """Open the source of a URL.

    Raises:
      SourceError: its scheme is unknown, or the source cannot be opened.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in SOURCES:
        raise SourceError(
            f"--source begins with {scheme[:20]!r}; needed a URL that begins with one of "
            f"{', '.join(f'{name}://' for name in SOURCES)}"
        )
    return SOURCES[scheme](url, features)
