"""What a server leaves in Redis for the next one, and its reading.

Anybody may write to Redis, so every value is checked. What cannot be read is an error that the
reader reports and repairs. It never ends a server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_server.client.connection import EntryId, parse_id, text
from lm_server.errors import UserError

_LONGEST_IDLE = 1e9
_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")


class SavedStateError(UserError, ValueError):
    """Redis holds something that no server wrote."""


@dataclass(frozen=True)
class SavedState:
    """Where another server continues a session.

    Attributes:
      positions: the last entry handled, by input stream.
      first: id of the current sentence's first entry.
      frames: frames of the current sentence.
      lost: why the current sentence's beginning is lost. Empty if it is not.
      session: the session's description, for `Session.restore`.
    """

    positions: Mapping[str, EntryId]
    first: str | None = None
    frames: int = 0
    lost: str = ""
    session: str | None = None


def read_state(fields: Mapping[str, Any], inputs: Sequence[str]) -> SavedState:
    """Return the content of a state hash.

    Raises:
      SavedStateError: a field is not as servers write it.
    """
    positions = {name: _id(fields[name], name) for name in inputs if name in fields}
    sentence = _json_object(fields.get("sentence", b"{}"), "sentence")
    first, frames = sentence.get("first"), sentence.get("frames", 0)
    if first is not None:
        first = "{}-{}".format(*_id(first, "first"))
    if type(frames) is not int or frames < 0:
        raise SavedStateError(f"frames is {_shown(frames)}; needed a whole number")
    lost, session = str(sentence.get("lost", ""))[:1000], fields.get("session")
    return SavedState(positions, first, frames, lost, None if session is None else text(session))


def read_description(value: bytes) -> tuple[float, str]:
    """Return the idle time and the session's description of an open session.

    Raises:
      SavedStateError: it is not as servers write it.
    """
    found = _json_object(value, "value")
    idle: Any = found.get("idle_seconds")
    if type(idle) not in (int, float) or not 0 < idle <= _LONGEST_IDLE:
        raise SavedStateError(f"idle_seconds is {_shown(idle)}; needed a number above 0")
    return float(idle), json.dumps(found.get("session"))


def _json_object(value: Any, name: str) -> dict[str, Any]:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SavedStateError(f"{name} is {_shown(text(value))}; needed a JSON object")
    return found


def _id(value: Any, name: str) -> EntryId:
    if not _ID.fullmatch(text(value)) or max(found := parse_id(value)) >= 2**64:
        raise SavedStateError(f"{name} is {_shown(text(value))}; needed an entry's id")
    return found


def _shown(value: Any) -> str:
    return repr(value)[:80]
