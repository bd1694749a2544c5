"""Final sentences read aloud by a speech program of this machine, such as espeak-ng."""

from __future__ import annotations

import shutil
import subprocess
import threading
from queue import SimpleQueue

from b2txt_jax.errors import UserError
from b2txt_jax.live.events import Final, Happening

DEFAULT_PROGRAM = "espeak-ng"


class SpeechError(UserError, OSError):
    """There is no such speech program, or it fails."""


class Speech:
    """An output that starts the program once for each sentence, with the text on its stdin."""

    def __init__(self, program: str = DEFAULT_PROGRAM) -> None:
        """Find the program.

        Raises:
          SpeechError: it is not there.
        """
        path = shutil.which(program)
        if path is None:
            raise SpeechError(
                f"--speak: there is no program {program!r} here; needed one that reads a text from "
                "its standard input aloud: install espeak-ng, or give --speak PROGRAM"
            )
        self._path = path
        self._failed: OSError | None = None
        self._texts: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._speak, name="speech", daemon=True)
        self._thread.start()

    def show(self, event: Happening) -> None:
        """Queue a final sentence: one is spoken after the other, and decoding goes on.

        Raises:
          OSError: the program failed with an earlier sentence.
        """
        if isinstance(event, Final) and event.answer.sentence:
            self._texts.put(event.answer.sentence)
            failed, self._failed = self._failed, None
            if failed is not None:
                raise failed

    def _speak(self) -> None:
        while (text := self._texts.get()) is not None:
            try:
                done = subprocess.run([self._path], input=f"{text}\n", text=True, check=False)
                if done.returncode:
                    self._failed = SpeechError(f"{self._path} ended with {done.returncode}")
            except OSError as error:
                self._failed = error

    def close(self) -> None:
        """Wait until all is spoken."""
        self._texts.put(None)
        self._thread.join(timeout=30)
