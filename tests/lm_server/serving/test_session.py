"""One client's messages, and what the server answers to each."""

import numpy as np
import pytest
from small_model import say

from lm_server.protocol import Streams, decode_scoring, encode_logits
from lm_server.search.flashlight import BeamSearch, LanguageModel
from lm_server.serving.session import STEP_FRAMES, Entry, Message, Session
from lm_server.settings import LIMITS, Settings

STREAMS = Streams()


@pytest.fixture(scope="module")
def model(model_folder):
    return LanguageModel(model_folder)


@pytest.fixture
def session(model):
    return Session(model, Settings())


def handle(session, stream, id_, fields, context=""):
    """The messages that answer an entry."""
    work = session.handle(Entry(stream, id_, fields), context)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value.messages()


def reset(session):
    return handle(session, STREAMS.reset, (1, 0), {"done": b"0"})


def send(session, logits):
    return handle(session, STREAMS.input, (2, 0), {"logits": encode_logits(logits)})


def finalize(session, context=""):
    return handle(session, STREAMS.finalize, (3, 0), {"done": b"0"}, context)


def update(session, **values):
    fields = {name: str(value).encode() for name, value in values.items()}
    return handle(session, STREAMS.update_params, (4, 0), fields)


def sentence(session, words, **chunks):
    reset(session)
    send(session, say(words))
    return finalize(session)[0]


def test_a_sentence_is_answered_with_partials_a_final_and_its_end(session, model):
    assert reset(session) == [Message("remote_lm_done_resetting", {"done": b"1"})]
    logits = say(["the", "cat", "sat"])
    half = len(say(["the", "cat"]))
    assert send(session, logits[:half]) == [
        Message("remote_lm_output_partial", {"lm_response_partial": b"the cat"})
    ]
    assert send(session, logits[half:])[0].fields == {"lm_response_partial": b"the cat sat"}
    final, done = finalize(session, "what was said before")
    assert done == Message("remote_lm_done_finalizing", {"done": b"1"})
    assert final.stream == "remote_lm_output_final"
    published = {"lm_response_final", "scoring", "context_str"}
    ours = {"rescored", "confidence", "word_confidences", "temperature"}
    assert set(final.fields) == published | ours
    assert final.fields["rescored"] == b"0"
    assert final.fields["lm_response_final"] == b"the cat sat"
    assert final.fields["context_str"] == b"what was said before"

    search = BeamSearch(model, Settings())
    search.step(logits)
    expected = search.finish()
    candidates = decode_scoring(final.fields["scoring"].decode())
    assert [c.sentence for c in candidates] == [h.sentence for h in expected]
    assert [c.acoustic for c in candidates] == [h.acoustic for h in expected]
    assert [c.ngram for c in candidates] == [h.ngram for h in expected]
    scale = Settings().acoustic_scale
    assert [c.total for c in candidates] == [scale * h.acoustic + h.ngram for h in expected]


def test_no_frames_give_an_empty_final(session):
    reset(session)
    for _ in range(2):
        final, done = finalize(session)
        published = {"lm_response_final": b"", "scoring": b"", "context_str": b""}
        assert final.fields == published | {"rescored": b"0", "word_confidences": b"[]"}
        assert done.stream == STREAMS.done_finalizing
    assert send(session, np.zeros((0, 41)))[0].fields == {"lm_response_partial": b""}
    assert finalize(session)[0].fields["lm_response_final"] == b""


def test_reset_drops_what_was_sent(session):
    send(session, say(["the", "dog"]))
    assert sentence(session, ["a", "cat"]).fields["lm_response_final"] == b"a cat"


def test_a_sentence_after_finalize_needs_no_reset(session):
    for words in (["the", "dog"], ["a", "cat"]):
        send(session, say(words))
        assert finalize(session)[0].fields["lm_response_final"].decode().split() == words


def test_updated_parameters_are_told_back_and_change_the_answer(session):
    args, done = update(
        session, acoustic_scale=0.35, nbest=3, alpha=0.4, top_candidates_to_augment=0
    )
    assert done == Message("remote_lm_done_updating_params", {"done": b"1"})
    assert args.stream == "remote_lm_args"
    told = {name: args.fields[name] for name in ("acoustic_scale", "nbest", "alpha")}
    assert told == {"acoustic_scale": b"0.35", "nbest": b"3", "alpha": b"0.4"}
    candidates = decode_scoring(sentence(session, ["the", "cat"]).fields["scoring"].decode())
    assert 1 <= len(candidates) <= 3
    for one in candidates:
        assert one.total == pytest.approx(0.35 * one.acoustic + one.ngram)


def test_every_published_parameter_is_taken(session):
    # The values of the published server's start; its optional parts are switched off.
    published = {
        "max_active": 200,
        "min_active": 200,
        "beam": 17.0,
        "lattice_beam": 8.0,
        "acoustic_scale": 0.3,
        "ctc_blank_skip_threshold": 1.0,
        "length_penalty": 0.0,
        "nbest": 100,
        "blank_penalty": 9.0,
        "alpha": 0.5,
        "do_opt": 0,
        "rescore": 0,
        "top_candidates_to_augment": 20,
        "score_penalty_percent": 0.01,
    }
    args, _ = update(session, **published)
    assert {name: float(args.fields[name]) for name in published} == published
    assert {*published, "lm_path", "protocol_version"} <= set(args.fields)


def test_a_parameter_that_this_search_does_not_have_is_told_back_with_a_warning(session):
    args, done, warning = update(session, min_active=300, beam=15)
    assert args.fields["min_active"] == b"300"
    assert done.fields == {"done": b"1"}
    assert warning.stream == "remote_lm_error"
    assert warning.fields["severity"] == b"warning"
    assert warning.fields["error"].startswith(
        b"min_active has no effect in the search flashlight: it keeps at most max_active"
    )
    # Said once, when it changes.
    assert len(update(session, min_active=300, beam=16)) == 2


def test_parameters_changed_within_a_sentence_hold_from_the_next(session):
    reset(session)
    logits = say(["the", "cat", "sat"])
    send(session, logits[:9])
    update(session, acoustic_scale=0.5)
    send(session, logits[9:])
    first = decode_scoring(finalize(session)[0].fields["scoring"].decode())[0]
    second = decode_scoring(sentence(session, ["the", "cat", "sat"]).fields["scoring"].decode())[0]
    assert first.total == pytest.approx(Settings().acoustic_scale * first.acoustic + first.ngram)
    assert second.total == pytest.approx(0.5 * second.acoustic + second.ngram)
    assert second.acoustic == pytest.approx(first.acoustic, rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"nbest": b"1_0"}, "nbest is '1_0'; needed a number"),
        ({"acoustic_scale": b"fast"}, "acoustic_scale is 'fast'; needed a number"),
        ({"acoustic_scale": b"nan"}, "finite"),
        ({"acoustic_scale": b"-1"}, "acoustic_scale is -1.0; needed a number from 0.001 to 100"),
        ({"acoustic_scale": b"1e30"}, "acoustic_scale is 1e+30; needed a number from 0.001 to 100"),
        ({"acoustic_scale": b"1e-30"}, "acoustic_scale is 1e-30"),
        ({"blank_penalty": b"1e300"}, "blank_penalty is 1e+300"),
        ({"beam": b"1e300"}, "beam is 1e+300; needed a number from 0.001 to 1000"),
        ({"max_active": b"1e30"}, "needed a number from 1 to 10000"),
        ({"max_active": b"3000000000"}, "max_active is 3000000000; needed a number from 1"),
        ({"nbest": b"1e30"}, "needed a number from 1 to 10000"),
        ({"blank_penalty": b"0"}, "blank_penalty is 0.0"),
        ({"nbest": b"2.5"}, "nbest is 2.5; needed a whole number"),
        ({"nbest": b"inf"}, "finite"),
        (
            {"acustic_scale": b"1"},
            "there is no parameter 'acustic_scale'; known are acoustic_scale",
        ),
        ({"nbest": b"7", "beam": b"wide"}, "beam"),
    ],
)
def test_a_bad_parameter_is_answered_on_the_error_stream_and_changes_nothing(
    session, fields, reason
):
    before = session.args()
    (answer,) = handle(session, STREAMS.update_params, (9, 1), fields)
    assert answer.stream == "remote_lm_error"
    assert answer.fields["stream"] == b"remote_lm_update_params"
    assert answer.fields["entry_id"] == b"9-1"
    assert reason in answer.fields["error"].decode()
    assert session.args() == before


def test_the_published_second_pass_is_taken_with_a_warning_since_nothing_lacks(session):
    args, done, warning = handle(
        session, STREAMS.update_params, (9, 1), {"rescore": b"1", "nbest": b"7"}
    )
    assert (args.fields["rescore"], args.fields["nbest"]) == (b"0", b"7")
    assert done.stream == "remote_lm_done_updating_params"
    assert warning.fields["severity"] == b"warning"
    assert b"rescore has no effect" in warning.fields["error"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"logits": bytes(40 * 4)}, "160 bytes; needed a multiple of 164"),
        ({"logits": np.full((1, 41), np.nan, "<f4").tobytes()}, "NaN"),
        ({"data": bytes(164)}, "fields ['data']; needed `logits`"),
        ({}, "needed `logits`"),
    ],
)
def test_bad_logits_are_answered_on_the_error_stream_and_the_sentence_goes_on(
    session, fields, reason
):
    reset(session)
    send(session, say(["the"]))
    (answer,) = handle(session, STREAMS.input, (9, 2), fields)
    assert answer.stream == "remote_lm_error"
    assert answer.fields["entry_id"] == b"9-2"
    assert reason in answer.fields["error"].decode()
    send(session, say(["cat"]))
    assert finalize(session)[0].fields["lm_response_final"] == b"the cat"


@pytest.mark.parametrize("end", [0, 1], ids=["least", "greatest"])
def test_scores_stay_finite_at_the_ends_of_every_setting(session, end):
    # The memory's limits do not bear on scores and would only make this slow.
    scored = ("acoustic_scale", "blank_penalty", "beam")
    assert len(update(session, **{name: LIMITS[name][end] for name in scored})) == 2
    reset(session)
    for _ in range(5):
        # As wrong as logits can be: in every frame another class is certain.
        send(session, 1e30 * np.eye(41, dtype=np.float32)[np.arange(400) % 41])
    final, _ = finalize(session)
    candidates = decode_scoring(final.fields["scoring"].decode())
    assert candidates
    for one in candidates:
        assert np.isfinite([one.acoustic, one.ngram, one.total]).all()


@pytest.mark.slow
def test_one_entry_may_hold_a_whole_sentence_and_neither_more(session):
    # The longest sentence, 10,000 frames: in one entry, and not a frame beyond it.
    assert send(session, np.zeros((10_000, 41)))[0].stream == STREAMS.partial
    (refused,) = send(session, np.zeros((1, 41)))
    assert b"at most 10000 are possible" in refused.fields["error"]
    reset(session)
    (refused,) = send(session, np.zeros((10_001, 41)))
    assert b"at most 10000 fit one entry" in refused.fields["error"]


def test_an_unknown_stream_is_an_error_entry(session):
    assert handle(session, "elsewhere", (1, 0), {})[0].stream == "remote_lm_error"


def test_a_long_search_yields_after_every_slice(model):
    session = Session(model, Settings(max_active=100))
    logits = encode_logits(np.zeros((3 * STEP_FRAMES + 1, 41)))
    frames = []
    for _ in session.handle(Entry(STREAMS.input, (1, 0), {"logits": logits})):
        frames.append(session.frames)
    assert frames == [STEP_FRAMES, 2 * STEP_FRAMES, 3 * STEP_FRAMES]
    assert session.frames == 3 * STEP_FRAMES + 1


def say_as(session, client, stream, ms=1000, **fields):
    """The stream of the answer to an entry of a client, and the answer's fields."""
    given = {**fields, **({"client": client.encode()} if client else {})}
    if stream == "input":
        given["logits"] = encode_logits(say(["the", "cat"]))
    first, *_ = handle(session, f"remote_lm_{stream}", (ms, 0), given)
    return first.stream.removeprefix("remote_lm_"), first.fields


@pytest.mark.parametrize(("first", "second"), [("ann", "bob"), ("ann", ""), ("", "bob")])
@pytest.mark.parametrize("stream", ["reset", "input", "finalize", "update_params", "hot_words"])
def test_a_second_client_in_a_sentence_is_refused_and_the_first_unharmed(
    session, first, second, stream
):
    assert say_as(session, first, "input")[0] == "output_partial"
    name, fields = say_as(session, second, stream, 2000, nbest=b"3", words=b"{}")
    assert name == "error"
    assert (
        b"this session is in use by "
        + ((first and "the client 'ann'") or "a client without a name").encode()
        in fields["error"]
    )
    assert fields["client"] == second.encode()
    name, fields = say_as(session, first, "finalize", 3000)
    assert (name, fields["lm_response_final"]) == ("output_final", b"the cat")
    assert fields.get("client", b"") == first.encode()


def test_a_named_client_holds_the_session_between_sentences_until_it_leaves_or_is_silent(session):
    for release, ms in (({}, 12_000), ({"release": b"1"}, 1001)):
        say_as(session, "ann", "input", 1000)
        say_as(session, "ann", "finalize", 1000)
        assert say_as(session, "bob", "reset", 1001)[0] == "error"
        say_as(session, "ann", "reset", 1000, **release)
        assert say_as(session, "bob", "reset", ms)[0] == "done_resetting"
        assert say_as(session, "ann", "input", ms)[0] == "error"
        say_as(session, "bob", "reset", ms, release=b"1")


def test_a_client_silent_in_a_sentence_is_succeeded_by_a_reset_only(session):
    say_as(session, "ann", "input", 1000)
    assert say_as(session, "bob", "input", 20_000)[0] == "error"
    assert say_as(session, "bob", "reset", 20_000)[0] == "done_resetting"
    assert say_as(session, "bob", "input", 20_001)[0] == "output_partial"
    assert say_as(session, "ann", "finalize", 20_002)[0] == "error"


def test_clients_without_names_share_a_session_as_before(session):
    say_as(session, "", "input")
    assert say_as(session, "", "finalize")[1]["lm_response_final"] == b"the cat"
