"""Claims about the figures: what they read, what they draw, that names do not overlap."""

import io
import itertools
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from b2txt_jax.evaluation.figures import (
    Segment,
    data_uri,
    greedy_segments,
    learning_curve,
    per_by_day,
    phoneme_picture,
    png,
    save_png,
    wer_bars,
)
from b2txt_jax.metrics import ErrorRate, greedy_decode
from b2txt_jax.phonemes import sentence_to_ids

METRICS: list[dict[str, Any]] = [
    {"step": 10, "kind": "train", "loss": 80.0},
    {"step": 20, "kind": "train", "loss": 50.0},
    {"step": 20, "kind": "val", "loss": 55.0, "per": 0.5, "per_day": {"day": 0.5}},
    {"step": 30, "kind": "val", "loss": 45.0, "per": 0.25, "per_day": {"day": 0.25}},
]


def trial(words: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy logits of a sentence, 1-3 frames per phoneme, and its label."""
    rng = np.random.default_rng(seed)
    label = sentence_to_ids(words.split())
    best = [i for index in label for i in [*[index] * rng.integers(1, 4), 0]]
    noise = rng.normal(0, 1.5, (len(best), 41))
    return (noise + 5 * np.eye(41)[best]).astype(np.float32), label


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_learning_curve_shows_the_measured_points_and_names_the_best() -> None:
    losses, rates = learning_curve(METRICS).axes
    drawn = {str(line.get_label()): line.get_xydata() for line in losses.lines}
    assert np.asarray(drawn["training"]).tolist() == [[10, 80], [20, 50]]
    assert np.asarray(drawn["validation"]).tolist() == [[20, 55], [30, 45]]
    assert np.asarray(rates.lines[0].get_xydata()).tolist() == [[20, 50], [30, 25]]
    assert "25.0 % at step 30" in rates.get_title()


def test_steps_repeated_after_a_resume_count_once_and_the_later_value_wins() -> None:
    again = [*METRICS, {"step": 10, "kind": "train", "loss": 70.0}]
    line = learning_curve(again).axes[0].lines[0]
    assert np.asarray(line.get_xydata()).tolist() == [[10, 70], [20, 50]]


def test_losses_that_are_not_finite_do_not_spoil_the_curve() -> None:
    entry = {"step": 15, "kind": "train", "loss": float("inf")}
    line = learning_curve([*METRICS, entry]).axes[0].lines[0]
    assert np.asarray(line.get_xydata()).tolist() == [[10, 80], [20, 50]]


def test_a_run_without_steps_says_so() -> None:
    assert texts(learning_curve([])) == ["no steps yet", "no validation yet"]


def test_each_day_has_its_bar_and_a_day_without_labels_says_so() -> None:
    figure = per_by_day({"t15.2023.08.11": None, "t15.2023.08.13": 0.125})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "t15.2023.08.11",
        "t15.2023.08.13",
    ]
    assert texts(figure) == ["no labels", "12.5 %"]
    assert [patch.get_width() for patch in axes.patches] == [0.0, 12.5]  # type: ignore[attr-defined]


def test_word_error_bars_carry_their_counts() -> None:
    figure = wer_bars([("3-gram", ErrorRate(53, 1600)), ("none", ErrorRate(0, 0))])
    assert texts(figure) == ["3.3 % (53 of 1,600 words)", "no labels (0 of 0 words)"]


def test_segments_are_the_greedy_decoding_with_its_frames() -> None:
    logits = np.eye(41, dtype=np.float32)[[0, 5, 5, 0, 5, 6, 40]]
    segments = [Segment(5, 1, 3), Segment(5, 4, 5), Segment(6, 5, 6), Segment(40, 6, 7)]
    assert greedy_segments(logits) == segments
    assert [s.phoneme for s in segments] == greedy_decode(logits).tolist()
    assert greedy_segments(logits[:0]) == []


def test_the_picture_shows_softmax_over_seconds() -> None:
    logits, label = trial("yes")
    figure = phoneme_picture(logits, label)
    (image,) = figure.axes[1].images
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.asarray(image.get_array()), expected.T, rtol=1e-4, atol=1e-7)
    assert figure.axes[1].get_xlim() == pytest.approx((0.0, 0.08 * len(logits)))
    names = [tick.get_text() for tick in figure.axes[1].get_yticklabels()]
    assert (names[0], names[1], names[39], names[40]) == ("blank", "AA", "ZH", "silence")


def test_decoded_phonemes_stand_over_the_middle_of_their_frames() -> None:
    logits = 9 * np.eye(41, dtype=np.float32)[[0, 0, 5, 5, 0, 40]]
    decoded = phoneme_picture(logits).axes[0].texts
    assert [text.get_text() for text in decoded] == ["AW", "·"]
    assert [text.get_position()[0] for text in decoded] == pytest.approx([3 * 0.08, 5.5 * 0.08])


def test_true_phonemes_stand_under_their_decoded_partners_and_missed_ones_between() -> None:
    logits = 9 * np.eye(41, dtype=np.float32)[[5, 0, 0, 0, 7, 40]]
    figure = phoneme_picture(logits, np.array([5, 6, 7, 40]))
    true = figure.axes[2].texts
    assert [text.get_text() for text in true] == ["AW", "AY", "B", "·"]
    times = [text.get_position()[0] / 0.08 for text in true]
    assert times == pytest.approx([0.5, 2.5, 4.5, 5.5])
    assert [text.get_bbox_patch() is not None for text in true] == [False, True, False, False]


@pytest.mark.parametrize("words", ["i am", "the quick brown fox jumps over the lazy dog " * 3])
def test_names_in_the_picture_do_not_overlap(words: str) -> None:
    figure = phoneme_picture(*trial(words))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    overlaps = 0
    for strip in (figure.axes[0], figure.axes[2]):
        boxes = [text.get_window_extent(renderer) for text in strip.texts]
        overlaps += sum(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert overlaps == 0


@pytest.mark.parametrize("shape", [(5, 40), (41,)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needed \\[frames, 41\\]"):
        phoneme_picture(np.zeros(shape, np.float32))


def test_a_figure_becomes_a_png_file_and_a_data_address(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "wer.png"
    figure = wer_bars([("3-gram", ErrorRate(1, 2))])
    save_png(path, figure)
    pixels = matplotlib.image.imread(io.BytesIO(path.read_bytes()))
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()
    assert list(path.parent.iterdir()) == [path]
    assert data_uri(figure).startswith("data:image/png;base64,")
    assert png(figure)[:4] == b"\x89PNG"
