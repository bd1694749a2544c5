"""`b2txt download` against a real server on this machine that behaves, breaks off or lies."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from b2txt_jax import cli
from b2txt_jax.data import download

NAME = "t15_copyTask_neuralData.zip"


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


CONTENT = zipped(
    {f"hdf5_data_final/t15.2023.08.1{i}/data_train.hdf5": bytes([i]) * 4000 for i in range(5)}
)


class Server(ThreadingHTTPServer):
    """Dryad's interface for one file, with faults to set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.name = NAME
        self.listed: dict[str, Any] = {}
        self.ranges = True
        self.page = False
        """Answer files with a page for a browser."""
        self.list_status = 200
        self.break_off = 0
        """Bytes after which so many of the following answers end."""
        self.breaks = 0
        self.lie = 0
        """Bytes that Content-Range adds to the size."""
        self.etag = '"1"'
        self.asked: list[str] = []
        self.logins: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        if self.path.startswith("/api/v2/datasets/"):
            self.send({"_embedded": {"stash:versions": [{"_links": {"stash:files": "no"}}, LINK]}})
        elif self.path.startswith("/api/v2/versions/7/files"):
            digest = hashlib.md5(server.content).hexdigest()
            one = {"path": server.name, "size": len(server.content), "digest": digest}
            one |= {"digestType": "md5", "_links": {"stash:download": {"href": "/file"}}}
            other = {**one, "path": "README.md"}
            files = [one | server.listed, other]
            self.send({"_links": {}, "_embedded": {"stash:files": files}})
        else:
            self.file()

    def send(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(self.server.list_status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def file(self) -> None:
        server = self.server
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{server.server_address[1]}/file")
            self.end_headers()
            return
        server.logins.append(self.headers.get("Authorization"))
        if server.page:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>Are you human?</html>")
            return
        start, stop = 0, len(server.content)
        asked = self.headers.get("Range") if server.ranges else None
        if asked:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            assert found
            start, stop = int(found[1]), int(found[2]) + 1
            server.asked.append(asked)
        data = server.content[start:stop]
        self.send_response(206 if asked else 200)
        if asked:
            total = len(server.content) + server.lie
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if len(data) > 1 and server.breaks:
            server.breaks -= 1
            data = data[: server.break_off]
            self.close_connection = True
        self.wfile.write(data)


LINK = {"_links": {"stash:files": {"href": "/api/v2/versions/7/files"}}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PIECE", 3000)
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    monkeypatch.delenv("DRYAD_TOKEN", raising=False)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def run(server: Server, out: Path, *more: str) -> int:
    return cli.main(["download", "t15", "--out", str(out), "--server", server.url, *more])


def whole(out: Path) -> bool:
    file = out / "hdf5_data_final/t15.2023.08.14/data_train.hdf5"
    return file.read_bytes() == b"\4" * 4000 and (out / NAME).read_bytes() == CONTENT


def left(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".*")]


def test_a_set_is_fetched_in_pieces_verified_and_unpacked(server: Server, tmp_path: Path) -> None:
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)
    assert not left(tmp_path)
    assert len(server.asked) == 1 + -(-len(CONTENT) // 3000)
    assert not (tmp_path / "README.md").exists()


def test_connections_that_break_off_lose_nothing(server: Server, tmp_path: Path) -> None:
    server.break_off, server.breaks = 700, 9
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)


def test_an_interrupted_fetch_asks_only_for_what_is_missing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, server.content = CONTENT, CONTENT[:9000]
    server.lie, server.listed = len(CONTENT) - 9000, {"size": len(CONTENT)}
    assert run(server, tmp_path, "--connections", "1") == 2
    error = capsys.readouterr().err
    assert "6 times in a row at byte 9000" in error
    assert "run the command again" in error
    server.content, server.lie, server.asked, server.listed = content, 0, [], {}
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)
    assert min(int(one[6:].split("-")[0]) for one in server.asked[1:]) == 9000


def test_another_file_on_the_server_is_not_mixed_with_an_older_part(
    server: Server, tmp_path: Path
) -> None:
    server.content, server.lie = bytes(9000), len(CONTENT) - 9000
    server.listed = {"size": len(CONTENT)}
    assert run(server, tmp_path, "--connections", "1") == 2
    server.content, server.lie, server.etag, server.listed = CONTENT, 0, '"2"', {}
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)


def test_a_server_without_ranges_sends_it_in_one(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    assert run(server, tmp_path) == 0
    assert whole(tmp_path)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"listed": {"size": 12}}, "the list says 12 bytes, the server sends"),
        ({"lie": 5}, "the list says"),
        ({"listed": {"digest": "0" * 32}}, f"needed {'0' * 32}: it was removed"),
        ({"listed": {"digestType": "crc-nought"}}, "'crcnought'"),
        ({"listed": {"path": "../x.zip"}}, "plain file name"),
        ({"listed": {"path": "other.zip"}}, "no file matches 't15_copyTask_neuralData.zip'"),
        ({"listed": {"size": "many"}}, "no files in the form of Dryad's interface"),
        ({"listed": {"size": 10**18}}, "GB free; needed about"),
        ({"page": True}, "fetch t15_copyTask_neuralData.zip with a browser from https://datadryad"),
        ({"list_status": 403}, "put it into"),
        ({"list_status": 500}, "cannot be read"),
        ({"content": CONTENT[:-30], "listed": {"digest": None}}, "broken or not whole"),
    ],
)
def test_a_lying_or_closed_server_is_an_error_that_leaves_no_file(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: dict[str, Any],
    says: str,
) -> None:
    for key, value in fault.items():
        setattr(server, key, value)
    assert run(server, tmp_path) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.hdf5"))
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("status", [200, 403])
def test_a_file_fetched_by_hand_is_verified_and_unpacked(
    server: Server, tmp_path: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.list_status, server.page = status, True
    (tmp_path / NAME).write_bytes(CONTENT[:-30])
    assert run(server, tmp_path) == 2
    assert ("needed" if status == 200 else "not whole") in capsys.readouterr().err
    (tmp_path / NAME).write_bytes(CONTENT)
    assert run(server, tmp_path, "--remove-archives") == 0
    assert (tmp_path / "hdf5_data_final/t15.2023.08.12/data_train.hdf5").exists()
    assert not (tmp_path / NAME).exists()


def test_a_login_goes_to_its_own_server_only(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRYAD_TOKEN", "secret")
    assert run(server, tmp_path / "a") == 0
    assert set(server.logins) == {"Bearer secret"}
    server.logins, server.listed = [], {"_links": {"stash:download": {"href": "/elsewhere"}}}
    assert run(server, tmp_path / "b") == 0
    assert set(server.logins) == {None}


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_no_archive_writes_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zipped({"fine": b"1", name: b"2"}))
    with pytest.raises(download.DataError, match="outside of the folder"):
        download.unpack(path, tmp_path / "in")
    tar = tmp_path / "a.tar.gz"
    with tarfile.open(tar, "w:gz") as archive:
        member = tarfile.TarInfo("../evil")
        archive.addfile(member, io.BytesIO())
    with pytest.raises(download.DataError, match="cannot be unpacked"):
        download.unpack(tar, tmp_path / "in")
    assert not (tmp_path / "evil").exists()


def test_unpacking_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(CONTENT)
    assert download.unpack(path, tmp_path) == 5
    kept, broken = sorted(tmp_path.rglob("*.hdf5"))[:2]
    before = kept.stat().st_ino
    broken.write_bytes(b"x" * 4000)
    assert download.unpack(path, tmp_path) == 5
    assert kept.stat().st_ino == before
    assert broken.read_bytes() == b"\1" * 4000


def test_the_list_is_printed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(server, tmp_path / "new", "--list") == 0
    assert f"{NAME}  0.0 MB" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
