"""What other libraries print beside our own message of a failed save."""

import asyncio
import gc
import logging

from b2txt_jax.quiet import other_libraries_quiet


async def async_serialize_from_host():
    """Fails as Orbax's coroutine of this name does, which writes one array."""
    raise ValueError("no space for the second array")


async def anything_else():
    raise ValueError("a fault of another kind")


async def both():
    tasks = [asyncio.create_task(c) for c in (async_serialize_from_host(), anything_else())]
    await asyncio.wait(tasks)  # which asks for no exception


def test_the_second_array_that_cannot_be_written_is_not_logged_and_other_faults_are(caplog):
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        with other_libraries_quiet():
            asyncio.run(both())
        gc.collect()
    assert "a fault of another kind" in caplog.text
    assert "second array" not in caplog.text
