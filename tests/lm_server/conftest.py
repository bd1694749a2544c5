"""A small language model, and a real server with it on a real Redis."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from lm_server.lm.build import build

# pytest imports tests by path; the modules that they share are found here.
_HERE = Path(__file__).parent
sys.path.extend([str(_HERE), *(str(room) for room in _HERE.iterdir() if room.is_dir())])

from processes import Running, serving  # noqa: E402
from small_model import LEXICON, TEXT  # noqa: E402


@pytest.fixture(scope="session")
def lexicon_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lexicon") / "lexicon.txt"
    path.write_text(LEXICON)
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 30)
    return path


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, lexicon_file: Path, text_file: Path
) -> Path:
    folder = tmp_path_factory.mktemp("model") / "lm"
    build([text_file], 3, lexicon_file, folder, Console(quiet=True))
    return folder


@pytest.fixture(scope="session")
def server(model_folder: Path) -> Iterator[Running]:
    with serving("--lm", str(model_folder), "--embedded-redis", "--exit-with-parent") as running:
        yield running
