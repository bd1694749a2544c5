"""Pickles of others, read without running code of theirs.

A pickle can run code as it is read. This reader admits nothing but numbers, texts, containers and
numpy arrays.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from lm_server.errors import UserError
from lm_server.files.atomic_file import regular

_BUILTINS = ("set", "frozenset", "bytearray", "complex", "slice", "range")
_NUMPY = {
    ("multiarray", "_reconstruct"),
    ("multiarray", "scalar"),
    ("numeric", "_frombuffer"),
    ("", "ndarray"),
    ("", "dtype"),
}


class PickleError(UserError, ValueError):
    """A pickle that is not there, is damaged, or holds what may run code."""


class _OnlyArrays(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, and refuses everything else by its name."""

    def find_class(self, module: str, name: str) -> Any:
        room = module.removeprefix("numpy").removeprefix("._core").removeprefix(".core").lstrip(".")
        ours = module.partition(".")[0] == "numpy" and (room, name) in _NUMPY
        scalar = module in ("numpy", "numpy.dtypes") and _is_scalar_type(module, name)
        plain = module in ("builtins", "__builtin__") and name in _BUILTINS
        # As protocols below 3 write bytes.
        if ours or scalar or plain or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise PickleError(
            f"it holds {module}.{name}, which may run code; needed arrays of numpy, texts and "
            "numbers only: where it was made, turn tensors into arrays "
            "(`.cpu().float().numpy()`) and pickle anew"
        )


def _is_scalar_type(module: str, name: str) -> bool:
    room = np if module == "numpy" else np.dtypes
    found = getattr(room, name, None)
    return isinstance(found, type) and issubclass(found, np.generic | np.dtype)


def read_pickle(path: Path, needed: str) -> Any:
    """Read a pickle of numbers, texts, containers and arrays.

    Args:
      path: of it.
      needed: what should be there, for the message where it is missing or damaged.

    Raises:
      PickleError: it cannot be read, or holds anything else.
    """
    try:
        with regular(path).open("rb") as file:
            return _OnlyArrays(file).load()
    except FileNotFoundError as error:
        raise PickleError(f"there is no {path}; {needed}") from error
    except PickleError as error:
        raise PickleError(f"{path} cannot be read: {error}") from error
    # A damaged pickle fails in any way.
    except Exception as error:
        raise PickleError(f"{path} is no readable pickle ({error!r}); {needed}") from error
