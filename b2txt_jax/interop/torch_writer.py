"""Writes a file that `torch.load(FILE, weights_only=True)` reads, without PyTorch.

`torch_reader` describes the format. The pickle is assembled here, because Python's pickler would
import the PyTorch names that it writes.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from b2txt_jax.interop.torch_reader import STORAGE_DTYPES
from lm_server.files.atomic_file import replacing

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_ALIGNMENT = 64
"""Bytes. PyTorch memory-maps storages inside the file."""

_MARKED = {dict: (b"}(", b"u"), list: (b"](", b"e"), tuple: (b"(", b"t")}
"""Pickle instructions before and after the items of a container."""


def write_torch_file(path: Path, value: Any) -> None:
    """Write nested dicts, lists, tuples, text, numbers and numpy arrays (as contiguous tensors).

    Dictionaries keep their order. Equal values give equal bytes. The file is written atomically.

    Raises:
      TypeError: the value contains another type.
    """
    storages: list[np.ndarray] = []
    body = bytearray(b"\x80\x02")  # protocol 2
    _put(body, value, storages)
    body += b"."
    with replacing(path) as temporary, temporary.open("wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _record(archive, "archive/data.pkl", bytes(body))
            _record(archive, "archive/byteorder", b"little")
            for key, array in enumerate(storages):
                _record(archive, f"archive/data/{key}", array.tobytes())
            _record(archive, "archive/version", b"3\n")
        file.flush()
        os.fsync(file.fileno())


def _record(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name)  # with a fixed time, so that equal values give equal files
    assert archive.fp is not None
    start = archive.fp.tell() + 30 + len(name) + 4  # local header, name, header of the extra field
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # PyTorch's own field, "FB"
    archive.writestr(info, data)


def _put(body: bytearray, value: Any, storages: list[np.ndarray]) -> None:
    """Append the pickle instructions that push `value` onto the stack."""
    if value is None:
        body += b"N"
    elif isinstance(value, bool):
        body += b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        _put_int(body, value)
    elif isinstance(value, float):
        body += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        _put_text(body, value)
    elif isinstance(value, np.ndarray):
        _put_tensor(body, value, storages)
    elif isinstance(value, dict | list | tuple):
        items = (
            value if not isinstance(value, dict) else [x for pair in value.items() for x in pair]
        )
        begin, end = _MARKED[type(value)]
        body += begin
        for item in items:
            _put(body, item, storages)
        body += end
    else:
        raise TypeError(
            f"cannot write a {type(value).__name__}; needed dict, list, tuple, str, int, float, "
            f"bool, None or a numpy array"
        )


def _put_int(body: bytearray, value: int) -> None:
    if 0 <= value < 256:
        body += b"K" + struct.pack("<B", value)
    elif -(2**31) <= value < 2**31:
        body += b"J" + struct.pack("<i", value)
    else:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        body += b"\x8a" + struct.pack("<B", len(data)) + data


def _put_text(body: bytearray, value: str) -> None:
    data = value.encode("utf-8")
    body += b"X" + struct.pack("<I", len(data)) + data


def _put_tensor(body: bytearray, value: np.ndarray, storages: list[np.ndarray]) -> None:
    value = np.ascontiguousarray(value).reshape(value.shape)
    if value.dtype not in _STORAGE_NAMES:
        raise TypeError(f"cannot write an array of {value.dtype}; PyTorch has no such storage")
    body += b"ctorch._utils\n_rebuild_tensor_v2\n(("
    _put_text(body, "storage")
    body += f"ctorch\n{_STORAGE_NAMES[value.dtype]}\n".encode()
    _put_text(body, str(len(storages)))
    _put_text(body, "cpu")
    _put_int(body, value.size)
    body += b"tQ"
    _put_int(body, 0)
    _put(body, value.shape, storages)
    _put(body, tuple(stride // value.itemsize for stride in value.strides), storages)
    # requires_grad is False, and there are no hooks.
    body += b"\x89ccollections\nOrderedDict\n)RtR"
    storages.append(value)
