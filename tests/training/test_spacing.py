"""Saves that are spaced by time as well as by steps."""

import pytest

from b2txt_jax.config import load_config
from b2txt_jax.training import distributed
from b2txt_jax.training.distributed import Spacing


@pytest.mark.parametrize(
    ("seconds", "due"),
    [(0.0, [10, 20, 30, 90, 130]), (60.0, [90]), (25.0, [30, 90, 130]), (1000.0, [])],
)
def test_a_save_is_due_when_so_much_time_has_passed_since_the_last(monkeypatch, seconds, due):
    now = 0.0
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now)
    spacing, found = Spacing(seconds), []
    for now in (10, 20, 30, 90, 130):
        if spacing.due():
            found.append(now)
    assert found == due


def test_all_hosts_go_by_the_first_ones_clock(monkeypatch):
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda late: 1 - late)
    spacing = Spacing(1000.0)
    assert spacing.due()  # the first says so, this one's clock does not


def test_the_published_recipe_saves_once_a_minute_at_most_and_the_demo_every_100_steps():
    assert load_config("nejm_baseline").train.save_seconds == 60
    assert load_config("demo").train.save_seconds == 0
