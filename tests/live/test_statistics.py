"""What the first bin of a replay is normalised with."""

from types import SimpleNamespace

import numpy as np
import pytest

from b2txt_jax.config import load_config
from b2txt_jax.data.normalised import NormalisedReader
from b2txt_jax.data.reader import open_folder
from b2txt_jax.live.statistics import replay_statistics
from b2txt_jax.signal.rolling import cold, write_statistics


@pytest.mark.parametrize("seconds", [0, 10])
def test_a_replay_begins_as_its_first_trial_was_recorded_or_with_a_file_that_is_there(
    seconds, simulated, tmp_path
):
    config = load_config("demo", [f"--config.signal.rolling_seconds={seconds}.0"])
    run = SimpleNamespace(config=config)
    reader = open_folder(simulated / "hdf5_data_final")
    first = reader.trials([reader.sessions[1]], "val")[0]
    recorded = NormalisedReader(reader, config.signal).before(first) if seconds else cold(512)
    file = tmp_path / "statistics.npz"
    for path in (None, file):
        found = replay_statistics(run, reader, first, path)
        np.testing.assert_array_equal(np.stack(found), np.stack(recorded))
    kept = (
        NormalisedReader(reader, config.signal).after(reader.sessions[0]) if seconds else recorded
    )
    assert (np.stack(kept) != np.stack(recorded)).any() == bool(seconds)
    write_statistics(file, kept)
    found = replay_statistics(run, reader, first, file)
    np.testing.assert_allclose(np.stack(found), np.stack(kept), rtol=1e-5)
