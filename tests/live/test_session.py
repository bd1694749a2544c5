"""Sentences by message, by silence and by key, through a real server, and what the log keeps."""

import argparse
import contextlib
import json
import queue
import signal

import numpy as np
import pytest
from live_speech import SAID, Heard, ListedSource, SpokenModel, bins_of, events_of, silence
from rich.console import Console

from b2txt_jax.data.sentence_log import SentenceLogError, confirmed_sentences
from b2txt_jax.live import session as session_module
from b2txt_jax.live.command import _report, _Scores
from b2txt_jax.live.events import Began, Chosen, Final, Problem, Progress
from b2txt_jax.live.outputs.log import SentenceLog
from b2txt_jax.live.session import LiveSession, Stop, Toggle, replaced, stopped_by_signals
from b2txt_jax.live.sources.interface import Begin, Bin, End, SourceError
from b2txt_jax.live.words import Words
from lm_server.client.answers import LanguageModelError, LanguageModelUnavailableError
from lm_server.client.process import serve_child
from lm_server.hypothesis import Answer, Hypothesis


@pytest.fixture
def words(live_server):
    with Words(lambda: contextlib.nullcontext((live_server, "server"))) as words:
        yield words


def decoded(events, words, intake, rule="message", commands=None, outputs=(), **more):
    heard = Heard()
    outputs = [*outputs, heard]
    source = ListedSource(events)
    LiveSession(
        source, intake, SpokenModel(), words, outputs, rule, commands=commands, **more
    ).run()
    return heard


def test_messages_begin_and_end_sentences_and_the_text_grows(words, intake):
    events = [event for one in SAID for event in events_of(bins_of(one), truth=one)]
    heard = decoded([Bin(silence(1)[0], None, 0.0), *events], words, intake)
    finals = heard.of(Final)
    assert [one.answer.sentence for one in finals] == SAID
    assert [one.truth for one in finals] == SAID
    assert len({one.id for one in finals}) == 3
    assert all(0 < word.confidence <= 1 for one in finals for word in one.answer.words)
    texts = [event.text for event in heard.of(Progress)]
    assert "the cat" in texts
    np.testing.assert_array_equal(finals[0].features, bins_of(SAID[0]))


def test_silence_ends_a_sentence_and_speech_begins_one(words, intake):
    pieces = [silence(12), bins_of(SAID[0]), silence(2), bins_of(SAID[1]), silence(2)]
    rows = np.concatenate(pieces)
    heard = decoded(events_of(rows, marks=False), words, intake, "silence", silence_seconds=1.0)
    assert [one.answer.sentence for one in heard.of(Final)] == SAID[:2]
    assert len(heard.of(Began)) == 2


class Written:
    """Stands for `Words`: an answer is the number of frames of its sentence."""

    def __init__(self, fails=()):
        self.fails, self.frames, self.begun = fails, 0, 0

    def begin(self):
        self.frames, self.begun = 0, self.begun + 1

    def send(self, logits):
        self.frames += len(logits)
        return ""

    def finalize(self):
        if self.begun in self.fails:
            raise LanguageModelError("refused")
        return Answer((Hypothesis((str(self.frames),), -1.0, -1.0),))


def test_speech_at_the_end_of_a_sentence_is_not_heard_again_in_the_next(intake):
    # By a silence that is shorter than the lead-in of a sentence, and by a message amid speech.
    rows = np.concatenate([silence(1), bins_of(SAID[0]), silence(3)])
    heard = decoded(events_of(rows, marks=False), Written(), intake, "silence", silence_seconds=0.4)
    assert len(heard.of(Final)) == 1
    events = [*events_of(bins_of(SAID[0]), marks=False), End(), *events_of(silence(3), marks=False)]
    assert len(decoded(events, Written(), intake, "silence").of(Final)) == 1


def test_a_sentence_that_nothing_ends_is_ended_by_its_bins_and_that_is_said(intake, monkeypatch):
    monkeypatch.setattr(session_module, "LONGEST_SECONDS", 2.0)
    events = [Begin(), *events_of(np.concatenate([bins_of(SAID[0])] * 4), marks=False)]
    heard = decoded(events, Written(), intake)
    (one,) = heard.of(Final)
    assert one.answer.sentence == "26"  # the first frame beyond 2 s, of 80 ms each
    assert "nothing has ended it for 2 s" in heard.of(Problem)[0].text


def test_all_words_of_a_sentence_without_an_answer_are_errors(intake, capsys, tmp_path):
    events = [event for one in SAID[:2] for event in events_of(bins_of(one), truth=one)]
    scores, source = _Scores(), ListedSource(events)
    session = LiveSession(source, intake, SpokenModel(), Written(fails={2}), [scores])
    session.run()
    args = argparse.Namespace(summary=tmp_path / "summary.json")
    _report(args, Console(), session, intake, scores)
    found = json.loads(args.summary.read_text())
    # One wrong word for four, and six words without any.
    assert (found["wer"], found["sentences"], found["unanswered"]) == (1.0, 1, 1)
    assert "1 more without an answer" in capsys.readouterr().out


def test_a_key_begins_and_ends_a_sentence(words, intake):
    commands = queue.SimpleQueue()

    class Source(ListedSource):
        def read(self, timeout):
            commands.put(Toggle())  # before and after the bins, which are one piece
            found, self.events = self.events, []
            return found or None

    heard = Heard()
    source = Source(events_of(bins_of(SAID[1]), marks=False))
    commands.put(Toggle())
    LiveSession(source, intake, SpokenModel(), words, [heard], "key", commands=commands).run()
    assert [one.answer.sentence for one in heard.of(Final)][:1] == [SAID[1]]


def test_a_sentence_in_progress_is_ended_when_the_session_is_stopped(words, intake):
    commands = queue.SimpleQueue()

    class Source(ListedSource):
        def read(self, timeout):
            found = super().read(timeout)
            if found is None:
                commands.put(Stop())
            return found or []

    events = events_of(bins_of(SAID[2]))[:-1]
    heard = Heard()
    LiveSession(Source(events), intake, SpokenModel(), words, [heard], commands=commands).run()
    assert [one.answer.sentence for one in heard.of(Final)] == [SAID[2]]


def test_a_sentence_without_a_frame_is_named_and_the_next_one_is_decoded(words, intake):
    events = [Begin(), *events_of(silence(0.04), marks=False), End(), *events_of(bins_of(SAID[0]))]
    heard = decoded(events, words, intake)
    first, second = heard.of(Began)
    (problem,) = heard.of(Problem)
    assert problem.text == f"sentence {first.id} has 2 bins, too few for a frame"
    (one,) = heard.of(Final)
    assert (one.id, one.answer.sentence) == (second.id, SAID[0])
    assert first.id != second.id


def test_a_source_that_is_lost_for_good_ends_the_sentence_first(words, intake):
    class Source(ListedSource):
        def read(self, timeout):
            if not self.events:
                raise SourceError("gone")
            return super().read(timeout)

    heard = Heard()
    source = Source(events_of(bins_of(SAID[0]))[:-1])
    with pytest.raises(SourceError, match="gone"):
        LiveSession(source, intake, SpokenModel(), words, [heard]).run()
    assert [one.answer.sentence for one in heard.of(Final)] == [SAID[0]]


def test_a_server_that_is_killed_in_a_sentence_is_started_anew_and_no_word_is_lost(
    spoken_lm, intake
):
    """Its Redis dies with it: all that was sent is gone."""
    servers, problems, heard = [], [], Heard()

    @contextlib.contextmanager
    def server():
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(serve_child(spoken_lm))
            servers.append(stack)
            yield url, "server"

    class Source(ListedSource):
        def read(self, timeout):
            if len(self.events) in (30, 31, 32, 33, 34, 35, 36, 37) and len(servers) == 1:
                servers[0].close()
            return super().read(timeout)

    with Words(server, problems.append) as words:
        LiveSession(
            Source(events_of(bins_of(SAID[1]))), intake, SpokenModel(), words, [heard]
        ).run()
    assert [one.answer.sentence for one in heard.of(Final)] == [SAID[1]]
    assert len(servers) == 2
    assert "attempt 1 of 5" in problems[0]


def test_a_server_that_does_not_come_back_is_an_error(intake):
    def server():
        return contextlib.nullcontext(("redis://127.0.0.1:1/0", "nowhere"))

    with pytest.raises(LanguageModelUnavailableError, match="no Redis answers"), Words(server):
        pass


def test_the_log_has_sentences_choices_and_features_that_can_be_trained_on(words, intake, tmp_path):
    log = SentenceLog(tmp_path / "log")
    events = [event for one in SAID[:2] for event in events_of(bins_of(one), truth=one)]
    heard = decoded(events, words, intake, outputs=[log])
    first, second = heard.of(Final)
    log.show(Chosen(second.id, "the cat sat", True))
    log.close()
    entries = [json.loads(line) for line in (tmp_path / "log/sentences.jsonl").open()]
    assert [(e["event"], e["text"]) for e in entries] == [
        ("final", SAID[0]),
        ("final", SAID[1]),
        ("chosen", "the cat sat"),
    ]
    assert entries[0]["id"] == first.id
    (confirmed,) = confirmed_sentences(tmp_path / "log")
    assert (confirmed.id, confirmed.text) == (second.id, "the cat sat")
    with np.load(confirmed.features) as file:
        np.testing.assert_array_equal(file["features"], bins_of(SAID[1]))
        np.testing.assert_array_equal(file["raw"], bins_of(SAID[1]))
    with (tmp_path / "log/sentences.jsonl").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(SentenceLogError, match="line 4 is no entry"):
        list(confirmed_sentences(tmp_path / "log"))


def test_words_that_were_shown_and_are_no_longer_where_they_were_count_as_revised():
    assert replaced(["the"], ["the", "cat"]) == 0
    assert replaced(["the", "cat", "sat"], ["the", "bat", "sat", "down"]) == 2
    assert replaced(["the", "cat"], []) == 2


def test_one_press_of_ctrl_c_ends_the_session_in_order_and_a_later_one_interrupts(monkeypatch):
    commands = queue.SimpleQueue()
    with stopped_by_signals(commands):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # forwarded by a launcher
        assert isinstance(commands.get(timeout=1), Stop)
        assert commands.empty()
        monkeypatch.setattr("b2txt_jax.live.session._ONE_PRESS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
