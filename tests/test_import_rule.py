"""Each package runs where the other's frameworks are not installed."""

import subprocess
import sys

import pytest

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""
SERVER_SIDE = {"torch", "transformers", "kenlm", "flashlight", "pyctcdecode", "kaldingram"}
JAX_SIDE = {"jax", "jaxlib", "flax", "optax", "orbax", "h5py", "b2txt_jax"}


def test_b2txt_imports_nothing_of_the_servers_side_where_that_is_installed():
    """So it runs where that is not installed."""
    program = (
        "import sys\n"
        "from b2txt_jax.cli import COMMANDS, make_parser\n"
        "for name in COMMANDS: make_parser(name)\n"
        "import b2txt_jax.training.loop, b2txt_jax.evaluation.command\n"
        f"print(*({SERVER_SIDE!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize(
    ("code", "blocked"),
    [
        (
            "import lm_server.client.client, lm_server.client.jobs, lm_server.client.process\n"
            "rooms = {name.split('.')[1] for name in sys.modules if 'lm_server.' in name}\n"
            "heavy = {'lexicon', 'lm', 'search', 'rescoring', 'tuning', 'serving'}\n"
            "assert not rooms & heavy, rooms",
            SERVER_SIDE | {"rich", "scipy", "jax", "h5py"},
        ),
        ("from lm_server.__main__ import main; main(['decode', '--help'])", JAX_SIDE),
        (
            "import lm_server.serving.server, lm_server.search.flashlight, lm_server.lm.build",
            JAX_SIDE,
        ),
        (
            "import lm_server.protocol",
            JAX_SIDE | SERVER_SIDE | {"redis", "rich", "scipy", "matplotlib"},
        ),
    ],
    ids=["b2txt's client", "lm-server", "lm-server's parts", "protocol"],
)
def test_a_side_imports_with_the_other_side_blocked(code, blocked):
    program = BLOCK.format(names=blocked) + code
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
