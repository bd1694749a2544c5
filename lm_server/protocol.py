"""The contract of both sides: classes, their order, stream names and message contents.

Streams and fields are those of the published NEJM server, so that either end can be replaced by the
published one. Added to them are error entries, request ids, sessions with streams of their own, and
jobs (docs/protocol.md). Only numpy and the standard library are needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from lm_server.errors import UserError
from lm_server.hypothesis import Hypothesis

PHONEMES: tuple[str, ...] = (
    *("AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY", "F", "G", "HH"),
    *("IH", "IY", "JH", "K", "L", "M", "N", "NG", "OW", "OY", "P", "R", "S", "SH", "T", "TH"),
    *("UH", "UW", "V", "W", "Y", "Z", "ZH"),
)
BLANK = "BLANK"
SILENCE = " | "
CLASSES: tuple[str, ...] = (BLANK, *PHONEMES, SILENCE)
"""The 41 classes in the RNN's order: CTC blank, 39 phonemes, silence."""
LM_CLASSES: tuple[str, ...] = (BLANK, SILENCE, *PHONEMES)
"""The same classes in the language model's order: blank, silence, 39 phonemes."""
CLASS_COUNT = len(CLASSES)

MAX_MESSAGE_FRAMES = 10_000
"""Most frames of 80 ms in one input entry and in one sentence (13 minutes, 1.6 MB)."""

_RNN_OF_LM = np.array([CLASSES.index(name) for name in LM_CLASSES])
_LM_OF_RNN = np.array([LM_CLASSES.index(name) for name in CLASSES])


PROTOCOL_VERSION = "2"
"""Sent in `remote_lm_args` and in every status. The published server, which sends none, is 1."""
CONTEXT_KEY = "contextual_decoding_current_context"
REQUEST_ID = "request_id"
"""A field that any entry may have. Everything that answers the entry has it too."""
CLIENT = "client"
"""A field with the name of the client that sends an entry. Its answers have it too."""
RELEASE = "release"
"""A field of a reset with which a client that has named itself leaves the session to others."""
HOLD_MS = 10_000
"""A client holds a session for so long after its last entry."""
MAX_REQUEST_ID = 200
"""Bytes of a request id and of a client's name."""
MAX_JSON = 1_000_000
"""Bytes of a field that is JSON: hot words, a job's settings."""
MAX_CONTEXT = 100_000
"""Bytes of a context string that are used, the last ones."""
MAX_SCORING = 2_000_000
"""Bytes of the field `scoring`. Further hypotheses are left out."""
MAX_JOB_NAME = 1000
"""Bytes of a job's name."""
WARNING = "warning"
"""`severity` of an error entry that accompanies an answer instead of replacing it."""
_OTHER_TYPES = {"float64": "<f8", "big-endian float32": ">f4", "float16": "<f2"}
_MANY = 8
_SESSION = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ProtocolError(UserError, ValueError):
    """A message that breaks the protocol."""


@dataclass(frozen=True)
class Streams:
    """Names of the Redis streams of one session. The default session has the published names."""

    reset: str = "remote_lm_reset"
    input: str = "remote_lm_input"
    finalize: str = "remote_lm_finalize"
    update_params: str = "remote_lm_update_params"
    done_resetting: str = "remote_lm_done_resetting"
    partial: str = "remote_lm_output_partial"
    final: str = "remote_lm_output_final"
    done_finalizing: str = "remote_lm_done_finalizing"
    done_updating_params: str = "remote_lm_done_updating_params"
    args: str = "remote_lm_args"
    error: str = "remote_lm_error"
    hot_words: str = "remote_lm_hot_words"
    done_hot_words: str = "remote_lm_done_updating_hot_words"


@dataclass(frozen=True)
class Registry:
    """Names that all clients and servers of one Redis share.

    Attributes:
      requests: stream of requests to open or close a session.
      answers: stream of their results, refusals included.
      sessions: hash, open session -> JSON of its settings, hot words and idle time.
      jobs: stream of sentences to decode offline, read by a consumer group.
      workers: name of that group.
      dead: stream of entries and jobs that were set aside, for an operator to read.
    """

    requests: str = "remote_lm_sessions"
    answers: str = "remote_lm_sessions_answer"
    sessions: str = "remote_lm_open_sessions"
    jobs: str = "remote_lm_jobs"
    workers: str = "workers"
    dead: str = "remote_lm_dead_letters"


REGISTRY = Registry()
DEFAULT_SESSION = ""


def is_session(name: str) -> bool:
    """Return whether a name may be a session's or a batch's id."""
    return _SESSION.fullmatch(name) is not None


def check_session(session: str) -> str:
    """Return a session id that a client has chosen.

    Raises:
      ProtocolError: it is empty, too long, or has other characters than A-Z a-z 0-9 . _ -.
    """
    if not is_session(session):
        raise ProtocolError(
            f"the session id is {session[:80]!r}; needed 1 to 64 of the characters A-Z a-z 0-9 . _ "
            "-: choose another"
        )
    return session


def session_streams(session: str) -> Streams:
    """Return the stream names of a session: the published names, followed by `:ID` unless it is the
    default session, whose id is empty."""
    if session == DEFAULT_SESSION:
        return Streams()
    suffix = f":{check_session(session)}"
    return Streams(**{field.name: f"{field.default}{suffix}" for field in fields(Streams)})


def context_key(session: str) -> str:
    """Return the key of a session's context string."""
    return f"{CONTEXT_KEY}:{session}" if session else CONTEXT_KEY


def owner_key(session: str) -> str:
    """Return the key that holds the id of a session's server. It expires with its heartbeat."""
    return f"remote_lm_owner:{session}" if session else "remote_lm_owner"


def state_key(session: str) -> str:
    """Return the key of the hash from which another server can resume the session."""
    return f"remote_lm_state:{session}" if session else "remote_lm_state"


def attempts_key(session: str) -> str:
    """Return the key that counts the servers which began an adopted session's next entry."""
    return f"remote_lm_attempts:{session}" if session else "remote_lm_attempts"


def process_key(process: str) -> str:
    """Return the key of a server's or worker's status hash. It expires soon after the process."""
    return f"remote_lm_process:{process}"


def check_job_name(name: bytes) -> bytes:
    """Return a job's name that a client has chosen.

    Raises:
      ProtocolError: it is empty or too long.
    """
    if not 0 < len(name) <= MAX_JOB_NAME:
        raise ProtocolError(
            f"the job's name has {len(name)} bytes; needed 1 to {MAX_JOB_NAME}: choose another"
        )
    return name


def batch_key(batch: str) -> str:
    """Return the key of a batch's hash, job -> queued or done."""
    return f"remote_lm_batch:{check_session(batch)}"


def results_stream(batch: str) -> str:
    """Return the name of the stream of a batch's results, one for each job."""
    return f"remote_lm_results:{check_session(batch)}"


def echoed(fields_: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return an entry's request id and its client's name as fields of its answers, each cut to
    `MAX_REQUEST_ID` bytes. No field that the client did not send."""
    return {
        name: fields_[name][:MAX_REQUEST_ID] for name in (REQUEST_ID, CLIENT) if name in fields_
    }


def to_lm_order(logits: np.ndarray) -> np.ndarray:
    """Reorder classes from the RNN's order to the language model's: [..., 41] -> [..., 41]."""
    return np.asarray(logits)[..., _RNN_OF_LM]


def to_rnn_order(logits: np.ndarray) -> np.ndarray:
    """Reorder classes from the language model's order to the RNN's: [..., 41] -> [..., 41]."""
    return np.asarray(logits)[..., _LM_OF_RNN]


def check_logits(logits: np.ndarray, what: str = "logits") -> np.ndarray:
    """Return `logits` as contiguous float32 [frames, 41].

    Raises:
      ProtocolError: it is not [frames, 41], or a value is NaN or infinite.
    """
    array = np.asarray(logits)
    if array.ndim != 2 or array.shape[1] != CLASS_COUNT:
        raise ProtocolError(
            f"{what} have shape {array.shape}; needed [frames, {CLASS_COUNT}] "
            "(blank, silence and 39 phonemes): send one row per 80 ms frame"
        )
    array = np.ascontiguousarray(array, dtype=np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        frame = int(np.argwhere(~finite)[0, 0])
        raise ProtocolError(
            f"{what} hold {int((~finite).sum())} NaN or infinite values, the first in frame "
            f"{frame}; needed finite numbers: check the model for divergence and its input features"
        )
    return array


def encode_logits(logits: np.ndarray) -> bytes:
    """Return logits [frames, 41] in the language model's order as bytes of the field `logits`.

    Raises:
      ProtocolError: the shape is wrong or a value is not finite.
    """
    return check_logits(logits).astype("<f4").tobytes()


def decode_logits(payload: bytes) -> np.ndarray:
    """Return float32 [frames, 41] in the language model's order from the bytes of `logits`.

    Raises:
      ProtocolError: the bytes are no whole number of frames, too many, hold NaN or infinity, or
        are numbers of another type.
    """
    frame_bytes = 4 * CLASS_COUNT
    likely = _other_type(payload)
    if likely is not None:
        raise ProtocolError(
            f"logits look like {likely}; needed little-endian float32 [frames, {CLASS_COUNT}] as "
            "raw bytes: convert them"
        )
    if len(payload) % frame_bytes:
        raise ProtocolError(
            f"logits have {len(payload)} bytes; needed a multiple of {frame_bytes} "
            f"({CLASS_COUNT} float32 per frame): send float32 [frames, {CLASS_COUNT}] as raw bytes"
        )
    frames = len(payload) // frame_bytes
    if frames > MAX_MESSAGE_FRAMES:
        raise ProtocolError(
            f"logits have {frames} frames; at most {MAX_MESSAGE_FRAMES} fit one entry: "
            "send them in chunks"
        )
    return check_logits(np.frombuffer(payload, dtype="<f4").reshape(frames, CLASS_COUNT))


def _other_type(payload: bytes) -> str | None:
    """Return the type that the bytes of logits likely have, if it is not little-endian float32.

    Logits are 0 or of a moderate size, but for a value that rules a class out. Numbers of another
    type, read as float32, are of all sizes, are denormal, or have zeros at every other place.
    """
    values = np.abs(np.frombuffer(payload[: len(payload) // 4 * 4], "<f4"))
    strange = values[~(values <= 1e3) | ((values > 0) & (values < 1e-10))]
    of_all_sizes = len(strange) > 0.01 * len(values) and len(np.unique(strange)) > 1
    denormal = (strange < np.finfo(np.float32).tiny).any()
    every_other = not values[::2].any() and np.count_nonzero(values) >= _MANY
    if not (of_all_sizes or denormal or every_other):
        return None
    for name, form in _OTHER_TYPES.items():
        if len(payload) % np.dtype(form).itemsize == 0:
            values = np.abs(np.frombuffer(payload, form))
            if ((values <= 1e3) & ((values >= 1e-12) | (values == 0))).all():
                return name
    return None


def encode_scoring(hypotheses: Sequence[Hypothesis]) -> str:
    """Return ranked hypotheses as the field `scoring`: `sentence;ac;ngram;llm;total;sentence;...`.

    The published format has no room for "not scored". It is written as 0.0, as published servers
    do.

    Raises:
      ProtocolError: a sentence holds a `;`, which the format cannot carry.
      ValueError: a candidate has no total, so it was not ranked.
    """
    fields: list[str] = []
    for one in hypotheses:
        if ";" in one.sentence:
            raise ProtocolError(
                f"sentence {one.sentence!r} holds a ';', the separator of `scoring`"
            )
        if one.total is None:
            raise ValueError(f"{one.sentence!r} has no total; needed ranked candidates: rank them")
        scores = (one.acoustic, one.ngram, one.llm or 0.0, one.total)
        fields += [one.sentence, *(repr(float(score)) for score in scores)]
    return ";".join(fields)


def decode_scoring(text: str) -> list[Hypothesis]:
    """Return the candidates of a `scoring` field in the order sent. An empty text has none.

    The format carries no bonus, which the total contains. Where all candidates have the llm score
    0, they were not scored, and `llm` is None.

    Raises:
      ProtocolError: the number of fields is no multiple of five, or a score is no number.
    """
    if not text:
        return []
    fields = text.split(";")
    if len(fields) % 5:
        raise ProtocolError(
            f"scoring has {len(fields)} fields; needed five per candidate: "
            "sentence;ac;ngram;llm;total"
        )
    found = []
    for sentence, *given in zip(*[iter(fields)] * 5, strict=True):
        try:
            acoustic, ngram, llm, total = map(float, given)
        except ValueError as error:
            raise ProtocolError(f"scoring of {sentence!r} is not four numbers: {error}") from error
        found.append(Hypothesis(tuple(sentence.split()), acoustic, ngram, llm, total=total))
    if all(one.llm == 0.0 for one in found):
        found = [replace(one, llm=None) for one in found]
    return found


@dataclass(frozen=True)
class HotWordEntry:
    """A hot word as it is sent: a word that a session's search favours.

    Attributes:
      weight: added to a sentence's total for every occurrence (ln).
      pronunciations: its pronunciations. If empty, those of the lexicon.
    """

    weight: float
    pronunciations: tuple[tuple[str, ...], ...] = ()


def encode_hot_words(words: Mapping[str, HotWordEntry]) -> str:
    """Return hot words as the field `words`: JSON {word: {weight, pronunciations}}."""
    return json.dumps(
        {
            word: {"weight": one.weight, "pronunciations": [list(p) for p in one.pronunciations]}
            for word, one in words.items()
        }
    )


def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Return the members of a JSON object, as `object_pairs_hook`.

    Raises:
      ValueError: a name is there twice. JSON would keep the last value without a word.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice: leave one out")
    return found


def decode_hot_words(text: str | bytes) -> dict[str, HotWordEntry]:
    """Return the hot words of the field `words`, in which a plain number is a weight alone.

    Raises:
      ProtocolError: it is not JSON of that form. The search checks words and weights.
    """
    if len(text) > MAX_JSON:
        raise ProtocolError(
            f"words are {len(text)} bytes of JSON; at most {MAX_JSON} are possible: send fewer "
            "pronunciations"
        )
    form = '{"WORD": WEIGHT, ...} or {"WORD": {"weight": W, "pronunciations": [["K", "AE", "T"]]}}'
    try:
        given = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"words are no JSON ({error}); needed {form}") from error
    if not isinstance(given, dict):
        raise ProtocolError(f"words are a JSON {type(given).__name__}; needed {form}")
    found = {}
    for word, value in given.items():
        value = value if isinstance(value, dict) else {"weight": value}
        unknown = sorted(set(value) - {"weight", "pronunciations"})
        if unknown:
            raise ProtocolError(f"{word!r} has {unknown[0]!r}, which is unknown; needed {form}")
        weight, pronunciations = value.get("weight"), value.get("pronunciations", [])
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ProtocolError(f"the weight of {word!r} is {weight!r}; needed a number: {form}")
        if not isinstance(pronunciations, list) or not all(
            isinstance(one, list) and all(isinstance(phoneme, str) for phoneme in one)
            for one in pronunciations
        ):
            raise ProtocolError(
                f"the pronunciations of {word!r} are {pronunciations!r}; needed lists of phonemes: "
                f"{form}"
            )
        try:
            number = float(weight)
        except OverflowError as error:
            raise ProtocolError(f"the weight of {word!r} is beyond all numbers: {form}") from error
        found[word] = HotWordEntry(number, tuple(tuple(one) for one in pronunciations))
    return found


SUBMIT_JOB = """
-- KEYS: jobs, batch;  ARGV: job, seconds that the batch is kept, then the entry's fields
redis.call('EXPIRE', KEYS[2], ARGV[2])
if redis.call('HSETNX', KEYS[2], ARGV[1], 'queued') == 0 then return 0 end
redis.call('EXPIRE', KEYS[2], ARGV[2])
redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
return 1
"""
"""Lua: submits a job once, however often it is sent, and returns 0 if it was there already."""
JOB_SECONDS = 86_400
"""Seconds for which a batch and its results are kept after its last job or result."""


@dataclass(frozen=True)
class Job:
    """A sentence to decode offline.

    Attributes:
      batch: name of the jobs that belong together. One stream has their results.
      name: name of the job within its batch, such as a trial's.
      logits: float32 [frames, 41] in the language model's order.
      settings: name -> value. The worker's own where a name is missing.
      context: the preceding text, for rescoring.
      hot_words: words to favour. None: the worker's own.
    """

    batch: str
    name: str
    logits: np.ndarray
    settings: Mapping[str, float] | None = None
    context: str = ""
    hot_words: Mapping[str, HotWordEntry] | None = None

    def fields(self) -> dict[str, bytes]:
        """Return the fields of an entry of the jobs' stream.

        Raises:
          ProtocolError: the logits cannot be sent, or the name is too long.
        """
        check_job_name(self.name.encode(errors="backslashreplace"))
        fields_ = {
            "batch": check_session(self.batch).encode(),
            "job": self.name.encode(),
            "logits": encode_logits(self.logits),
        }
        if self.settings:
            fields_["settings"] = json.dumps(dict(self.settings)).encode()
        if self.context:
            fields_["context"] = self.context.encode()
        if self.hot_words is not None:
            fields_["hot_words"] = encode_hot_words(self.hot_words).encode()
        return fields_
