"""Fetches published data sets: resumes, checks sums, unpacks.

  t15         Card et al. 2024: 45 sessions of 512 features, 11 GB (Dryad, dncjsxm85)
  t15-kaggle  the same sessions as Kaggle's competition brain-to-text-25 has them
  t12         Willett et al. 2023 and the published language models (Dryad, x69p8czpq)
  kunz        Kunz et al. 2025, inner speech (Dryad, gf1vhhn1j)

The same command continues after an interruption, and files that are there already are verified
instead of fetched. Where the server asks for a browser, the command says which file to fetch by
hand and where to put it. Run it again then: it verifies and unpacks the file. Dryad's API token is
read from DRYAD_TOKEN, Kaggle's login from KAGGLE_USERNAME and KAGGLE_KEY or ~/.kaggle/kaggle.json.
"""

from __future__ import annotations

import argparse
import base64
import errno
import fnmatch
import gzip
import hashlib
import http.client
import json
import os
import shutil
import stat
import tarfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from b2txt_jax.data.description import DataError
from lm_server.files.atomic_file import replacing

DRYAD, KAGGLE = "https://datadryad.org", "https://www.kaggle.com"
PIECE = 16 << 20
"""Bytes of one request, the unit in which a download resumes."""
TRIES = 6
"""Requests in a row that may fail without a byte received."""
_CHUNK = 1 << 20
_PAUSE = 0.5
"""Seconds before the first request after a failed one."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
_UNPACKED = 1.2
"""Bytes unpacked for one of an archive, before its directory can be read."""
_PARTIAL = 206
_BROWSER = {202, 401, 403, 405, 429}
"""Statuses with which servers ask for a browser, a login or patience."""


@dataclass(frozen=True)
class DataSet:
    """A published data set."""

    doi: str
    """On Dryad. For Kaggle, the competition's name."""
    page: str
    """Where a person finds the files."""
    files: tuple[str, ...]
    """Names or patterns of what is fetched unless --files names others."""
    kaggle: bool = False


SETS = {
    "t15": DataSet(
        "10.5061/dryad.dncjsxm85",
        "https://datadryad.org/dataset/doi:10.5061/dryad.dncjsxm85",
        ("t15_copyTask_neuralData.zip",),
    ),
    "t15-kaggle": DataSet(
        "brain-to-text-25",
        "https://www.kaggle.com/competitions/brain-to-text-25/data",
        ("brain-to-text-25.zip",),
        kaggle=True,
    ),
    "t12": DataSet(
        "10.5061/dryad.x69p8czpq",
        "https://datadryad.org/dataset/doi:10.5061/dryad.x69p8czpq",
        ("competitionData.tar.gz",),
    ),
    "kunz": DataSet(
        "10.5061/dryad.gf1vhhn1j",
        "https://datadryad.org/dataset/doi:10.5061/dryad.gf1vhhn1j",
        ("*",),
    ),
}


@dataclass(frozen=True)
class RemoteFile:
    """A file as its server lists it."""

    name: str
    url: str
    size: int | None = None
    """Bytes."""
    digest: str | None = None
    """Hexadecimal."""
    digest_type: str = "md5"


class BrowserNeededError(DataError):
    """A server that serves a person with a browser only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `b2txt download`."""
    parser.add_argument("set", choices=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--out", type=Path, required=True, help="folder for files and sessions")
    parser.add_argument(
        "--files", nargs="+", metavar="NAME", help="names or patterns (default: the neural data)"
    )
    parser.add_argument("--list", action="store_true", help="list the files and their sizes only")
    parser.add_argument("--connections", type=int, default=4, help="requests at a time (default 4)")
    parser.add_argument("--no-unpack", action="store_true", help="leave archives as they are")
    parser.add_argument(
        "--remove-archives", action="store_true", help="remove an archive once it is unpacked"
    )
    parser.add_argument("--server", help="another server with the same interface, a mirror")


def run(args: argparse.Namespace) -> int:
    """Run `b2txt download`."""
    if args.connections < 1:
        raise DataError(f"--connections is {args.connections}; needed 1 or more")
    chosen = SETS[args.set]
    server = args.server or (KAGGLE if chosen.kaggle else DRYAD)
    console = Console(stderr=True)
    if args.list:
        for one in list_files(chosen, server):
            size = "size unknown" if one.size is None else f"{one.size / 1e6:,.1f} MB"
            print(f"{one.name}  {size}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    patterns = args.files or chosen.files
    try:
        files = matching(list_files(chosen, server), patterns)
    except BrowserNeededError as error:
        files = _by_hand(args.out, patterns, chosen, error)
    missing = [one for one in files if not (args.out / one.name).exists()]
    require_space(args.out, missing, unpack=not args.no_unpack)
    for one in files:
        path = args.out / one.name
        if path.exists():
            console.print(f"{one.name}: is there, verifying it")
            verify(path, one)
        else:
            fetch(one, path, args.connections, chosen, console)
        if not args.no_unpack and is_archive(path):
            count = unpack(path, args.out, console)
            console.print(f"{one.name}: {count} files unpacked to {args.out}")
            if args.remove_archives:
                path.unlink()
    print(f"{len(files)} of {len(files)} files fetched and verified in {args.out}")
    return 0


def _by_hand(
    folder: Path, patterns: Sequence[str], chosen: DataSet, error: BrowserNeededError
) -> list[RemoteFile]:
    """Return the files that a person has put into the folder, where the list cannot be had.

    Raises:
      BrowserNeededError: one of the patterns has no file there.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    found = [name for name in names if any(fnmatch.fnmatch(name, one) for one in patterns)]
    absent = [one for one in patterns if not fnmatch.filter(names, one)]
    if absent:
        raise BrowserNeededError(
            f"{error}; fetch {', '.join(absent)} with a browser from {chosen.page}, put it into "
            f"{folder} and run this command again, which verifies and unpacks it"
        ) from error
    return [RemoteFile(name, "") for name in found]


def matching(files: Sequence[RemoteFile], patterns: Sequence[str]) -> list[RemoteFile]:
    """Return the files that a pattern names, each once.

    Raises:
      DataError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(one.name, pattern) for one in files):
            raise DataError(
                f"no file matches {pattern!r}; there are {', '.join(one.name for one in files)}"
            )
    return [one for one in files if any(fnmatch.fnmatch(one.name, p) for p in patterns)]


# ---------------------------------------------------------------------------------- the server


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects without the login: storage elsewhere must not see it, and refuses it."""

    def redirect_request(self, req: Any, *rest: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *rest)
        if new is not None and new.host != req.host:
            new.remove_header("Authorization")
        return new


_opener = urllib.request.build_opener(_Redirects)


def _authorization(url: str) -> dict[str, str]:
    """Return the header with a login where the environment has one."""
    if "/api/v1/competitions/" in url:
        name, key = os.environ.get("KAGGLE_USERNAME"), os.environ.get("KAGGLE_KEY")
        kept = Path.home() / ".kaggle" / "kaggle.json"
        if not (name and key) and kept.is_file():
            try:
                found = json.loads(kept.read_text())
                name, key = str(found["username"]), str(found["key"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{kept} has no username and key; needed the file that Kaggle's account page "
                    "makes, or KAGGLE_USERNAME and KAGGLE_KEY"
                ) from error
        if name and key:
            return {"Authorization": "Basic " + base64.b64encode(f"{name}:{key}".encode()).decode()}
        return {}
    token = os.environ.get("DRYAD_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _get(url: str, span: tuple[int, int] | None = None) -> http.client.HTTPResponse:
    """Open a URL, or its bytes from span[0] up to span[1].

    Raises:
      BrowserNeededError: the server asks for a browser, a login or patience.
      OSError: no connection, or another status.
    """
    headers = {"User-Agent": "b2txt", **_authorization(url)}
    if span:
        headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
    host = urllib.parse.urlsplit(url).netloc
    try:
        answer = _opener.open(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code in _BROWSER:
            raise BrowserNeededError(
                f"{host} answers {error.code} ({error.reason}) to a program"
            ) from error
        raise
    if answer.status in _BROWSER or "html" in (answer.headers.get_content_type() or ""):
        answer.close()
        raise BrowserNeededError(f"{host} answers with a page for a browser instead of the file")
    return answer


def _json(url: str) -> Any:
    try:
        with _get(url) as answer:
            return json.loads(answer.read())
    except DataError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url} cannot be read ({error}); needed a connection to it") from error
    except ValueError as error:
        raise DataError(f"{url} answers with what is no JSON; needed the list of files") from error


def list_files(chosen: DataSet, server: str) -> list[RemoteFile]:
    """Return the files of the newest version of a data set.

    Raises:
      BrowserNeededError: the server asks for a browser.
      DataError: the list cannot be read.
    """
    if chosen.kaggle:
        url = f"{server}/api/v1/competitions/data/download-all/{chosen.doi}"
        return [RemoteFile(chosen.files[0], url)]
    doi = urllib.parse.quote(f"doi:{chosen.doi}", safe="")
    url = f"{server}/api/v2/datasets/{doi}/versions"
    try:
        newest = _json(url)["_embedded"]["stash:versions"][-1]
        page: str | None = newest["_links"]["stash:files"]["href"]
        found = []
        while page:
            url = urllib.parse.urljoin(server, page)
            listed = _json(url)
            for one in listed["_embedded"]["stash:files"]:
                href = one["_links"]["stash:download"]["href"]
                found.append(
                    RemoteFile(
                        _plain_name(one["path"]),
                        urllib.parse.urljoin(server, href),
                        int(one["size"]),
                        one.get("digest"),
                        (one.get("digestType") or "md5").replace("-", ""),
                    )
                )
            page = listed["_links"].get("next", {}).get("href")
    except DataError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{url} lists no files in the form of Dryad's interface, version 2 ({error!r}); "
            f"needed it: fetch the files with a browser from {chosen.page}"
        ) from error
    return found


def _plain_name(name: str) -> str:
    if PurePosixPath(name).name != name or name.startswith("."):
        raise DataError(f"the list has a file {name!r}; needed a plain file name")
    return name


# ------------------------------------------------------------------------------------ fetching


@dataclass
class _State:
    """Which pieces of a file are on disk. Kept beside it."""

    path: Path
    size: int
    tag: str | None
    done: set[int]

    def save(self) -> None:
        with replacing(self.path) as place:
            place.write_text(
                json.dumps(
                    {
                        "size": self.size,
                        "tag": self.tag,
                        "piece": PIECE,
                        "done": sorted(self.done),
                    }
                )
            )

    @classmethod
    def load(cls, path: Path, size: int, tag: str | None) -> _State:
        """Return what was fetched before, nothing if the server has another file now."""
        try:
            kept = json.loads(path.read_text())
            if (kept["size"], kept["tag"], kept["piece"]) == (size, tag, PIECE):
                return cls(path, size, tag, {int(one) for one in kept["done"]})
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return cls(path, size, tag, set())


def fetch(one: RemoteFile, path: Path, connections: int, chosen: DataSet, console: Console) -> None:
    """Fetch a file in pieces and verify it. An interrupted fetch continues.

    Raises:
      BrowserNeededError: the server asks for a browser.
      DataError: the connection fails too often, or what came is not what was announced.
    """
    try:
        size, tag, ranges = _probe(one)
    except BrowserNeededError as error:
        raise BrowserNeededError(
            f"{error}; fetch {one.name} with a browser from {chosen.page}, put it into "
            f"{path.parent} and run this command again, which verifies and unpacks it"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{one.url} cannot be opened ({error}); run the command again") from error
    if one.size is not None and size is not None and size != one.size:
        raise DataError(
            f"{one.name}: the list says {one.size} bytes, the server sends {size}; needed the same "
            "number: the file may just be replaced, try again later"
        )
    unfinished = path.with_name(f".{path.name}.part")
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        task = progress.add_task(one.name, total=size)

        def seen(count: int) -> None:
            progress.advance(task, count)

        if ranges and size:
            _fetch_pieces(one, unfinished, size, tag, connections, seen)
        else:
            console.print(f"{one.name}: the server sends it in one piece, without resuming")
            _fetch_whole(one, unfinished, size, seen)
    try:
        verify(unfinished, replace(one, size=one.size or size))
    except DataError as error:
        _state_path(unfinished).unlink(missing_ok=True)
        unfinished.unlink()
        raise DataError(f"{error}: it was removed, run the command again") from error
    os.replace(unfinished, path)
    _state_path(unfinished).unlink(missing_ok=True)


def _state_path(unfinished: Path) -> Path:
    return unfinished.with_name(f"{unfinished.name}.json")


def _probe(one: RemoteFile) -> tuple[int | None, str | None, bool]:
    """Return size, version tag, and whether parts of the file can be asked for."""
    with _get(one.url, (0, 1)) as answer:
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if answer.status == _PARTIAL:
            total = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
            return (int(total) if total.isdigit() else one.size), tag, True
        length = answer.headers.get("Content-Length")
        return (int(length) if length else None), tag, False


def _fetch_pieces(
    one: RemoteFile,
    unfinished: Path,
    size: int,
    tag: str | None,
    connections: int,
    seen: Callable[[int], None],
) -> None:
    state = _State.load(_state_path(unfinished), size, tag)
    if not unfinished.exists():
        state.done.clear()
    count = -(-size // PIECE)
    state.done &= set(range(count))
    lock, failed = threading.Lock(), threading.Event()
    seen(sum(min(PIECE, size - place * PIECE) for place in state.done))
    with unfinished.open("r+b" if unfinished.exists() else "w+b") as file:
        file.truncate(size)

        def piece(place: int) -> None:
            start, stop = place * PIECE, min((place + 1) * PIECE, size)
            try:
                whole = _fetch_span(one, file, (start, stop), size, seen, failed)
            except BaseException:
                failed.set()
                raise
            if not whole:
                return
            with lock:
                os.fsync(file.fileno())
                state.done.add(place)
                state.save()

        todo = [place for place in range(count) if place not in state.done]
        with ThreadPoolExecutor(connections) as pool:
            try:
                for future in [pool.submit(piece, place) for place in todo]:
                    future.result()
            except BaseException:
                failed.set()
                pool.shutdown(cancel_futures=True)
                raise


def _fetch_span(
    one: RemoteFile,
    file: IO[bytes],
    span: tuple[int, int],
    size: int,
    seen: Callable[[int], None],
    failed: threading.Event,
) -> bool:
    """Write the bytes of a span to their place, over as many requests as it takes.

    Returns False where another thread failed before the last byte.
    """
    at, stop, tries = span[0], span[1], 0
    while at < stop and not failed.is_set():
        before = at
        try:
            with _get(one.url, (at, stop)) as answer:
                wanted = f"bytes {at}-{stop - 1}/{size}"
                got = answer.headers.get("Content-Range")
                if answer.status != _PARTIAL or got != wanted:
                    raise DataError(
                        f"{one.name}: asked for {wanted}, the server sends {got or 'all'}; needed "
                        "that part: the file was replaced meanwhile, or the server is broken"
                    )
                while at < stop and (data := answer.read(min(_CHUNK, stop - at))):
                    os.pwrite(file.fileno(), data, at)
                    at += len(data)
                    seen(len(data))
            problem: Exception | str = "it ended early"
        except (http.client.HTTPException, OSError) as error:
            if getattr(error, "errno", None) in _DISK:
                raise
            problem = error
        if at == stop:
            break
        tries = 0 if at > before else tries + 1
        if tries >= TRIES:
            raise DataError(
                f"{one.name}: the connection failed {tries} times in a row at byte {at} of {size} "
                f"({problem}); what came is kept: run the command again to go on"
            )
        failed.wait(min(2.0**tries * _PAUSE, 30))
    return at == stop


def _fetch_whole(
    one: RemoteFile, unfinished: Path, size: int | None, seen: Callable[[int], None]
) -> None:
    _state_path(unfinished).unlink(missing_ok=True)
    try:
        with _get(one.url) as answer, unfinished.open("wb") as file:
            while data := answer.read(_CHUNK):
                file.write(data)
                seen(len(data))
    except http.client.HTTPException as error:
        raise DataError(
            f"{one.name}: the connection broke ({error!r}); run the command again, which starts "
            "this file anew"
        ) from error


# ----------------------------------------------------------------------- checking and unpacking


def verify(path: Path, one: RemoteFile) -> None:
    """Compare a file with what its server lists: size and digest, or else an archive's own sums.

    Raises:
      DataError: it differs, or nothing vouches for it.
    """
    size = path.stat().st_size
    if one.size is not None and size != one.size:
        raise DataError(f"{one.name} has {size} bytes; needed {one.size}")
    if one.digest:
        try:
            digest = hashlib.new(one.digest_type)
        except ValueError as error:
            raise DataError(
                f"{one.name} is listed with a sum of type {one.digest_type!r}; needed one that "
                "Python's hashlib has"
            ) from error
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
        if digest.hexdigest() != one.digest.lower():
            raise DataError(
                f"{one.name} has {one.digest_type} {digest.hexdigest()}; needed {one.digest}"
            )
        return
    try:
        if one.name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise DataError(f"{one.name}: the checksum of its file {broken} is wrong")
        elif one.name.endswith(".gz"):
            with gzip.open(path) as stream:
                while stream.read(_CHUNK):
                    pass
    except (zipfile.BadZipFile, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{one.name} is broken or not whole ({error})") from error


def is_archive(path: Path) -> bool:
    """Return whether a file is one that `unpack` reads, by its name."""
    return path.name.endswith((".zip", ".tar.gz", ".tgz"))


def require_space(folder: Path, files: Sequence[RemoteFile], unpack: bool) -> None:
    """Raise before the work if the disk is too small for it.

    Raises:
      DataError: it is.
    """
    needed = 0.0
    for one in files:
        part = folder / f".{one.name}.part"
        there = part.stat().st_blocks * 512 if part.exists() else 0
        needed += max((one.size or 0) - there, 0)
        if unpack and is_archive(folder / one.name):
            needed += (one.size or 0) * _UNPACKED
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free; needed about {needed / 1e9:.1f} GB: name a "
            "folder on another disk with --out, or use --no-unpack"
        )


def unpack(path: Path, folder: Path, console: Console | None = None) -> int:
    """Unpack an archive into a folder and return the number of its files.

    Files of a zip that are there whole are kept, so that the work resumes.

    Raises:
      DataError: the archive is broken, or would write outside of the folder.
    """
    try:
        if path.name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                return _unpack_zip(archive, folder, console)
        with tarfile.open(path) as tar:
            count = 0
            for member in tar:
                tar.extract(member, folder, filter="data")
                count += member.isfile()
            return count
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error})") from error


def _unpack_zip(archive: zipfile.ZipFile, folder: Path, console: Console | None) -> int:
    members = [one for one in archive.infolist() if not one.is_dir()]
    for one in members:
        place = PurePosixPath(one.filename.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or stat.S_ISLNK(one.external_attr >> 16):
            raise DataError(
                f"{archive.filename} holds {one.filename!r}, which is a link or would be written "
                "outside of the folder; needed an archive of plain files"
            )
    todo = [one for one in members if not _is_whole(folder / one.filename, one)]
    size = sum(one.file_size for one in todo)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free; needed {size / 1e9:.1f} GB to unpack "
            f"{archive.filename}"
        )
    with Progress(console=console or Console(stderr=True)) as progress:
        task = progress.add_task("unpacking", total=size)
        for one in todo:
            target = folder / one.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as new, archive.open(one) as source, new.open("wb") as out:
                for data in _chunks(source):
                    out.write(data)
                    progress.advance(task, len(data))
    return len(members)


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while data := source.read(_CHUNK):
        yield data


def _is_whole(path: Path, member: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != member.file_size:
        return False
    checksum = 0
    with path.open("rb") as file:
        for data in _chunks(file):
            checksum = zlib.crc32(data, checksum)
    return checksum == member.CRC
