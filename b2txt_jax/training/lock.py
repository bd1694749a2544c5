"""One training per folder: a lock that the kernel frees when its holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from b2txt_jax.errors import UserError

LOCK_FILE = ".training.lock"
"""Name in a run's folder. The file stays, and means nothing unless a process holds its lock."""

_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK}


class WorkdirInUseError(UserError, RuntimeError):
    """A folder in which another training runs."""


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, which must exist.

    Warn and go on where the file system has no locks, as some that show a bucket as a folder. A
    folder in a bucket is protected at most against other trainings on the same machine.

    Raises:
      WorkdirInUseError: another training holds it. The text names the process.
    """
    path = workdir / LOCK_FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            raise WorkdirInUseError(
                f"{workdir} is in use by another training ({holder}); needed a folder of its own "
                "for each: wait until it ends, stop it (kill PROCESS saves first), or give "
                "another --workdir"
            ) from error
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            warnings.warn(
                f"{workdir} is on a file system without locks ({error.strerror}): nothing keeps "
                "a second training out of it",
                stacklevel=3,
            )
        else:
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(file)
