"""Makes docs/tpu_table.md: memory, step time and scaling of a recipe on TPU slices, by compiling.

Run:  python scripts/tpu_table.py                      (all that is missing: hours of one core)
      python scripts/tpu_table.py --only v5e:4x4 v4:   (slices whose names begin so)
      python scripts/tpu_table.py --write              (only the table, from what is there)

Each compilation leaves a JSON file in docs/tpu_table, so that the work can be done piece by piece;
--again replaces them, after a change to the step. Needs the tpu extra.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from b2txt_jax.config import load_config
from b2txt_jax.tpu.chips import CHIPS
from b2txt_jax.tpu.compile import (
    VARIANTS,
    CompileError,
    compile_step,
    session_count,
    typical_bucket,
    with_recurrence,
)
from b2txt_jax.tpu.topologies import SHAPES, parse_topology

REPOSITORY = Path(__file__).parents[1]
BUCKET = (1000, 100)
WEAK_ROWS = 64
"""Per device, in the table of weak scaling: the published batch on every device."""


class Case(NamedTuple):
    """One compilation."""

    topology: str
    scaling: str
    """'weak': WEAK_ROWS rows per device; 'strong': the configured batch, shared."""
    recurrence: str
    """'scan' or 'pallas'."""

    def file(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / f"{self.topology.replace(':', '_')}_{self.scaling}_{self.recurrence}.json"


def cases(rows: int) -> list[Case]:
    """Slices of 4 to 256 chips, the smaller ones of each chip first; strong scaling as far as
    every device has a row."""
    found = []
    for scaling, recurrence in itertools.product(("weak", "strong"), VARIANTS):
        for chip, shapes in SHAPES.items():
            for shape in shapes:
                topology = parse_topology(f"{chip}:{shape}")
                shared = rows % topology.devices == 0
                if topology.chips >= 4 and (scaling == "weak" or shared):
                    found.append(Case(topology.name, scaling, recurrence))
    # Every second size first: 4, 16, 64, 256 chips.
    return sorted(
        found,
        key=lambda case: (
            parse_topology(case.topology).chips not in (4, 16, 64, 256),
            parse_topology(case.topology).chips,
        ),
    )


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
    parser.add_argument("--again", action="store_true", help="compile what is there already, too")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    args = parser.parse_args(argv)
    config = load_config(args.config)
    rows = config.data.days_per_batch * config.data.trials_per_day
    wanted = [
        case
        for case in cases(rows)
        if case.topology.startswith(tuple(args.only))
        and case.scaling in (args.scaling or ("weak", "strong"))
        and case.recurrence in (args.recurrence or VARIANTS)
        and (args.again or not case.file(args.folder).is_file())
    ]
    if not args.write:
        args.folder.mkdir(parents=True, exist_ok=True)
        _compile_all(config, wanted, args.folder)
    results = {
        case: json.loads(case.file(args.folder).read_text())
        for case in cases(rows)
        if case.file(args.folder).is_file()
    }
    _replace(args.out, table(results, len(cases(rows)), args.config.name, rows))
    print(f"{args.out}: {len(results)} of {len(cases(rows))} compilations")


def _compile_all(config: Any, wanted: list[Case], folder: Path) -> None:
    days = session_count(config)
    bucket = BUCKET if not config.data.buckets else typical_bucket(config)
    console = Console()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=len(wanted))
        for case in wanted:
            progress.update(task, description=f"compiling for {' '.join(case)}")
            per_device = WEAK_ROWS if case.scaling == "weak" else None
            topology = parse_topology(case.topology)
            try:
                result = compile_step(
                    with_recurrence(config, case.recurrence),
                    topology,
                    days=days,
                    bucket=bucket,
                    per_device_batch=per_device,
                )
                if result.recurrence != case.recurrence:
                    console.print(f"{case}: the program has the recurrence {result.recurrence}")
                    continue
                values = result.to_json()
            except CompileError as error:
                values = {"error": str(error), "topology": case.topology, "chips": topology.chips}
            values["scaling"] = case.scaling
            values["versions"] = {
                name: importlib.metadata.version(name) for name in ("jax", "libtpu")
            }
            _replace(case.file(folder), json.dumps(values, indent=1) + "\n")
            progress.advance(task)


def table(results: dict[Case, dict[str, Any]], planned: int, config: str, rows: int) -> str:
    """The page, from results by case."""
    good = [found for found in results.values() if "error" not in found]
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
- all-reduce and other: megabytes that a device puts into collectives in one step.
- cycles: the compiler's static estimate outside kernels, loops multiplied out, in millions.
- roofline: lower bound in milliseconds from published peaks, collectives not overlapped.
- by cycles: the cycles at the chip's published clock, plus kernels and collectives at their
  roofline; "?" where the clock is not published. It ranks programs and is not a timing.
- rates and hours come from the larger of the two times; where the clock is not published only
  the roofline is there, and they are no more than bounds, not to be compared with the others.
  `b2txt compile` prints the assumptions.
- scaling: rows a second and chip against the smallest slice of the same chip in the table.
- recurrence: `auto` in a configuration means pallas on every slice here.
"""
    if any(_moved(found) for found in good):
        text += """
Rows with megabytes under "other" were compiled before the CTC loss kept each row on its device;
the step of today moves nothing there. `scripts/tpu_table.py --again` renews them.
"""
    for scaling, title in (
        ("weak", f"## Weak scaling: {WEAK_ROWS} rows per device, a larger batch on a larger slice"),
        ("strong", f"## Strong scaling: the published batch of {rows} rows, shared by the devices"),
    ):
        text += f"\n{title}\n\n{_rows(results, scaling)}"
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
    "hours for 120,000",
    "scaling",
)


def _rows(results: dict[Case, dict[str, Any]], scaling: str) -> str:
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for (chip, shapes), recurrence in itertools.product(SHAPES.items(), VARIANTS):
        smallest: float | None = None
        for shape in shapes:
            found = results.get(Case(f"{chip}:{shape}", scaling, recurrence))
            if found is None:
                continue
            if "error" in found:
                rest = " | ".join([""] * (len(_HEAD) - 6))
                lines.append(
                    f"| {chip}:{shape} | {recurrence} | {found['chips']} |  |  | **no** | {rest} |"
                )
                continue
            rate = found["rows"] / found["time"]["likely"] / found["chips"]
            smallest = smallest or rate
            lines.append(_row(found, rate / smallest))
    return "\n".join(lines) + "\n"


def _moved(found: dict[str, Any]) -> int:
    """Bytes in collectives that sum nothing."""
    return sum(c["bytes"] for c in found["cost"]["collectives"] if c["kind"] != "all-reduce")


def _row(found: dict[str, Any], scaling: float) -> str:
    memory, cost, time = found["memory"], found["cost"], found["time"]
    reduced = sum(c["bytes"] for c in cost["collectives"] if c["kind"] == "all-reduce")
    bound_only = time["compiler"] is None
    compiler = "?" if bound_only else f"{1e3 * (time['compiler'] + time['ici']):.1f}"
    cells = (
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
        f"{'at least ' if bound_only else ''}{120_000 * time['likely'] / 3600:.2f}",
        f"{100 * scaling:.0f} %",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
