"""README.md and docs/: every block runs, every command exists, every path and link leads somewhere.

Blocks run in the order of their page, in a folder that looks like a checkout after `make demo`.
Simulations, models and trainings are made smaller: SMALLER lists the options that commands get.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import itertools
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pages import (
    NOT_RUN,
    PAGES,
    REPOSITORY,
    RUN_BY_OTHERS,
    Block,
    PageError,
    blocks_of,
    commands_of,
    inline_code_of,
    words_of,
)

from b2txt_jax import cli
from b2txt_jax.config import load_config
from lm_server import __main__ as lm_server_command

SIMULATION = {"sessions": 4, "train": 8, "val": 4, "test": 3, "min_words": 3, "max_words": 4}
SPEAKING_RATE = 2.0
TRAINING = (
    "--config.data.trials_per_day=1",
    "--config.data.eval_batch_size=4",
    "--config.data.buckets=((180,40),)",
    "--config.model.units=16",
    "--config.model.layers=2",
    "--config.train.steps=6",
    "--config.train.log_every=2",
    "--config.train.validate_every=3",
    "--config.train.save_every=2",
)
SMALLER: dict[tuple[str, str], Sequence[str]] = {
    ("b2txt", "simulate"): [
        *(f"--{key.replace('_', '-')}={value}" for key, value in SIMULATION.items()),
        f"--speaking-rate={SPEAKING_RATE}",
    ],
    ("b2txt", "train"): TRAINING,
    ("lm-server", "build"): ["--vocabulary=2000"],
    ("lm-server", "tune"): ["--searches=2"],
}
LONG = (
    *("evaluation", "first_steps", "language_models", "python", "report", "rescoring"),
    *("search", "sharing"),
)
"""Pages whose blocks take long. As those of all pages, their commands are parsed in any case."""
SENTENCES = 2000
"""Lines that a simulation's text for language models keeps."""
REDIS = "redis://127.0.0.1:6379/0"
"""In the pages; the tests use a Redis of their own instead."""


# ---- what is written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_say_how_they_are_run_and_their_commands_exist(page):
    for block in blocks_of(page):
        if block.run_by is not None:
            assert (REPOSITORY / block.run_by).is_file(), block.place
            continue
        assert block.language not in RUN_BY_OTHERS, f"{block.place}: no test runs this block"
        if block.language == "python":
            compile(block.text, block.place, "exec")
        if block.language in ("sh", "ipython"):
            for command in commands_of(block):
                check_command(command, block.place)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_paths_modules_and_links_of_the_prose_exist(page):
    for line, text in inline_code_of(page):
        place = f"{page.relative_to(REPOSITORY)}:{line}"
        check_extras(text, place)
        if text.startswith(("b2txt ", "lm-server ")) and "--" in text:
            check_options(text.split(), place)
        path = text.partition(":")[0].partition(" ")[0]
        folder = path.partition("/")[0]
        ours = folder not in ("", "runs") and (REPOSITORY / folder).is_dir()  # runs/: users' own
        if "/" in path and ours and "*" not in path:
            assert (REPOSITORY / path).exists(), f"{place}: there is no {path}"
        if re.fullmatch(r"test_\w+\.py", text):
            assert any((REPOSITORY / "tests").rglob(text)), f"{place}: there is no {text}"
        if re.fullmatch(r"(b2txt_jax|lm_server)(\.\w+)+", text):
            assert exists(text), f"{place}: there is no {text}"
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: there is no {target}"


def test_no_command_hides_in_an_indented_block():
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            assert not re.match(r" {4,}(b2txt|lm-server|python|make|import) ", line), (page, number)


def test_every_page_is_in_the_readme_s_index():
    readme = (REPOSITORY / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in readme, f"docs/{page.name} is not in README.md's index"


def check_command(command: str, place: str) -> None:
    """Assert that a command's program, options, configuration keys and files exist."""
    words = words_of(command)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program = Path(words[0]).name
    if program in ("b2txt", "lm-server"):
        parse(program, words[1:], place)
    elif program == "make":
        targets = (REPOSITORY / "Makefile").read_text()
        for target in words[1:]:
            assert re.search(rf"^{target}:", targets, re.MULTILINE), f"{place}: make {target}"
    elif program == "timeout":
        check_command(shlex.join(itertools.dropwhile(is_of_timeout, words[1:])), place)
    elif program == "pip":
        check_extras(command, place)
    elif program == "python" and words[1].endswith(".py"):
        script = REPOSITORY / words[1]
        assert script.is_file(), f"{place}: there is no {words[1]}"
        # Scripts of one folder share options.
        text = "".join(path.read_text() for path in script.parent.glob("*.py"))
        for word in words[2:]:
            if word.startswith("--"):
                assert f'"{word}"' in text, f"{place}: {words[1]} has no {word}"
    elif "/" in words[0] and not words[0].startswith((".", "~", "/")):
        assert (REPOSITORY / words[0]).is_file(), f"{place}: there is no {words[0]}"


def is_of_timeout(word: str) -> bool:
    """Return whether a word is an option or the duration of `timeout`."""
    return word.startswith("--") or re.fullmatch(r"[\d.]+[smhd]?", word) is not None


def check_extras(text: str, place: str) -> None:
    """Assert that the extras of an installation such as `.[lm,llm]` exist."""
    known = (REPOSITORY / "setup.cfg").read_text()
    for extras in re.findall(r"\.\[([\w,]+)\]", text):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} =$", known, re.MULTILINE), f"{place}: no extra {extra}"


def parse(program: str, words: list[str], place: str) -> None:
    """Parse a command line of one of ours as it will be; the configuration's keys too."""
    overrides = [word for word in words if word.startswith("--config.")]
    plain = [word for word in words if word not in overrides]
    parser = parser_of(program, plain[0])
    try:
        args = parser.parse_args(plain)
    except SystemExit as stopped:
        if stopped.code == 0:  # --help and --version
            return
        pytest.fail(f"{place}: {program} {' '.join(words)} is not a command line of {program}")
    config = getattr(args, "config", None)
    if config is not None and str(config).endswith(".py"):
        config = REPOSITORY / config
    if overrides or config is not None:
        load_config(config or REPOSITORY / "configs/nejm_baseline.py", overrides)


def parser_of(program: str, command: str) -> argparse.ArgumentParser:
    """Return the parser of one of our commands; b2txt has the options of one subcommand only."""
    return cli.make_parser(command) if program == "b2txt" else lm_server_command._parser()


def check_options(words: list[str], place: str) -> None:
    """Assert that the options of a command in the prose exist, as far as it is written out."""
    parser = parser_of(*words[:2])
    commands = next(action.choices for action in parser._actions if action.dest == "command")
    assert words[1] in commands, f"{place}: {words[0]} has no {words[1]}"
    for word in words[2:]:
        option = word.strip("[].,").partition("=")[0]
        if option.startswith("--") and not option.startswith("--config."):
            known = commands[words[1]]._option_string_actions
            assert option in known, f"{place}: {words[0]} {words[1]} has no {option}"


def exists(name: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    module, _, rest = name, "", ""
    while module:
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
            continue
        for part in filter(None, rest.split(".")):
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


# ---- what is run


@pytest.fixture(scope="session")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves, small: runs/demo with data, lm_3gram and run."""
    folder = tmp_path_factory.mktemp("demo")
    demo = folder / "runs" / "demo"
    simulate(demo / "data")
    text = demo / "data" / "language_model_text.txt"
    build = ["build", "--text", str(text), "--order", "3", "--out", str(demo / "lm_3gram")]
    run_lm_server([*build, *SMALLER["lm-server", "build"]])
    root = f"--config.data.root={demo / 'data' / 'hdf5_data_final'}"
    config = str(REPOSITORY / "configs/demo.py")
    train = ["train", "--config", config, "--workdir", str(demo / "run"), root, *TRAINING]
    assert cli.main(train) == 0
    return folder


@pytest.fixture
def checkout(after_the_demo, tmp_path, monkeypatch) -> Path:
    """A folder that looks like a checkout after the demo; the working directory."""
    for name in ("configs", "benchmarks", "scripts", "launch", "docs", "constraints.txt"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    shutil.copytree(after_the_demo / "runs", tmp_path / "runs")
    lines = (tmp_path / "runs/demo/data/language_model_text.txt").read_text().splitlines()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "some.txt").write_text("\n".join(lines[:1000]) + "\n")
    with gzip.open(tmp_path / "more.txt.gz", "wt") as file:
        file.write("\n".join(lines[1000:]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("B2TXT_REDIS_URL", f"unix://{tmp_path}/none.sock")
    return tmp_path


@pytest.fixture
def small_api(monkeypatch) -> None:
    """The Python API, with simulations and trainings as small as those of the commands."""
    import b2txt_jax

    simulate, train = b2txt_jax.simulate, b2txt_jax.train

    def small_simulate(out: Any, **settings: Any) -> Any:
        small = {**settings, **SIMULATION, "speaking_rate": SPEAKING_RATE}
        done = simulate(out, **small)
        shorten_text(Path(out))
        return done

    def small_train(config: Any, workdir: Any, overrides: Sequence[str] = ()) -> Any:
        return train(config, workdir, overrides=[*overrides, *TRAINING])

    monkeypatch.setattr(b2txt_jax, "simulate", small_simulate)
    monkeypatch.setattr(b2txt_jax, "train", small_train)


def page_param(page: Path) -> Any:
    """Return the page as a parameter; one that takes long is run by `make test-slow`."""
    return pytest.param(page, marks=[pytest.mark.slow] if page.stem in LONG else [])


@pytest.mark.parametrize("page", [page_param(page) for page in PAGES], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_their_order(page, request):
    blocks = [block for block in blocks_of(page) if block.runs]
    if not blocks:
        return
    checkout = request.getfixturevalue("checkout")
    if any(block.language == "python" for block in blocks):
        request.getfixturevalue("small_api")
    with Servers(checkout) as servers:
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks:
            text = block.text.replace(REDIS, servers.url) if REDIS in block.text else block.text
            if block.language == "python":
                exec(compile(text, block.place, "exec"), names)
                continue
            for command in commands_of(block):
                run = servers.start if block.keeps_running else run_command
                run(command.replace(REDIS, servers.url) if REDIS in command else command, block)


def run_command(command: str, block: Block) -> None:
    """Run one command line; b2txt in this process, since importing JAX takes seconds each time."""
    words = words_of(command)
    words += SMALLER.get((words[0], words[1] if len(words) > 1 else ""), ())
    if words[0] == "b2txt":
        assert cli.main(words[1:]) == 0, f"{block.place}: {command}"
        if words[1] == "simulate":
            shorten_text(Path(words[words.index("--out") + 1]))
    elif words[0] == "lm-server":
        run_lm_server(words[1:], block.place)
    else:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], timeout=600)
        assert done.returncode == 0, f"{block.place}: {command}"


def run_lm_server(words: Sequence[str], place: str = "") -> None:
    """Run `lm-server` in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "lm_server", *words], timeout=600)
    assert done.returncode == 0, f"{place}: lm-server {' '.join(words)}"


def simulate(out: Path) -> None:
    """Simulate small sessions with a short text."""
    assert cli.main(["simulate", "--out", str(out), *SMALLER["b2txt", "simulate"]]) == 0
    shorten_text(out)


def shorten_text(folder: Path) -> None:
    """Keep the first lines of a simulation's text, so that language models are built at once."""
    text = folder / "language_model_text.txt"
    text.write_text("\n".join(text.read_text().splitlines()[:SENTENCES]) + "\n")


class Servers:
    """The processes that a page starts and leaves running, and a Redis for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[subprocess.Popen[str]] = []
        self._url: str | None = None

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running):
            process.terminate()
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()

    @property
    def url(self) -> str:
        """Return the URL of the Redis, started when a page first needs it."""
        if self._url is None:
            from lm_server.serving.embedded_redis import find_program

            socket = self._folder / "redis.sock"
            program = [str(find_program()), "--port", "0", "--unixsocket", str(socket)]
            self._running.append(
                subprocess.Popen([*program, "--save", ""], stdout=subprocess.DEVNULL, text=True)
            )
            until = time.monotonic() + 120
            while not socket.exists():
                assert time.monotonic() < until, "Redis does not start"
                time.sleep(0.05)
            self._url = f"unix://{socket}"
        return self._url

    def start(self, command: str, block: Block) -> None:
        """Start a command of ours and wait until it prints that it is ready."""
        words = words_of(command)
        assert words[0] == "lm-server", f"{block.place}: only lm-server keeps running"
        process = subprocess.Popen(
            [sys.executable, "-m", "lm_server", *words[1:]], stdout=subprocess.PIPE, text=True
        )
        self._running.append(process)
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 300)[0], f"{block.place}: not ready"
        line = process.stdout.readline()
        assert " ready " in line, f"{block.place}: {line}"


# ---- the reader of pages


@pytest.fixture
def page(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setattr("pages.REPOSITORY", tmp_path)
    return tmp_path / "page.md"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nls\n```\n", "page.md:1: a block of language ''"),
        ("<!-- needs: luck -->\n```sh\nls\n```\n", "page.md:2: a block that needs 'luck'"),
        ("```sh\nls\n", "page.md:1: this block is not closed"),
        ("- item\n  ```sh\n  ls\n  ```\n", "page.md:2: a block begins"),
        ("<!-- needs: tpu -->\n\ntext\n", "page.md:2: a comment for a block"),
    ],
)
def test_a_block_that_follows_no_rule_is_refused_with_its_line(page, text, message):
    page.write_text(text)
    with pytest.raises(PageError, match=re.escape(message)):
        blocks_of(page)


def test_an_unknown_option_key_or_script_fails_with_its_line():
    for command in (
        "b2txt train --config configs/demo.py --workdir runs/x --no-such-option",
        "lm-server serve --lm x --no-such-option",
        "python benchmarks/no_such.py",
        "make no-such-target",
        "pip install '.[lm,nothing]' -c constraints.txt",
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception), match=r"docs/x\.md:7"):
            check_command(command, "docs/x.md:7")


def test_every_language_that_is_not_run_is_used():
    used = {block.language for page in PAGES for block in blocks_of(page)}
    assert set(NOT_RUN) <= used
