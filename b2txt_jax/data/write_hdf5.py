"""Writes trials in the published T15 layout."""

from __future__ import annotations

import h5py
import numpy as np

PADDED_LABEL = 500
"""Places of a label and of a transcription, padded with 0."""


def write_trial(
    group: h5py.Group,
    session: str,
    block: int,
    trial: int,
    features: np.ndarray,
    labels: np.ndarray | None,
    sentence: str | None,
) -> None:
    """Write a trial to its empty group.

    Args:
      group: of the trial, such as `trial_0000`.
      session: such as `t15.2023.08.13`.
      block: number of the block of sentences.
      trial: number within the block.
      features: float32 [T, D], bins of 20 ms.
      labels: class ids [L], None for a trial without labels.
      sentence: its text, None for a trial without labels.
    """
    group["input_features"] = features
    group.attrs["n_time_steps"] = len(features)
    group.attrs["session"] = session
    group.attrs["block_num"] = block
    group.attrs["trial_num"] = trial
    if labels is None or sentence is None:
        return
    group["seq_class_ids"] = _padded(labels)
    group["transcription"] = _padded(np.array([ord(letter) for letter in sentence]))
    group.attrs["seq_len"] = len(labels)
    group.attrs["sentence_label"] = sentence


def _padded(values: np.ndarray) -> np.ndarray:
    padded = np.zeros(PADDED_LABEL, np.int32)
    padded[: len(values)] = values
    return padded
