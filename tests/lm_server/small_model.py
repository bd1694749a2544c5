"""Text and lexicon of a small language model, and logits that say given words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm_server.protocol import LM_CLASSES, SILENCE

LEXICON = """\
a AH
a EY
and AH N D
bat B AE T
cat K AE T
dog D AO G
eight EY T
ate EY T
had HH AE D
hat HH AE T
mat M AE T
on AA N
ran R AE N
sat S AE T
saw S AO
the DH AH
the DH IY
to T UW
too T UW
two T UW
was W AA Z
zebra Z IY B R AH
"""
TEXT = """\
The cat sat on the mat. The dog saw the cat.
The dog ran to the cat, and the cat ran.
A cat had a hat and a dog had two hats.
The cat ate the hat. The dog ate too!
The bat was on the mat. The dog sat on the bat.
"""


def say(
    words: Sequence[str],
    frames: int = 2,
    gap: int = 1,
    last_silence: bool = True,
    strength: float = 25.0,
) -> np.ndarray:
    """Logits [frames, 41] in the language model's order that spell the words' first pronunciation.

    Each phoneme and each silence has `frames` frames, with `gap` frames of blank after it. The
    default `strength` (ln) leaves the language model no say.
    """
    said = {}
    for line in LEXICON.splitlines():
        word, *phones = line.split()
        said.setdefault(word, phones)
    classes = [name for word in words for name in [*said[word], SILENCE]]
    rows = []
    for name in classes if last_silence else classes[:-1]:
        rows += [LM_CLASSES.index(name)] * frames + [0] * gap
    logits = np.zeros((len(rows), len(LM_CLASSES)), np.float32)
    logits[np.arange(len(rows)), rows] = strength
    return logits
