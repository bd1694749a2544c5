"""The .npz file of logits that `lm-server` decodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_server.files.atomic_file import replacing
from lm_server.protocol import CLASSES


def write_logits_file(
    path: Path,
    names: Sequence[str],
    logits: Sequence[np.ndarray],
    sentences: Sequence[str | None],
    **checkpoint: Any,
) -> None:
    """Write the file, whole or not at all.

    Args:
      path: the file.
      names: of the trials.
      logits: of each trial, [frames, 41] in the RNN's order.
      sentences: what was said. Left out where one is not known.
      checkpoint: what made the logits: step, weights, parameters (a fingerprint), split.
    """
    arrays = {
        "logits": np.concatenate(logits).astype(np.float32),
        "frames": np.array([len(one) for one in logits], np.int32),
        "trial": np.array(names),
        "classes": np.array(CLASSES),
        **{name: np.array(value) for name, value in checkpoint.items()},
    }
    if all(sentence is not None for sentence in sentences):
        arrays["sentence"] = np.array(sentences)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
