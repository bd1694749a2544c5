"""Which class was said when a model shows another: a matrix that mixes its posteriors.

A model confuses phonemes in ways of its own. Where its softmax all but rules out the class that was
said, no acoustic scale brings it back. The matrix M, [41, 41] with M[c, s] = P(s was said | the
model shows c), replaces the posteriors p of a frame by p @ M.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from lm_server.errors import UserError
from lm_server.protocol import CLASS_COUNT, LM_CLASSES, SILENCE

_NAMES = ["silence" if name == SILENCE else name for name in LM_CLASSES]
_TINY = 1e-300


class ConfusionError(UserError, ValueError):
    """A class confusion that cannot be used."""


@dataclass(frozen=True, repr=False)
class Confusion:
    """A class confusion in the language model's order of classes.

    Attributes:
      rows: P(class said | class of the model), a row of 41 for each of the 41 classes of the model.
    """

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        matrix = self.matrix
        if matrix.shape != (CLASS_COUNT, CLASS_COUNT):
            raise ConfusionError(
                f"the confusion has the shape {matrix.shape}; needed {CLASS_COUNT} rows of "
                f"{CLASS_COUNT} probabilities"
            )
        # Written so that NaN is refused too.
        if not (matrix >= 0).all() or not np.allclose(matrix.sum(axis=1), 1.0, atol=1e-3):
            raise ConfusionError(
                "a row of the confusion is no distribution: needed numbers from 0 with the sum 1"
            )

    @classmethod
    def of(cls, rows: object) -> Confusion:
        """Return a confusion with rows as JSON has them.

        Raises:
          ConfusionError: they are no 41 distributions.
        """
        try:
            matrix = np.array(rows, np.float64)
        except (TypeError, ValueError) as error:
            raise ConfusionError(f"the confusion is no table of numbers ({error})") from error
        return cls(tuple(map(tuple, matrix.tolist())) if matrix.ndim == 2 else ())

    @functools.cached_property
    def matrix(self) -> np.ndarray:
        """The rows as float64 [41, 41]."""
        found = np.array(self.rows, np.float64)
        found.setflags(write=False)
        return found

    @functools.cached_property
    def digest(self) -> str:
        """A fingerprint of the probabilities."""
        return hashlib.sha256(self.matrix.tobytes()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Confusion({self.digest})"

    def weakened(self, share: float) -> Confusion:
        """Return a confusion that leaves all but a share of the posteriors as they are."""
        return of_matrix((1.0 - share) * np.eye(CLASS_COUNT) + share * self.matrix)

    def likeliest(self, count: int) -> list[tuple[str, str, float]]:
        """Return the likeliest exchanges: (class of the model, class said, probability)."""
        off = self.matrix * (1.0 - np.eye(CLASS_COUNT))
        order = np.argsort(-off, axis=None, kind="stable")[:count]
        pairs = [divmod(int(place), CLASS_COUNT) for place in order]
        return [(_NAMES[c], _NAMES[s], float(off[c, s])) for c, s in pairs]


def of_matrix(matrix: np.ndarray) -> Confusion:
    """Return a confusion with the rows of a matrix, rounded to what a file keeps."""
    return Confusion(tuple(tuple(float(f"{one:.6g}") for one in row) for row in matrix))


def mixed(log_probabilities: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return log-probabilities [frames, 41] of the classes said, by those of the model (ln)."""
    mixture = np.exp(log_probabilities) @ matrix
    found: np.ndarray = np.log(np.maximum(mixture, _TINY))
    return found
