"""Write a file whole or not at all, and find out early whether it can be written or read."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm_server.errors import UserError


class UnwritableError(UserError, OSError):
    """A place where a result cannot be written."""


def regular(path: Path) -> Path:
    """Return `path`, which a caller is about to read.

    Raises:
      OSError: it is a FIFO, a socket or a device, whose reading may never end.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "it is no regular file: remove it, or name another", str(path))
    return path


def require_writable(
    path: Path,
    option: str = "--out",
    devices: bool = False,
    make: bool = True,
    inputs: Sequence[Path] = (),
) -> None:
    """Raise before the work what `replacing(path)` would raise after it.

    Args:
      path: of the file.
      option: that names it.
      devices: whether a device or a pipe will do.
      make: whether to make the file's folder.
      inputs: files and folders that are read, which the result must not replace.

    Raises:
      UnwritableError: it cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        here = path.resolve()
        for one in inputs:
            if path.exists() and one.resolve() in (here, *here.parents):
                raise OSError(f"it is {one}, which is read, or a file in it")
        if path.exists() and not path.is_file():
            if devices:
                return
            raise OSError("it is no regular file")
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        folder = next(place for place in path.absolute().parents if place.exists())
        with tempfile.NamedTemporaryFile(prefix=f".unfinished-{path.name}", dir=folder):
            pass
    except OSError as error:
        raise UnwritableError(
            f"{option} {path} cannot be written ({error.strerror or error}); needed the name of a "
            "file in a folder that can be written to"
        ) from error


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a path beside `path` that takes its place when the block ends without an exception.

    The temporary file keeps the suffix, because some writers choose a format by it. A device or a
    pipe (`/dev/stdout`) is yielded as it is: nothing can take its place.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
