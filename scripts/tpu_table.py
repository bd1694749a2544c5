"""Makes docs/tpu_table.md: memory, step time and scaling of a recipe on TPU slices, by compiling.

Run:  python scripts/tpu_table.py                      (all missing compilations: 1-2 hours)
      python scripts/tpu_table.py --only v5e:4x4 v4:   (slices whose names begin like this)
      python scripts/tpu_table.py --write              (only the table, from the existing files)

First whole runs: every shape that their batches have, weighed by how often, by lengths like those
of the recordings. Then one shape on many slices, to compare these.

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
from collections.abc import Callable, Iterator, Sequence
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
    used_shapes,
)
from b2txt_jax.tpu.topologies import SHAPES, parse_topology
from b2txt_jax.tpu.whole_run import whole_run
from lm_server.files.atomic_file import replacing

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


class Run(NamedTuple):
    """A whole recipe: a compilation for every shape of its batches."""

    topology: str
    recipe: str
    packing: str
    """data.packing, 'auto' or 'off'."""

    def file(self, folder: Path) -> Path:
        """Return the file of the result."""
        return folder / f"run_{self.recipe}_{self.topology.replace(':', '_')}_{self.packing}.json"


RUNS = (
    Run("v5e:4x4", "nejm_baseline", "auto"),
    Run("v5e:2x4", "transformer", "auto"),
    Run("v5e:4x4", "nejm_baseline", "off"),
    Run("v5e:2x4", "nejm_baseline", "auto"),
    Run("v5e:2x4", "transformer", "off"),
    Run("v5e:1x1", "nejm_baseline", "auto"),
    Run("v5p:2x2x1", "nejm_baseline", "auto"),
)


class Case(NamedTuple):
    """One compilation of one shape."""

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
    parser.add_argument("--scaling", choices=("weak", "strong", "none"), nargs="+")
    parser.add_argument("--runs", choices=("auto", "off", "none"), nargs="+", help="data.packing")
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
    wanted: list[Run | Case] = [
        run
        for run in RUNS
        if run.topology.startswith(tuple(args.only))
        and run.packing in (args.runs or ("auto", "off"))
        and (args.again or not run.file(args.folder).is_file())
    ]
    wanted += [
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
        page = table(results, len(planned), args.config.name, rows)
        before, rest = page.split(_RUNS_HERE)
        path.write_text(before + _runs(args.folder) + rest)
    return f"{args.out}: {len(results)} of {len(planned)} compilations"


def _compiled(
    wanted: list[Run | Case], config: Path, folder: Path, minutes: int
) -> Iterator[Run | Case]:
    """Compile the cases one by one, each in its own process, which has a time limit."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("compiling", total=len(wanted))
        for case in wanted:
            progress.update(task, description=f"compiling for {' '.join(case)}")
            process = spawn.Process(
                target=_compile_run if isinstance(case, Run) else _compile,
                args=(case, config, folder, minutes),
                daemon=True,
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


def _compile_run(run: Run, config_file: Path, folder: Path, minutes: int = 15) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (4 * 60 * minutes, resource.RLIM_INFINITY))
    config = load_config(run.recipe, [f"--config.data.packing={run.packing}"])
    topology, days = parse_topology(run.topology), session_count(config)
    shapes, _ = used_shapes(config, days, topology.devices)
    results = [
        compile_step(config, topology, days=days, bucket=shape.bucket, shape=shape, share=share)
        for shape, share in shapes.share.items()
        if share
    ]
    parts = [part._asdict() for part in whole_run(results, config)]
    _write(run, folder, {"results": [one.to_json() for one in results], "parts": parts})


def _write(case: Run | Case, folder: Path, values: dict[str, Any]) -> None:
    values |= {"topology": case.topology}
    if isinstance(case, Case):
        values["scaling"] = case.scaling
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

Made by `scripts/tpu_table.py`: the step that `b2txt train` runs, compiled for each slice on a
machine without a TPU, products in bfloat16 ({"; ".join(versions)}). **Nothing in this table has
run on a TPU.** `b2txt check-device` measures one that you have, `b2txt compile` prints the
assumptions.

- cycles: the compiler's static estimate outside kernels, loops multiplied out, in millions.
- by cycles: the cycles at the chip's published clock, plus the recurrence's kernels by the schedule
  that libtpu writes for them (`scripts/kernel_cycles.py`), other kernels and collectives at their
  roofline; "?" where the clock is not published. It ranks programs and is not a timing.
- roofline: lower bound in milliseconds from published peaks, collectives not overlapped.

{_RUNS_HERE}## One shape on many slices

From `configs/{config}`, padded to {" or ".join(bins)}. No run has batches of this shape alone: the
tables compare slices, and hours are those above. {len(results)} of {planned} planned compilations
are here.

- memory: of the fullest device, parameters, optimizer, batch, activations and program together.
- GFLOP a device: matrix products. The recurrence's kernel fills its rows up to 16 (a bfloat16
  tile's), so that a device with 4 rows computes the recurrence of 16.
- all-reduce and other: megabytes that a device puts into collectives in one step.
- scaling: rows a second and chip against the smallest slice of the same chip in the table.
- recurrence: `auto` in a configuration means pallas on every slice here; the scan is here for
  comparison.
- \\*: compiled with an earlier step, whose devices did not share the optimizer's moments and whose
  CTC loss was a loop, with the recurrence's kernels at their roofline.
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
        text += f"\n#{title}\n\n{_rows(results, scaling)}"
    text += _transformer(results)
    sources = "\n".join(f"- {chip.name}: {chip.source}" for chip in CHIPS.values())
    return f"{text}\n## Sources of the chips' figures\n\n{sources}\n"


_RUNS_HERE = "@RUNS@"


def _runs(folder: Path) -> str:
    """Return the table of whole runs."""
    head = (
        "| recipe | slice | trials | shapes: share, ms a step | cycles, M | kernels, M | links, ms "
    )
    text = f"""## Whole runs

Batches as the recipe draws them, by lengths like those of the recordings: every shape that they
have is compiled and weighed by how often it occurs. Trials share rows ([packing.md](packing.md)),
or each has one of its own. Cycles outside kernels, of the recurrence's kernels, and the time on
the links between chips are means over the shapes.

{head}| steps, min | in all, min |
|{"---|" * 9}
"""
    assumed: dict[str, None] = {}
    for run in RUNS:
        if not run.file(folder).is_file():
            continue
        found = json.loads(run.file(folder).read_text())
        if "results" not in found:
            text += f"| {run.recipe} | {run.topology} | {found['skipped']} |\n"
            continue
        results, parts = found["results"], found["parts"]
        shapes = "; ".join(
            f"{one['rows']} x {one['bucket'][0]:,}: {one['share']:.0%}, "
            f"{1e3 * one['time']['likely']:.1f}"
            for one in results
        )

        def mean(value: Callable[[dict[str, Any]], float], of: Any = results) -> float:
            return sum(one["share"] * value(one) for one in of) / sum(one["share"] for one in of)

        cells = (
            run.recipe,
            run.topology,
            "share rows" if run.packing == "auto" else "one a row",
            shapes,
            f"{mean(lambda one: one['cost']['cycles']) / 1e6:.1f}",
            f"{mean(lambda one: one['time']['kernel_cycles'] or 0) / 1e6:.1f}",
            f"{1e3 * mean(lambda one: one['time']['ici']):.1f}",
            f"{60 * parts[0]['hours']:.1f}",
            f"{60 * sum(part['hours'] for part in parts):.1f}",
        )
        text += "| " + " | ".join(cells) + " |\n"
        for part in parts[1:]:
            line = f"{run.recipe}, {run.topology}: {part['name']} {60 * part['hours']:.1f} min: "
            assumed[line + part["assumed"]] = None
    text += "\nIn all: with validation, saves and compiling, by these assumptions, without reading "
    text += "and setting up the machine.\n\n"
    return text + "".join(f"- {line}\n" for line in assumed) + "\n"


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
### The Transformer: its published batch of {good[0]["rows"]} rows, shared by the devices

`configs/transformer.py`. It has no kernel, so that all of a step is in
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
        found["topology"] + ("" if "recurrences" in cost else "\\*"),
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
        f"{100 * scaling:.0f} %",
    )


if __name__ == "__main__":
    main()
