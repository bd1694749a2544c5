"""What the tests of packing share: folders of packed sessions, and a process that is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from b2txt_jax.data.packed import MANIFEST
from b2txt_jax.data.prepare import PackSettings, prepare

# Packs in a process of its own, which dies or is limited at a chosen moment.
PROGRAM = """
import json, os, resource, signal, sys
from b2txt_jax.data import prepare
from b2txt_jax.data.hdf5 import Hdf5Reader
from b2txt_jax.errors import UserError

root, out, call, number, limit = json.loads(sys.argv[1])
count = 0

def deadly(function):
    def called(*args, **kwargs):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return called

if call == "read":
    Hdf5Reader.read = deadly(Hdf5Reader.read)
elif call == "fill":
    # The rest of the disk is taken by something else while trials are packed.
    read = Hdf5Reader.read
    def filling(reader, ref):
        global count
        count += 1
        if count == number:
            with open(os.path.join(os.path.dirname(out), "filler"), "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        return read(reader, ref)
    Hdf5Reader.read = filling
elif call:
    setattr(os, call, deadly(getattr(os, call)))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print(prepare.prepare(root, out, prepare.PackSettings()))
except UserError as error:
    print(error)
    sys.exit(2)
"""


def pack_in_process(
    root: Path, out: Path, call: str = "", number: int = 0, limit: int = 0
) -> subprocess.CompletedProcess[str]:
    """Packs in a process of its own, in which something happens or files are cut at `limit` bytes.

    Before the `number`th call of `call`, a function of `os` or "read" of a trial, it is killed with
    SIGKILL; with "fill", before that trial is read the disk is filled.
    """
    arguments = json.dumps([str(root), str(out), call, number, limit])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, arguments], capture_output=True, text=True, check=False
    )


def packed(root: Path, out: Path, dtype: str = "float32", features: int = 512) -> Path:
    """`root`, with so many features, packed into `out`."""
    prepare(root, out, PackSettings(dtype=dtype, min_bins=14, feature_count=features))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".prepare.lock"
    }


def finished(folder: Path) -> bool:
    """Whether the manifest is there."""
    return (folder / MANIFEST).is_file()
