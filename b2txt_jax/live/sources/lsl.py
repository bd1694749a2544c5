"""Bins from the lab streaming layer: an inlet with a sample of all features each 20 ms."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from b2txt_jax.live.sources.interface import Begin, Bin, End, Event, SourceError

_RESOLVE_SECONDS = 10.0
_RATE = 50.0
"""Samples a second: bins of 20 ms."""
_MOST_SAMPLES = 256


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


class LslStream:
    """Samples from now on. LSL numbers none and finds a lost stream again by itself."""

    def __init__(self, url: str, features: int) -> None:
        """Find the streams.

        Args:
          url: `lsl://NAME`, or `lsl://NAME?marks=MARKERS`.
          features: of a bin.

        Raises:
          SourceError: there is no such stream, it does not answer, or it has other channels or
            another rate.
        """
        name, marks = split_url(url, "--source")
        self._package = pylsl()
        info = self._found(name)
        rate = info.nominal_srate()
        if info.channel_count() != features or rate not in (0.0, _RATE):
            raise SourceError(
                f"the LSL stream {name!r} has {info.channel_count()} channels at {rate:g} Hz; "
                f"needed {features} at {_RATE:g} Hz: bins of 20 ms"
            )
        self._inlet = self._package.StreamInlet(info)
        self._marks: Any = marks and self._package.StreamInlet(self._found(marks))
        for inlet in (self._inlet, self._marks):
            if inlet:
                self._open(inlet)

    def _open(self, inlet: Any) -> None:
        """Open a stream that was found: a firewall may let only the search pass."""
        try:
            inlet.open_stream(timeout=_RESOLVE_SECONDS)
        except RuntimeError as error:  # TimeoutError and LostError, which pylsl defines itself
            raise SourceError(
                f"an LSL stream was found and sends nothing within {_RESOLVE_SECONDS:g} s "
                f"({error}); needed a network that passes LSL's TCP ports, 16572 to 16604"
            ) from error

    def _found(self, name: str) -> Any:
        found = self._package.resolve_byprop("name", name, timeout=_RESOLVE_SECONDS)
        if not found:
            others = sorted({one.name() for one in self._package.resolve_streams(1.0)})
            raise SourceError(
                f"no LSL stream is named {name!r}; there are: {', '.join(others) or 'none'}. Start "
                "the sender first, and let the network pass LSL's multicast"
            )
        return found[0]

    def read(self, timeout: float) -> list[Event] | None:
        """Return the bins and marks that have arrived. See `Source.read`.

        Raises:
          SourceError: a stream has ended that cannot be found again.
        """
        try:
            return self._arrived(timeout)
        except RuntimeError as error:  # LostError, which pylsl defines itself
            raise SourceError(
                f"an LSL stream is lost and cannot be found again ({error}); needed one with a "
                "source_id, which is found after its program starts anew"
            ) from error

    def _arrived(self, timeout: float) -> list[Event]:
        found: list[tuple[float, Event]] = []
        # A chunk with a timeout would wait until it is full.
        sample, stamp = self._inlet.pull_sample(timeout=timeout)
        if sample is not None:
            rest, stamps = self._inlet.pull_chunk(timeout=0.0, max_samples=_MOST_SAMPLES)
            now = time.monotonic()
            found += [
                (when, Bin(np.asarray(values, np.float32), None, now))
                for values, when in zip([sample, *rest], [stamp, *stamps], strict=True)
            ]
        while self._marks:
            text, stamp = self._marks.pull_sample(timeout=0.0)
            if text is None:
                break
            word, _, name = text[0].strip().partition(" ")
            if word in ("begin", "end"):
                found.append((stamp, Begin(name) if word == "begin" else End()))
        return [event for _, event in sorted(found, key=lambda one: one[0])]

    def close(self) -> None:
        """Close the streams."""
        for inlet in (self._inlet, self._marks):
            if inlet:
                inlet.close_stream()
