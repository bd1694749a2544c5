"""Reads a PyTorch checkpoint without PyTorch, and without running any code from it.

`torch.save` writes a zip archive with one folder: `data.pkl` (a pickle of the containers), one file
per tensor storage under `data/`, and `byteorder`. A pickle can call any function of any installed
package while it is loaded. This reader knows a few names only and imports none of them: each is
mapped to a small function of this file. Any other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from b2txt_jax.interop.errors import ConversionError, shortened

STORAGE_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
"""Storage types that are read, by their names in `torch.save`."""

# Pickle instructions of protocol 2 that build containers, numbers, text and tensors.
_OPCODES = frozenset(
    {"PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"}
    | {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
    | {"BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}
    | {"EMPTY_LIST", "APPEND", "APPENDS", "LIST", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"}
    | {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"}
)
# Exceptions that damaged bytes can raise in `zipfile` and `pickle`.
_DAMAGED = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError),
)


def read_torch_file(path: Path) -> Any:
    """Return a checkpoint's containers, numbers and text, with its tensors as numpy arrays.

    Dictionaries keep their order. bfloat16 tensors become `ml_dtypes.bfloat16`.

    Raises:
      ConversionError: the file is missing, is not a file of `torch.save`, is damaged, or contains
        anything but tensors and plain data.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; needed a file written by torch.save")
    with _readable(path), zipfile.ZipFile(path) as archive:
        records = _Records(path, archive)
        pickled = records.read("data.pkl")
        _check_opcodes(path, pickled)
        return _Resolver(records).resolve(_Unpickler(path, pickled).load())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Convert the exceptions of damaged files to ConversionError with the file's name."""
    try:
        yield
    except ConversionError:
        raise
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04":
            raise ConversionError(
                f"{path} is damaged or cut short ({error}); copy it again"
            ) from error
        raise ConversionError(
            f"{path} is not in the zip format of torch.save (PyTorch 1.6 and newer); it begins "
            f"with {start!r}. If it is an older PyTorch file, save it again with a newer PyTorch: "
            f"torch.save(torch.load(FILE, map_location='cpu', weights_only=True), NEW_FILE)"
        ) from error
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path}: {error}") from error
    except _DAMAGED as error:
        raise ConversionError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it is damaged or was not "
            f"written by torch.save"
        ) from error


class _Records:
    """The files inside the archive, by their name within its one folder."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path = path
        self._archive = archive
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConversionError(
                f"{path} holds {len(pickles)} data.pkl; needed one, as torch.save writes it"
            )
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}constants.pkl" in archive.namelist():
            raise ConversionError(
                f"{path} is a TorchScript program (torch.jit.save); needed the checkpoint of "
                f"weights that torch.save writes"
            )
        if f"{self._folder}byteorder" in archive.namelist():
            order = self.read("byteorder")
            if order != b"little":
                raise ConversionError(f"{path} has byte order {shortened(order)}; needed b'little'")

    def read(self, name: str) -> bytes:
        """Read one file and check its CRC."""
        try:
            info = self._archive.getinfo(self._folder + name)
        except KeyError as error:
            raise ConversionError(f"{self.path} lacks {name}; it is damaged: copy it again") from (
                error
            )
        if info.compress_type != zipfile.ZIP_STORED:
            raise ConversionError(
                f"{self.path}: {name} is compressed, which torch.save never does; needed the file "
                f"as PyTorch wrote it"
            )
        return self._archive.read(info)


def _check_opcodes(path: Path, pickled: bytes) -> None:
    """Refuse what no plain checkpoint needs, before the pickle is loaded.

    Instructions are followed on a stack of texts and numbers, with None for other values. So the
    key that a refused object is under can be named. Other keys than texts and numbers are refused
    before they are hashed, which of tuples in tuples may take forever.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        if opcode.name == "GLOBAL" and tuple(argument.split(" ", 1)) not in _NAMES:
            key = next((one for one in reversed(stack) if isinstance(one, str)), None)
            raise _unknown_name(argument.replace(" ", "."), key)
        if opcode.name not in _OPCODES:
            raise ConversionError(
                f"{path}: pickle instruction {opcode.name} is not one that a checkpoint of plain "
                f"tensors needs; save it again with torch.save(checkpoint, FILE), which writes "
                f"pickle protocol 2"
            )
        # The memo grows to the largest index, which could use up all memory.
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            if argument > count:
                raise ConversionError(
                    f"{path}: pickle memo index {argument} is too large; damaged file"
                )
            memo[argument] = stack[-1]
            continue
        taken: list[Any] = []
        before = opcode.stack_before
        if pickletools.markobject in before:
            while stack[-1] is not _MARK:
                taken.append(stack.pop())
            stack.pop()
            before = before[: before.index(pickletools.markobject)]
        taken += [stack.pop() for _ in before]
        # The last pair comes first: value, key, value, key, ...
        if opcode.name in ("SETITEM", "SETITEMS", "DICT") and any(
            key is None for key in taken[1 : 2 if opcode.name == "SETITEM" else None : 2]
        ):
            raise pickle.UnpicklingError("found a key that is neither text nor a number")
        stack.append(_pushed(opcode.name, argument, memo))
        if not opcode.stack_after:
            stack.pop()


_MARK = object()


def _pushed(opcode: str, argument: Any, memo: dict[int, Any]) -> Any:
    """Return what an instruction leaves on the stack of `_check_opcodes`."""
    if opcode in ("BINGET", "LONG_BINGET"):
        return memo[argument]
    if opcode == "MARK":
        return _MARK
    if opcode in ("NEWTRUE", "NEWFALSE"):
        return opcode == "NEWTRUE"
    # The index of a GLOBAL or a memo is no value.
    return (
        argument
        if opcode.startswith(("BINUNI", "BINSTR", "SHORT_", "BININT", "LONG", "BINF"))
        else None
    )


def _unknown_name(name: str, key: str | None) -> pickle.UnpicklingError:
    place = f"under the key {shortened(key)} " if key is not None else ""
    return pickle.UnpicklingError(
        f"the pickle {place}asks for {name}, which is not part of a checkpoint of plain tensors; "
        f"it was not looked up and nothing was run. If you know what it is, load the file with "
        f"torch.load(FILE, weights_only=True), that name allowed by torch.serialization."
        f"safe_globals, and save the state_dicts alone, without {shortened(key) if key else 'it'}"
    )


class _Closed:
    """Base of objects in a pickle. The pickle cannot set their state or attributes.

    Subclasses that are frozen dataclasses must not use slots: dataclasses with slots define
    `__setstate__` themselves.
    """

    __slots__ = ()

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError(f"the pickle tries to change a {type(self).__name__}; refused")


class _Function(_Closed):
    """A known name. It wraps the function, so that the pickle cannot change the function."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"the pickle tries to set {name}; refused")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


@dataclass(frozen=True)
class _Storage(_Closed):
    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class _Tensor(_Closed):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _StorageType(_Closed):
    dtype: np.dtype


class _ScalarType:
    """A numpy dtype. Its state in a pickle holds the byte order."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, *_: object):
        if name not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise pickle.UnpicklingError(
                f"numpy type {shortened(name)} is not a plain number; refused"
            )
        self.name = name
        self.order = "="

    def __setstate__(self, state: tuple[object, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"numpy byte order {shortened(order)} is unknown; refused")
        self.order = str(order)


class _OrderedDict(dict[Any, Any]):
    """An OrderedDict without the attributes that PyTorch adds (`_metadata`)."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        pass


def _rebuild_tensor(
    storage: object, offset: object, shape: object, strides: object, *_: object
) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"a tensor is built from a {type(storage).__name__}; refused")
    numbers = [offset, *_tuple(shape), *_tuple(strides)]
    if len(_tuple(shape)) != len(_tuple(strides)) or not all(
        type(number) is int and number >= 0 for number in numbers
    ):
        raise pickle.UnpicklingError(
            f"a tensor has offset {shortened(offset)}, shape {shortened(shape)}, strides "
            f"{shortened(strides)}; needed numbers from 0, as many strides as axes"
        )
    assert isinstance(offset, int)
    return _Tensor(storage, offset, _tuple(shape), _tuple(strides))


def _tuple(value: object) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        raise pickle.UnpicklingError(f"found {shortened(value)} where a tuple of sizes is needed")
    return value


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _scalar(kind: object, data: object) -> int | float | bool:
    if not isinstance(kind, _ScalarType) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy number of an unknown kind; refused")
    number: int | float | bool = np.frombuffer(data, kind.order + kind.name, count=1)[0].item()
    return number


def _encode(text: object, encoding: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"text in encoding {shortened(encoding)}; needed 'latin1'")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Function(_OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("numpy.core.multiarray", "scalar"): _Function(_scalar),
    ("numpy._core.multiarray", "scalar"): _Function(_scalar),
    ("numpy", "dtype"): _Function(_ScalarType),
    ("_codecs", "encode"): _Function(_encode),
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, pickled: bytes):
        super().__init__(io.BytesIO(pickled))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _unknown_name(f"{module}.{name}", None) from None

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(
                f"found {shortened(pid)} where a tensor's storage is needed"
            )
        _, kind, key, _, size = pid
        if not isinstance(kind, _StorageType):
            raise pickle.UnpicklingError(f"storage {shortened(key)} is of an unknown type; refused")
        if not isinstance(key, str) or not key.isalnum() or type(size) is not int or size < 0:
            raise pickle.UnpicklingError(
                f"storage {shortened(key)} has the invalid size {shortened(size)}"
            )
        return _Storage(key, kind.dtype, size)


class _Resolver:
    """Replaces tensors by arrays and refuses anything that is not plain data."""

    def __init__(self, records: _Records):
        self._records = records
        self._storages: dict[str, np.ndarray] = {}
        self._room = 4 * records.path.stat().st_size + 2**20
        """Bytes that copies may still take: any number of tensors may be parts of one storage."""
        # Keyed by identity, so that shared objects stay shared.
        self._done: dict[int, Any] = {}

    def resolve(self, value: Any) -> Any:
        """Return the plain counterpart of one value of the pickle."""
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._make(value)
        return self._done[id(value)]

    def _make(self, value: Any) -> Any:
        if isinstance(value, _Tensor):
            return self._array(value)
        if isinstance(value, dict):
            return {_plain_key(key): self.resolve(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.resolve(item) for item in value)
        raise pickle.UnpicklingError(
            f"found a {type(value).__name__}; needed tensors and plain data"
        )

    def _array(self, tensor: _Tensor) -> np.ndarray:
        storage, path = tensor.storage, self._records.path
        if storage.key not in self._storages:
            # Writable without another copy.
            data = np.frombuffer(bytearray(self._records.read(f"data/{storage.key}")), np.uint8)
            self._storages[storage.key] = data
        data = self._storages[storage.key]
        if len(data) != storage.size * storage.dtype.itemsize:
            raise ConversionError(
                f"{path}: storage {storage.key} has {len(data)} bytes; needed "
                f"{storage.size} x {storage.dtype.itemsize}: damaged file, copy it again"
            )
        count = math.prod(tensor.shape)
        if count == 0:
            return np.zeros(tensor.shape, storage.dtype)
        last = tensor.offset + sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        if last >= storage.size or count > storage.size:
            raise ConversionError(
                f"{path}: a tensor of shape {shortened(tensor.shape)} and strides "
                f"{shortened(tensor.strides)} from {tensor.offset} on does not lie in its storage "
                f"of {storage.size} values"
            )
        flat = data.view(storage.dtype)
        strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)
        if count == storage.size and view.flags.c_contiguous:
            return view
        self._room -= view.nbytes
        if self._room < 0:
            raise ConversionError(
                f"{path}: its tensors are several times larger than the file, since they are parts "
                f"of the same storages; needed a checkpoint whose tensors have their own"
            )
        return np.array(view)  # contiguous


def _plain_key(key: Any) -> Any:
    if isinstance(key, str | int | float | bool):
        return key
    raise pickle.UnpicklingError(f"found a key of type {type(key).__name__}; needed text or number")
