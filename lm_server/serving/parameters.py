"""Settings as a client gives them: fields of an entry under their published names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace

from lm_server.protocol import REQUEST_ID, ProtocolError
from lm_server.settings import WHOLE, Settings, without_effect

OURS = tuple(field.name for field in dataclasses.fields(Settings))
NOT_NEEDED = ("rescore",)
"""Published parameters of what has no counterpart here since nothing is lacking: taken, with a
warning, and told as 0."""


def changed_settings(settings: Settings, fields: Mapping[str, bytes]) -> Settings:
    """Settings with those that an entry gives under their published names.

    Raises:
      ProtocolError: a name is unknown or a value is no number.
      SettingsError: a value is outside its range.
    """
    ours: dict[str, float] = {}
    for name, text in fields.items():
        if name == REQUEST_ID:
            continue
        value = _number(name, text)
        if name in OURS:
            ours[name] = int(value) if name in WHOLE and value == int(value) else value
        elif name not in NOT_NEEDED:
            known = ", ".join([*OURS, *NOT_NEEDED])
            raise ProtocolError(f"there is no parameter {name!r}; known are {known}")
    # int is what whole settings are declared as; the values of the others are floats.
    return replace(settings, **ours)  # type: ignore[arg-type]


def idle_settings(
    before: Settings, after: Settings, fields: Mapping[str, bytes], backend: str
) -> list[str]:
    """Why what an entry changes has no effect in a search, one text for each such setting."""
    changed = [name for name in OURS if getattr(after, name) != getattr(before, name)]
    changed += [name for name in NOT_NEEDED if name in fields and _number(name, fields[name])]
    reasons = (without_effect(name, backend) for name in changed)
    return [reason for reason in reasons if reason is not None]


def _number(name: str, text: bytes) -> float:
    try:
        value = float(text)
    except ValueError as error:
        shown = text[:40].decode(errors="replace")
        raise ProtocolError(f"{name} is {shown!r}; needed a number") from error
    if value != value or value in (float("inf"), float("-inf")):
        raise ProtocolError(f"{name} is {value}; needed a finite number")
    return value
