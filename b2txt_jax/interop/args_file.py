"""Reads an args.yaml as plain data, and what its values may look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from b2txt_jax.interop.errors import ConversionError


def load_args(path: Path) -> dict[str, Any]:
    """Reads args.yaml as plain data: `section.name` -> value, with the text `None` as None.

    Raises:
      ConversionError: no such file, not plain YAML, or with OmegaConf interpolations in it.
    """
    if not path.is_file():
        raise ConversionError(
            f"{path} does not exist; needed the args.yaml that the published trainer writes beside "
            f"its checkpoint: model sizes and the list of sessions stand there"
        )
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"{path} is not plain YAML ({' '.join(str(error).split())}); save it again with "
            f"OmegaConf.save(OmegaConf.create(OmegaConf.to_container(args, resolve=True)), FILE)"
        ) from error
    if not isinstance(loaded, dict):
        raise ConversionError(f"{path} holds no settings; needed `model:`, `dataset:` and others")
    flat = _flatten(loaded)
    for key, value in flat.items():
        if isinstance(value, str) and "${" in value:
            raise ConversionError(
                f"{path}: {key} is {value!r}, an OmegaConf reference; save the file with its "
                f"references resolved: OmegaConf.to_container(args, resolve=True)"
            )
    return flat


def _flatten(values: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{where}{name}"
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{key}.")
        else:
            empty = isinstance(value, str) and value.strip().lower() in ("none", "null")
            flat[key] = None if empty else value
    return flat


def read_number(value: Any) -> float:
    """A number, also one written as text, as OmegaConf and YAML 1.1 leave `1e-4`.

    Raises:
      ValueError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("needed a number")
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond floating point
        found = math.inf
    if not math.isfinite(found):
        raise ValueError("needed a finite number")
    return found


def read_whole(value: Any) -> int:
    """A whole number, in any of the ways of `read_number`.

    Raises:
      ValueError: it is none.
    """
    found = read_number(value)
    if found != int(found):
        raise ValueError("needed a whole number")
    return int(found)


def read_truth(value: Any) -> bool:
    """True or false, also as text.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("needed true or false")
    return value


def read_text(value: Any) -> str:
    """Text.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError("needed text")
    return value


def read_names(value: Any) -> tuple[str, ...]:
    """Names of different sessions.

    Raises:
      ValueError: there are none, one stands twice, or one is not the name of a folder.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("needed a list of session names")
    for name in value:
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise ValueError(f"session {name!r} is not the name of a folder")
    if len(set(value)) < len(value):
        twice = sorted({name for name in value if value.count(name) > 1})
        raise ValueError(f"sessions stand twice: {', '.join(twice)}")
    return tuple(value)


def read_numbers(value: Any) -> tuple[float, ...]:
    """A list of numbers.

    Raises:
      ValueError: it is none.
    """
    if not isinstance(value, list):
        raise ValueError("needed a list of numbers")
    return tuple(map(read_number, value))
