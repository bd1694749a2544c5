"""Finds the module that the tests of the pages share."""

import sys
from pathlib import Path

# pytest imports tests by path; the modules that they share are found here.
sys.path.insert(0, str(Path(__file__).parent))
