"""`b2txt compile`: compiles a configuration's training step for a TPU slice, on any machine, and
reports its memory and estimated time.

No TPU is used. The program is the one that `b2txt train` runs on such a slice: the same step and
shardings, with bfloat16 products if the configuration's dtype is auto.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from b2txt_jax.config import Config, load_config
from b2txt_jax.data.batches.buckets import buckets_of_data
from b2txt_jax.data.batches.layout import Shape
from b2txt_jax.data.batches.shapes import Shapes, choose
from b2txt_jax.data.loader import configured_sessions, resolve_buckets
from b2txt_jax.data.reader import open_folder
from b2txt_jax.data.typical import typical_lengths
from b2txt_jax.errors import UserError
from b2txt_jax.tpu.hlo_cost import program_cost
from b2txt_jax.tpu.report import Memory, Result, compared, described, weighed
from b2txt_jax.tpu.roofline import step_time
from b2txt_jax.tpu.topologies import (
    Topology,
    known_topologies,
    parse_topology,
    require_libtpu,
    topology_devices,
)
from b2txt_jax.tpu.whole_run import whole_run
from b2txt_jax.training.compiled import abstract_batch
from b2txt_jax.training.sharding import abstract_state, jit_train_step, make_mesh
from b2txt_jax.training.step import model_of, packing_rules
from lm_server.files.atomic_file import replacing, require_writable

TYPICAL_BUCKET = (1000, 100)
"""(bins, labels), used if the configuration derives the buckets from the data."""


class CompileError(UserError, ValueError):
    """The step cannot be compiled with these options."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}; needed a whole number of at least 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt compile`."""
    option = parser.add_argument
    option("--topology", required=True, help=f"the slice: {known_topologies()}")
    option("--config", required=True, help="e.g. configs/nejm_baseline.py")
    rows = "rows per device (default: the devices share the configured batch)"
    option("--per-device-batch", type=_positive, metavar="N", help=rows)
    axis = "devices that share the large parameters (default: parallel.model_axis)"
    option("--model-axis", type=_positive, metavar="M", help=axis)
    shape = (
        "padded shape of the batch, e.g. 2560x500 (default: all shapes that batches have, by the "
        "lengths of the data, or without data by lengths like the published recordings')"
    )
    option("--bucket", metavar="BINSxLABELS", help=shape)
    days = "number of sessions, if the configuration names none and has no data"
    option("--days", type=_positive, help=days)
    compare = "compile each variant of the recurrence and rank them by the compiler's cycles"
    option("--compare", action="store_true", help=compare)
    option("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.epilog = (
        "Any key of the configuration: --config.section.key=value. Needs the tpu extra; one to "
        "five minutes of one core."
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt compile`. Return 0 if the step fits the chip's memory, else 1."""
    console = Console()
    config = load_config(args.config, args.overrides)
    topology = parse_topology(args.topology)
    bucket = parse_bucket(args.bucket) if args.bucket else typical_bucket(config)
    if bucket[0] < config.model.least_bins:
        raise CompileError(
            f"--bucket has {bucket[0]} bins; the model needed at least {config.model.least_bins}"
        )
    days = args.days or session_count(config)
    model_axis = args.model_axis or config.parallel.model_axis
    if args.json:
        require_writable(args.json, "--json", devices=True)  # not after minutes of compiling
    require_libtpu()  # not after the shapes of batches are found
    used: dict[Shape | None, float] = {None: 1.0}  # none: the bucket's
    if args.bucket is None and args.per_device_batch is None and not args.compare:
        groups, left = divmod(topology.devices, model_axis)
        if not left:  # else compiling refuses it
            batch_rows(config, groups, None)
            shapes, lengths = used_shapes(config, days, groups)
            used = {one: share for one, share in shapes.share.items() if share}
            console.print(f"shapes of batches, by {lengths}:", highlight=False, soft_wrap=True)
            for one, share in used.items():
                console.print(f"  {share:6.1%}  {one}", highlight=False)
    settings = [config.model]
    if args.compare:
        settings = list(model_of(config, days).variants().values())
        if not settings:
            raise CompileError(f"--compare: model {config.model.name!r} has no variants to compare")
    results = []
    for model, (batch_shape, share) in itertools.product(settings, used.items()):
        changed = dataclasses.replace(config, model=model)
        result = compile_step(
            changed,
            topology,
            days=days,
            bucket=bucket,
            shape=batch_shape,
            share=share,
            per_device_batch=args.per_device_batch,
            model_axis=model_axis,
            console=console,
        )
        for line in described(result):
            console.print(line, highlight=False, soft_wrap=True)
        results.append(result)
    if None not in used:
        for line in (*weighed(results), *_whole(results, config)):
            console.print(line, highlight=False, soft_wrap=True)
    if args.compare:
        for line in compared(results):
            console.print(line, highlight=False, soft_wrap=True)
    if args.json:
        with replacing(args.json) as path:
            path.write_text(json.dumps([result.to_json() for result in results], indent=2) + "\n")
    return 0 if all(result.memory.fits for result in results) else 1


def _whole(results: list[Result], config: Config) -> Iterator[str]:
    parts = whole_run(results, config)
    least = "at least " if any(result.at_best for result in results) else ""
    total = sum(part.hours for part in parts)
    yield f"the whole run: {least}{total:.2f} hours, without reading and setting up the machine"
    for part in parts:
        yield (
            f"  {part.name:<10} {60 * part.hours:7.1f} minutes{part.assumed and '; assumed: '}"
            + (part.assumed)
        )


def compile_step(
    config: Config,
    topology: Topology,
    *,
    days: int,
    bucket: tuple[int, int],
    shape: Shape | None = None,
    share: float = 1.0,
    per_device_batch: int | None = None,
    model_axis: int = 1,
    console: Console | None = None,
) -> Result:
    """Compile the training step for a slice and analyse the program.

    Args:
      config: the recipe. `auto` is resolved as on the slice.
      topology: the slice.
      days: number of sessions, one input layer each.
      bucket: padded shape of the batch, (bins of 20 ms, labels).
      shape: of the batch, in place of `bucket`, such as one of rows of several trials.
      share: of the batches that have it.
      per_device_batch: rows per device of the data axis. None shares the configured batch.
      model_axis: devices that share the large parameters.
      console: where progress is shown, None for nowhere.

    Raises:
      CompileError: the devices cannot share the rows evenly, or memory does not suffice.
      TopologyError: libtpu is missing.
      ConfigError: the model axis does not divide the devices or a parameter.
    """
    devices = topology_devices(topology)
    mesh = make_mesh(model_axis, devices)
    shards = len(devices) // model_axis
    rows, per_device = batch_rows(config, shards, per_device_batch)
    trials = rows
    shape = shape or Shape(rows, *bucket)
    rows, per_device, bucket = shape.rows, shape.rows // shards, shape.bucket
    config = as_on_tpu(config)
    step = jit_train_step(config, days, mesh)
    placed = abstract_state(config, days, mesh)
    batch = abstract_batch(shape, config.data.feature_count, np.float32, mesh)
    model = model_of(config, days)
    kind = f", recurrence {model.variant}" if model.variants() else ""
    label = f"compiling for {topology.name}, {rows} x {bucket[0]} bins{kind}"
    started = time.monotonic()
    with _at_work(console, label), _no_compilation_cache():
        try:
            compiled = step.lower(placed, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            raise _compile_error(error, topology, per_device, bucket) from error
    seconds = time.monotonic() - started
    analysis = compiled.memory_analysis()
    memory = Memory(
        parameters=held_bytes(placed.params),
        optimizer=held_bytes(placed.optimizer),
        batch=held_bytes(batch),
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        program=analysis.generated_code_size_in_bytes,
        capacity=topology.chip.hbm_bytes // topology.chip.devices,
    )
    program = compiled.as_text()
    cost = program_cost(program, len(devices))
    return Result(
        topology=topology,
        devices=len(devices),
        model_axis=model_axis,
        per_device_batch=per_device,
        rows=rows,
        bucket=bucket,
        trials=trials,
        share=share,
        days=days,
        dtype=config.model.dtype,
        wanted=model.variant,
        recurrence=("pallas" if "gru_forward" in program else "scan") if model.variants() else "",
        compile_seconds=seconds,
        memory=memory,
        cost=cost,
        time=step_time(cost, topology),
        steps=config.train.steps,
    )


def batch_rows(config: Config, shards: int, per_device: int | None) -> tuple[int, int]:
    """Return (rows of the whole batch, rows per device).

    Raises:
      CompileError: the devices cannot share the configured batch evenly.
    """
    if per_device is not None:
        if per_device < 1:
            raise CompileError(f"--per-device-batch is {per_device}; needed at least 1")
        return per_device * shards, per_device
    rows = config.data.batch_rows
    if rows % shards:
        raise CompileError(
            f"the configured batch has {rows} rows (data.days_per_batch * data.trials_per_day), "
            f"which {shards} devices cannot share evenly: give --per-device-batch N for a batch "
            "that grows with the slice, change these keys, or raise --model-axis"
        )
    return rows, rows // shards


def as_on_tpu(config: Config) -> Config:
    """Resolve the dtype `auto` as on a TPU. The recurrence is resolved when the step is lowered."""
    if config.model.dtype != "auto":
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))


def used_shapes(config: Config, days: int, groups: int) -> tuple[Shapes, str]:
    """Return the shapes that a run's batches have on `groups` devices of the data axis, and whose
    lengths they are by: those of the configured data, or without any like the published."""
    data, known = config.data, "the lengths of the training trials in " + config.data.root
    try:
        sessions = configured_sessions(data)
        with open_folder(data.root, data.feature_count) as reader:
            lengths = reader.lengths(sessions, "train")
            buckets = resolve_buckets(data, sessions, reader)
    except UserError:
        lengths, known = typical_lengths(days), "lengths like the published recordings'"
        buckets = data.buckets
        if not buckets:
            rows = data.days_per_batch, data.trials_per_day
            choice = buckets_of_data(lengths, [], *rows, data.plan)
            buckets = choice.buckets
    rules = packing_rules(config, days, groups)
    return choose(data, buckets, lengths, rules, config.train.seed, config.train.steps), known


def typical_bucket(config: Config) -> tuple[int, int]:
    """Return a middle one of the configured buckets."""
    buckets = config.data.buckets
    return buckets[(len(buckets) - 1) // 2] if buckets else TYPICAL_BUCKET


def parse_bucket(text: str) -> tuple[int, int]:
    """Parse `2560x500` -> (2560, 500).

    Raises:
      CompileError: the text is not two positive numbers.
    """
    bins, _, labels = text.partition("x")
    if not (bins.isdigit() and labels.isdigit() and int(bins) and int(labels)):
        raise CompileError(f"--bucket is {text!r}; needed BINSxLABELS such as 1000x100")
    return int(bins), int(labels)


def session_count(config: Config) -> int:
    """Count the sessions that the configuration names, or those of its data folder."""
    try:
        return len(configured_sessions(config.data))
    except UserError as error:
        raise CompileError(
            f"the configuration names no sessions and its data cannot be counted ({error}): give "
            "--days N"
        ) from error


def held_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of sharded arrays or shapes, without padding."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _compile_error(
    error: Exception, topology: Topology, per_device: int, bucket: tuple[int, int]
) -> CompileError:
    text = str(error)
    reason = next((line for line in text.splitlines() if "Ran out of memory" in line), None)
    if reason is None:
        return CompileError(f"the compiler refuses the step for {topology.name}: {text[:2000]}")
    return CompileError(
        f"the step does not fit {topology.name} with {per_device} rows of {bucket[0]} bins per "
        f"device: {reason}. Give fewer rows (--per-device-batch), a smaller --bucket, a larger "
        "--model-axis, a chip with more memory, or model.recurrence=scan where VMEM is short"
    )


@contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Disable JAX's compilation cache, which would load the program onto absent devices."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


@contextmanager
def _at_work(console: Console | None, label: str) -> Iterator[None]:
    if console is None:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(label, total=None)
        yield
