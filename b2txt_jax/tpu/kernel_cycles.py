"""Cycles of the recurrence's kernels, which the compiler's estimate in a program leaves out.

They are counted in the schedule that libtpu writes for the kernels of 768 units in bfloat16:
bundles of one frame's loop, one a cycle but for stalls. `scripts/kernel_cycles.py` counts them.
A frame pushes the whole weight through the matrix unit, however few its rows are: up to 16 rows
cost about the same.
"""

from __future__ import annotations

import bisect

from b2txt_jax.tpu.hlo_cost import KernelRun

UNITS = 768
# chip -> rows of a device -> cycles per frame of a layer, forward and backward.
SCHEDULED: dict[str, dict[int, tuple[int, int]]] = {
    "v5e": {2: (923, 895), 4: (925, 893), 16: (952, 985), 64: (1789, 1900)},
    "v5p": {16: (963, 950)},
    "v6e": {16: (940, 803)},
    "tpu7x": {16: (818, 715)},
}


def recurrence_cycles(run: KernelRun, chip: str) -> int | None:
    """Return the cycles of all runs of a kernel of the recurrence. None where no schedule of the
    chip or width was counted.

    Between two counted numbers of rows they lie on a line, beyond the last one on that of v5e.
    """
    counted = SCHEDULED.get(chip)
    if counted is None or run.units != UNITS:
        return None
    way = run.name == "gru_backward"
    rows = sorted(counted)
    place = bisect.bisect_left(rows, run.rows)
    if place == 0:
        frame = float(counted[rows[0]][way])
    elif place < len(rows):
        low, high = rows[place - 1], rows[place]
        rise = (counted[high][way] - counted[low][way]) / (high - low)
        frame = counted[low][way] + rise * (run.rows - low)
    else:
        few, many = (SCHEDULED["v5e"][n][way] for n in (16, 64))
        frame = counted[rows[-1]][way] + (many - few) / 48 * (run.rows - rows[-1])
    return round(run.times * run.frames * frame)
