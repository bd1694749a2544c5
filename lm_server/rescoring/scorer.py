"""What rescoring needs of a large language model, and the check of its scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lm_server.errors import UserError

_LOG = logging.getLogger(__name__)
DEFAULT_MODEL = "facebook/opt-6.7b"
"""What `--llm` without a value means: the published server's model."""


class RescoringError(UserError, RuntimeError):
    """A large language model that cannot be loaded or did not score. Names the next step."""


def find_model(folder: Path | str) -> Path:
    """Return the model's folder, or the one of that name in the Hugging Face cache.

    Raises:
      RescoringError: there is neither. Says how to get one.
    """
    path = Path(folder)
    if (path / "config.json").is_file():
        return path
    name = str(folder)
    if not path.exists() and name.count("/") == 1:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            pass
    what = "is no model folder (it has no config.json)" if path.is_dir() else "is not there"
    wanted = name if name.count("/") == 1 and not name.startswith((".", "/")) else DEFAULT_MODEL
    raise RescoringError(
        f"the large language model {name} {what}: fetch one where there is a network, "
        f"`hf download {wanted} --local-dir DIR` (facebook/opt-6.7b: 13 GB), or make a small one "
        "with `lm-server prepare-llm --out DIR`, and use --llm DIR"
    )


class SentenceScorer(Protocol):
    """A large language model that scores sentences."""

    name: str

    def score(
        self, sentences: Sequence[str], context: str = "", length_penalty: float = 0.0
    ) -> np.ndarray:
        """Return log-probabilities (ln), float64 [sentences].

        Args:
          sentences: none of them empty, in the text form of the search (lower case).
          context: what was said before. It is put before every sentence.
          length_penalty: subtracted from a score for every token (ln).

        Raises:
          RescoringError: not every sentence got a finite score.
        """
        ...


def checked_scores(
    scorer: SentenceScorer, sentences: Sequence[str], context: str, length_penalty: float
) -> dict[str, float]:
    """Return sentence -> log-probability (ln).

    Raises:
      RescoringError: the scorer failed in whatever way, or a score is missing or not finite.
    """
    try:
        scores = np.asarray(scorer.score(sentences, context, length_penalty), np.float64)
    except RescoringError:
        raise
    # A model's library may fail with anything. The sentence must still get its n-gram answer.
    except Exception as error:
        _LOG.exception("rescoring with %s failed", scorer.name)
        raise RescoringError(
            f"{scorer.name} failed ({type(error).__name__}: {error}): see the server's log"
        ) from error
    if scores.shape != (len(sentences),):
        raise RescoringError(
            f"{scorer.name} returned scores of shape {scores.shape}; needed one for each of the "
            f"{len(sentences)} sentences: use another model"
        )
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise RescoringError(
            f"{scorer.name} returned no finite score for {len(bad)} of {len(sentences)} sentences, "
            f"first {scores[bad[0]]} for {sentences[bad[0]]!r}: load it in float32 or use another "
            "model"
        )
    return dict(zip(sentences, scores.tolist(), strict=True))
