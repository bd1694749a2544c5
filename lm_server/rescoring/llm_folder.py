"""A folder of a causal language model, in the format of transformers, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_server.files.atomic_file import require_writable
from lm_server.rescoring.causal_lm import DESCRIPTION
from lm_server.rescoring.scorer import RescoringError


def require_llm_folder(out: Path) -> None:
    """Raise before the work what `replacing_llm(out)` would raise after it.

    Raises:
      RescoringError: `out` is there and is no folder that this module wrote.
      UnwritableError: the folder around it cannot be written to.
    """
    if out.exists() and not (out / DESCRIPTION).is_file():
        raise RescoringError(f"{out} is there and was not made by this command: choose another")
    require_writable(out.parent / DESCRIPTION)


@contextlib.contextmanager
def replacing_llm(out: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place when the block ends without an
    exception, with the `description` of how the model scores.

    Raises:
      RescoringError: it cannot be written.
    """
    temporary = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        (temporary / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    except OSError as error:
        raise RescoringError(
            f"cannot write {out} ({error}): choose a place that you may write to"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
