"""What `b2txt evaluate` wrote, read again: for reports, comparisons, submissions, consensus."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from b2txt_jax.config import CONFIG_FILE
from b2txt_jax.errors import UserError
from b2txt_jax.metrics import ErrorRate
from lm_server.files import answers_file
from lm_server.files.atomic_file import regular

EVALUATION, ANSWERS = "evaluation.json", "answers.jsonl"
"""Files in a result's folder."""


class ResultsError(UserError, ValueError):
    """A result that is not there, or cannot be used. The message names file and trial."""


@dataclass(frozen=True)
class SavedTrial:
    """One trial of a result.

    Attributes:
      trial: its name, such as `t15.2023.08.13/trial_0007`.
      true, decoded: sentences. None: unknown, or failed.
      per, wer: errors against the true phonemes and words. None: unknown.
      seen: whether the sentence occurs in the train split. None: unknown.
      corpus: of the sentence. None: unknown.
      answer: the line of answers.jsonl: n-best list and confidences. Empty where it was not kept.
    """

    trial: str
    true: str | None
    decoded: str | None
    per: ErrorRate | None
    wer: ErrorRate | None
    seen: bool | None
    corpus: str | None
    answer: Mapping[str, Any]

    @property
    def session(self) -> str:
        """The recording day."""
        return self.trial.split("/", 1)[0]


@dataclass(frozen=True)
class Result:
    """A folder of `b2txt evaluate`: `content` is evaluation.json."""

    folder: Path
    content: Mapping[str, Any]
    trials: tuple[SavedTrial, ...]

    @property
    def name(self) -> str:
        """The folder's name: the language model and how it rescored."""
        return self.folder.absolute().name

    @property
    def parameters(self) -> str | None:
        """Fingerprint of the parameters that were evaluated."""
        found = self.content["checkpoint"].get("parameters")
        return found if isinstance(found, str) else None

    def rate(self, kind: str) -> ErrorRate | None:
        """Return `per`, `wer`, `wer_oracle` or `wer_without_lm` of all trials."""
        found = self.content.get(kind)
        return found and ErrorRate(found["all"]["errors"], found["all"]["length"])


def read_result(path: Path) -> Result:
    """Read a result's folder, or the `evaluation.json` in it.

    Raises:
      ResultsError: it holds no result, or a damaged one.
    """
    file = path if path.suffix == ".json" else path / EVALUATION
    try:
        content = json.loads(regular(file).read_bytes())
        answers = read_answers(file.parent / ANSWERS)
        trials = tuple(_trial(row, answers) for row in content["sentences"])
        names = {one.trial for one in trials}
        if len(names) != len(trials):
            raise ValueError(f"{len(trials) - len(names)} trials are there more than once")
        found = Result(file.parent, content, trials)
        for kind in ("per", "wer", "wer_oracle", "wer_without_lm"):
            found.rate(kind)
        _ = found.parameters, content["settings"].get, content["made"].get
    except ResultsError:
        raise
    except FileNotFoundError as error:
        raise ResultsError(
            f"there is no {file}; needed the folder of a result: make one with `b2txt evaluate "
            "--workdir RUN --lm DIR`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultsError(
            f"{file} is not a result of `b2txt evaluate` ({error!r}): evaluate again"
        ) from error
    return found


def results_of(workdir: Path, split: str = "val") -> list[Result]:
    """Return the results in a run's folder, the newest last.

    Raises:
      ResultsError: one of them is damaged.
    """
    found = [read_result(file.parent) for file in (workdir / split).glob(f"*/{EVALUATION}")]
    # By the date that the result records: files that were copied have that of the copy.
    return sorted(found, key=lambda one: (str(one.content["made"].get("date")), _changed(one)))


def _changed(result: Result) -> float:
    return (result.folder / EVALUATION).stat().st_mtime


def result_of(path: Path, split: str = "val") -> Result:
    """Return the result in a folder of `b2txt evaluate`, or the newest one of a run's folder.

    Raises:
      ResultsError: there is none, or it is damaged.
    """
    if not (path / CONFIG_FILE).is_file():
        return read_result(path)
    found = results_of(path, split)
    if not found:
        raise ResultsError(
            f"the run {path} has no result of its {split} split: make one with `b2txt evaluate "
            f"--workdir {path} --split {split} --lm DIR`"
        )
    return found[-1]


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of a file of answers by trial. Without the file, none.

    Raises:
      ResultsError: a line is not an answer.
    """
    if not path.exists():
        return {}
    try:
        return answers_file.read_answers(path)
    except answers_file.AnswersFileError as error:
        raise ResultsError(str(error)) from error


def _trial(row: Mapping[str, Any], answers: Mapping[str, Mapping[str, Any]]) -> SavedTrial:
    def rate(errors: str, length: str) -> ErrorRate | None:
        # Older results have no phonemes of each trial.
        return None if row.get(errors) is None else ErrorRate(int(row[errors]), int(row[length]))

    for key in ("trial", "true", "decoded", "corpus"):
        if not isinstance(row.get(key), str | None) or row["trial"] is None:
            raise ValueError(f"{key} is {row.get(key)!r}")
    per, wer = rate("phoneme_errors", "phonemes"), rate("errors", "words")
    return SavedTrial(
        row["trial"],
        row["true"],
        row["decoded"],
        per,
        wer,
        row.get("seen"),
        row.get("corpus"),
        answers.get(row["trial"], {}),
    )
