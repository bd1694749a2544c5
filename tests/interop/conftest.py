"""Makes the PyTorch model importable and keeps PyTorch to one thread."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# pytest imports tests by path; the modules that they share are found here.
sys.path.insert(0, str(Path(__file__).parent))

# More threads than cores stall PyTorch on a busy machine.
torch.set_num_threads(1)
