"""A page for a browser on this machine: signal, phonemes, the sentence, alternatives to choose.

It is one file without anything from the network. The server sends events (SSE) and accepts two
messages: a choice, and the key that begins or ends a sentence.
"""

from __future__ import annotations

import base64
import collections
import hmac
import ipaddress
import json
import queue
import socket
import threading
import urllib.parse
from collections.abc import Callable
from http import cookies
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.errors import UserError
from b2txt_jax.live.events import Chosen, Final, Happening, Progress

_FEATURE_ROWS = 64
_KEPT_SENTENCES = 50
_WAITING_EVENTS = 500
"""Events that a slow browser may be behind. Then its connection is closed, and it connects anew."""
_MOST_BYTES, _MOST_LETTERS = 10_000, 1000
_PING_SECONDS = 5.0
_COOKIE = "b2txt_token"


class PageError(UserError, OSError):
    """The page cannot be served."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def message_of(event: Happening) -> tuple[str, dict[str, Any]]:
    """Return the name and the JSON of an event as the page receives it."""
    if isinstance(event, Progress):
        features, odds = event.features, np.exp(event.logits - event.logits.max(1, keepdims=True))
        rows = min(_FEATURE_ROWS, features.shape[1])
        each = features.shape[1] // rows
        groups = features[:, : rows * each].reshape(len(features), rows, each)
        levels = np.clip(128 + 64 * groups.mean(2), 0, 255)
        shares = 255 * odds / odds.sum(1, keepdims=True)
        return "progress", {
            "text": event.text,
            "delay_ms": round(1000 * event.delay),
            "problems": event.health.problems,
            "features": base64.b64encode(levels.astype(np.uint8).tobytes()).decode(),
            "feature_rows": rows,
            "phonemes": base64.b64encode(shares.astype(np.uint8).tobytes()).decode(),
            "phoneme_rows": event.logits.shape[1],
        }
    if isinstance(event, Final):
        return "final", {
            "id": event.id,
            "text": event.answer.sentence,
            "words": [list(word) for word in event.answer.words],
            "alternatives": [h.sentence for h in event.answer.hypotheses[:9]],
        }
    return type(event).__name__.lower(), vars(event)


class Page:
    """An output, and the HTTP server that shows it."""

    def __init__(
        self,
        host: str,
        port: int,
        token: str | None,
        on_choice: Callable[[Chosen], None],
        on_toggle: Callable[[], None],
    ) -> None:
        """Bind and serve.

        Args:
          host: to listen on.
          port: 0 is any free one.
          token: that a browser must have, as `?token=` of the first visit. None: none.
          on_choice: called with what the user confirmed or corrected.
          on_toggle: called when the user begins or ends a sentence.

        Raises:
          PageError: others could reach the page and there is no token, or the port is taken.
        """
        if not is_loopback(host) and not token:
            raise PageError(
                f"--view-host is {host}, which other machines reach; needed --view-token too, or "
                "127.0.0.1, which only this machine reaches"
            )
        self.token, self.on_choice, self.on_toggle = token, on_choice, on_toggle
        self.loopback = is_loopback(host)
        self._lock = threading.Lock()
        self._browsers: list[queue.Queue[bytes | None]] = []
        self._finals: collections.OrderedDict[str, Final] = collections.OrderedDict()
        self._replayed: collections.deque[bytes] = collections.deque(maxlen=_KEPT_SENTENCES)
        server = _ServerV6 if ":" in host else _Server
        try:
            self._server = server((host.strip("[]"), port), _handler(self))
        except (OSError, OverflowError) as error:
            raise PageError(
                f"the page cannot listen on {host}:{port} ({error}); needed a free port: give "
                "another --view PORT"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, name="page", daemon=True).start()

    def show(self, event: Happening) -> None:
        """Send an event to every browser. None of them delays decoding."""
        name, content = message_of(event)
        text = f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()
        with self._lock:
            if isinstance(event, Final):
                self._finals[event.id] = event
                while len(self._finals) > _KEPT_SENTENCES:
                    self._finals.popitem(last=False)
            if isinstance(event, Final | Chosen):
                self._replayed.append(text)
            for browser in self._browsers.copy():
                try:
                    browser.put_nowait(text)
                except queue.Full:
                    self._browsers.remove(browser)
                    browser.get_nowait()
                    browser.put_nowait(None)

    def choose(self, id_: Any, text: Any) -> str | None:
        """Take a choice of the user. Return what is wrong with it, if anything."""
        with self._lock:
            final = self._finals.get(id_) if isinstance(id_, str) else None
        if final is None:
            return "this sentence is not known here any more: reload the page"
        if not isinstance(text, str) or not text.strip() or len(text) > _MOST_LETTERS:
            return f"needed a text of 1 to {_MOST_LETTERS} letters"
        text = " ".join(text.split())
        self.on_choice(Chosen(final.id, text, text != final.answer.sentence))
        return None

    def connect(self) -> queue.Queue[bytes | None]:
        """Return the queue of a new browser, which begins with the sentences so far."""
        browser: queue.Queue[bytes | None] = queue.Queue(_WAITING_EVENTS)
        with self._lock:
            for text in self._replayed:
                browser.put_nowait(text)
            self._browsers.append(browser)
        return browser

    def leave(self, browser: queue.Queue[bytes | None]) -> None:
        """Forget a browser."""
        with self._lock:
            if browser in self._browsers:
                self._browsers.remove(browser)

    def close(self) -> None:
        """Stop serving."""
        with self._lock:
            for browser in self._browsers:
                if not browser.full():
                    browser.put_nowait(None)
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True


class _ServerV6(_Server):
    address_family = socket.AF_INET6


def _handler(page: Page) -> type[BaseHTTPRequestHandler]:
    html = Path(__file__).with_name("page.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        timeout = 60.0

        def do_GET(self) -> None:
            if not self._allowed():
                return
            path = self.path.partition("?")[0]
            if path == "/":
                self._answer(200, html, "text/html; charset=utf-8")
            elif path == "/events":
                self._events()
            else:
                self._answer(404, b"there are / and /events\n")

        def do_POST(self) -> None:
            # A page of another site cannot send this header.
            if not self._allowed() or not self._expect(
                self.headers.get("X-B2txt") == "1", 403, "needed the header X-B2txt: 1"
            ):
                return
            length = self.headers.get("Content-Length", "")
            if not self._expect(
                length.isdigit() and int(length) <= _MOST_BYTES, 413, "the message is too long"
            ):
                return
            try:
                message = json.loads(self.rfile.read(int(length)))
                id_, text = message.get("id"), message.get("text")
            except (ValueError, AttributeError, RecursionError):
                self._answer(400, b"needed a JSON object\n")
                return
            path = self.path.partition("?")[0]
            if path == "/toggle":
                page.on_toggle()
                self._answer(204, b"")
            elif path == "/choose":
                wrong = page.choose(id_, text)
                self._answer(400 if wrong else 204, (wrong or "").encode())
            else:
                self._answer(404, b"there are /choose and /toggle\n")

        def _events(self) -> None:
            browser = page.connect()  # before the answer, after which a browser misses nothing
            try:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                while True:
                    try:
                        text = browser.get(timeout=_PING_SECONDS)
                    except queue.Empty:
                        text = b": still here\n\n"
                    if text is None:
                        return
                    self.wfile.write(text)
            except OSError:
                return  # The browser has left.
            finally:
                page.leave(browser)

        def _allowed(self) -> bool:
            """Return whether a request may be answered. Otherwise it has been refused."""
            name = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
            # A name of another site that leads to this machine (DNS rebinding).
            if not self._expect(
                not page.loopback or is_loopback(name), 403, "needed the address of this machine"
            ):
                return False
            if page.token is None:
                return True
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            held = cookies.SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
            given = [*query.get("token", []), urllib.parse.unquote(held.value) if held else ""]
            given.append(self.headers.get("Authorization", "").removeprefix("Bearer "))
            right = any(hmac.compare_digest(one.encode(), page.token.encode()) for one in given)
            return self._expect(right, 401, "needed /?token=TOKEN, that of --view-token")

        def _expect(self, right: bool, code: int, text: str) -> bool:
            if not right:
                self._answer(code, f"{text}\n".encode())
            return right

        def _answer(self, code: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(code)
            if code == 200 and page.token is not None:
                cookie = urllib.parse.quote(page.token)
                self.send_header("Set-Cookie", f"{_COOKIE}={cookie}; HttpOnly; SameSite=Strict")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header(
                "Content-Security-Policy",
                "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                "connect-src 'self'",
            )
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Log nothing."""

    return Handler
