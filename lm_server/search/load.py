"""Finds a search by its name, and reads a model folder for it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from lm_server.search.interface import Backend, BackendError, SearchModel
from lm_server.settings import Settings

BACKENDS = ("flashlight", "pyctcdecode", "wfst")
"""Names of the searches, the default first. Each is a module of this folder."""


def backend(name: str) -> Backend:
    """Return what a search declares of itself. Its packages need not be installed.

    Raises:
      BackendError: there is no such search.
    """
    declared: Backend = _module(name).BACKEND
    return declared


def default_settings(name: str) -> Settings:
    """Return a search's own defaults."""
    return backend(name).settings


def without_effect(setting: str, name: str) -> str | None:
    """Return why a setting or published parameter has no effect in a search. None if it has one."""
    reason = backend(name).reason_without_effect(setting)
    return None if reason is None else f"{setting} has no effect in the search {name}: {reason}"


def need_packages(name: str) -> None:
    """Import what a search needs, so that a missing package is found before any work.

    Raises:
      BackendError: there is no such search, or a package is missing that no extra contains.
      ModuleNotFoundError: a package of the extra `lm` is missing.
    """
    declared = backend(name)
    try:
        for module in declared.requires:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if declared.install is None:
            raise
        raise BackendError(
            f"the search {name} needs packages that are not installed ({error.name}): "
            f"{declared.install}"
        ) from error


def load_model(folder: Path, name: str = BACKENDS[0]) -> SearchModel:
    """Read a model folder for a search.

    Raises:
      BackendError: there is no such search, or its packages are not installed.
      ModelFolderError: the folder is not what the search needs.
    """
    need_packages(name)
    model: SearchModel = _module(name).load(folder)
    return model


def _module(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise BackendError(f"there is no search {name!r}; known are {', '.join(BACKENDS)}")
    return importlib.import_module(f"lm_server.search.{name}")
