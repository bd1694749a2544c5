"""The hours of a whole recipe on a slice: steps, and by named assumptions what is between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from b2txt_jax.config import Config
from b2txt_jax.tpu.report import Result

VALIDATION_TRIALS = 1426
"""Of the published recordings."""
VALIDATED_COST = 0.5
"""Time of a validated trial as a share of a trained one's: forward is a third of its products, and
trials share no rows."""
SAVE_SECONDS = 1.0
"""That the loop waits for a save, while the state is copied to the host. Writing goes on beside."""
PROGRAM_SECONDS = 60.0
"""To compile a program of training on a TPU VM, and half of it for one of validation."""
MOST_CHIPS_OF_A_HOST = 8


class Part(NamedTuple):
    """A part of a run."""

    name: str
    hours: float
    assumed: str
    """Empty where nothing but the compiler's estimate of a step is."""


def whole_run(results: Sequence[Result], config: Config) -> list[Part]:
    """Return the parts of a run whose batches have the shapes of `results`.

    Reading is not among them: it goes on beside the steps. Nor is setting up the machine.
    """
    train = config.train
    share = sum(result.share for result in results)
    step = sum(result.share * result.time.likely for result in results) / share
    steps = train.steps * step
    checks = train.steps // train.validate_every
    trials = VALIDATION_TRIALS / config.data.batch_rows
    saves = train.steps // train.save_every
    if train.save_seconds:
        saves = min(saves, int(steps / train.save_seconds) + 1)
    evaluated = len(config.data.buckets) or 3
    compiling = PROGRAM_SECONDS * (len(results) + evaluated / 2)
    at_once = "one after another, as on several hosts"
    if results[0].topology.chips <= MOST_CHIPS_OF_A_HOST:
        compiling, at_once = compiling / 4, "four at a time"
    parts = (
        ("steps", steps, ""),
        (
            "validation",
            checks * trials * VALIDATED_COST * step,
            f"{checks} of {VALIDATION_TRIALS:,} trials, each {VALIDATED_COST:g} of a trained one",
        ),
        ("saving", saves * SAVE_SECONDS, f"{saves} saves of {SAVE_SECONDS:g} s"),
        (
            "compiling",
            compiling,
            f"{len(results)} programs of {PROGRAM_SECONDS:g} s and {evaluated} of half of it, "
            f"{at_once}; once, then from the run's cache",
        ),
    )
    return [Part(name, seconds / 3600, assumed) for name, seconds, assumed in parts]
