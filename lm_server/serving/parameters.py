"""Settings as clients send them: fields of an `update_params` entry, under the settings' names."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lm_server.protocol import CLIENT, REQUEST_ID, ProtocolError
from lm_server.search.load import BACKENDS, without_effect
from lm_server.settings import NAMES, NOT_NEEDED, PRESET, Settings, changed, preset

NO_CEILINGS: Mapping[str, float] = {}

OURS = NAMES
"""Parameters that are settings here. `NOT_NEEDED` are accepted beside them."""
_OTHERS = (REQUEST_ID, CLIENT)


def named(fields: Mapping[str, bytes]) -> set[str]:
    """Return the settings that an entry names, itself or through a valid preset."""
    through = preset(fields[PRESET].decode(errors="replace")) if PRESET in fields else ()
    return {name for name in fields if name in OURS}.union(through)


def changed_settings(
    settings: Settings,
    fields: Mapping[str, bytes],
    ceilings: Mapping[str, float] = NO_CEILINGS,
    backend: str = BACKENDS[0],
) -> Settings:
    """Return settings with the changes of an entry: those of its preset, then those by name.

    Raises:
      ProtocolError: a name is unknown, or a value is no finite number or above its ceiling.
      SettingsError: a value is outside its range, or there is no such preset.
    """
    values: dict[str, float] = {}
    if PRESET in fields:
        chosen = preset(fields[PRESET].decode(errors="replace"))
        values |= chosen if without_effect(PRESET, backend) is None else {}
    values |= {
        name: _number(name, text) for name, text in fields.items() if name not in (*_OTHERS, PRESET)
    }
    for name in values:
        if name not in OURS and name not in NOT_NEEDED:
            known = ", ".join([*OURS, PRESET, *NOT_NEEDED])
            raise ProtocolError(f"there is no parameter {name!r}; known are {known}")
    for name, ceiling in ceilings.items():
        if values.get(name, 0) > ceiling:
            raise ProtocolError(
                f"{name} is {values[name]:g}; this server allows at most {ceiling:g}: choose less, "
                "or ask its operator for a higher --ceiling"
            )
    return changed(settings, {name: value for name, value in values.items() if name in OURS})


def idle_settings(
    before: Settings, after: Settings, fields: Mapping[str, bytes], backend: str
) -> list[str]:
    """Return why the changes of an entry have no effect in a search, one text for each of these."""
    different = [name for name in OURS if getattr(after, name) != getattr(before, name)]
    different += [name for name in NOT_NEEDED if name in fields and _number(name, fields[name])]
    different += [PRESET] if PRESET in fields else []
    reasons = (without_effect(name, backend) for name in different)
    return [reason for reason in reasons if reason is not None]


def _number(name: str, text: bytes) -> float:
    try:
        if b"_" in text:
            raise ValueError
        value = float(text)
    except ValueError as error:
        shown = text[:40].decode(errors="replace")
        raise ProtocolError(f"{name} is {shown!r}; needed a number") from error
    if not math.isfinite(value):
        raise ProtocolError(f"{name} is {value}; needed a finite number")
    return value
