"""The live demo: a further day of the simulated participant, calibrated, then decoded as it comes.

It needs what `b2txt demo` has made. Each part is a command that a user could type, and is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from b2txt_jax.calibration import command as calibrate
from b2txt_jax.calibration.folder import REPORT_FILE
from b2txt_jax.errors import UserError
from b2txt_jax.live import command as stream
from b2txt_jax.live.outputs.page import Page
from b2txt_jax.simulation.plan import SESSIONS, SimulationSettings
from b2txt_jax.simulation.write import SESSIONS_FOLDER, SETTINGS_FILE, simulate
from b2txt_jax.training.loop import FINISHED_FILE

FOLDER = "live"
"""In the demo's folder."""
_ORDER = 3
"""Of the language model."""


class LiveDemoError(UserError, ValueError):
    """The live demo lacks what it works with."""


@dataclass(frozen=True)
class LiveDemo:
    """How much is shown."""

    view: int | None = None
    """Port of the page. None: no page."""
    sentences: int = 8
    """That are replayed."""
    speed: str = "1"
    """Of the replay, see `b2txt stream --speed`."""
    learned: int = 20
    """Sentences of the calibration."""
    steps: int = 30
    rows: int = 8
    """Of the calibration, see `b2txt calibrate`."""


def show_live(out: Path, settings: LiveDemo, console: Console) -> int:
    """Simulate a further day, decode it without calibration, calibrate, decode it live.

    Args:
      out: folder of `b2txt demo`. The further day and the calibrated run are in its folder `live`.
      settings: how much is shown.
      console: for headlines and commands.

    Returns:
      The exit status of the last command.

    Raises:
      LiveDemoError: the demo has not run there, or the published calendar has no further day.
      PageError: the page's port is taken.
    """
    made = _check_made(out)
    if settings.view is not None:
        # Before the work, since the page itself comes at the end.
        Page("127.0.0.1", settings.view, None, lambda _: None, lambda: None).close()
    day = SESSIONS[made.sessions]
    model, work = out / f"lm_{_ORDER}gram", out / FOLDER
    console.rule(f"1 of 4: a further day, {day}, on which the signals have drifted")
    root = further_day(out / "data", work / "data", made)
    console.print(f"its sentences are in {root / day}", soft_wrap=True)
    replayed = ["--lm", model, "--replay", day, "--limit", settings.sentences]
    console.rule("2 of 4: its sentences with the layer of the day before")
    data = f"--config.data.root={root}"
    before = ["--workdir", out / "run", data, *replayed, "--speed", "max", "--no-record"]
    _run("stream", stream.add_arguments, stream.run, before, console)
    console.rule(f"3 of 4: calibration with {settings.learned} sentences whose text is known")
    calibrated = work / "run"
    if (calibrated / REPORT_FILE).is_file():
        shutil.rmtree(calibrated)  # of an earlier call
    new = ["--workdir", out / "run", "--session", day, "--data", root, "--out", calibrated]
    new += [f"--config.data.root={out / 'data' / SESSIONS_FOLDER}"]
    new += ["--sentences", settings.learned, "--steps", settings.steps, "--rows", settings.rows]
    _run("calibrate", calibrate.add_arguments, calibrate.run, new, console)
    console.rule("4 of 4: the same sentences live")
    after = ["--workdir", calibrated, *replayed, "--speed", settings.speed]
    if settings.view is not None:
        after += ["--view", settings.view]
    status = _run("stream", stream.add_arguments, stream.run, after, console)
    console.print("docs/realtime.md and docs/calibration.md have more", soft_wrap=True)
    return status


def _check_made(out: Path) -> SimulationSettings:
    """Return the settings of the demo's simulation.

    Raises:
      LiveDemoError: something is missing.
    """
    needed = [f"data/{SETTINGS_FILE}", f"lm_{_ORDER}gram/lm.json", f"run/{FINISHED_FILE}"]
    missing = [name for name in needed if not (out / name).is_file()]
    if missing:
        raise LiveDemoError(
            f"{out} has no {', '.join(missing)}; the live demo needed a finished demo there: "
            f"`make demo`, or `b2txt demo --out {shlex.quote(str(out))}`, which takes about ten "
            "minutes once"
        )
    found = json.loads((out / "data" / SETTINGS_FILE).read_text())
    known = {field.name for field in dataclasses.fields(SimulationSettings)}
    settings = SimulationSettings(**{k: value for k, value in found.items() if k in known})
    if settings.sessions >= len(SESSIONS):
        raise LiveDemoError(
            f"{out} has all {len(SESSIONS)} days that the simulation knows; needed one more: "
            "make a demo with fewer --sessions"
        )
    return settings


def further_day(before: Path, out: Path, settings: SimulationSettings) -> Path:
    """Write the day after the last one of a simulation to a folder of its own. Return its root.

    The other days are there as links, since one folder holds one simulation.
    """
    root = out / SESSIONS_FOLDER
    root.mkdir(parents=True, exist_ok=True)
    if not (out / SETTINGS_FILE).is_file():
        shutil.copy(before / SETTINGS_FILE, out / SETTINGS_FILE)
    for name in SESSIONS[: settings.sessions]:
        if not (root / name).exists():
            (root / name).symlink_to((before / SESSIONS_FOLDER / name).resolve())
    return simulate(out, dataclasses.replace(settings, sessions=settings.sessions + 1))


def _run(
    name: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    words: Sequence[object],
    console: Console,
) -> int:
    """Print a command of ours as a user types it, and run it here."""
    typed = [str(word) for word in words]
    console.print(f"$ b2txt {name} {shlex.join(typed)}", soft_wrap=True, highlight=False)
    parser = argparse.ArgumentParser(prog=f"b2txt {name}")
    add_arguments(parser)
    args = parser.parse_args([word for word in typed if not word.startswith("--config.")])
    args.overrides = [word for word in typed if word.startswith("--config.")]
    return run(args)
