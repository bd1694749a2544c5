"""The pages of the documentation, their fenced blocks and the commands in them.

A block is run by the tests unless an HTML comment directly before it says otherwise:

    <!-- needs: tpu -->              not run; its commands are parsed. NEEDS lists the words.
    <!-- run by: tests/x/test_y.py --> another test runs it, or compares it
    <!-- keeps running -->           servers: started, and stopped at the end of the page
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

NEEDS = {
    "tpu": "a TPU",
    "gcloud": "a Google Cloud project",
    "gpu": "a GPU, or many gigabytes of memory",
    "download": "packages or models from the internet",
    "published-data": "the published recordings, checkpoints or language models",
    "redis": "a Redis server of one's own",
    "long": "more time than a test should take",
}
RUN = ("sh", "python")
NOT_RUN = {
    "text": "output, formulas and file layouts",
    "json": "the content of a file",
    "env": "settings of launch/tpu.sh",
    "exchange": "messages of the protocol",
    "ini": "a unit of systemd",
    "dockerfile": "a recipe of a container image",
    "ipython": "a cell of a notebook",
}
RUN_BY_OTHERS = ("env", "exchange", "ini", "dockerfile")
"""Languages whose blocks another test must run or compare."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Of its opening fence, from 1."""
    language: str
    text: str
    needs: str | None
    run_by: str | None
    keeps_running: bool

    @property
    def place(self) -> str:
        """Page and line, as an editor opens them."""
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the page's own test runs it."""
        return self.language in RUN and self.needs is None and self.run_by is None


class PageError(Exception):
    """A page that does not follow the rules; the text names the page and the line."""


_FENCE = re.compile(r"^```(\S*)\s*$")
_COMMENT = re.compile(r"^<!-- (needs: \S+|run by: \S+|keeps running) -->$")


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order.

    Raises:
      PageError: a block has no language, an unknown one or an unknown comment, or is not closed.
    """
    found: list[Block] = []
    comments: list[str] = []
    opened: tuple[int, str] | None = None
    text: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, text = (number, fence[1]), []
        elif opened is not None and line == "```":
            found.append(_block(page, opened, "\n".join(text) + "\n", comments))
            opened, comments = None, []
        elif opened is not None:
            text.append(line)
        elif comment := _COMMENT.match(line):
            comments.append(comment[1])
        elif re.match(r"\s+```|\s*~~~", line):
            raise PageError(f"{page.name}:{number}: a block begins with ``` at the line's start")
        elif comments:
            raise PageError(f"{page.name}:{number}: a comment for a block, and no block after it")
    if opened is not None:
        raise PageError(f"{page.name}:{opened[0]}: this block is not closed")
    return found


def _block(page: Path, opened: tuple[int, str], text: str, comments: list[str]) -> Block:
    line, language = opened
    marks = dict(comment.partition(": ")[::2] for comment in comments)
    if language not in (*RUN, *NOT_RUN):
        raise PageError(
            f"{page.name}:{line}: a block of language {language!r}; needed one of "
            f"{', '.join((*RUN, *NOT_RUN))}"
        )
    needs = marks.get("needs")
    if needs is not None and needs not in NEEDS:
        raise PageError(
            f"{page.name}:{line}: a block that needs {needs!r}; needed one of {', '.join(NEEDS)}"
        )
    return Block(page, line, language, text, needs, marks.get("run by"), "keeps running" in marks)


def commands_of(block: Block) -> list[str]:
    """Return the command lines of a shell block, continued lines joined and remarks left out.

    A quoted text and a loop's body may span lines: they are one command.
    """
    commands: list[str] = []
    depth = 0
    for line in block.text.replace("\\\n", " ").splitlines():
        words = words_of(line)
        if not words:
            continue
        if depth:
            commands[-1] += "\n" + line
        else:
            commands.append(line)
        depth += words.count("do") - words.count("done")
    return commands


def words_of(command: str) -> list[str]:
    """Return the words of a command line without the remark at its end."""
    return shlex.split(command.removeprefix("!"), comments=True)


def inline_code_of(page: Path) -> list[tuple[int, str]]:
    """Return what stands in backticks outside the blocks, each with its line."""
    found = []
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            found += [(number, text) for text in re.findall(r"`([^`]+)`", line)]
    return found
