"""Brain-to-text decoding in JAX: neural features to phoneme probabilities to sentences.

>>> import b2txt_jax as b2t
>>> run = b2t.load_run("runs/demo/run")
>>> logits = run.logits(features, day="t15.2023.08.13")  # [T, 512] -> float32 [P, 41]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2txt_jax.api import evaluate, simulate, train
    from b2txt_jax.inference.run import Run, load_run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "evaluate", "load_run", "simulate", "train"]

_MODULES = {
    "Run": "b2txt_jax.inference.run",
    "load_run": "b2txt_jax.inference.run",
    "evaluate": "b2txt_jax.api",
    "simulate": "b2txt_jax.api",
    "train": "b2txt_jax.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use: JAX takes seconds, and `b2txt --help` needs none of it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
