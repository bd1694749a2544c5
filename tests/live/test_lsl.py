"""The lab streaming layer: a real outlet of features and marks in, a real inlet of words out."""

import json
import time

import numpy as np
import pytest
from live_speech import FINAL

from b2txt_jax.live.events import Chosen
from b2txt_jax.live.outputs.lsl import LslOutlet
from b2txt_jax.live.sources import lsl
from b2txt_jax.live.sources.choice import open_source
from b2txt_jax.live.sources.interface import Begin, Bin, End, SourceError

pylsl = pytest.importorskip("pylsl")


@pytest.fixture(scope="module")
def outlets():
    features = pylsl.StreamInfo("rig", "Features", 8, 50, "float32", "rig-1")
    marks = pylsl.StreamInfo("rig-marks", "Markers", 1, 0, "string", "rig-2")
    return pylsl.StreamOutlet(features), pylsl.StreamOutlet(marks)


def test_bins_and_marks_come_in_the_order_of_their_times(outlets):
    features, marks = outlets
    source = open_source("lsl://rig?marks=rig-marks", 8)
    rows = np.arange(16, dtype=np.float32).reshape(2, 8)
    for outlet in outlets:  # what is sent before is not received
        assert outlet.wait_for_consumers(60)
    now = pylsl.local_clock()
    marks.push_sample(["begin block 2"], now)
    marks.push_sample(["end"], now + 0.3)
    for place, row in enumerate(rows):
        features.push_sample(row.tolist(), now + 0.1 * (1 + place))
    found, deadline = [], time.monotonic() + 60
    while len(found) < 4 and time.monotonic() < deadline:
        found += source.read(0.1)
    assert sorted(type(one).__name__ for one in found) == ["Begin", "Bin", "Bin", "End"]
    bins = [one for one in found if isinstance(one, Bin)]
    np.testing.assert_array_equal([one.features for one in bins], rows)
    assert Begin("block 2") in found
    assert End() in found
    assert all(one.sequence is None for one in bins)
    source.close()


def test_a_stream_with_other_channels_or_none_is_refused(outlets, monkeypatch):
    with pytest.raises(SourceError, match="8 channels at 50 Hz; needed 512"):
        open_source("lsl://rig", 512)
    monkeypatch.setattr(lsl, "_RESOLVE_SECONDS", 1.0)
    with pytest.raises(SourceError, match=r"no LSL stream is named 'rigg'; there are: .*rig"):
        open_source("lsl://rigg", 8)
    with pytest.raises(SourceError, match="needed lsl://NAME"):
        open_source("lsl://", 8)


def test_a_stream_that_cannot_be_found_again_is_an_error():
    outlet = pylsl.StreamOutlet(pylsl.StreamInfo("passing", "Features", 4, 50, "float32", ""))
    source = open_source("lsl://passing", 4)
    assert outlet.wait_for_consumers(60)
    del outlet
    with pytest.raises(SourceError, match="is lost and cannot be found again"):
        [source.read(0.1) for _ in range(600)]


def test_sentences_and_choices_are_samples_of_text():
    output = LslOutlet("lsl://words")
    (info,) = pylsl.resolve_byprop("name", "words", timeout=30)
    inlet = pylsl.StreamInlet(info)
    inlet.open_stream(timeout=30)
    assert output._outlet.wait_for_consumers(60)
    output.show(FINAL)
    output.show(Chosen("s-1", "the cats", True))
    values = [json.loads(inlet.pull_sample(timeout=60)[0][0]) for _ in range(2)]
    assert (values[0]["text"], values[0]["words"]) == ("the cat", [["the", 0.6], ["cat", 1.0]])
    assert values[1] == {"event": "chosen", "id": "s-1", "text": "the cats", "corrected": True}
    output.close()
