"""One client's conversation as a pure state machine: a message comes in, messages go out.

The messages are those of the published server (reset, input, finalize, update_params and their
answers); a message that cannot be used is answered on the error stream and leaves the state as it
was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lm_server.beam_search import BeamSearch, LanguageModel
from lm_server.nbest import scored
from lm_server.protocol import ProtocolError, Streams, decode_logits, encode_scoring
from lm_server.settings import Settings, SettingsError

_WHOLE = ("max_active", "nbest")
_OURS = ("acoustic_scale", "blank_penalty", "beam", *_WHOLE)
_WITHOUT_EFFECT: Mapping[str, float] = {
    "min_active": 200,
    "lattice_beam": 8.0,
    "ctc_blank_skip_threshold": 1.0,
    "alpha": 0.55,
    "top_candidates_to_augment": 20,
    "score_penalty_percent": 0.01,
}
"""Published parameters of parts that this search does not have, with the published defaults: kept
and told back."""
_MUST_BE_ZERO = ("length_penalty", "do_opt", "rescore")
"""Published parameters that would change the answers if they were honoured; refused unless 0,
rather than ignored."""


@dataclass(frozen=True)
class Message:
    """An entry of a Redis stream: the stream's name and the entry's fields."""

    stream: str
    fields: Mapping[str, bytes]


class Session:
    """State of one client: settings, and the search of the sentence under way."""

    def __init__(
        self, model: LanguageModel, settings: Settings, streams: Streams | None = None
    ) -> None:
        self._model = model
        self._streams = streams or Streams()
        self._settings = settings
        self._without_effect = dict(_WITHOUT_EFFECT)
        self._search = BeamSearch(model, settings)

    def handle(
        self, stream: str, entry_id: str, fields: Mapping[str, bytes], context: str = ""
    ) -> list[Message]:
        """Takes one entry and gives the entries that answer it, in the order in which they must be
        sent.

        Args:
          stream: the stream that the entry came on.
          entry_id: its id, told back in an error.
          fields: its fields.
          context: the context string of this moment; a final answer carries it.
        """
        try:
            if stream == self._streams.reset:
                self._search.begin(self._settings)
                return [self._done(self._streams.done_resetting)]
            if stream == self._streams.input:
                return [self._step(fields)]
            if stream == self._streams.finalize:
                return [self._finish(context), self._done(self._streams.done_finalizing)]
            if stream == self._streams.update_params:
                return self._update(fields)
            raise ProtocolError(f"the stream {stream!r} is none of the four that the server reads")
        except (ProtocolError, SettingsError) as error:
            return [self._refusal(stream, entry_id, str(error))]

    def failed(self, stream: str, entry_id: str, error: Exception) -> Message:
        """The answer to an entry on which `handle` failed by a fault of ours; begins anew.

        The sentence under way is dropped, because nobody knows in what state its search is.
        """
        self._search = BeamSearch(self._model, self._settings)
        text = (
            f"the server failed on this entry ({type(error).__name__}: {error}) and dropped the "
            "sentence under way: send reset, then the sentence again; its log says more"
        )
        return self._refusal(stream, entry_id, text)

    def args(self) -> Message:
        """The settings as they stand, for `remote_lm_args`, under their published names."""
        ours = {name: getattr(self._settings, name) for name in _OURS}
        zeros = dict.fromkeys(_MUST_BE_ZERO, 0)
        values = {"lm_path": str(self._model.folder), **ours, **self._without_effect, **zeros}
        return _message(self._streams.args, {name: str(value) for name, value in values.items()})

    def _step(self, fields: Mapping[str, bytes]) -> Message:
        if "logits" not in fields:
            raise ProtocolError(
                f"the entry has the fields {sorted(fields)}; needed `logits`: "
                "float32 [frames, 41] as raw bytes"
            )
        if not self._search.frames:
            self._search.begin(self._settings)
        words = self._search.step(decode_logits(fields["logits"]))
        return _message(self._streams.partial, {"lm_response_partial": " ".join(words)})

    def _finish(self, context: str) -> Message:
        scale = self._search.settings.acoustic_scale
        candidates = self._search.finish()
        answer = {
            "lm_response_final": candidates[0].sentence if candidates else "",
            "scoring": encode_scoring([scored(candidate, scale) for candidate in candidates]),
            "context_str": context,
        }
        return _message(self._streams.final, answer)

    def _update(self, fields: Mapping[str, bytes]) -> list[Message]:
        # Everything is checked before anything changes: an entry is taken whole or not at all.
        ours: dict[str, float] = {}
        without_effect = dict(self._without_effect)
        for name, text in fields.items():
            value = _number(name, text)
            if name in _OURS:
                ours[name] = int(value) if name in _WHOLE and value == int(value) else value
            elif name in _WITHOUT_EFFECT:
                without_effect[name] = value
            elif name in _MUST_BE_ZERO:
                if value:
                    raise ProtocolError(
                        f"{name} is {value:g}, but this server has no such part; needed 0: "
                        "leave it out"
                    )
            else:
                known = ", ".join([*_OURS, *_WITHOUT_EFFECT, *_MUST_BE_ZERO])
                raise ProtocolError(f"there is no parameter {name!r}; known are {known}")
        # int is what both fields are declared as; the values of the other fields are floats.
        settings = replace(self._settings, **ours)  # type: ignore[arg-type]
        # A search with them, made before they are taken: what it refuses must not stay.
        search = BeamSearch(self._model, settings)
        self._settings = settings
        self._without_effect = without_effect
        if not self._search.frames:
            self._search = search
        return [self.args(), self._done(self._streams.done_updating_params)]

    def _refusal(self, stream: str, entry_id: str, reason: str) -> Message:
        answer = {"error": reason, "stream": stream, "entry_id": entry_id}
        return _message(self._streams.error, answer)

    @staticmethod
    def _done(stream: str) -> Message:
        return _message(stream, {"done": "1"})


def _number(name: str, text: bytes) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ProtocolError(f"{name} is {text[:40]!r}; needed a number") from error
    if value != value or value in (float("inf"), float("-inf")):
        raise ProtocolError(f"{name} is {value}; needed a finite number")
    return value


def _message(stream: str, fields: Mapping[str, str]) -> Message:
    return Message(stream, {name: value.encode() for name, value in fields.items()})
