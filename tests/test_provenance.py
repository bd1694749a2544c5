"""What is recorded of the origin of a result, and what is not."""

import pytest

from b2txt_jax import __version__
from b2txt_jax.provenance import provenance, without_passwords


def test_a_result_is_known_by_its_time_command_commit_and_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/b2txt", "train", "--workdir", "runs/a"])
    found = provenance()
    assert found["date"].endswith("+00:00")
    assert found["command"] == "/usr/bin/b2txt train --workdir runs/a"
    commit = found["commit"]  # None outside a checkout
    assert commit is None or len(commit.removesuffix("-dirty")) == 40
    assert found["versions"]["b2txt-jax"] == __version__


@pytest.mark.parametrize(
    "arguments",
    [
        ["--redis", "redis://:sec#ret@host/0"],
        ["--redis", "sec/ret"],
        ["--redis=redis:/sec@ret"],
        ["--red", "rediss://sec:ret@host"],
        ["--lm-options=--redis redis://:sec?ret@host --beam 5"],
    ],
)
def test_no_part_of_a_password_is_recorded(arguments: list[str]) -> None:
    shown = without_passwords(["b2txt", "evaluate", *arguments, "--workdir", "runs/a b"])
    assert "sec" not in shown
    assert "ret" not in shown
    assert shown.endswith("--workdir 'runs/a b'")
