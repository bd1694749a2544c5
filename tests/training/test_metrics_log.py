"""`metrics.jsonl`: read as it was written, refused with its line where it holds junk."""

import json
import os

import pytest

from b2txt_jax.training.metrics_log import MetricsError, MetricsLog, read_metrics

METRICS = [{"kind": "train", "step": 10, "loss": 9.5}, {"kind": "val", "step": 20, "per": 0.4}]


def test_metrics_are_read_line_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in METRICS) + "\n")
    assert read_metrics(path) == METRICS


def test_a_last_line_that_is_still_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(METRICS[0]) + '\n{"step": 20, "ki')
    assert read_metrics(path) == METRICS[:1]


@pytest.mark.parametrize(
    "broken",
    [
        b'{"step": 1, "ki\n{}\n',
        b'{"step": 1}\n',
        b"[1]\n",
        b"5\n",
        b"junk\n",
        b'{"step": "1", "kind": "val"}\n',
        b'{"step": 1, "kind": []}\n',
        b"\xff\xfe",
    ],
)
def test_junk_in_the_metrics_of_a_run_is_refused_before_it_goes_on(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(broken)
    with pytest.raises(
        MetricsError, match=r"metrics\.jsonl (line 1|cannot be read).*move the file"
    ):
        MetricsLog(tmp_path, 4)
    assert path.read_bytes() == broken


def test_a_fifo_in_the_place_of_the_log_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="no regular file"):
        MetricsLog(tmp_path, 0)
