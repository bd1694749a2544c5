"""Several hosts: one process each, which find each other before the first use of a device."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from b2txt_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


class DistributedError(UserError, RuntimeError):
    """Processes that did not find each other."""


def join_hosts() -> None:
    """Join this process to the others of a TPU slice or cluster.

    JAX finds the others by itself on Cloud TPU, SLURM and Kubernetes. Elsewhere the environment
    names them: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID.

    Raises:
      DistributedError: there are no others to be found, or they do not answer.
    """
    named = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
    if named and len(named) < 3:
        missing = ", ".join(sorted({ADDRESS, COUNT, INDEX} - set(named)))
        raise DistributedError(f"the environment has {', '.join(named)}; needed also {missing}")
    try:
        if named:
            jax.distributed.initialize(named[ADDRESS], int(named[COUNT]), int(named[INDEX]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise DistributedError(
            f"--distributed: the processes of this run did not find each other ({error}); needed a "
            f"TPU slice, SLURM, or {ADDRESS}, {COUNT} and {INDEX} in the environment of every "
            "process. A single host needs no --distributed"
        ) from error


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Wait until every process of the run is here, an hour at most.

    A process that loads its programs from the cache is ready minutes before one that compiles them.
    Without waiting, its first exchange with the others would time out.
    """
    ocp.multihost.get_barrier_sync_fn()(key=f"b2txt_{what}", timeout_ms=3_600_000)


class Spacing:
    """Decides for all hosts when enough time has passed, by the clock of the first."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        """Return whether `seconds` have passed since the start, or since it last was due."""
        late = time.monotonic() - self._last >= self._seconds
        if self._seconds and jax.process_count() > 1:
            late = bool(multihost_utils.broadcast_one_to_all(np.int32(late)))
        if late:
            self._last = time.monotonic()
        return late


@contextmanager
def stop_on_signals() -> Iterator[Callable[[int | None], int | None]]:
    """Yield `stopping(step)`, which returns the signal that asks for a stop after this step, or
    None. Before the first step, `step` is None.

    After SIGTERM (preemption) or SIGINT the step ends and the state is saved. A SIGINT after that
    interrupts. With several hosts, all stop after the same step, whichever received the signal,
    and none before the first.
    """
    if jax.process_count() > 1:
        # JAX's own handler of SIGTERM agrees on a step with the other hosts.
        yield (
            lambda step: (
                signal.SIGTERM
                if step is not None and multihost_utils.reached_preemption_sync_point(step)
                else None
            )
        )
        return
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        # SIGTERM may come twice, to the process and its group; a second SIGINT is a person's.
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {
            number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:  # not in the main thread: signals stay the caller's
        yield lambda step: None
        return
    try:
        yield lambda step: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
