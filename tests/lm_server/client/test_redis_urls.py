"""Every way to a Redis: TLS with a certificate of one's own, a password, a Unix socket."""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading

import pytest
from processes import ROOT, free_port, serving, start_redis, start_server
from small_model import say

from lm_server.client.client import Client
from lm_server.client.jobs import JobClient
from lm_server.protocol import to_rnn_order

SAID = to_rnn_order(say(["the", "cat", "sat"]))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl program to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


class TlsRelay:
    """Ends TLS in front of a Redis without it, as stunnel does."""

    def __init__(self, folder, port):
        self._target = port
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._context = context
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError):
            outer = self._context.wrap_socket(connection, server_side=True)
            inner = socket.create_connection(("127.0.0.1", self._target))
            # An SSL socket may be read by one thread while another writes to it.
            threading.Thread(target=self._pump, args=(inner, outer), daemon=True).start()
            self._pump(outer, inner)

    @staticmethod
    def _pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()


@pytest.fixture
def tls(certificate):
    """Port of a Redis with TLS and the password `secret`, and the certificate's file."""
    port = free_port()
    process, _ = start_redis(port, "--requirepass", "secret")
    relay = TlsRelay(certificate, port)
    try:
        yield relay.port, certificate / "cert.pem"
    finally:
        relay.close()
        process.kill()
        process.wait()


def test_server_worker_client_and_status_speak_tls_with_a_password(model_folder, tls):
    port, trusted = tls
    url = f"rediss://:secret@127.0.0.1:{port}/0?ssl_ca_certs={trusted}"
    lm = ("--lm", str(model_folder))
    worker = subprocess.Popen(
        [sys.executable, "-m", "lm_server", "worker", *lm, "--redis", url, "--workers", "1"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        with serving(*lm, "--redis", url) as server:
            with Client(url, session="ann") as client:
                assert client.decode(SAID, chunk_frames=4).sentence == "the cat sat"
            with JobClient(url) as jobs:
                (found,) = jobs.decode_all([SAID], ["one"])
                assert found.answer.sentence == "the cat sat"
            status = subprocess.run(
                [sys.executable, "-m", "lm_server", "status", "--json", "--redis", url],
                capture_output=True,
                text=True,
                cwd=ROOT,
            )
            kinds = {one["kind"] for one in json.loads(status.stdout)["processes"]}
            assert kinds == {"server", "worker"}
            assert "secret" not in server.line + worker.stdout.readline() + status.stderr
    finally:
        worker.terminate()
        worker.communicate(timeout=120)


def test_a_certificate_that_is_not_trusted_is_refused_with_what_to_do(model_folder, tls):
    port, _ = tls
    server = start_server(
        *("--lm", str(model_folder), "--wait-seconds", "0"),
        *("--redis", f"rediss://:secret@127.0.0.1:{port}/0"),
    )
    _, error = server.communicate(timeout=120)
    assert server.returncode == 2
    assert "not trusted: add ?ssl_ca_certs=FILE to the URL" in error
    assert "secret" not in error


def test_a_unix_socket_with_a_password_and_logs_as_json(model_folder, tmp_path):
    path = tmp_path / "redis.sock"
    process, _ = start_redis(free_port(), "--requirepass", "secret", "--unixsocket", str(path))
    url = f"unix://:secret@{path}?db=2"
    server = start_server("--lm", str(model_folder), "--redis", url, "--log-format", "json")
    try:
        assert "ready" in server.stdout.readline()
        with Client(url) as client:
            assert client.decode(SAID).sentence == "the cat sat"
            client._redis.xadd("remote_lm_input", {"logits": b"123", "client": client.name})
            client._redis.xread({"remote_lm_error": "0-0"}, block=4000)
        server.terminate()
        _, error = server.communicate(timeout=120)
    finally:
        server.kill()
        process.kill()
        process.wait()
    assert server.returncode == 0
    lines = [json.loads(line) for line in error.splitlines()]
    (refused,) = [line for line in lines if "3 bytes" in line["message"]]
    assert refused["level"] == "WARNING"
    assert refused["session"] == ""
    assert refused["entry"]
    assert refused["pid"] == server.pid
    assert "secret" not in error
