"""The checks of `b2txt doctor`: functions of paths and values, so that each can be tested on a
broken machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

Status = Literal["ok", "warning", "problem"]

_GB = 1e9
_INSTALL = "from the checkout: pip install . -c constraints.txt"
_INSTALL_TPU = _INSTALL.replace(" . ", " '.[tpu]' ")
_GOOGLE_PCI_VENDOR = "0x1ae0"
# PCI device numbers, as in jax/_src/hardware_utils.py.
_TPU_GENERATIONS = {
    "0x0027": "v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}
_WANT_HUGE_PAGES = {"v5p", "v5e", "v6e", "tpu7x"}

OPT_PARAMETERS = {
    "125m": 125e6,
    "350m": 331e6,
    "1.3b": 1.32e9,
    "2.7b": 2.65e9,
    "6.7b": 6.66e9,
    "13b": 12.85e9,
    "30b": 29.97e9,
    "66b": 65.72e9,
}
"""Parameters of the OPT models (Zhang et al. 2022, table 1). NEJM rescores with 6.7b."""
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    status: Status
    found: str
    """One line."""
    advice: str = ""
    """One line with the remedy, empty if the status is ok."""


def _graded(name: str, found: str, advice: str, *, problem: bool, warning: bool = False) -> Finding:
    """Return a finding whose status is the worst that applies."""
    if not (problem or warning):
        return Finding(name, "ok", found)
    return Finding(name, "problem" if problem else "warning", found, advice)


def existing_folder(path: Path) -> Path:
    """Return the path or its nearest parent that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


@dataclasses.dataclass(frozen=True)
class TpuChips:
    """TPU chips on the PCI bus."""

    generation: str | None
    count: int


def find_tpu_chips(devices: Path = Path("/sys/bus/pci/devices")) -> TpuChips:
    """Find the machine's TPU chips, whether or not JAX can use them."""
    found = []
    for vendor in sorted(devices.glob("*/vendor")):
        with contextlib.suppress(OSError):
            if vendor.read_text().strip() == _GOOGLE_PCI_VENDOR:
                number = (vendor.parent / "device").read_text().strip()
                found.append(_TPU_GENERATIONS.get(number))
    chips = [generation for generation in found if generation]
    return TpuChips(chips[0] if chips else None, len(chips))


def check_versions(
    installed: Mapping[str, str | None], jax_requires: Sequence[str], chips: TpuChips
) -> Finding:
    """Check that jaxlib and libtpu have the versions that jax requires.

    Args:
      installed: versions of jax, jaxlib and libtpu, None if not installed.
      jax_requires: jax's requirements, as returned by `importlib.metadata.requires("jax")`.
      chips: TPU chips of this machine. Without any, libtpu is not needed.
    """
    listed = ", ".join(f"{name} {version or 'missing'}" for name, version in installed.items())
    python = sys.version.split()[0]
    found = f"Python {python}, {listed}"
    if installed.get("jax") is None or installed.get("jaxlib") is None:
        return Finding("versions", "problem", found, _INSTALL)
    if chips.count and installed.get("libtpu") is None:
        found += f", on a machine with {chips.count} TPU {chips.generation} chips"
        return Finding("versions", "problem", found, _INSTALL_TPU)
    extra = "tpu" if installed.get("libtpu") else ""
    for text in jax_requires:
        wanted = Requirement(text)
        version = installed.get(wanted.name)
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": extra})
        if version and applies and not wanted.specifier.contains(version, prereleases=True):
            harmless = wanted.name == "libtpu" and not chips.count
            return Finding(
                "versions",
                "warning" if harmless else "problem",
                f"{found}; this jax needs {wanted.name} {wanted.specifier}",
                f"pip install '{wanted.name}{wanted.specifier}', or "
                + (_INSTALL_TPU if extra else _INSTALL),
            )
    return Finding("versions", "ok", found)


_LIST_DEVICES = (
    "import json, jax; d = jax.local_devices(); "
    "print('DEVICES ' + json.dumps([d[0].platform, len(d), d[0].device_kind, jax.device_count()]))"
)


def check_devices(
    chips: TpuChips,
    holders: Sequence[str] = (),
    command: Sequence[str] = (sys.executable, "-c", _LIST_DEVICES),
    timeout: float = 120.0,
) -> tuple[Finding, int | None]:
    """Check the devices that JAX uses, in a separate process, which releases the chips.

    Args:
      chips: TPU chips of this machine.
      holders: processes that hold them, see `find_holders`.
      command: prints `DEVICES ["platform", count, "kind", count of all hosts]`.
      timeout: seconds.

    Returns:
      The finding, and the number of devices on all hosts of a slice if it is known.
    """
    busy = f"they are in use by {', '.join(holders)}: end it, or wait" if holders else ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        found = f"JAX did not answer within {timeout:.0f} s"
        advice = busy or (
            "look for a process that holds the chips: sudo lsof -w /dev/accel* /dev/vfio/*; on a "
            "slice, all workers must ask at the same time: launch/tpu.sh doctor"
        )
        return Finding("devices", "problem", found, advice), None
    answer = [line for line in done.stdout.splitlines() if line.startswith("DEVICES ")]
    if done.returncode or not answer:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        in_use = [line for line in lines if "already in use" in line]
        found = f"JAX found no device: {(in_use or lines or ['no message'])[-1]}"
        advice = busy or (
            "another process holds the TPU: end the one named, or wait"
            if in_use
            else "correct the versions first; on a TPU VM, restart it if that does not help"
        )
        return Finding("devices", "problem", found, advice), None
    platform, count, kind, everywhere = json.loads(answer[0].removeprefix("DEVICES "))
    found = f"{count} {platform} device(s), {kind}"
    if everywhere != count:
        found += f"; {everywhere} on all hosts"
    if chips.count and platform != "tpu":
        found += f", though the machine has {chips.count} TPU {chips.generation} chips"
        advice = busy or (
            f"{_INSTALL_TPU}; unset JAX_PLATFORMS"
            + (f" (it is {os.environ['JAX_PLATFORMS']!r})" if "JAX_PLATFORMS" in os.environ else "")
        )
        return Finding("devices", "problem", found, advice), None
    return Finding("devices", "ok", found), everywhere


def check_rows(
    days: int, trials: int, evaluated: int, devices: int, model_axis: int = 1
) -> Finding:
    """Check that the devices can share the rows of a batch evenly.

    Args:
      days: data.days_per_batch.
      trials: data.trials_per_day.
      evaluated: data.eval_batch_size, the rows of a validation batch.
      devices: number of devices of all hosts.
      model_axis: devices that share the large parameters, and therefore their rows.
    """
    if devices % model_axis:
        found = f"{devices} devices cannot be grouped by parallel.model_axis, {model_axis}"
        return Finding("batch", "problem", found, "set parallel.model_axis to a divisor")
    shares, rows = devices // model_axis, days * trials
    if rows % shares == 0 and evaluated % shares == 0:
        found = f"{rows} rows, {rows // shares} for each of {shares} devices"
        return Finding("batch", "ok", found)
    more = next(count for count in range(trials, trials + shares) if days * count % shares == 0)
    found = (
        f"{shares} devices cannot share {rows} rows (data.days_per_batch * data.trials_per_day) "
        f"and {evaluated} of validation (data.eval_batch_size) evenly"
    )
    advice = (
        f"--config.data.trials_per_day={more} "
        f"--config.data.eval_batch_size={-(-evaluated // shares) * shares}, or fewer devices"
    )
    return Finding("batch", "problem", found, advice)


def find_holders(
    patterns: Sequence[str] = ("/dev/accel", "/dev/vfio/"), processes: Path = Path("/proc")
) -> list[str]:
    """List other processes with an open file whose path starts with one of `patterns`.

    They are named `pid 123 (python)`. Only root sees the processes of other users.
    """
    found = []
    for folder in sorted(processes.glob("[0-9]*"), key=lambda path: int(path.name)):
        if folder.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):
            targets = []
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(OSError):
                    targets.append(os.readlink(link))
            if any(target.startswith(tuple(patterns)) for target in targets):
                found.append(f"pid {folder.name} ({(folder / 'comm').read_text().strip()})")
    return found


def check_huge_pages(
    generation: str | None,
    setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled"),
) -> Finding:
    """Check transparent huge pages: 'always' for the TPU runtime of v5 and newer.

    On a CPU 'madvise' suffices, because b2txt requests them.
    """
    name = "huge pages"
    try:
        text = setting.read_text()
        chosen = text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return Finding(name, "ok", "this system has no such setting")
    advice = f'sudo sh -c "echo {{}} > {setting}", once per start of the machine'
    if generation in _WANT_HUGE_PAGES and chosen != "always":
        found = f"{chosen!r}: the runtime of TPU {generation} starts and stops slowly"
        return Finding(name, "warning", found, advice.format("always"))
    if generation is None and chosen == "never":
        found = "'never': training on a CPU takes about a tenth longer"
        return Finding(name, "warning", found, advice.format("madvise"))
    return Finding(name, "ok", f"{chosen!r}")


def check_disk(name: str, path: Path, needed: float) -> Finding:
    """Check that `needed` bytes are free at `path`, which need not exist yet."""
    free = shutil.disk_usage(existing_folder(path)).free
    found = f"{free / _GB:.1f} GB free at {path}, {needed / _GB:.1f} GB needed"
    full = free < needed
    advice = (
        "delete old runs there, or give another folder"
        if full
        else "free more space before a long run"
    )
    return _graded(name, found, advice, problem=full, warning=free < 2 * needed)


def check_writable(name: str, path: Path, advice: str) -> Finding:
    """Check that files can be made in a folder. The folder is made if it does not exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        return Finding(name, "problem", f"{path} cannot be written to: {error.strerror}", advice)
    return Finding(name, "ok", f"{path} can be written to")


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the free bytes of the machine or, if fewer, of the container. None if unknown."""
    limits = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = meminfo.read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        most = int((cgroup / "memory.max").read_text())
        limits.append(most - int((cgroup / "memory.current").read_text()))
    return min(limits) if limits else None


def check_memory(
    name: str, what: str, needed: float, available: int | None, advice: str
) -> Finding:
    """Compare the needed bytes with the available ones."""
    found = f"{what} takes about {needed / _GB:.1f} GB"
    if available is None:
        return Finding(name, "warning", f"{found}; free memory unknown", "look with `free -g`")
    found += f"; {available / _GB:.1f} GB of memory are free"
    return _graded(name, found, advice, problem=available < needed)


def check_open_files(soft: int, hard: int) -> Finding:
    """Check the limit on open files. A session needs one, and saving a checkpoint many."""
    found = f"at most {soft} open files"
    advice = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536} before the command"
    few, fewer = 0 <= soft < 1024, 0 <= soft < 256
    return _graded("open files", found, advice, problem=fewer, warning=few)


def check_clock(newest: float, now: float | None = None) -> Finding:
    """Check that the clock is not before the code was written. Cloud services refuse such clocks.

    Args:
      newest: date of a file of the code, in seconds since 1970.
      now: the clock, in seconds since 1970.
    """
    now = time.time() if now is None else now
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    early = now < newest - 86400
    found = f"it shows {shown}, which is before this code was written" if early else shown
    return _graded("clock", found, "sudo timedatectl set-ntp true", problem=early)


def check_clock_difference(seconds: float) -> Finding:
    """Check that the clock, `seconds` ahead of the Redis server's, agrees with it."""
    found = f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the Redis server's"
    advice = "sudo timedatectl set-ntp true, on both machines: logs cannot be compared"
    apart = abs(seconds) > 5
    return _graded("clock and Redis", found, advice, problem=False, warning=apart)


_LM_FORMAT = 1
_LM_BYTES_PER_WORD = 2000
"""In addition to the n-grams. Measured: 279 MB for 125,938 words and 25 MB of n-grams."""


def check_packages(
    purpose: str, extra: str, packages: Sequence[str], available: Callable[[str], object]
) -> list[Finding]:
    """Check that the packages of an extra are installed. Return no finding if they are.

    Args:
      purpose: what needs them.
      extra: of this package, which brings them.
      packages: their import names.
      available: returns whether a package can be imported, such as `importlib.util.find_spec`.
    """
    missing = [name for name in packages if not available(name)]
    if not missing:
        return []
    found = f"{purpose} needs {' and '.join(missing)}, not installed here"
    return [Finding("packages", "problem", found, _INSTALL.replace(" . ", f" '.[{extra}]' "))]


def check_language_model(folder: Path, available: int | None) -> Finding:
    """Check that a model folder is complete, has the right format and fits into memory."""

    def problem(found: str) -> Finding:
        out = shlex.quote(str(folder))
        advice = f"lm-server build --text FILE --order 3 --lexicon cmudict --out {out}"
        return Finding("language model", "problem", found, advice)

    if not folder.is_dir():
        return problem(f"there is no folder {folder}")
    files = [folder / name for name in ("lm.json", "lm.bin", "lexicon.txt")]
    missing = [path.name for path in files if not path.is_file() or not path.stat().st_size]
    if missing:
        return problem(f"{folder} has no {', '.join(missing)}, or it is empty")
    try:
        description = json.loads((folder / "lm.json").read_text())
        words, order, version = (description[key] for key in ("words", "order", "format"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return problem(f"{folder}/lm.json cannot be used: {type(error).__name__} {error}")
    if version != _LM_FORMAT:
        return problem(f"{folder} has format {version}; needed {_LM_FORMAT}")
    needed = (folder / "lm.bin").stat().st_size + words * _LM_BYTES_PER_WORD
    what, advice = f"the {order}-gram model of {words:,} words", "use a smaller text or order"
    return check_memory("language model", what, needed, available, f"{advice}, or free memory")


def opt_memory(size: str, dtype: str) -> float:
    """Estimate the memory of rescoring: weights, a tenth for activations, 1 GB of libraries."""
    return 1.1 * OPT_PARAMETERS[size] * BYTES_PER_PARAMETER[dtype] + 1e9


def check_opt(size: str, dtype: str, available: int | None) -> Finding:
    """Check that an OPT model fits into memory, and name the largest that does."""
    fitting = [name for name in OPT_PARAMETERS if opt_memory(name, dtype) <= (available or 0)]
    advice = f"the largest that fits in {dtype}: {fitting[-1]}" if fitting else "none of them fits"
    what = f"rescoring with OPT {size} in {dtype}"
    return check_memory("rescoring", what, opt_memory(size, dtype), available, advice)
