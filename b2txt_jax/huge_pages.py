"""Memory in pages of 2 MB for the whole process, where Linux leaves the choice to the program.

A training step on a CPU takes and gives back more than a gigabyte; in pages of 4 kB the kernel
spends a tenth of the step on that (`benchmarks/train_step.py`).
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"


def huge_page_environment(setting: Path = _SETTING) -> dict[str, str]:
    """Variables that make the C library ask for huge pages: none where the system does so anyway
    ('always'), never ('never'), has no such choice, or somebody has set the variable already."""
    try:
        on_request = "[madvise]" in setting.read_text()
    except OSError:
        return {}
    if not on_request or platform.libc_ver()[0] != "glibc" or _TUNABLES in os.environ:
        return {}
    return {_TUNABLES: "glibc.malloc.hugetlb=1"}


def restart_with_huge_pages() -> None:
    """Starts this Python program anew, same process and arguments, if that brings huge pages.

    The C library reads the variable once, before Python runs. The second start finds it set.
    """
    more = huge_page_environment()
    if more:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **more})
