"""Claims about how the benchmarks of decoding choose settings and make their tasks."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import as a script of that folder does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("decoder", "decoding"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_of_equal_settings_no_order_of_the_grid_decides() -> None:
    from decoding import best_of

    errors = np.array([[5, 9, 9], [9, 9, 6], [9, 6, 5]])
    assert best_of(errors) == (2, 2), "the one with the fewest errors around it"
    assert best_of(errors[::-1, ::-1]) == (0, 0)
    # All are equal: the middle.
    assert best_of(np.ones((3, 5))) == (1, 2)
    assert best_of(np.array([7, 3, 4, 3])) == (3,)
    # More errors count more than any neighbourhood.
    assert best_of(np.array([[4, 9], [5, 5]])) == (0, 0)


def test_sharper_logits_of_a_run_are_the_same_sentences_times_a_factor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import decoder
    import spliced_logits

    piece = np.eye(41, dtype=np.float32) * 9
    right = {one: [piece[[one, 0]]] for one in range(41)}
    halves = [
        spliced_logits.Pieces(right, {one: [] for one in range(41)}, [piece[[0] * starts]])
        for starts in (1, 2)
    ]
    monkeypatch.setattr(spliced_logits, "halves_of", lambda run: halves)
    args = argparse.Namespace(
        run=Path("run"), per=[0.1], dropped=[0.0], sharpness=[1.0, 2.5], seed=0
    )
    soft, sharp = decoder.make_tasks(args, "val", 3)
    assert [soft.sharpness, sharp.sharpness] == [1.0, 2.5]
    assert soft.truth == sharp.truth
    for one, other in zip(soft.logits, sharp.logits, strict=True):
        np.testing.assert_allclose(2.5 * one, other)
    (test, *_) = decoder.make_tasks(args, "test", 3)
    # Pieces of the other half have two frames before a first label.
    assert (test.logits[0][:2].argmax(1) == 0).all()
    assert soft.logits[0][1].argmax() != 0
