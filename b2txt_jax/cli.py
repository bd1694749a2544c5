"""The `b2txt` command: parses arguments and calls the topic's module."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from b2txt_jax import __version__
from b2txt_jax.huge_pages import restart_with_huge_pages
from lm_server.process import CommandParser, ended_by_interrupt, exit_status

# name -> (module with add_arguments and run, help, whether --config.key=value is allowed)
COMMANDS: dict[str, tuple[str, str, bool]] = {
    "demo": ("b2txt_jax.demo", "the main job end to end on simulated sessions", True),
    "simulate": ("b2txt_jax.simulation.write", "write simulated sessions in the T15 layout", False),
    "download": ("b2txt_jax.data.download", "fetch the published data sets", False),
    "import": ("b2txt_jax.data.foreign.command", "recordings of other formats", False),
    "export": ("b2txt_jax.data.foreign.export", "sessions as NWB files, to share", False),
    "prepare": ("b2txt_jax.data.prepare", "pack sessions for fast training", True),
    "train": ("b2txt_jax.training.loop", "train a decoder, or resume a run", True),
    "pretrain": ("b2txt_jax.training.pretrain", "learn from recordings without labels", True),
    "sweep": ("b2txt_jax.sweep", "train several seeds or a grid, with intervals", True),
    "compile": ("b2txt_jax.tpu.compile", "compile the training step for a TPU, without one", True),
    "doctor": ("b2txt_jax.doctor.command", "check this environment, and how to repair it", True),
    "check-device": (
        "b2txt_jax.check_device.command",
        "check that this TPU, GPU or CPU computes what it should",
        False,
    ),
    "convert": ("b2txt_jax.interop.convert", "weights from and to other formats", True),
    "infer": ("b2txt_jax.inference.logits", "write a trained run's logits to a file", True),
    "ensemble": ("b2txt_jax.inference.ensemble", "average the logits of several runs", True),
    "evaluate": ("b2txt_jax.evaluation.command", "PER and WER of a trained run", True),
    "report": ("b2txt_jax.evaluation.report.command", "one page about runs", False),
    "figures": ("b2txt_jax.evaluation.paper", "the published paper's figures", False),
    "compare": ("b2txt_jax.evaluation.compare", "two runs on the same sentences", False),
    "consensus": ("b2txt_jax.evaluation.consensus", "one sentence of several systems", False),
    "correction-data": (
        "b2txt_jax.evaluation.correction_data",
        "chats that teach a large language model to correct n-best lists",
        False,
    ),
    "export-model": ("b2txt_jax.sharing.export", "a model to share, as a folder", False),
    "submit": ("b2txt_jax.evaluation.submit", "a checked submission to a benchmark", False),
    "calibrate": ("b2txt_jax.calibration.command", "add a recording day to a trained model", True),
    "stream": ("b2txt_jax.live.command", "bins in, words out: decode live or replay", True),
    "brand-node": ("b2txt_jax.live.brand", "live decoding as a node of BRAND", False),
}


def make_parser(wanted: str | None) -> argparse.ArgumentParser:
    """Return the parser of all subcommands. Only the wanted one's module is imported, for speed."""
    parser = CommandParser(prog="b2txt", description="Brain-to-text decoding in JAX.")
    parser.add_argument("--version", action="version", version=f"b2txt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, text, _) in COMMANDS.items():
        if name != wanted:
            commands.add_parser(name, help=text)
            continue
        module = importlib.import_module(module_name)
        command = commands.add_parser(name, help=text, description=(module.__doc__ or text))
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. An error that a user can repair is one line and exit status 2."""
    if argv is None:
        restart_with_huge_pages()
    # Keeps compiled programs, so that a resumed run starts at once. JAX reads this on import.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder() / "xla"))
    arguments = list(sys.argv[1:] if argv is None else argv)
    with ended_by_interrupt():
        parser = make_parser(next((word for word in arguments if word in COMMANDS), None))
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    for before, after in itertools.pairwise([*arguments, ""]):
        if before.startswith("--config.") and "=" not in before:
            parser.error(f"found {before} {after}; needed {before}=VALUE")
    args = parser.parse_args([argument for argument in arguments if argument not in overrides])
    if overrides and not COMMANDS[args.command][2]:
        parser.error(f"b2txt {args.command} takes no configuration keys, found {overrides[0]}")
    args.overrides = overrides
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    from b2txt_jax.errors import UserError
    from b2txt_jax.quiet import other_libraries_quiet

    try:
        with other_libraries_quiet(), _warnings_in_one_line():
            status: int = args.run(args)
    except UserError:
        raise
    except (RuntimeError, AssertionError) as error:
        unusable = _unusable_platform()
        if unusable is None:
            raise
        raise UserError(unusable) from error
    return status


def _unusable_platform() -> str | None:
    """Return why JAX does not start on the platform that JAX_PLATFORMS asks for, None if it does.

    Asked after a failure: JAX may not be started before the hosts of a training have joined.
    """
    wanted = os.environ.get("JAX_PLATFORMS")
    if not wanted:
        return None
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["its plug-in is not installed"])[0]
        extra = "tpu" if "tpu" in wanted else "cuda"
        return (
            f"JAX_PLATFORMS is {wanted!r}, where JAX cannot start ({reason}); needed the plug-in "
            f"of that platform: pip install -e '.[{extra}]', or unset JAX_PLATFORMS to use what "
            "there is. `b2txt doctor` checks more"
        )
    return None


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print our own warnings as one line each, without a place in the code. Each appears once."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if category.__module__.startswith("b2txt_jax."):
            print(f"warning: {message}", file=sys.stderr)
        else:
            shown(message, category, *place)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "b2txt_jax"


if __name__ == "__main__":
    sys.exit(main())
