"""Add a recording day to a trained model, in minutes on a CPU.

DATA holds the new day's session, in the same layout as the run's, or is the record of
`b2txt stream`: then the confirmed sentences of all its days are the new day. OUT becomes a run's
folder like any other, with the old days and the new one.

Of a run with several participants, DATA is best the folder of one of them, to which the new day
was added: then its layer starts from that participant's days. Otherwise it starts from those with
as many features, and OUT/sessions becomes one more folder of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from b2txt_jax.calibration.calibrate import (
    STARTS,
    Calibrated,
    Material,
    Settings,
    calibrate,
    evenly,
    separated,
    spoken,
)
from b2txt_jax.calibration.folder import (
    SESSIONS_FOLDER,
    joined_sessions,
    session_alone,
    write_run,
)
from b2txt_jax.calibration.moving import ADAPTS, Moving, moving_of
from b2txt_jax.config import ConfigError
from b2txt_jax.data.description import DataError
from b2txt_jax.data.joint import folders
from b2txt_jax.data.reader import format_of, open_folder
from b2txt_jax.data.sentence_log import VALIDATED, SentenceLogReader
from b2txt_jax.data.trial import Reader, existing_folder
from b2txt_jax.inference.run import Run, add_weights_argument, load_run
from b2txt_jax.provenance import hardware, provenance

_DEFAULTS = Settings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `b2txt calibrate`."""
    option = parser.add_argument
    option("--workdir", required=True, type=Path, help="folder of a trained run")
    add_weights_argument(parser)
    option("--session", required=True, metavar="NEW", help="name of the new day in the run")
    option("--data", required=True, type=Path, help="folder with that session, or a record")
    option("--out", required=True, type=Path, help="folder of the new run, new or empty")
    option(
        "--start",
        choices=STARTS,
        default=_DEFAULTS.start,
        help="where the new day's layer begins: at the old day with which the new sentences have "
        "the lowest loss, at the mean of the old days, at the last (default nearest)",
    )
    option(
        "--adapt",
        choices=ADAPTS,
        help="what moves: the day's own layer, which a model without day layers gets; the patch "
        "embedding too; or every matrix by a change of low rank; everything (default: day where "
        "the model can have such a layer, else patch)",
    )
    option(
        "--rank",
        type=int,
        default=_DEFAULTS.rank,
        help=f"of the changes of matrices, with --adapt adapters (default {_DEFAULTS.rank})",
    )
    option(
        "--replay",
        type=float,
        help="share of old days' trials in a batch, where something moves that they use (default "
        "0.4, for a model without day layers 0.6)",
    )
    option("--steps", type=int, default=_DEFAULTS.steps, help=f"(default {_DEFAULTS.steps})")
    option("--rows", type=int, default=_DEFAULTS.rows, help="trials of a step (default 16)")
    for name, of, value in (
        ("day", "the day's layer", f"{_DEFAULTS.day_rate:g}"),
        ("shared", "what all days share", "0.0001, of a patch embedding that moves alone 0.001"),
        ("adapter", "the factors of a change of low rank", f"{_DEFAULTS.adapter_rate:g}"),
    ):
        default = getattr(_DEFAULTS, f"{name}_rate")
        text = f"first learning rate of {of} (default {value})"
        option(f"--{name}-rate", type=float, default=default, help=text)
    option(
        "--old-rise",
        type=float,
        default=_DEFAULTS.old_rise,
        help="most that the loss of old days' sentences may rise, as a share, where they use what "
        "moves: the change is shortened until it is so (default 0.15, inf: no bound)",
    )
    option("--seed", type=int, default=_DEFAULTS.seed, help="of everything random (default 0)")
    option("--sentences", type=int, metavar="N", help="use the first N alone (default: all)")
    option(
        "--curve",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="measure the PER with so many sentences as well",
    )
    parser.epilog = (
        "OUT/calibration.json has every figure. --config.data.root=DIR says where the old days are "
        "if not where they were. docs/calibration.md has what to expect."
    )


def run(args: argparse.Namespace) -> int:
    """Run `b2txt calibrate`."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    settings = Settings(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    )
    settings.check()
    _check_free(args.out)
    trained = load_run(args.workdir, args.overrides, args.weights)
    old_folders = folders(trained.config.data.root)
    if args.session in trained.sessions:
        raise ConfigError(
            f"--session is {args.session}, a day that {args.workdir} has already; needed a new "
            "name, or `b2txt train` to go on with the days that it has"
        )
    moving = moving_of(separated(trained, args.adapt).config, 0, args.adapt)
    _check_used(args, moving)
    width = _width(trained, args.data)
    with open_folder(args.data, width) as new:
        recorded = _recorded(new, args.session)
        renamed = recorded, args.session
        own = _own_folder(trained, new, *renamed)
        joining: AbstractContextManager[Path]
        if own is not None:
            joining = nullcontext(own)
        elif len(old_folders) > 1:
            joining = session_alone(args.out, new, *renamed)
        else:
            joining = joined_sessions(args.out, old_folders[0], trained.sessions, new, *renamed)
        with joining as root:
            material = _material(trained, root, width, args, console)
            beyond = [str(count) for count in args.curve if count > len(material.new)]
            if beyond:
                console.print(
                    f"--curve has no point at {', '.join(beyond)}: there are {len(material.new)} "
                    "sentences to learn from"
                )
            _say_replay(trained, moving.shared, settings.replay, console)
            with _bar(console) as progress:
                task = progress.add_task("", total=None)

                def show(what: str, done: int, of: int) -> None:
                    progress.update(task, description=what, completed=done, total=of)

                calibrated = calibrate(trained, args.session, material, settings, args.curve, show)
    calibrated.report.update(
        {"run": str(args.workdir), "data": str(args.data), "made": provenance() | hardware()}
    )
    kept = [] if own is not None else [args.out / SESSIONS_FOLDER]
    before = old_folders if own is not None or len(old_folders) > 1 else ()
    write_run(args.out, ",".join(map(str, [*before, *kept])), calibrated, trained.step)
    _print(args.out, calibrated, console)
    return 0


def _check_used(args: argparse.Namespace, moving: Moving) -> None:
    """Raise ConfigError where an option is of something that does not move."""
    needed = {
        "rank": ("no matrix changes by a low rank", bool(moving.ranks), "--adapt adapters"),
        "adapter_rate": ("no matrix changes by a low rank", bool(moving.ranks), "--adapt adapters"),
        "day_rate": ("no layer of a day moves", moving.of_a_day, "--adapt day"),
        "shared_rate": (
            "nothing that days share moves at a rate of its own",
            None in moving.rows.values(),
            "--adapt patch or all",
        ),
        "old_rise": ("old days stay as they are", moving.shared, "--adapt patch or all"),
    }
    for name, (why, used, instead) in needed.items():
        value = getattr(args, name)
        if value != getattr(_DEFAULTS, name) and not used:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is {value:g}, and {why}; needed {instead}")


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out is {out}, which is not empty; needed a new or empty folder")


def _recorded(new: Reader, session: str) -> str:
    """Return the new day's name in DATA. A record may have another: its sentences are taken."""
    if not isinstance(new, SentenceLogReader):
        new.find_trials([session], "train")  # no such session, other features, no labels
        return session
    if len(new.sessions) > 1 and session not in new.sessions:
        raise DataError(
            f"{new.root} has sentences of {len(new.sessions)} days, {', '.join(new.sessions)}; "
            "needed one: record each day in a folder of its own (b2txt stream --record DIR)"
        )
    return session if session in new.sessions else new.sessions[0]


def _width(trained: Run, data: Path) -> int:
    """Return the features of the new day, which a run of several participants may have fewer of.

    Raises:
      DataError: they are more than the run reads, or cannot be read.
    """
    most = trained.config.data.feature_count
    if len(folders(trained.config.data.root)) == 1:
        return most
    found = format_of(existing_folder(data)).features(data)
    if found > most:
        raise DataError(
            f"the sessions in {data} have {found} features a bin; needed at most {most}, which the "
            "run was trained with"
        )
    return found


def _own_folder(trained: Run, new: Reader, recorded: str, session: str) -> Path | None:
    """Return the folder of the run's data that has the new day already, if one has it."""
    for one in folders(trained.config.data.root) if recorded == session else ():
        if one.is_dir() and new.root.resolve() == one.resolve():
            return one
    return None


def _peers(trained: Run, root: Path, width: int) -> list[int] | None:
    """Return the days whose layers the new day's may start from: those of its participant.

    They are the days in the folder of the new one, else those with as many features. None: all.
    """
    if len(folders(trained.config.data.root)) == 1:
        return None
    with open_folder(root, width) as reader:
        beside = [n for n, name in enumerate(trained.sessions) if name in reader.sessions]
    return (
        beside
        or [n for n, name in enumerate(trained.sessions) if trained.width(name) == width]
        or None
    )


def _material(
    trained: Run, root: Path, width: int, args: argparse.Namespace, console: Console
) -> Material:
    """Read the new day's trials, and list those of the old days."""
    config, day = trained.config, len(trained.sessions)
    least, features = config.model.least_bins, config.data.feature_count
    reader = open_folder(root, features, config.signal, narrower=width < features)
    refs = reader.trials([args.session], "train", min_bins=least)
    held = reader.find_trials([args.session], "val", min_bins=least, labels_needed=True)
    if args.sentences is not None:
        if not 1 <= args.sentences <= len(refs):
            raise DataError(
                f"--sentences is {args.sentences}; needed 1 to {len(refs)}, the sentences of "
                f"{args.session}"
            )
        refs = refs[: args.sentences]
    if not held:
        held = refs[VALIDATED - 1 :: VALIDATED]
        refs = [ref for ref in refs if ref not in held]
        console.print(
            f"{args.session} has no val split: {len(held)} of its sentences, every fifth, are held "
            "out to measure the PER"
        )
    old, val = [], []
    if _have_old(trained):
        past = open_folder(config.data.root, features, config.signal)
        several = folders(config.data.root)
        if len(several) > 1 and args.session in past.sessions and root not in several:
            raise DataError(
                f"{config.data.root} has a session {args.session} too; needed another --session, "
                "or that folder as --data"
            )
        have = [name if name in past.sessions else None for name in trained.sessions]
        lists = {
            split: [past.find_trials([n], split, min_bins=least) if n else [] for n in have]
            for split in ("train", "val")
        }
        old = [(past, one) for one in lists["train"]]
        labelled = [[ref for ref in one if ref.label_length] for one in lists["val"]]
        for number, some in enumerate(evenly(labelled)):
            val += spoken(past, some, number)
    new, val_of_new = spoken(reader, refs, day), spoken(reader, held, day)
    return Material(new, val_of_new, old, val, width, _peers(trained, root, width))


def _have_old(trained: Run) -> bool:
    return all(one.is_dir() for one in folders(trained.config.data.root))


def _say_replay(trained: Run, shared: bool, replay: float | None, console: Console) -> None:
    if not _have_old(trained):
        console.print(
            f"the old days' folder {trained.config.data.root} is not here: they are neither "
            "replayed nor scored. --config.data.root=DIR names another place"
        )
    elif not shared and replay != 0:
        console.print("the new day's layer moves alone: old days stay as they are, no replay")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f} %"


def _print(out: Path, calibrated: Calibrated, console: Console) -> None:
    report: dict[str, Any] = calibrated.report
    start, per, old = report["start"], report["per"], report["old_days"]
    lines = [f"the day's layer starts from {start.get('day', start['kind'])}"]
    if start["kind"] == "shared":
        lines = ["the day gets a layer of its own, which begins as what all days share"]
    if start["kind"] == "none":
        lines = ["days have no layers of their own: what all days share moves"]
    lines.append(f"PER of {report['session']}: {_percent(per['before'])} before")
    lines += [f"  {_percent(one['per'])} after step {one['step']}" for one in per["during"]]
    lines.append(f"  {_percent(per['after'])} after all {report['settings']['steps']} steps")
    lines += [
        f"  with {one['sentences']} sentences {_percent(one['per'])}" for one in report["curve"]
    ]
    lines.append(f"PER of old days: {_percent(old['before'])} before, {_percent(old['after'])}")
    lines[-1] += " after"
    if old["kept_share"] < 1:
        lines.append(
            f"{_percent(old['kept_share'])} of the change were kept: with more, the loss of old "
            f"days' sentences would rise by more than {_percent(report['settings']['old_rise'])} "
            "(--old-rise)"
        )
    for line in lines:
        print(line)
    console.print(f"the run is in {out}, after {report['seconds']:g} s", soft_wrap=True)
