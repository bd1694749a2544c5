"""`b2txt check-device`: checks that this machine's TPU, GPU or CPU computes what it should, and how
fast. The first thing to run on a new one.

Kernels (the recurrence, the CTC loss) are compared with float64 NumPy, values and gradients, and
training steps with those of the CPU. The exit status is 1 if something disagrees, else 0.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from b2txt_jax.doctor.checks import Finding
from b2txt_jax.doctor.command import print_findings
from b2txt_jax.provenance import provenance
from lm_server.files.atomic_file import replacing, require_writable

Result = tuple[Finding, dict[str, Any]]
"""What was found, and its figures for the JSON file."""

_ADVICE = (
    "do not train on it. Update jax and its plug-in (b2txt doctor), try another machine, and "
    "report the JSON file; model.recurrence=scan avoids the kernels of the recurrence"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt check-device`."""
    mode = parser.add_mutually_exclusive_group()
    quick = "small sizes and the small model: about a minute (default)"
    mode.add_argument("--quick", action="store_true", help=quick)
    thorough = (
        "also the published sizes, whole steps of the baseline and of the Transformer, and their "
        "times: several minutes on an accelerator, half an hour on two CPU cores"
    )
    mode.add_argument("--thorough", action="store_true", help=thorough)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.epilog = (
        "It uses this machine's devices, on a slice those of each worker by itself. JAX_PLATFORMS "
        "chooses among them."
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt check-device`. Return 1 if something disagrees, else 0."""
    if args.json:
        require_writable(args.json, "--json", devices=True)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # the CPU is compared with
    import jax

    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or None)
    devices = jax.local_devices()
    kind = f"{len(devices)} {devices[0].platform} device(s), {devices[0].device_kind}"
    console = Console(stderr=True)
    results: list[Result] = [(Finding("device", "ok", kind), {})]
    with console.status("") as status:
        for name, check in _checks(devices, args.thorough):
            status.update(f"checking {name}")
            try:
                results.append(check())
            except Exception as error:  # whatever a device does, it is named and counted
                reason = (str(error).strip().splitlines() or [""])[0]
                found = f"ended with {type(error).__name__}: {reason}"[:400]
                results.append((Finding(name, "problem", found, _ADVICE), {}))
    findings = [finding for finding, _ in results]
    print_findings(findings)
    wrong = [finding.name for finding in findings if finding.status == "problem"]
    if args.json:
        values = {
            "device": {"platform": devices[0].platform, "kind": devices[0].device_kind},
            "devices": len(devices),
            "mode": "thorough" if args.thorough else "quick",
            "disagree": wrong,
            "checks": [
                {"name": one.name, "status": one.status, "found": one.found, **figures}
                for one, figures in results
            ],
            **provenance(),
        }
        with replacing(args.json) as path:
            path.write_text(json.dumps(_or_none(values), indent=2, allow_nan=False) + "\n")
    checks = f"of {len(findings)} checks on {kind}"
    if wrong:
        print(f"{len(wrong)} {checks} DISAGREE: {'; '.join(wrong)}")
    else:
        print(f"none {checks} disagrees")
    return 1 if wrong else 0


def _or_none(value: Any) -> Any:
    """Return plain objects with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _or_none(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_or_none(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checks(devices: list[Any], thorough: bool) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Yield (name, check) in order."""
    from b2txt_jax.check_device import kernels, steps
    from b2txt_jax.check_device.limits import measured_bandwidth, measured_flops

    device = devices[0]
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    limits: dict[str, float] = {}

    def speed_limits() -> Result:
        limits["flops"] = measured_flops(device, dtype)
        limits["bytes"] = measured_bandwidth(device)
        return _limits(device, dtype, limits)

    for name, compare in kernels.comparisons(device, thorough):
        yield name, functools.partial(_compared, compare)
    yield "product and memory", speed_limits
    for recipe in (steps.SMALL, *(steps.FULL if thorough else ())):
        rest = steps.compared_steps(recipe, devices, tuple(dict.fromkeys(("float32", dtype))))
        for one in dict.fromkeys(("float32", dtype)):
            name = f"{steps.STEPS} steps of {recipe.config}, {one}"
            yield name, functools.partial(_stepped, name, rest)
    for recipe in steps.TIMED if thorough else (steps.SMALL,):
        name = f"speed of {recipe.config}, {dtype}"
        yield name, functools.partial(_speed, name, recipe, devices, dtype, limits)


def _compared(compare: Callable[[], Any]) -> Result:
    comparison = compare()
    errors = comparison.errors
    worst = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))
    figures = {"errors": errors, "bound": comparison.bound}
    found = f"{worst} within {errors[worst]:.1e} of float64"
    if comparison.agrees:
        return Finding(comparison.name, "ok", found), figures
    found = f"{worst} is {errors[worst]:.1e} of its largest entry away from float64"
    found += f"; needed at most {comparison.bound:g}"
    return Finding(comparison.name, "problem", found, _ADVICE), figures


def _stepped(name: str, comparisons: Iterator[Any]) -> Result:
    steps = next(comparisons, None)
    if steps is None:
        return Finding(name, "problem", "not run: the steps before it ended early", _ADVICE), {}
    figures = {"found": steps.found, "cpu": steps.wanted, "bound": steps.bound}

    def shown(values: dict[str, list[float]]) -> str:
        return "; ".join(
            f"{what} {', '.join(f'{v:.5g}' for v in some)}" for what, some in values.items()
        )

    if steps.agrees:
        found = f"{shown(steps.found)}: the CPU's to {steps.error:.1e}"
        return Finding(name, "ok", found), figures
    found = f"{shown(steps.found)}; needed within {steps.bound:g} of the CPU's "
    return Finding(name, "problem", found + shown(steps.wanted), _ADVICE), figures


def _limits(device: Any, dtype: str, limits: dict[str, float]) -> Result:
    from b2txt_jax.check_device.limits import chip_of

    name, chip = "product and memory", chip_of(device)
    flops, memory = limits["flops"], limits["bytes"]
    found = f"{flops / 1e12:.3g} TFLOP/s in {dtype}, {memory / 1e9:.0f} GB/s"
    figures = {"flops_per_second": flops, "bytes_per_second": memory}
    if chip is None:
        return Finding(name, "ok", f"{found}; nothing published to compare with"), figures
    peaks = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    shares = flops / peaks[0], memory / peaks[1]
    found += f": {shares[0]:.0%} and {shares[1]:.0%} of what is published for {chip.name}"
    figures |= {"share_of_published_flops": shares[0], "share_of_published_bytes": shares[1]}
    if min(shares) < 0.5:
        advice = "another program may use the chip, or it is throttled: b2txt doctor"
        return Finding(name, "warning", found, advice), figures
    return Finding(name, "ok", found), figures


def _speed(
    name: str, recipe: Any, devices: list[Any], dtype: str, limits: dict[str, float]
) -> Result:
    from b2txt_jax.check_device import steps
    from b2txt_jax.check_device.limits import chip_of

    speed = steps.speed(recipe, devices, dtype)
    chip = chip_of(devices[0])
    # All devices of a CPU are the same cores.
    count = 1 if devices[0].platform == "cpu" else len(devices)
    peak = chip.peak_flops / chip.devices if chip else limits.get("flops")
    share = speed.flops / speed.seconds / (peak * count) if peak else None
    of_peak = "" if share is None else f": {share:.0%} of the rate "
    if of_peak:
        of_peak += "published" if chip else "measured for one large product"
    found = (
        f"{1e3 * speed.seconds:.1f} ms for {speed.rows} rows of {speed.bins} bins, "
        f"{speed.flops / 1e9:,.0f} GFLOP of products{of_peak}; compiled in "
        f"{speed.compile_seconds:.0f} s"
    )
    return Finding(name, "ok", found), {**speed._asdict(), "share_of_peak": share}
