"""A real server for the sentences of live sessions, and an intake for their bins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from live_speech import FEATURES, SAID

from b2txt_jax.config import load_config
from b2txt_jax.live.intake import Intake
from b2txt_jax.signal.rolling import cold
from lm_server.client.process import serve_child


@pytest.fixture
def intake():
    return Intake(FEATURES, load_config("demo").signal, cold(FEATURES))


@pytest.fixture(scope="session")
def spoken_lm(build_lm):
    return build_lm(SAID)


@pytest.fixture(scope="session")
def live_server(spoken_lm):
    """URL of the Redis of a server for `SAID`."""
    with serve_child(spoken_lm) as url:
        yield url
