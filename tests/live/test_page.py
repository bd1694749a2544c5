"""The page over HTTP: events, choices, and who is let in."""

import dataclasses
import json
import queue
import urllib.error
import urllib.request

import pytest
from live_speech import FINAL, PROGRESS

from b2txt_jax.live.events import Began, Chosen, Problem
from b2txt_jax.live.outputs.page import Page, PageError


@pytest.fixture
def chosen():
    return queue.Queue()


@pytest.fixture
def toggled():
    return queue.Queue()


@pytest.fixture
def page(chosen, toggled):
    page = Page("127.0.0.1", 0, None, chosen.put, lambda: toggled.put(True))
    yield page
    page.close()


def asked(url, body=None, **headers):
    """Return the status and the body of an answer."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers), timeout=120
        ) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def read_events(stream, count):
    found = []
    while len(found) < count:
        line = stream.readline().decode().strip()
        if line.startswith("event: "):
            found.append((line[7:], json.loads(stream.readline().decode()[6:])))
    return found


def test_the_page_is_one_file_that_asks_nothing_of_the_network(page):
    status, html = asked(page.url)
    assert status == 200
    assert "http" not in html
    assert "src=" not in html
    assert 'aria-live="polite"' in html
    assert 'lang="en"' in html


def test_a_browser_receives_what_happens_and_one_that_comes_later_the_sentences(page):
    with urllib.request.urlopen(page.url + "events", timeout=120) as stream:
        page.show(Began("s-1", "a trial"))
        page.show(PROGRESS)
        page.show(dataclasses.replace(PROGRESS, features=PROGRESS.features[:0]))  # at the end
        page.show(FINAL)
        page.show(Problem("the server is away"))
        events = dict(read_events(stream, 5))
    assert events["progress"]["text"] == "the"
    assert events["progress"]["problems"] == {"dropped": 2}
    assert events["progress"]["delay_ms"] == 20
    assert events["final"]["words"] == [["the", 0.6], ["cat", 1.0]]
    assert events["final"]["alternatives"] == ["the cat", "a cat"]
    assert events["problem"] == {"text": "the server is away"}
    with urllib.request.urlopen(page.url + "events", timeout=120) as stream:
        assert read_events(stream, 1)[0][1]["id"] == "s-1"


def test_a_click_confirms_or_corrects_a_sentence(page, chosen, toggled):
    page.show(FINAL)
    for text, corrected in (("the cat", False), ("a  cat", True)):
        status, _ = asked(page.url + "choose", {"id": "s-1", "text": text}, X_B2txt="1")
        assert status == 204
        assert chosen.get(timeout=120) == Chosen("s-1", " ".join(text.split()), corrected)
    assert asked(page.url + "toggle", {}, X_B2txt="1")[0] == 204
    assert toggled.get(timeout=120)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"id": "s-9", "text": "a"}, "not known"),
        ({"id": ["s-1"], "text": "a"}, "not known"),
        ({"id": "s-1", "text": "  "}, "1 to 1000 letters"),
        ({"id": "s-1", "text": 3}, "1 to 1000 letters"),
        ([], "JSON object"),
        ({"id": "s-1", "text": "a" * 20_000}, "too long"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(page, chosen, body, said):
    page.show(FINAL)
    status, text = asked(page.url + "choose", body, X_B2txt="1")
    assert status in (400, 413)
    assert said in text
    assert chosen.empty()


def test_pages_of_other_sites_neither_read_nor_choose(page, chosen):
    page.show(FINAL)
    body = {"id": "s-1", "text": "the cat"}
    assert asked(page.url + "choose", body)[0] == 403  # a form of another site has no such header
    assert asked(page.url, Host="evil.example")[0] == 403  # a name that was made to lead here
    assert asked(page.url + "events", Host="evil.example")[0] == 403
    assert chosen.empty()


def test_others_are_let_in_with_a_token_alone(chosen):
    with pytest.raises(PageError, match=r"0\.0\.0\.0.*needed --view-token"):
        Page("0.0.0.0", 0, None, chosen.put, lambda: None)
    page = Page("0.0.0.0", 0, "a secret", chosen.put, lambda: None)
    url = page.url.replace("0.0.0.0", "127.0.0.1")
    try:
        assert asked(url)[0] == 401
        assert asked(url + "events")[0] == 401
        assert asked(url + "?token=wrong")[0] == 401
        assert asked(url + "?token=a%20secret")[0] == 200
        assert asked(url, Cookie="b2txt_token=a%20secret")[0] == 200
        assert asked(url, Authorization="Bearer a secret")[0] == 200
    finally:
        page.close()


def test_a_port_in_use_is_an_error_that_names_it(page, chosen):
    port = int(page.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(PageError, match=f"127.0.0.1:{port}.*give another"):
        Page("127.0.0.1", port, None, chosen.put, lambda: None)


def test_a_browser_that_does_not_read_never_delays_decoding(page):
    with urllib.request.urlopen(page.url + "events", timeout=120):
        for _ in range(2000):
            page.show(PROGRESS)
