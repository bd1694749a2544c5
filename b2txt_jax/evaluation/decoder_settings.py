"""Which settings the decoder has, and whether they were tuned for the checkpoint that is evaluated.

Another checkpoint has other posteriors. With settings of an earlier one its WER can be higher
although its PER is lower.
"""

from __future__ import annotations

import argparse
import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from b2txt_jax.errors import UserError
from b2txt_jax.inference.run import Run
from b2txt_jax.training.checkpoint import RAW

FOLDER = "lm_settings"
"""Name in a run's folder of the settings files of `lm-server tune` for its checkpoints."""


class SettingsFileError(UserError, ValueError):
    """A settings file that cannot be read."""


@dataclass(frozen=True)
class DecoderSettings:
    """Settings in use.

    Attributes:
      file: of `lm-server tune`. None: the search's defaults, or those of a running server.
      tuned_for: step, weights, parameters and split that the file names, as far as it does.
      fits: whether these are the parameters that are evaluated. None: a running server has its own.
      expected_wer: what tuning expects of sentences that it has not seen.
      found: whether the file was found in the run's folder.
      others: what else is there, in words.
    """

    file: Path | None = None
    tuned_for: Mapping[str, Any] = field(default_factory=dict)
    fits: bool | None = False
    expected_wer: float | None = None
    found: bool = False
    others: str = ""

    def options(self, given: Sequence[str]) -> list[str]:
        """Return options of a server, with the file if it was found. Those given come after it."""
        return [*(("--settings", str(self.file)) if self.found else ()), *given]

    def to_json(self) -> dict[str, Any]:
        """Return {file, tuned_for, fits}."""
        return {
            "file": self.file and str(self.file),
            "tuned_for": dict(self.tuned_for) or None,
            "fits": self.fits,
        }

    def notice(self, run: Run, lm: Path | None, split: str) -> str | None:
        """Return what a reader of the results must know of the settings, if anything."""
        this = _words(run.identity)
        if self.fits is None:
            return (
                "warning: the settings are the running server's own. It is not known for which "
                f"checkpoint they were tuned, and this is {this}"
            )
        if self.fits:
            used = f"settings tuned for this checkpoint: {self.file}"
            if self.tuned_for.get("split") != split or self.expected_wer is None:
                return used
            return (
                f"{used}, on the {split} sentences themselves, whose WER is too good. Expected of "
                f"others: {100 * self.expected_wer:.2f} %"
            )
        if self.file is None:
            found = f"settings are the search's defaults, tuned for no checkpoint{self.others}"
        elif self.tuned_for:
            found = f"settings {self.file} were tuned for {_words(self.tuned_for)}"
        else:
            found = f"settings {self.file} do not name the checkpoint that they were tuned for"
        folder = run.workdir or Path("WORKDIR")
        logits, name = folder / "val.npz", (lm.absolute().name if lm else "lm")
        infer = ["b2txt", "infer", "--workdir", folder, "--out", logits]
        infer += [] if run.weights == RAW else ["--weights", run.weights]
        out = folder / FOLDER / f"{name}_{run.step}.json"
        tune = ["lm-server", "tune", "--lm", lm, "--logits", logits, "--out", out]
        commands = " && ".join(shlex.join(map(str, command)) for command in (infer, tune))
        return (
            f"warning: the decoder's {found}, and this is {this}. Its WER may be higher for that "
            f"reason alone. To tune them: {commands}"
        )


def settings_in_use(run: Run, lm: Path | None, options: Sequence[str]) -> DecoderSettings:
    """Return the settings that a decoder for this run gets.

    These are those of `--settings` among the options, else those in WORKDIR/lm_settings that were
    tuned for these parameters, this language model, this search and this large language model (the
    newest, if there are several), else the search's defaults. Those that tuning itself expects to
    be worse than what it began with are left out.

    Args:
      run: that is evaluated.
      lm: model folder of a decoder that is started. None: a server runs already.
      options: of that decoder.

    Raises:
      SettingsFileError: a file cannot be read.
    """
    if lm is None:
        return DecoderSettings(fits=None)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--settings", type=Path)
    parser.add_argument("--backend", default="flashlight")
    parser.add_argument("--llm", nargs="?", const="")
    chosen, _ = parser.parse_known_args(list(options))
    if chosen.settings is not None:
        about = _about(chosen.settings)
        return _of(chosen.settings, about, run)
    described = lm / "lm.json"
    crc = zlib.crc32(described.read_bytes()) if described.is_file() else None
    wanted = (crc, chosen.backend, _name(chosen.llm))
    fitting, others = [], []
    for path in sorted((run.workdir / FOLDER).glob("*.json")) if run.workdir else ():
        about = _about(path)
        made = about.get("lm_crc32"), about.get("backend"), _name(about.get("llm"))
        found = _of(path, about, run)
        worse = about.get("expected_wer", 0) > about.get("wer_before", 1)
        if made == wanted and found.fits and not worse:
            fitting.append(found)
        else:
            why = "" if made == wanted else ", for another decoder"
            why += ", expected to be worse than those that tuning began with" if worse else ""
            others.append(f"{path} ({_words(found.tuned_for)}{why})")
    if fitting:
        newest = max(fitting, key=lambda one: one.file.stat().st_mtime if one.file else 0.0)
        return DecoderSettings(**{**vars(newest), "found": True})
    return DecoderSettings(others=f" (there are {', '.join(others)})" if others else "")


def _of(path: Path, about: Mapping[str, Any], run: Run) -> DecoderSettings:
    made = about.get("checkpoint")
    tuned_for = made if isinstance(made, dict) else {}
    fits = tuned_for.get("parameters") == run.fingerprint
    return DecoderSettings(path, tuned_for, fits, about.get("expected_wer"))


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_bytes()).get("about", {})
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SettingsFileError(
            f"the settings file {path} cannot be read ({error!r}); needed one of `lm-server tune`: "
            "remove it, or tune again"
        ) from error
    return about if isinstance(about, dict) else {}


def _name(llm: str | None) -> str | None:
    return None if llm is None else Path(llm).absolute().name


def _words(made: Mapping[str, Any]) -> str:
    if "step" not in made:
        return "no checkpoint that is named"
    return f"step {made['step']} ({made.get('weights')}, parameters {made.get('parameters')})"
