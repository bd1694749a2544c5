"""What `b2txt doctor` looks at on the machine: pure functions of paths and values, so that each can
be shown a broken machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

Status = Literal["ok", "warning", "problem"]

_GB = 1e9
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
"""Parameters of the OPT models (Zhang et al. 2022, table 1); NEJM rescores with 6.7b."""
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    """One line."""
    advice: str = ""
    """One line of what to do; empty when all is well."""


@dataclasses.dataclass(frozen=True)
class TpuChips:
    """TPU chips on the PCI bus."""

    generation: str | None
    count: int


def find_tpu_chips(devices: Path = Path("/sys/bus/pci/devices")) -> TpuChips:
    """Chips that the machine has, whether or not JAX can use them."""
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
    """Whether jaxlib and libtpu are the ones that this jax asks for.

    Args:
      installed: version of jax, jaxlib and libtpu, None where one is not installed.
      jax_requires: jax's own requirements, as `importlib.metadata.requires("jax")` has them.
      chips: of this machine; without any, libtpu is not needed.
    """
    listed = ", ".join(f"{name} {version or 'missing'}" for name, version in installed.items())
    python = sys.version.split()[0]
    found = f"Python {python}, {listed}"
    if installed.get("jax") is None or installed.get("jaxlib") is None:
        return Finding("versions", "problem", found, "pip install -e . in this repository")
    if chips.count and installed.get("libtpu") is None:
        found += f", on a machine with {chips.count} TPU {chips.generation} chips"
        return Finding("versions", "problem", found, "pip install -e '.[tpu]'")
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
                f"pip install '{wanted.name}{wanted.specifier}', or reinstall with "
                f"pip install -e '.[{extra}]'".replace(".[]", "."),
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
    """What JAX computes on, asked of a process of its own, which gives the chips back; and the
    number of devices, of all hosts of a slice, where that is known.

    Args:
      chips: that the machine has.
      holders: processes that hold them, see `find_holders`.
      command: prints `DEVICES ["platform", count, "kind", count of all hosts]`.
      timeout: seconds.
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
            else "mend the versions first; on a TPU VM, restart it if that does not help"
        )
        return Finding("devices", "problem", found, advice), None
    platform, count, kind, everywhere = json.loads(answer[0].removeprefix("DEVICES "))
    found = f"{count} {platform} device(s), {kind}"
    if everywhere != count:
        found += f"; {everywhere} on all hosts"
    if chips.count and platform != "tpu":
        found += f", though the machine has {chips.count} TPU {chips.generation} chips"
        advice = busy or (
            "pip install -e '.[tpu]'; unset JAX_PLATFORMS"
            + (f" (it is {os.environ['JAX_PLATFORMS']!r})" if "JAX_PLATFORMS" in os.environ else "")
        )
        return Finding("devices", "problem", found, advice), None
    return Finding("devices", "ok", found), everywhere


def check_rows(
    days: int, trials: int, evaluated: int, devices: int, model_axis: int = 1
) -> Finding:
    """Whether all devices get as many rows of a batch.

    Args:
      days: data.days_per_batch.
      trials: data.trials_per_day.
      evaluated: rows of a batch of validation, data.eval_batch_size.
      devices: of all hosts.
      model_axis: devices that share the large parameters, and with them their rows.
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
    """Other processes that have a file open whose path starts with one of `patterns`, as
    `pid 123 (python)`; those of other users are seen by root alone."""
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
    """Transparent huge pages: 'always' for the TPU runtime of v5 and newer; on a CPU, 'madvise'
    does too, since b2txt asks for them."""
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
    """Room for `needed` bytes at `path`, which need not exist yet."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    found = f"{free / _GB:.1f} GB free at {path}, {needed / _GB:.1f} GB needed"
    if free < needed:
        return Finding(name, "problem", found, "delete old runs there, or give another folder")
    if free < 2 * needed:
        return Finding(name, "warning", found, "make room before a long run")
    return Finding(name, "ok", found)


def check_writable(name: str, path: Path, advice: str) -> Finding:
    """Whether files can be made in a folder, which is made where it is not there."""
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
    """Bytes that a new process can have: of the machine, or of the container if that is less; None
    where neither is told."""
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
    """`needed` bytes against `available` ones."""
    found = f"{what} takes about {needed / _GB:.1f} GB"
    if available is None:
        return Finding(name, "warning", f"{found}; free memory unknown", "look with `free -g`")
    found += f"; {available / _GB:.1f} GB of memory are free"
    if available < needed:
        return Finding(name, "problem", found, advice)
    return Finding(name, "ok", found)


def check_open_files(soft: int, hard: int) -> Finding:
    """The limit on open files: a session is one, and a checkpoint opens many for a moment."""
    found = f"at most {soft} open files"
    advice = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536} before the command"
    if 0 <= soft < 256:
        return Finding("open files", "problem", found, advice)
    if 0 <= soft < 1024:
        return Finding("open files", "warning", found, advice)
    return Finding("open files", "ok", found)


def check_clock(newest: float, now: float | None = None) -> Finding:
    """The clock must not be before `newest`, the date of a file that came with the code (seconds
    since 1970): cloud services refuse those who live in the past."""
    now = time.time() if now is None else now
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < newest - 86400:
        found = f"it says {shown}, which is before this code was written"
        return Finding("clock", "problem", found, "sudo timedatectl set-ntp true")
    return Finding("clock", "ok", shown)


def check_clock_difference(seconds: float) -> Finding:
    """The clock against the one of the Redis server, `seconds` ahead."""
    found = f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the Redis server's"
    if abs(seconds) > 5:
        advice = "sudo timedatectl set-ntp true, on both machines: logs cannot be compared"
        return Finding("clock and Redis", "warning", found, advice)
    return Finding("clock and Redis", "ok", found)


_LM_FORMAT = 1
_LM_BYTES_PER_WORD = 2000
"""Beside the n-grams: 279 MB were measured for 125,938 words and 25 MB of n-grams."""


def check_language_model(folder: Path, available: int | None) -> Finding:
    """The folder that `lm-server build` writes: whole, of this format, and small enough."""
    name = "language model"
    build = "lm-server build --text FILE --order 3 --lexicon cmudict --out " + str(folder)
    if not folder.is_dir():
        return Finding(name, "problem", f"there is no folder {folder}", build)
    missing = [
        file
        for file in ("lm.json", "lm.bin", "lexicon.txt")
        if not (folder / file).is_file() or not (folder / file).stat().st_size
    ]
    if missing:
        found = f"{folder} has no {', '.join(missing)}, or it is empty"
        return Finding(name, "problem", found, build)
    try:
        description = json.loads((folder / "lm.json").read_text())
        words, order, version = (description[key] for key in ("words", "order", "format"))
    except (ValueError, KeyError, TypeError) as error:
        found = f"{folder}/lm.json cannot be used: {type(error).__name__} {error}"
        return Finding(name, "problem", found, build)
    if version != _LM_FORMAT:
        found = f"{folder} has format {version}; needed {_LM_FORMAT}"
        return Finding(name, "problem", found, build)
    needed = (folder / "lm.bin").stat().st_size + words * _LM_BYTES_PER_WORD
    what = f"the {order}-gram model of {words:,} words"
    return check_memory(
        name, what, needed, available, "use a smaller text or order, or free memory"
    )


def opt_memory(size: str, dtype: str) -> float:
    """Bytes that rescoring with an OPT model takes, about: its weights, a tenth for activations,
    and 1 GB for the libraries."""
    return 1.1 * OPT_PARAMETERS[size] * BYTES_PER_PARAMETER[dtype] + 1e9


def check_opt(size: str, dtype: str, available: int | None) -> Finding:
    """Whether an OPT model fits; names the largest that does."""
    fitting = [name for name in OPT_PARAMETERS if opt_memory(name, dtype) <= (available or 0)]
    advice = f"the largest that fits in {dtype}: {fitting[-1]}" if fitting else "none of them fits"
    what = f"rescoring with OPT {size} in {dtype}"
    return check_memory("rescoring", what, opt_memory(size, dtype), available, advice)
