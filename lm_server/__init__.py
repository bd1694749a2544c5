"""Phoneme probabilities to sentences: in this process, or by a server on Redis streams.

>>> decoder = lm_server.load("runs/lm")
>>> decoder.decode(logits).sentence

`lm_server.Client` sends logits to a running server instead. Both are imported when first used, so
that `lm_server.client` needs neither the search nor its libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_server.client import Client as Client
    from lm_server.offline import Decoder as Decoder
    from lm_server.settings import Settings

__all__ = ["Client", "Decoder", "load"]


def load(
    folder: Path | str,
    backend: str = "flashlight",
    settings: Settings | Mapping[str, float | str] | Path | str | None = None,
    llm: Path | str | None = None,
    fuse: bool = False,
) -> Decoder:
    """Read a model folder, made by `lm-server build`, for decoding.

    Args:
      folder: the model folder.
      backend: the search: flashlight, pyctcdecode or wfst.
      settings: `Settings`, or some of them by name (the others keep the search's defaults; "preset"
        may be among them), or a file of `lm-server tune`. None: the search's defaults.
      llm: folder of a causal language model that rescores, or its name in the Hugging Face cache.
      fuse: ask it during the search too.

    Raises:
      BackendError: there is no such search, its package is not installed, or it cannot ask.
      ModelFolderError: the folder is not as the search needs it.
      SettingsError: a setting is outside its range, or the file cannot be used.
      RescoringError: the large language model cannot be loaded.
    """
    from lm_server.offline import Decoder

    return Decoder(folder, backend, settings, llm, fuse)


def __getattr__(name: str) -> Any:
    if name == "Client":
        from lm_server.client import Client

        return Client
    if name == "Decoder":
        from lm_server.offline import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
