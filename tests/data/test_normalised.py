"""Trials read with a rolling z-score, against one pass over the recording in its order."""

import dataclasses

import numpy as np

from b2txt_jax.config import load_config
from b2txt_jax.data.reader import open_folder
from b2txt_jax.signal.rolling import cold, normalise


def test_trials_are_normalised_in_the_order_of_recording_from_the_session_before(simulated):
    signal = load_config("demo").signal
    root = simulated / "hdf5_data_final"
    assert type(open_folder(root, 512, signal)) is type(open_folder(root))
    signal = dataclasses.replace(signal, rolling_seconds=0.5)
    raw, reader = open_folder(root), open_folder(root, 512, signal)
    before, session = raw.sessions[:2]
    statistics = cold(512)
    for name in (before, session):
        refs = [ref for split in ("train", "val", "test") for ref in raw.find_trials([name], split)]
        for ref in sorted(refs, key=lambda ref: (ref.block, ref.trial)):
            expected, statistics = normalise(raw.read(ref).features, statistics, signal)
            if name == session:  # Any order of reading gives the same.
                np.testing.assert_allclose(reader.read(ref).features, expected, atol=1e-5)
