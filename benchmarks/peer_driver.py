"""Decodes sentences for benchmarks/peers.py in a process of its own.

    PYTHON benchmarks/peer_driver.py {ours,theirs} FOLDER MODEL.bin LOGITS.npz

"ours" is run by this project's Python and reads the model folder FOLDER. "theirs" is run by the
Python of an environment in which phoneme-to-words-lm is installed, and reads FOLDER/lexicon.txt and
FOLDER/tokens.txt. The first line written tells what loading took. Each line read is a JSON request,
each further line written its answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

Decode = Callable[[np.ndarray], list[str]]
"""Logits [frames, 41] in the language model's order -> sentences, best first."""


class Ours:
    """The search `flashlight` of lm_server."""

    def __init__(self) -> None:
        import flashlight.lib.text.decoder.kenlm  # noqa: F401

        import lm_server.search.flashlight  # noqa: F401

    def load(self, folder: Path, model: Path) -> None:
        """Read the model folder, which `model` is a file of."""
        from lm_server.search.flashlight import LanguageModel

        self.model = LanguageModel(folder)

    def decoder(self, settings: dict[str, float]) -> Decode:
        """Return a search with settings by name."""
        from lm_server.settings import Settings

        search = self.model.search(dataclasses.replace(Settings(), **settings))  # type: ignore[arg-type]

        def decode(logits: np.ndarray) -> list[str]:
            search.begin()
            search.step(logits)
            return [" ".join(one.words) for one in search.finish()]

        return decode

    def normalise(self, sentences: list[str]) -> list[str]:
        """Return sentences as the search writes them."""
        return sentences


class Theirs:
    """The decoder of phoneme-to-words-lm, without its large language model."""

    def __init__(self) -> None:
        import phoneme_to_words_lm
        import torch

        torch.set_num_threads(1)
        self.package, self.torch = phoneme_to_words_lm, torch

    def load(self, folder: Path, model: Path) -> None:
        """Read lexicon.txt, tokens.txt and the KenLM file."""
        self.lm = self.package.KenLMFlashlightTextLM(
            str(folder / "lexicon.txt"),
            str(folder / "tokens.txt"),
            str(model),
            do_llm_rescoring=False,
        )
        self.defaults = dict(vars(self.lm))

    def decoder(self, settings: dict[str, float]) -> Decode:
        """Return the decoder with its defaults but for these parameters."""
        for name, value in settings.items():
            if name not in self.defaults:
                raise SystemExit(f"phoneme-to-words-lm has no parameter {name!r}")
            kind = type(self.defaults[name])
            setattr(self.lm, name, kind(value))
        for name in self.defaults.keys() - settings.keys() - {"ngram_decoder"}:
            setattr(self.lm, name, self.defaults[name])
        self.lm.init_ngram_decoder()

        def decode(logits: np.ndarray) -> list[str]:
            batch = self.torch.from_numpy(np.array(logits, np.float32, order="C"))[None]
            return list(self.lm.offline_decode(batch)[0]["word_seqs"])

        return decode

    def normalise(self, sentences: list[str]) -> list[str]:
        """Return sentences as the package writes them."""
        return [
            self.package.replace_words(self.package.remove_punctuation(one)) for one in sentences
        ]


def memory(what: str) -> int:
    """Return bytes of this process: VmRSS (now) or VmHWM (peak)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


def main() -> None:
    """Answer requests until the input ends."""
    side, folder, model, logits_file = sys.argv[1:]
    # What a package prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    began = time.process_time()
    peer = Ours() if side == "ours" else Theirs()
    imported, libraries = time.process_time() - began, memory("VmRSS")
    began = time.process_time()
    peer.load(Path(folder), Path(model))
    loading = time.process_time() - began
    answer({"imported": imported, "libraries": libraries, "loading": loading})
    with np.load(logits_file) as arrays:
        logits = {name: arrays[name] for name in arrays.files}
    for line in sys.stdin:
        request = json.loads(line)
        if "normalise" in request:
            answer(peer.normalise(request["normalise"]))
            continue
        decode = peer.decoder(request["settings"])
        found, seconds = [], []
        for name in request["sentences"]:
            began = time.process_time()
            found.append(decode(logits[name]))
            seconds.append(time.process_time() - began)
        answer({"found": found, "seconds": seconds, "peak": memory("VmHWM")})


if __name__ == "__main__":
    main()
