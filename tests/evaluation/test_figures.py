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
    BLUE,
    ORANGE,
    Curves,
    Point,
    Segment,
    confusion_picture,
    data_uri,
    greedy_segments,
    learning_curves,
    phoneme_errors,
    phoneme_picture,
    rates_by_group,
    save_figure,
)
from b2txt_jax.metrics import greedy_decode
from b2txt_jax.phonemes import sentence_to_ids

METRICS: list[dict[str, Any]] = [
    {"step": 10, "kind": "train", "loss": 80.0, "gradient_norm": 4.0},
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


def curves(metrics: list[dict[str, Any]], name: str = "run") -> Curves:
    return Curves(name, metrics, lambda steps: 0.5 * steps)


def drawn(axes: Any) -> dict[str, list[list[float]]]:
    return {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.lines}


def test_the_learning_curves_show_the_measured_points_and_name_the_best() -> None:
    losses, rates, learning, norms = learning_curves([curves(METRICS)]).axes
    assert drawn(losses) == {
        "training": [[10, 80], [20, 50]],
        "validation": [[20, 55], [30, 45]],
    }
    assert drawn(rates)["run"] == [[20, 50], [30, 25]]
    assert "25.0 % at step 30" in rates.get_title()
    assert drawn(learning)["run"][::10] == [[0, 0], [10, 5], [20, 10]]
    assert np.asarray(norms.lines[0].get_xydata()).tolist() == [[10, 4]]


def test_several_runs_have_a_colour_each_in_all_panels() -> None:
    panels = learning_curves([curves(METRICS, "one"), curves(METRICS, "two")]).axes
    colours = [{line.get_color() for line in axes.lines} for axes in panels]
    assert colours == [{BLUE, ORANGE}] * 4


def test_steps_repeated_after_a_resume_count_once_and_the_later_value_wins() -> None:
    again = [*METRICS, {"step": 10, "kind": "train", "loss": 70.0}]
    assert drawn(learning_curves([curves(again)]).axes[0])["training"] == [[10, 70], [20, 50]]


def test_losses_that_are_not_finite_do_not_spoil_the_curve() -> None:
    entry = {"step": 15, "kind": "train", "loss": float("inf")}
    figure = learning_curves([curves([*METRICS, entry])])
    assert drawn(figure.axes[0])["training"] == [[10, 80], [20, 50]]


def test_a_run_without_steps_says_so() -> None:
    found = texts(learning_curves([curves([])]))
    assert found == ["no steps yet", "no validation yet", "no steps yet", "no steps yet"]


def test_each_group_has_its_rate_and_interval_at_its_place() -> None:
    points = {"day 1": Point(0.5, 0.25, 0.75), "day 2": Point(None), "day 3": Point(0.125)}
    figure = rates_by_group("By day", {"PER": {"run": points}, "WER": {"run": {}}})
    per, _ = figure.axes
    assert [label.get_text() for label in per.get_yticklabels()] == list(points)
    lines = [np.asarray(line.get_xydata()).tolist() for line in per.lines]
    assert lines == [[[25, 0], [75, 0]], [[50, 0]], [[12.5, 2]]]


def test_confusions_are_shares_of_what_was_said_and_the_blank_is_nothing() -> None:
    counts = np.zeros((41, 41), int)
    counts[5, 5], counts[5, 6], counts[5, 0], counts[0, 7] = 2, 1, 1, 1
    axes = confusion_picture(counts).axes[0]
    shares = np.asarray(axes.images[0].get_array())
    assert (shares[4, 4], shares[4, 5], shares[4, 40]) == (50, 25, 25)
    assert shares[40, 6] == 25  # of all four phonemes that were said
    assert axes.get_xticklabels()[40].get_text() == "missed"


def test_phonemes_without_errors_have_no_bar() -> None:
    counts = np.zeros((3, 41), int)
    counts[:, 9], counts[0, 3] = (3, 2, 1), 1
    axes = phoneme_errors(*counts).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["D", "AH"]
    widths = [patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
    assert widths == [3, 1, 2, 0, 1, 0]
    assert texts(phoneme_errors(*np.zeros((3, 41), int))) == ["no errors"]


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
    denser = phoneme_picture(logits, label, frame_seconds=0.04)
    assert denser.axes[1].get_xlim() == pytest.approx((0.0, 0.04 * len(logits)))
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


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_figure_is_written_in_the_format_of_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "figures" / f"rates.{kind}"
    figure = rates_by_group("By day", {"PER": {"run": {"day": Point(0.5)}}})
    save_figure(path, figure)
    assert list(path.parent.iterdir()) == [path]
    data = path.read_bytes()
    assert data[:5] == {"png": b"\x89PNG\r", "pdf": b"%PDF-", "svg": b"<?xml"}[kind]
    if kind == "png":
        pixels = matplotlib.image.imread(io.BytesIO(data))
        assert pixels.shape[1] > 1000
        assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()
    if kind == "svg":
        assert b">By day</text>" in data  # a text, not its outlines
        assert data_uri(figure).startswith("data:image/svg+xml;base64,")
