"""A worker process whose behaviour depends on the length of a sentence, for tests:

    python wilful_worker.py MODEL URL LEASE_SECONDS PROCESSES SLOW_SECONDS STUCK_SECONDS

Sentences of 7 frames kill it (SIGKILL), those of 9 frames take SLOW_SECONDS; of longer ones every
hundred frames do, and the end thrice as long. Without a sign of life for
STUCK_SECONDS it counts as stuck.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from lm_server.client.connection import connect
from lm_server.search.load import load_model
from lm_server.serving.supervisor import supervise
from lm_server.serving.worker import Terms, Worker
from lm_server.settings import Settings

DEADLY, SLOW = 7, 9


class Wilful:
    """A search that dies or dawdles on certain sentences."""

    def __init__(self, search, seconds):
        self._search, self._seconds = search, seconds

    def __getattr__(self, name):
        return getattr(self._search, name)

    def step(self, logits):
        if len(logits) == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(logits) in (SLOW, 100):
            time.sleep(self._seconds)
        return self._search.step(logits)

    def finish(self):
        if self._search.frames >= 100:
            time.sleep(3 * self._seconds)
        return self._search.finish()


class Model:
    def __init__(self, folder, seconds):
        self._model, self._seconds = load_model(folder), seconds

    def search(self, settings, hot_words=None):
        return Wilful(self._model.search(settings, hot_words or {}), self._seconds)


def main():
    folder, url, lease, processes, seconds, stuck = sys.argv[1:]
    terms = Terms(float(lease), stuck_seconds=float(stuck))
    model = Model(Path(folder), float(seconds))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def work(ended, busy):
        with connect(url, 20.0, ended) as client:
            Worker(client, model, Settings(), terms=terms, busy=busy).run(ended)

    print("ready", flush=True)
    supervise(work, int(processes), stop)


if __name__ == "__main__":
    main()
