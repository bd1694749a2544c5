"""Self-calibration while decoding: sentences that are certain, or that the user chose, move the
model between sentences."""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from dataclasses import dataclass

import jax
import numpy as np

from b2txt_jax.calibration.follow import Follower, Kept
from b2txt_jax.live.events import Chosen, Final, Happening
from b2txt_jax.live.model import LiveModel
from b2txt_jax.phonemes import sentence_to_ids
from lm_server.lexicon.text_rules import normalise

_REMEMBERED = 16
"""Sentences that the user may still confirm or correct."""


@dataclass(frozen=True)
class _Job:
    final: Final
    text: str
    source: str
    """`certain` or `chosen`."""


class Following:
    """An output that moves the model after a sentence. The steps run in a thread of their own, and
    the next sentence that begins after them uses what they found."""

    def __init__(
        self,
        model: LiveModel,
        follower: Follower,
        kept: Kept,
        confidence: float,
        background: bool = True,
    ) -> None:
        """Go on from what was learned before.

        Args:
          model: that decodes.
          follower: its part that moves.
          kept: where updates are written.
          confidence: of a sentence from which on its text is taken as known.
          background: whether steps run beside the next sentence. Else it waits for them.
        """
        self._model, self._follower, self._kept = model, follower, kept
        self._confidence = confidence
        self.kept, self.seen = 0, 0
        """Updates that were kept, and sentences that were used."""
        follower.moved = kept.load(follower.start)
        model.renew(follower.params)
        model.begin()
        self._finals: collections.OrderedDict[str, Final] = collections.OrderedDict()
        self._used: dict[str, str] = {}
        self._last_kept = ""
        self.failed: Exception | None = None
        """Why an update failed that nobody was informed of yet."""
        self._before = follower.moved
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._work, name="self-calibration")
            self._thread.start()

    def show(self, event: Happening) -> None:
        """Take note of final sentences and of choices.

        Raises:
          OSError: an earlier update failed.
        """
        self._take_note(event)
        failed, self.failed = self.failed, None
        if failed is not None:
            raise OSError(f"an update failed ({failed})") from failed

    def _take_note(self, event: Happening) -> None:
        if isinstance(event, Final):
            self._finals[event.id] = event
            while len(self._finals) > _REMEMBERED:
                self._used.pop(self._finals.popitem(last=False)[0], None)
            confidence = event.answer.confidence
            if confidence is not None and confidence >= self._confidence:
                self._submit(_Job(event, event.answer.sentence, "certain"))
        elif isinstance(event, Chosen):
            final = self._finals.get(event.id)
            if final is not None and self._used.get(event.id) != event.text:
                self._submit(_Job(final, event.text, "chosen"))

    def close(self) -> None:
        """End after the sentences that wait."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _submit(self, job: _Job) -> None:
        wrong = self._used.get(job.final.id) is not None
        self._used[job.final.id] = job.text
        if wrong:
            job = dataclasses.replace(job, source="corrected")
        if self._thread is None:
            self._update(job)
        else:
            self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._update(job)
            except Exception as error:  # or the thread would end, and later sentences be lost
                self.failed = error

    def _update(self, job: _Job) -> None:
        id_, confidence = job.final.id, job.final.answer.confidence
        entry = {"id": id_, "text": job.text, "source": job.source, "confidence": confidence}
        if job.source == "corrected":
            # Also where its update was taken back, or others came after it.
            self._follower.forget(id_)
        if job.source == "corrected" and self._last_kept == id_:
            # What its wrong text did is taken back first.
            self._follower.moved = self._before
            self._kept.undo(1)
            self._last_kept = ""  # or a second correction would take back another sentence's
            self.kept -= 1
            self._model.renew(jax.block_until_ready(self._follower.params))
        try:
            labels = sentence_to_ids(normalise(job.text).split())
        except ValueError as error:
            self._kept.write(event="left out", **entry, why=str(error))
            return
        if not len(labels):
            self._kept.write(event="left out", **entry, why="no words")
            return
        self.seen += 1
        before = self._follower.moved
        done = self._follower.update(np.asarray(job.final.features), labels, id_)
        self._last_kept = id_ if done.kept else ""
        if done.kept:
            self._before = before
            self.kept += 1
            self._kept.save(self._follower.moved)
        self._model.renew(jax.block_until_ready(self._follower.params))
        self._kept.write(event="update", **entry, **dataclasses.asdict(done))
