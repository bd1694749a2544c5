"""Makes the PyTorch model importable and keeps PyTorch to one thread."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from b2txt_jax.interop.nejm_args import args_from_config

# pytest imports tests by path; the modules that they share are found here.
sys.path.insert(0, str(Path(__file__).parent))

from nejm_run import Run

# More threads than cores stall PyTorch on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small(tiny_config, tmp_path_factory) -> tuple[Path, Run]:
    """A published folder of the tiny model for the simulated sessions, two steps old.

    With the recipe of the other tests, the programs that they compile serve here too.
    """
    sessions = sorted(path.name for path in Path(tiny_config.data.root).iterdir())
    data = dataclasses.replace(tiny_config.data, sessions=tuple(sessions))
    args = args_from_config(dataclasses.replace(tiny_config, data=data), sessions)
    args |= {"num_training_batches": 4, "batches_per_val_step": 2}
    run = Run(args)
    for step in range(2):
        run.step(run.random_gradient(step, (0, 1, 3)))
    return run.save(tmp_path_factory.mktemp("small") / "theirs"), run
