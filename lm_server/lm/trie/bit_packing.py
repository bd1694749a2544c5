"""Numbers of a few bits each, one after another without gaps, lowest bit first (little-endian)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GROUP = 64
"""So many rows of n bits fill n whole 64-bit words: every group of rows looks alike."""


def pack_bits(fields: Sequence[tuple[np.ndarray, int]]) -> bytes:
    """Rows of fields -> bytes; the last byte is filled with zero bits.

    Args:
      fields: (values [N] below 2 ** bits, bits up to 64) in the order in which they stand in a row.
    """
    rows, width = len(fields[0][0]), sum(bits for _, bits in fields)
    groups = -(-rows // _GROUP)
    packed = np.zeros((width, groups), np.uint64)
    offset = 0
    for values, bits in fields:
        if bits:
            padded = np.zeros(groups * _GROUP, np.uint64)
            padded[:rows] = values
            # [64, groups]: the rows at one place of their group stand together.
            by_place = np.ascontiguousarray(padded.reshape(groups, _GROUP).T)
            for place in range(_GROUP):
                word, shift = divmod(place * width + offset, 64)
                packed[word] |= by_place[place] << np.uint64(shift)
                if shift + bits > 64:
                    packed[word + 1] |= by_place[place] >> np.uint64(64 - shift)
        offset += bits
    data = np.ascontiguousarray(packed.T).astype("<u8", copy=False).tobytes()
    return data[: (rows * width + 7) // 8]
