"""Memory in pages of 2 MB for the whole process, where Linux leaves the choice to the program.

A training step on a CPU allocates and frees more than a gigabyte. With pages of 4 kB the kernel
needs a tenth of the step for that (`benchmarks/train_step.py`).
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"


def huge_page_environment(setting: Path = _SETTING) -> dict[str, str]:
    """Return the variables that make the C library request huge pages.

    There are none where the system uses huge pages always or never or has no such choice, or where
    the variable is set already.
    """
    try:
        on_request = "[madvise]" in setting.read_text()
    except OSError:
        return {}
    if not on_request or platform.libc_ver()[0] != "glibc" or _TUNABLES in os.environ:
        return {}
    return {_TUNABLES: "glibc.malloc.hugetlb=1"}


def restart_with_huge_pages() -> None:
    """Restart this Python program in the same process, if that enables huge pages.

    The C library reads the variable once, before Python runs. The restarted program finds it set.
    """
    more = huge_page_environment()
    if more:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **more})
