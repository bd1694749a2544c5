"""Makes docs/tpu_table.md: memory, step time and scaling of a recipe on TPU slices, by compiling.

Run:  python scripts/tpu_table.py                      (all missing compilations: 1-2 hours)
      python scripts/tpu_table.py --only v5e:4x4 v4:   (slices whose names begin like this)
      python scripts/tpu_table.py --write              (only the table, from the existing files)

Each compilation writes a JSON file to docs/tpu_table and renews the table, so the work can be
interrupted. --again replaces the files, after a change to the step. Needs the tpu extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import multiprocessing
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from b2txt_jax.config import load_config
from b2txt_jax.tpu.chips import CHIPS
from b2txt_jax.tpu.compile import (
    CompileError,
    compile_step,
    session_count,
    typical_bucket,
)
from b2txt_jax.tpu.topologies import SHAPES, parse_topology
from lm_server.atomic_file import replacing

REPOSITORY = Path(__file__).parents[1]
BUCKET = (1000, 100)
WEAK_ROWS = 64
"""Rows per device in the table of weak scaling: the published batch on every device."""
SIZES = (4, 16, 64, 256)
"""Numbers of chips. Each kind of chip has a slice of each size."""
VARIANTS = ("scan", "pallas")
COMPARED = ("v5e:2x2", "v5e:4x4")
"""Slices whose step is also compiled with the scan. The others only use the variant of `auto`."""
TRANSFORMER = ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v5e:4x4")
"""Slices that share the batch of configs/transformer.py."""


class Case(NamedTuple):
    """One compilation."""

    topology: str
    scaling: str
    """'weak': WEAK_ROWS rows per device. 'strong': the configured batch, shared."""
    recurrence: str
    """'scan' or 'pallas'. Empty for a model without any."""
    recipe: str = ""
    """Name of another configuration than --config."""

    def file(self, folder: Path) -> Path:
        """Return the file of the result."""
        parts = (self.recipe, self.topology.replace(":", "_"), self.scaling, self.recurrence)
        return folder / f"{'_'.join(filter(None, parts))}.json"


def cases(rows: int) -> list[Case]:
    """Return the plan, smaller slices first. Strong scaling ends when devices would have no row."""
    found = [Case(topology, "strong", "", "transformer") for topology in TRANSFORMER]
    for chip, shapes in SHAPES.items():
        for shape in shapes:
            topology = parse_topology(f"{chip}:{shape}")
            if topology.chips not in SIZES:
                continue
            found.append(Case(topology.name, "weak", "pallas"))
            if topology.name in COMPARED:
                found.append(Case(topology.name, "weak", "scan"))
            if rows % topology.devices == 0:
                found.append(Case(topology.name, "strong", "pallas"))
    return sorted(found, key=lambda case: parse_topology(case.topology).chips)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs/nejm_baseline.py")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "docs/tpu_table")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs/tpu_table.md")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of slices' names")
    parser.add_argument("--scaling", choices=("weak", "strong"), nargs="+")
    parser.add_argument("--recurrence", choices=VARIANTS, nargs="+")
    parser.add_argument("--again", action="store_true", help="compile again what exists")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    parser.add_argument(
        "--minutes",
        type=int,
        default=15,
        help="of processor time: a compilation that takes longer is left out",
    )
    args = parser.parse_args(argv)
    config = load_config(args.config)
    rows = config.data.batch_rows
    wanted = [
        case
        for case in cases(rows)
        if case.topology.startswith(tuple(args.only))
        and case.scaling in (args.scaling or ("weak", "strong"))
        and (not args.recurrence or case.recurrence in args.recurrence)
        and (args.again or not case.file(args.folder).is_file())
    ]
    if not args.write:
        args.folder.mkdir(parents=True, exist_ok=True)
        for case in _compiled(wanted, args.config, args.folder, args.minutes):
            print(f"{' '.join(case)}: {write_table(args, rows)}", flush=True)
    print(write_table(args, rows))


def write_table(args: argparse.Namespace, rows: int) -> str:
    """Write the page from the existing files. Return a line with their number."""
    planned = cases(rows)
    results = {
        case: json.loads(case.file(args.folder).read_text())
        for case in planned
        if case.file(args.folder).is_file()
    }
    with replacing(args.out) as path:
        path.write_text(table(results, len(planned), args.config.name, rows))
    return f"{args.out}: {len(results)} of {len(planned)} compilations"


def _compiled(wanted: list[Case], config: Path, folder: Path, minutes: int) -> Iterator[Case]:
    """Compile the cases one by one, each in its own process, which has a time limit."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=len(wanted))
        for case in wanted:
            progress.update(task, description=f"compiling for {' '.join(case)}")
            process = spawn.Process(
                target=_compile, args=(case, config, folder, minutes), daemon=True
            )
            started = time.monotonic()
            process.start()
            process.join()
            if process.exitcode == -signal.SIGXCPU:
                reason = f"not compiled within {minutes} minutes of processor time"
                _write(case, folder, {"skipped": reason})
            elif process.exitcode:
                raise SystemExit(f"{case}: the compilation ended with status {process.exitcode}")
            progress.console.print(f"{' '.join(case)}: {time.monotonic() - started:.0f} s")
            progress.advance(task)
            yield case


def _compile(case: Case, config_file: Path, folder: Path, minutes: int = 15) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (60 * minutes, resource.RLIM_INFINITY))
    config = load_config(case.recipe or config_file)
    model = config.model
    if case.recurrence:
        model = dataclasses.replace(model, recurrence=case.recurrence)
    try:
        result = compile_step(
            dataclasses.replace(config, model=model),
            parse_topology(case.topology),
            days=session_count(config),
            bucket=BUCKET if not config.data.buckets else typical_bucket(config),
            per_device_batch=WEAK_ROWS if case.scaling == "weak" else None,
        )
    except CompileError as error:
        _write(case, folder, {"error": str(error)})
        return
    if result.recurrence != case.recurrence:
        raise SystemExit(f"{case}: the program has the recurrence {result.recurrence}")
    _write(case, folder, result.to_json())


def _write(case: Case, folder: Path, values: dict[str, Any]) -> None:
    values |= {"topology": case.topology, "scaling": case.scaling}
    values["chips"] = parse_topology(case.topology).chips
    values["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    with replacing(case.file(folder)) as path:
        path.write_text(json.dumps(values, indent=1) + "\n")


def table(results: dict[Case, dict[str, Any]], planned: int, config: str, rows: int) -> str:
    """Return the page, from results by case."""
    good = [found for found in results.values() if "cost" in found]
    versions = sorted(
        {f"jax {f['versions']['jax']}, libtpu {f['versions']['libtpu']}" for f in good}
    )
    bins = sorted({f"{f['bucket'][0]} bins and up to {f['bucket'][1]} labels" for f in good})
    text = f"""# The training step on TPU slices, by compiling

Made by `scripts/tpu_table.py` from `configs/{config}`: the step that `b2txt train` runs, compiled
for each slice on a machine without a TPU, padded to {" or ".join(bins)}, products in bfloat16
({"; ".join(versions)}). {len(results)} of {planned} planned compilations are here. **Nothing in
this table has run on a TPU.**

- memory: of the fullest device, parameters, optimizer, batch, activations and program together.
- GFLOP a device: matrix products. The recurrence's kernel fills its rows up to 16 (a bfloat16
  tile's), so that a device with 4 rows computes the recurrence of 16.
- all-reduce and other: megabytes that a device puts into collectives in one step.
- cycles: the compiler's static estimate outside kernels, loops multiplied out, in millions.
- roofline: lower bound in milliseconds from published peaks, collectives not overlapped.
- by cycles: the cycles at the chip's published clock, plus kernels and collectives at their
  roofline; "?" where the clock is not published. It ranks programs and is not a timing.
- rates and hours come from the larger of the two times; where the clock is not published only
  the roofline is there, and they are no more than bounds, not to be compared with the others.
  `b2txt compile` prints the assumptions.
- scaling: rows a second and chip against the smallest slice of the same chip in the table.
- recurrence: `auto` in a configuration means pallas on every slice here; the scan is here for
  comparison.
- tpu7x shows two devices per chip, each with half of its memory and a batch of its own. Strong
  scaling ends where devices would have no row.
"""
    bad = {case: found for case, found in results.items() if "cost" not in found}
    for case, found in bad.items():
        text += (
            f"- {' '.join(case)} is not in the tables: {found.get('error', found.get('skipped'))}\n"
        )
    for scaling, title in (
        ("weak", f"## Weak scaling: {WEAK_ROWS} rows per device, a larger batch on a larger slice"),
        ("strong", f"## Strong scaling: the published batch of {rows} rows, shared by the devices"),
    ):
        text += f"\n{title}\n\n{_rows(results, scaling)}"
    text += _transformer(results)
    sources = "\n".join(f"- {chip.name}: {chip.source}" for chip in CHIPS.values())
    return f"{text}\n## Sources of the chips' figures\n\n{sources}\n"


_HEAD = (
    "slice",
    "recurrence",
    "chips",
    "rows",
    "memory, GB",
    "fits",
    "all-reduce, MB",
    "other, MB",
    "GFLOP a device",
    "cycles, M",
    "roofline, ms",
    "by cycles, ms",
    "batches an hour",
    "hours for the run",
    "scaling",
)


def _rows(results: dict[Case, dict[str, Any]], scaling: str) -> str:
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for (chip, shapes), recurrence in itertools.product(SHAPES.items(), VARIANTS):
        smallest: float | None = None
        for shape in shapes:
            found = results.get(Case(f"{chip}:{shape}", scaling, recurrence))
            if found is None or "cost" not in found:
                continue
            rate = found["rows"] / found["time"]["likely"] / found["chips"]
            smallest = smallest or rate
            lines.append(_row(found, rate / smallest))
    return "\n".join(lines) + "\n"


def _transformer(results: dict[Case, dict[str, Any]]) -> str:
    """Return the table of configs/transformer.py."""
    found = [results.get(Case(topology, "strong", "", "transformer")) for topology in TRANSFORMER]
    good = [one for one in found if one is not None and "cost" in one]
    if not good:
        return ""
    kept = [index for index, name in enumerate(_HEAD) if name not in ("recurrence", "scaling")]

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cells[index]) for index in kept) + " |\n"

    return f"""
## The Transformer: its published batch of {good[0]["rows"]} rows, shared by the devices

`configs/transformer.py`, {good[0]["steps"]:,} steps. It has no kernel, so that all of a step is in
the compiler's cycles. Its only loop over frames is the CTC loss's. Reading the data is left out.

{line(_HEAD)}|{"---|" * len(kept)}
{"".join(line(_cells(one, 1.0)) for one in good)}"""


def _moved(found: dict[str, Any]) -> int:
    """Return the bytes of collectives other than all-reduce."""
    return sum(c["bytes"] for c in found["cost"]["collectives"] if c["kind"] != "all-reduce")


def _row(found: dict[str, Any], scaling: float) -> str:
    return "| " + " | ".join(map(str, _cells(found, scaling))) + " |"


def _cells(found: dict[str, Any], scaling: float) -> tuple[Any, ...]:
    memory, cost, time = found["memory"], found["cost"], found["time"]
    reduced = sum(c["bytes"] for c in cost["collectives"] if c["kind"] == "all-reduce")
    bound_only = time["compiler"] is None
    compiler = "?" if bound_only else f"{1e3 * (time['compiler'] + time['ici']):.1f}"
    return (
        found["topology"],
        found["recurrence"],
        found["chips"],
        f"{found['rows']:,}",
        f"{memory['total'] / 1e9:.2f} of {memory['capacity'] / 1e9:.1f}",
        "yes" if memory["fits"] else "**no**",
        f"{reduced / 1e6:.0f}",
        f"{_moved(found) / 1e6:.0f}",
        f"{(cost['flops'] + cost['kernel_flops']) / 1e9:,.0f}",
        f"{cost['cycles'] / 1e6:.1f}",
        f"{1e3 * time['bound']:.1f}",
        compiler,
        f"{'at most ' if bound_only else ''}{3600 / time['likely']:,.0f}",
        f"{'at least ' if bound_only else ''}{found['steps'] * time['likely'] / 3600:.2f}",
        f"{100 * scaling:.0f} %",
    )


if __name__ == "__main__":
    main()
