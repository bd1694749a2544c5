import os
import subprocess
import sys
from pathlib import Path

import pytest

from b2txt_jax.huge_pages import huge_page_environment

WANTED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("always [madvise] never\n", WANTED),
        ("[always] madvise never\n", {}),
        ("always madvise [never]\n", {}),
        (None, {}),
    ],
)
def test_huge_pages_are_asked_for_only_where_linux_leaves_the_choice(
    setting, wanted, tmp_path, monkeypatch
):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    assert huge_page_environment(tmp_path / "enabled") == wanted


def test_a_setting_of_the_users_own_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    (tmp_path / "enabled").write_text("always [madvise] never")
    assert huge_page_environment(tmp_path / "enabled") == {}


def test_the_restart_keeps_process_arguments_and_input(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), *sys.argv[1:], flush=True)\n"
        "from b2txt_jax.huge_pages import restart_with_huge_pages\n"
        "restart_with_huge_pages()\n"
        "print(sys.stdin.read())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, program, "a b", "--c"],
        input="typed",
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PYTHONPATH": str(Path.cwd())},
    )
    *starts, typed = done.stdout.splitlines()
    pid = starts[0].split()[0]
    tunables = ["None", *huge_page_environment().values()] if len(starts) > 1 else ["None"]
    assert starts == [f"{pid} {value} a b --c" for value in tunables]
    assert typed == "typed"
