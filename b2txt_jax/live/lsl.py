"""The lab streaming layer, through the package pylsl (extra `lsl`): URLs and its import."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from b2txt_jax.live.sources.interface import SourceError


def pylsl() -> Any:
    """Return the package.

    Raises:
      SourceError: it is not installed, or has no library for this machine.
    """
    try:
        import pylsl as package
    except (ImportError, RuntimeError) as error:
        raise SourceError(
            f"LSL needs the package pylsl, which cannot be used here ({error}); install it: "
            "pip install '.[lsl]' -c constraints.txt"
        ) from error
    return package


def split_url(url: str, option: str) -> tuple[str, str | None]:
    """Split `lsl://NAME?marks=MARKERS` into the names of both streams.

    Raises:
      SourceError: there is no name. `option` is where the URL was given.
    """
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    if not parts.netloc or parts.path.strip("/") or set(query) - {"marks"}:
        raise SourceError(
            f"{option} is {url}; needed lsl://NAME, or lsl://NAME?marks=MARKERS with a stream of "
            "text that says begin and end"
        )
    return unquote(parts.netloc), query.get("marks", [None])[0]
