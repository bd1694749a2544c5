"""docs/protocol.md, word for word: its worked exchange, its stream names, its defaults."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
from processes import ROOT
from small_model import say

from lm_server.protocol import MAX_REQUEST_ID, REGISTRY, Streams, encode_logits
from lm_server.settings import LIMITS

TEXT = (ROOT / "docs" / "protocol.md").read_text()
EXCHANGES = re.findall(r"^```exchange\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def payload(text):
    """What a word of the exchange stands for."""
    if found := re.fullmatch(r"LOGITS\((.*)\)", text):
        return encode_logits(say(found[1].split()))
    if found := re.fullmatch(r"BYTES\((\d+)\)", text):
        return bytes(int(found[1]))
    return text


def words_of(line):
    """The words of a line; spaces in parentheses part none."""
    joined = re.sub(r"\(([^)\"]*)\)", lambda m: m[0].replace(" ", "\0"), line)
    return [word.replace("\0", " ") for word in shlex.split(joined)]


def pairs(words):
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_worked_exchange_is_what_happens(server):
    assert len(EXCHANGES) == 3
    with server.client() as connection:
        connection.flushall()
        seen = {}
        sent = b"0-0"
        for line in "".join(EXCHANGES).splitlines():
            direction, *words = words_of(line)
            if direction == ">" and words[0] == "SET":
                connection.set(words[1], words[2])
            elif direction == ">":
                command, stream, star, *fields = words
                assert (command, star) == ("XADD", "*")
                sent = connection.xadd(stream, {k: payload(v) for k, v in pairs(fields).items()})
            else:
                stream, *fields = words
                found = connection.xread({stream: seen.get(stream, "0-0")}, count=1, block=4000)
                assert found, f"no answer: {line}"
                seen[stream], got = found[0][1][0]
                got = {key.decode(): value.decode() for key, value in got.items()}
                expected = pairs(fields)
                assert set(got) == set(expected), line
                for name, pattern in expected.items():
                    form = re.escape(pattern).replace(re.escape("~"), ".*")
                    assert re.fullmatch(form, got[name], re.DOTALL), (line, name, got[name])
                if "entry_id" in got:
                    assert got["entry_id"] == sent.decode()
        for stream, last in seen.items():
            assert connection.xrevrange(stream, count=1)[0][0] == last, f"more on {stream}"
        connection.xadd("remote_lm_update_params", {"acoustic_scale": 1.5, "blank_penalty": 8})


@pytest.mark.parametrize("name", [*dataclasses.asdict(Streams()).values()])
def test_every_stream_is_in_its_tables(name):
    assert re.search(rf"^\| `{name}` \|", TEXT, re.MULTILINE)


def test_every_shared_name_is_in_it():
    for name in vars(REGISTRY).values():
        assert f"`{name}`" in TEXT
    assert f"the first {MAX_REQUEST_ID} count" in TEXT


def test_the_ranges_of_its_table_are_the_codes():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) (?:to|or) (\S+) \|", TEXT, re.MULTILINE)
    assert len(rows) == 15
    for name, least, greatest in rows:
        assert LIMITS[name] == (float(least), float(greatest.replace(",", ""))), name


def test_the_exchanges_notation():
    assert words_of('< x LOGITS(the cat) "a b" [~]') == ["<", "x", "LOGITS(the cat)", "a b", "[~]"]
    assert np.frombuffer(payload("LOGITS(a cat)"), "<f4").size % 41 == 0
