"""The loop of a server or a worker: round after round, through failures of Redis."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lm_server.client.connection import LOST, Backoff
from lm_server.serving.keys.key_types import wrong_type
from lm_server.serving.keys.rights import RightsError, lasting

_log = logging.getLogger(__name__)


def run_rounds(
    one_round: Callable[[], None],
    ended: Callable[[bool], bool],
    stop: threading.Event,
    set_aside: Callable[[], bool],
) -> None:
    """Call `one_round` again and again. After a failure of Redis, pause first.

    Args:
      one_round: may raise an error of Redis and must then be repeatable.
      ended: returns before each round whether to end. Its argument is whether the last one failed.
      stop: ends a pause.
      set_aside: renames keys of a wrong type and returns whether there were any.

    Raises:
      RightsError: Redis refuses a command, and will refuse it again.
    """
    backoff = Backoff(stop)
    while not ended(backoff.failing):
        try:
            one_round()
        except LOST as error:
            if wrong_type(error) and set_aside():
                continue
            if lasting(error):
                raise RightsError(
                    f"Redis refuses a command that this process needs ({error}): give its user the "
                    "rights of docs/protocol.md and start it again"
                ) from error
            if not backoff.failing:
                _log.error("Redis: %s; trying again until it works", error)
            backoff.failed()
        else:
            if backoff.failing:
                _log.info("Redis is back")
            backoff.worked()
