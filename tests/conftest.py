"""Simulated sessions and a tiny recipe that every test of the pipeline shares."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import h5py
import pytest
from hypothesis import HealthCheck, settings
from packaging.version import Version

# Tests and the processes that they start compile the same small programs: once is enough.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Compilation dominates these tests, and both flags shorten it. Results stay within every tolerance.
# JAX 0.12 ends a process at the second, which it no longer knows.
# Flags that are set already come last, so that they win.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" * (Version(version("jaxlib")) < Version("0.11")),
        os.environ.get("XLA_FLAGS", ""),
    ]
)

from b2txt_jax.config import Config, load_config
from b2txt_jax.phonemes import pronunciations
from b2txt_jax.simulation.plan import SimulationSettings
from b2txt_jax.simulation.write import simulate
from b2txt_jax.training.compiled import CompiledSteps

REPOSITORY = Path(__file__).parents[1]

# Where tests run in the background Ctrl-C is ignored, and every process of a test inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on what else the machine does. `make test-slow` tries more.
ANY_TIME = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", ANY_TIME, max_examples=25)
settings.register_profile("thorough", ANY_TIME, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


LONGEST_FIRST = (
    *("training", "docs", "test_cli.py", "test_python_api.py", "parity", "interop", "serving"),
    *("client", "evaluation", "launch"),
)
"""Folders and files of tests in the order in which they are started; the others follow."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest first: no worker is left with a long file at the end."""
    rank = {folder: index for index, folder in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: min(rank.get(part, len(rank)) for part in item.path.parts))


def pytest_collection_finish() -> None:
    """Take what the modules hold out of the collector's sight: millions of objects, which each of
    its full passes would visit."""
    gc.collect()
    gc.freeze()


SIMULATION = SimulationSettings(
    sessions=4, train=8, val=4, test=3, min_words=3, max_words=4, speaking_rate=2.0
)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of four small simulated sessions; read it, do not change it."""
    out = tmp_path_factory.mktemp("simulated")
    simulate(out, SIMULATION)
    return out


FEATURES = 64
"""Of `narrow`. With the published 512 the day layers alone have more than a million weights."""


@pytest.fixture(scope="session")
def narrow(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sessions of `simulated` with their first features alone; read it, do not change it."""
    folder = tmp_path_factory.mktemp("narrow") / simulated.name
    shutil.copytree(simulated, folder)  # beside the sessions is the description of their blocks
    make_narrow(folder / "hdf5_data_final")
    return folder / "hdf5_data_final"


def make_narrow(root: Path) -> None:
    """Leave only the first FEATURES features of the sessions in a folder."""
    for path in root.rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            for trial in file.values():
                features = trial["input_features"][:, :FEATURES]
                del trial["input_features"]
                trial["input_features"] = features


@pytest.fixture(scope="session")
def tiny_overrides(narrow: Path) -> list[str]:
    """Overrides that make configs/demo.py train in seconds on `narrow`."""
    values = {
        "data.root": narrow,
        "data.feature_count": FEATURES,
        "data.trials_per_day": 1,
        "data.eval_batch_size": 4,
        "data.buckets": ((180, 40),),  # one, just large enough: less to compile and to compute
        "model.units": 16,
        "model.layers": 2,
        "train.steps": 6,
        "train.log_every": 2,
        "train.validate_every": 3,
        "train.save_every": 2,
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="session")
def tiny_config(tiny_overrides: list[str]) -> Config:
    """configs/demo.py, tiny."""
    return load_config(REPOSITORY / "configs/demo.py", tiny_overrides)


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings end before their first step, as if they had been told to: nothing is compiled."""
    monkeypatch.setattr(CompiledSteps, "compile", lambda *_: False)


@pytest.fixture(scope="session")
def build_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Sequence[str]], Path]:
    """Return the function that builds a 2-gram model folder of sentences, by the command."""

    def build(sentences: Sequence[str]) -> Path:
        folder = tmp_path_factory.mktemp("lm")
        words = sorted({word for sentence in sentences for word in sentence.split()})
        lexicon = [f"{word} {' '.join(pronunciations()[word][0])}" for word in words]
        (folder / "lexicon.txt").write_text("\n".join(lexicon) + "\n")
        (folder / "text.txt").write_text("\n".join([*sentences] * 5) + "\n")
        command = [sys.executable, "-m", "lm_server", "build", "--order", "2"]
        command += ["--text", str(folder / "text.txt"), "--lexicon", str(folder / "lexicon.txt")]
        subprocess.run([*command, "--out", str(folder / "lm")], check=True, capture_output=True)
        return folder / "lm"

    return build
