"""`b2txt doctor`: checks the environment and names a remedy for every problem.

The exit status is 1 if something prevents training or decoding, else 0.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import b2txt_jax
from b2txt_jax.config import CONFIG_FILE, Config, load_config, read_written_config, with_overrides
from b2txt_jax.doctor import checks
from b2txt_jax.doctor.checks import Finding
from b2txt_jax.errors import UserError


class Sizes(NamedTuple):
    """(rows, bins) of the batches of a run."""

    training: list[tuple[int, int]]
    """Rows of several trials, where these share rows."""
    evaluation: tuple[int, int]
    """The largest."""


_MARKS = {"ok": ("green", "ok"), "warning": ("yellow", "warning"), "problem": ("red", "problem")}
_LM_PACKAGES, _LLM_PACKAGES = ("kenlm", "flashlight"), ("torch", "transformers")
_CACHE_BYTES = 1e9
_RUNTIME_BYTES = 1.5e9
"""Memory of Python, JAX and compiled programs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt doctor`."""
    option = parser.add_argument
    option("--config", help="configuration: its data and memory are checked too (default: none)")
    option("--workdir", type=Path, help="folder of a run, existing or planned")
    option("--data", help="folder of sessions, overrides data.root")
    url, own = "redis://:PASSWORD@host:6379/0", os.environ.get("B2TXT_REDIS_URL")
    help_ = f"for example {url} (default: $B2TXT_REDIS_URL)"
    option("--redis", metavar="URL", default=own, help=help_)
    option("--lm", type=Path, help="folder written by `lm-server build`")
    option("--opt", choices=tuple(checks.OPT_PARAMETERS), help="model to rescore with")
    option(
        "--opt-dtype",
        choices=tuple(checks.BYTES_PER_PARAMETER),
        default="float16",
        help="of its numbers (default float16)",
    )
    option("--json", action="store_true", help="print JSON instead of lines")
    rows = [
        f"  {size:>5}  {checks.opt_memory(size, 'float16') / 1e9:6.1f} GB float16 "
        f"{checks.opt_memory(size, 'float32') / 1e9:7.1f} GB float32"
        for size in checks.OPT_PARAMETERS
    ]
    parser.epilog = "\n".join(["Approximate memory of rescoring with OPT:", *rows])


def run(args: argparse.Namespace) -> int:
    """Run `b2txt doctor`."""
    console = Console(stderr=True)
    findings = []
    with console.status("checking") as status:
        for name, check in _checks(args):
            status.update(f"checking {name}")
            findings.extend(check())
    problems = sum(finding.status == "problem" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    if args.json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        values = {"problems": problems, "warnings": warnings, "findings": listed}
        print(json.dumps(values, indent=2))
    else:
        print_findings(findings)
        print(f"{problems} problems, {warnings} warnings")
    return 1 if problems else 0


def print_findings(findings: list[Finding]) -> None:
    """Print one line for each finding, and its advice below."""
    out = Console(highlight=False, markup=False, soft_wrap=True)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        color, mark = _MARKS[finding.status]
        out.print(f"{mark:<8}", style=color, end="")
        out.print(f"{finding.name:<{width}}  {finding.found}")
        if finding.advice:
            out.print(f"{'':<8}{'':<{width}}  -> {finding.advice}")


def _checks(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[Finding]]]]:
    """Yield (name, check) in order: first the machine, then what the arguments name."""
    chips = checks.find_tpu_chips()
    available = checks.available_memory()
    devices: int | None = None

    def look_at_devices() -> list[Finding]:
        nonlocal devices
        finding, devices = checks.check_devices(chips, checks.find_holders() if chips.count else ())
        return [finding]

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    names, read = ("jax", "jaxlib", "libtpu"), importlib.metadata.version
    versions = {name: _metadata(read, name) for name in names}
    required = _metadata(importlib.metadata.requires, "jax") or []
    yield "versions", lambda: [checks.check_versions(versions, required, chips)]
    yield "devices", look_at_devices
    yield "huge pages", lambda: [checks.check_huge_pages(chips.generation)]
    yield "open files", lambda: [checks.check_open_files(soft, hard)]
    yield "clock", lambda: [checks.check_clock(Path(b2txt_jax.__file__).stat().st_mtime)]
    yield "compilation cache", _compilation_cache
    if args.config or args.data or args.workdir or getattr(args, "overrides", []):
        yield "training", lambda: check_training(args, chips.count > 0, available, devices)
    if args.redis:
        yield "Redis", lambda: check_redis(args.redis)
    if args.lm:
        yield (
            "language model",
            lambda: [
                checks.check_language_model(args.lm, available),
                *checks.check_packages("decoding here", "lm", _LM_PACKAGES, find_spec),
            ],
        )
    if args.opt:
        yield (
            "rescoring",
            lambda: [
                checks.check_opt(args.opt, args.opt_dtype, available),
                *checks.check_packages("rescoring here", "llm", _LLM_PACKAGES, find_spec),
            ],
        )


def _metadata(read: Callable[[str], Any], package: str) -> Any:
    """Return a package's metadata, or None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return read(package)


def _compilation_cache() -> list[Finding]:
    name, folder = "compilation cache", os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not folder:
        return [Finding(name, "warning", "off", "set JAX_COMPILATION_CACHE_DIR to a folder")]
    if "://" in folder:
        return [Finding(name, "ok", f"{folder}, not checked")]
    advice = "set JAX_COMPILATION_CACHE_DIR to a folder of yours"
    writable = checks.check_writable(name, Path(folder), advice)
    if writable.status != "ok":
        return [writable]
    return [writable, checks.check_disk("cache's disk", Path(folder), _CACHE_BYTES)]


def check_training(
    args: argparse.Namespace,
    on_accelerator: bool,
    available: int | None,
    devices: int | None = None,
) -> list[Finding]:
    """Check data, batch, memory and disk of the run that the arguments describe.

    Args:
      args: arguments of the command.
      on_accelerator: whether the step runs on a TPU or GPU.
      available: bytes of host memory.
      devices: number of devices that share a batch, None if unknown.
    """
    try:
        config = _config(args)
    except UserError as error:
        advice = "correct the configuration file or the option"
        return [Finding("configuration", "problem", str(error), advice)]
    findings = []
    state = None
    try:
        if config is None:
            root, others = _root_alone(args)
            if others:
                unread = f"{', '.join(others)} not checked: there is no configuration to change"
                advice = "give --config FILE, or --workdir of a run that has begun"
                findings.append(Finding("configuration", "warning", unread, advice))
            findings.append(_sessions(root))
        else:
            if devices is not None:  # otherwise the check of the devices has failed
                data, axis = config.data, config.parallel.model_axis
                rows = (data.days_per_batch, data.trials_per_day, data.eval_batch_size)
                findings.append(checks.check_rows(*rows, devices, axis))
            groups = max(1, (devices or 1) // config.parallel.model_axis)
            found, sizes, sessions = _data(config, groups)
            findings.append(found)
            state = _state_bytes(config, sessions)
            needed = training_memory(config, state, sizes, on_accelerator=on_accelerator)
            what, advice = "one training process", "lower data.trials_per_day or data.buckets"
            advice += ", or use a larger machine"
            findings.append(checks.check_memory("memory", what, needed, available, advice))
    except (UserError, OSError) as error:
        findings.append(Finding("data", "problem", str(error), "see the message; then run again"))
    if args.workdir:
        advice = "give a --workdir of yours"
        # The check must not make the run's folder.
        existing = checks.existing_folder(args.workdir)
        findings.append(checks.check_writable("run's folder", existing, advice))
        # Two latest states, one more being written, and the best parameters twice.
        needed = 4 * state if state else 3e9
        findings.append(checks.check_disk("run's disk", args.workdir, needed))
    return findings


def _root_alone(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Return (folder of sessions, other overrides) of a command without a configuration."""
    key = "--config.data.root="
    overrides: list[str] = getattr(args, "overrides", [])
    roots = [override.removeprefix(key) for override in overrides if override.startswith(key)]
    others = [override for override in overrides if not override.startswith(key)]
    return args.data or (roots[-1] if roots else None), others


def _config(args: argparse.Namespace) -> Config | None:
    overrides = list(getattr(args, "overrides", []))
    if args.data:
        overrides.append(f"--config.data.root={args.data}")
    if args.config:
        return load_config(args.config, overrides)
    if args.workdir and (args.workdir / CONFIG_FILE).is_file():
        return with_overrides(read_written_config(args.workdir / CONFIG_FILE), overrides)
    return None


def _sessions(root: str | None) -> Finding:
    from b2txt_jax.data.reader import open_folder

    if root is None:
        return Finding("data", "ok", "not checked: no --config and no --data")
    reader = open_folder(root)
    sessions = reader.sessions
    trials = len(reader.trials(sessions, "train"))
    return Finding("data", "ok", f"{len(sessions)} sessions, {trials} training trials in {root}")


def _data(config: Config, groups: int) -> tuple[Finding, Sizes, int]:
    """Return what was found, the sizes of batches that `groups` devices share, and the number of
    sessions."""
    from b2txt_jax.data.loader import (
        MUCH_PADDING,
        EvaluationData,
        TrainingData,
        configured_sessions,
        resolve_buckets,
    )
    from b2txt_jax.training.step import model_of, packing_rules

    sessions = configured_sessions(config.data)
    least, frames = config.model.least_bins, model_of(config, len(sessions)).frames
    rules = packing_rules(config, len(sessions), groups)
    sample = config.train.seed, config.train.steps
    training = TrainingData(config.data, sessions, least, frames, rules, sample)
    validation = EvaluationData(config.data, sessions, "val", least, labels=True)
    with training.reader as reader:
        for refs in training.refs_of_day:
            for ref in refs[:1]:
                reader.read(ref)
    trials = sum(map(len, training.refs_of_day))
    buckets = resolve_buckets(config.data, sessions)
    shapes = ", ".join(f"{bins}x{labels}" for bins, labels in buckets)
    sizes = Sizes(
        [(shape.rows, shape.bins) for shape in training.shapes.share],
        (config.data.eval_batch_size, max(bins for bins, _ in buckets)),
    )
    found = (
        f"{len(sessions)} sessions, {trials} training and {len(validation.refs)} validation trials "
        f"in {config.data.root}, one read of each session; buckets {shapes}, "
        f"{training.padding:.0%} of a training batch is padding"
        f"{' (trials share rows)' if training.packed else ''}"
    )
    if training.padding > MUCH_PADDING and not training.packed:
        advice = "--config.data.buckets='()' chooses buckets from the trials' lengths"
        return Finding("data", "warning", found, advice), sizes, len(sessions)
    without = [name for name, refs in zip(sessions, training.refs_of_day, strict=True) if not refs]
    if without:
        advice = f"no training trials in {', '.join(without)}: their day layers stay untrained"
        return Finding("data", "warning", found, advice), sizes, len(sessions)
    return Finding("data", "ok", found), sizes, len(sessions)


def _state_bytes(config: Config, days: int) -> int:
    """Return the bytes of parameters and optimizer state, without computing them."""
    import jax

    from b2txt_jax.training.step import init_state

    shapes = jax.tree.leaves(jax.eval_shape(lambda: init_state(config, days)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)


def training_memory(config: Config, state: int, sizes: Sizes, *, on_accelerator: bool) -> float:
    """Estimate the host memory of one training process, in bytes, from above.

    Args:
      config: configuration of the run.
      state: bytes of parameters and optimizer state.
      sizes: of its batches.
      on_accelerator: whether the step runs on a TPU or GPU. On a CPU it uses host memory too.
    """
    from b2txt_jax.data.loader import batches_ahead
    from b2txt_jax.training.step import model_of

    data = config.data
    most = max(map(math.prod, [*sizes.training, sizes.evaluation]))
    batch = most * data.feature_count * 4
    # A state that is being saved, and batches read ahead.
    needed = _RUNTIME_BYTES + state + (batches_ahead(batch) + 1) * batch
    if not on_accelerator:
        model = model_of(config, len(data.sessions) or 1)
        largest = max(model.activation_bytes(*size) for size in sizes.training)
        needed += 2 * state + 4 * batch + largest
    return needed


def check_redis(url: str, timeout: float = 5.0) -> list[Finding]:
    """Check that a Redis server answers at `url`. Findings do not contain the password."""
    import redis

    from lm_server.client.connection import RedisUnavailableError, mask_password, redis_client

    shown = mask_password(url)
    try:
        client = redis_client(url, timeout)
        started = time.perf_counter()
        client.ping()
        milliseconds = 1000 * (time.perf_counter() - started)
        seconds, microseconds = client.time()
        ahead = time.time() - (seconds + microseconds / 1e6)
        version = client.info("server")["redis_version"]
        client.close()
    except RedisUnavailableError as error:
        found, _, needed = str(error).partition("; ")
        return [Finding("Redis", "problem", found, needed)]
    except redis.AuthenticationError:
        found = f"{shown} refuses the login"
        return [Finding("Redis", "problem", found, "give user and password in the URL")]
    except (redis.RedisError, OSError) as error:
        reason = str(error).replace(url, shown).splitlines()[0]
        advice = (
            "check host and port, or start one: redis-server --port PORT; a server with a Redis of "
            "its own: lm-server serve --lm DIR --embedded-redis"
        )
        return [Finding("Redis", "problem", f"{shown} does not answer: {reason}", advice)]
    found = f"{shown} answers in {milliseconds:.1f} ms, version {version}"
    return [Finding("Redis", "ok", found), checks.check_clock_difference(ahead)]
