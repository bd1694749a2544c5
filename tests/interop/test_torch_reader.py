"""PyTorch files are read as PyTorch reads them, and nothing in them is ever run."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from b2txt_jax.interop.errors import ConversionError
from b2txt_jax.interop.torch_reader import read_torch_file
from b2txt_jax.interop.torch_writer import write_torch_file


def archive(path: Path, pickled: bytes, **records: bytes) -> Path:
    """A file in torch's zip format with this data.pkl."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", **records}.items():
            file.writestr(f"archive/{name}", data)
    return path


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
    ids=str,
)
def test_values_of_every_dtype_are_read_bit_for_bit(tmp_path, dtype):
    tensor = (torch.randn(4, 5) * 40).to(dtype)
    torch.save({"x": tensor}, tmp_path / "file")
    (found,) = read_torch_file(tmp_path / "file").values()
    if dtype == torch.bfloat16:
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found.view(np.int16), tensor.view(torch.int16).numpy())
    else:
        assert found.dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(found, tensor.numpy())


def test_views_keep_their_offset_size_and_strides(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "whole": base,
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:, 1::2, 3:],
        "row": base[2, 3],
        "scalar": base[1, 2, 3],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[0].T.contiguous()),
    }
    torch.save(views, tmp_path / "file")
    found = read_torch_file(tmp_path / "file")
    assert list(found) == list(views)
    for name, view in views.items():
        assert found[name].shape == tuple(view.shape)
        np.testing.assert_array_equal(found[name], view.detach().numpy(), err_msg=name)


def test_containers_and_numbers_come_as_plain_python(tmp_path):
    value = {
        "ordered": collections.OrderedDict(b=1, a=2.5),
        "list": [None, True, -3, 2**70, "text é", (1, ("deep",))],
        7: np.float64(1.5),
        "int": np.int64(-4),
    }
    torch.save(value, tmp_path / "file")
    found = read_torch_file(tmp_path / "file")
    assert found == {
        "ordered": {"b": 1, "a": 2.5},
        "list": value["list"],
        7: 1.5,
        "int": -4,
    }
    assert list(found["ordered"]) == ["b", "a"]


def test_what_is_written_is_what_weights_only_loading_gives(tmp_path):
    random = np.random.default_rng(0)
    value = {
        "matrix": random.normal(size=(3, 4)).astype(np.float32),
        "turned": random.normal(size=(3, 4)).astype(np.float64).T,
        "scalar": np.array(7.0, np.float32),
        "empty": np.zeros((0, 2), np.float16),
        "brain": random.normal(size=5).astype(ml_dtypes.bfloat16),
        "numbers": [0, 255, 256, -1, 2**31, -(2**40), 0.1, float("inf")],
        "others": (None, True, False, "é", {"nested": {}}),
    }
    write_torch_file(tmp_path / "file", value)
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "file", weights_only=True, mmap=mapped)
        assert list(loaded) == list(value)
        assert loaded["numbers"] == value["numbers"]
        assert loaded["others"] == value["others"]
        assert torch.equal(
            loaded["brain"].view(torch.int16), torch.tensor(value["brain"].view(np.int16))
        )
        for name in ("matrix", "turned", "scalar", "empty"):
            assert loaded[name].shape == value[name].shape
            np.testing.assert_array_equal(loaded[name].numpy(), value[name])
    again = read_torch_file(tmp_path / "file")
    np.testing.assert_array_equal(again["turned"], value["turned"])
    write_torch_file(tmp_path / "again", value)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_something_that_cannot_be_written_leaves_no_file(tmp_path):
    with pytest.raises(TypeError, match="cannot write a set"):
        write_torch_file(tmp_path / "file", {"x": {1, 2}})
    assert list(tmp_path.iterdir()) == []


class Evil:
    """Runs a shell command when it is unpickled in the ordinary way."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_calls_a_function_is_refused_by_name_and_not_run(tmp_path):
    trap = tmp_path / "sprung"
    torch.save({"model_state_dict": Evil(trap)}, tmp_path / "file")
    with pytest.raises(ConversionError, match=r"asks for (posix|os)\.system.*weights_only=True"):
        read_torch_file(tmp_path / "file")
    assert not trap.exists()
    # The trap is a real one: the ordinary reader springs it.
    torch.load(tmp_path / "file", weights_only=False)
    assert trap.exists()


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ%b(%bt(%bt\x89ccollections\nOrderedDict\n)RtR"
)
NUMBERS = np.arange(4, dtype=np.float32).tobytes()


def test_the_hand_made_tensor_of_the_next_tests_is_sound(tmp_path):
    pickled = b"\x80\x02" + TENSOR % (b"K\x01", b"K\x03", b"K\x01") + b"."
    found = read_torch_file(archive(tmp_path / "file", pickled, **{"data/0": NUMBERS}))
    np.testing.assert_array_equal(found, [1, 2, 3])


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.", r"asks for builtins\.eval"),
        (b"ctorch._utils\n_rebuild_tensor\n.", r"asks for torch\._utils\._rebuild_tensor,"),
        (b"ctorch\nfloat32\n.", r"asks for torch\.float32"),
        (b"(X\x01\x00\x00\x001ibuiltins\neval\n.", "instruction INST"),
        (b"ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        (pickle.dumps(os.system, protocol=4), "instruction (FRAME|SHORT_BINUNICODE)"),
        (b"ccollections\nOrderedDict\n}X\x05\x00\x00\x00_callK\x01sb.", "change a _Function"),
        (b"ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb.", "change a _StorageType"),
        (TENSOR % (b"K\x00", b"K\x01", b"K\x01") + b"]K\x00ab.", "change a _Tensor"),
        (TENSOR % (b"K\x00", b"K\x05", b"K\x01") + b".", "does not lie in its storage of 4"),
        (TENSOR % (b"K\x03", b"K\x02", b"K\x01") + b".", "does not lie in its storage of 4"),
        (TENSOR % (b"K\x00", b"J\x00\x00\x00\x40", b"K\x00") + b".", "does not lie"),
        (TENSOR % (b"J\xff\xff\xff\xff", b"K\x01", b"K\x01") + b".", "offset -1"),
        (TENSOR % (b"K\x00", b"K\x02K\x02", b"K\x01") + b".", "as many strides as axes"),
        (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR.", "numpy type 'O8'"),
        (b"ctorch\nFloatStorage\n.", "found a _StorageType"),
        (b"]q\x00h\x00a.", "RecursionError"),
        (b"]r\xff\xff\xff\x7f.", "memo index"),
        (b"K\x01", "damaged|cannot be read"),
        (b"X\x01\x00\x00\x00aQ.", "where a tensor's storage is needed"),
    ],
)
def test_pickles_beyond_plain_tensors_are_refused(tmp_path, pickled, message):
    pickled = pickled if pickled.startswith(b"\x80") else b"\x80\x02" + pickled
    with pytest.raises(ConversionError, match=message):
        read_torch_file(archive(tmp_path / "file", pickled, **{"data/0": NUMBERS}))


def test_a_value_that_is_repeated_a_billion_times_by_reference_is_made_once(tmp_path):
    # [[[...], [...]], ...] thirty levels deep, each level twice the one below
    pickled = b"\x80\x02]q\x00"
    for level in range(30):
        pickled += b"](h%ch%ceq%c" % (level, level, level + 1)
    found = read_torch_file(archive(tmp_path / "file", pickled + b"."))
    assert found[0] is found[1]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (TENSOR % (b"K\x00", b"%b", b"K\x01") + b".", "a tensor has offset 0, shape"),
        (b"%bQ.", "where a tensor's storage is needed"),
        (b"ccollections\nOrderedDict\n)R%bK\x01s.", "a key that is neither text nor a number"),
        (
            b"}ctorch._utils\n_rebuild_parameter\n(%btRK\x01s.",
            "a key that is neither text nor a number",
        ),
        (b"(%bK\x01d.", "a key that is neither text nor a number"),
    ],
)
def test_values_of_endless_text_or_hash_are_refused_at_once(tmp_path, pickled, message):
    endless = b"K\x01\x85q\x00"  # a tuple of tuples, sixty levels deep
    for level in range(60):
        endless += b"h%ch%c\x86q%c" % (level, level, level + 1)
    pickled = b"\x80\x02" + endless + pickled.replace(b"%b", b"h\x3c")
    with pytest.raises(ConversionError, match=message) as refused:
        read_torch_file(archive(tmp_path / "file", pickled, **{"data/0": NUMBERS}))
    assert len(str(refused.value)) < 500


def test_an_object_of_a_class_is_named_with_its_key(tmp_path):
    value = {"model_state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace(x=1)}
    for checkpoint in (value, {"first": "args", **value}):  # the second time from the memo
        torch.save(checkpoint, tmp_path / "file")
        with pytest.raises(
            ConversionError, match=r"under the key 'args' asks for argparse.Namespace.*without 'arg"
        ):
            read_torch_file(tmp_path / "file")


def test_tensors_on_one_storage_are_read_once_and_do_not_multiply(tmp_path):
    base = torch.arange(200_000.0)
    torch.save([base.view(400, 500) for _ in range(2000)] + [base[:-1]], tmp_path / "file")
    torch.save([base[index:] for index in range(2000)], tmp_path / "parts")
    with zipfile.ZipFile(tmp_path / "file") as file:
        size = file.getinfo("file/data/0").file_size
    tracemalloc.start()
    found = read_torch_file(tmp_path / "file")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 2001
    np.testing.assert_array_equal(found[0], base.view(400, 500))
    np.testing.assert_array_equal(found[2000], base[:-1])
    assert most < 8 * size
    with pytest.raises(ConversionError, match="several times larger than the file"):
        read_torch_file(tmp_path / "parts")


def test_files_that_are_no_checkpoint_say_what_to_do(tmp_path):
    with pytest.raises(ConversionError, match="does not exist"):
        read_torch_file(tmp_path / "missing")
    torch.save({"x": torch.ones(3)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match="save it again with a newer PyTorch: ") as refused:
        read_torch_file(tmp_path / "old")
    advice = "torch.save(torch.load(FILE, map_location='cpu', weights_only=True), NEW_FILE)"
    assert str(refused.value).endswith(advice)
    exec(advice, {"torch": torch, "FILE": tmp_path / "old", "NEW_FILE": tmp_path / "new"})
    np.testing.assert_array_equal(read_torch_file(tmp_path / "new")["x"], np.ones(3))
    # torch.jit.save writes its constants beside the data.
    script = archive(tmp_path / "script", b"\x80\x02}.", **{"constants.pkl": b"\x80\x02)."})
    with pytest.raises(ConversionError, match="TorchScript"):
        read_torch_file(script)
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("a/readme.txt", "hello")
    with pytest.raises(ConversionError, match=r"0 data\.pkl"):
        read_torch_file(tmp_path / "zip")


def test_a_file_cut_short_or_changed_is_refused(tmp_path):
    torch.save({"x": torch.ones(1000)}, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    for length in (len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ConversionError, match="cut short"):
            read_torch_file(tmp_path / "cut")
    at = whole.index(np.ones(1000, np.float32).tobytes()) + 100
    (tmp_path / "changed").write_bytes(whole[:at] + b"\xee" + whole[at + 1 :])
    with pytest.raises(ConversionError, match="CRC"):
        read_torch_file(tmp_path / "changed")
    for records in ({}, {"data/0": NUMBERS[:-1]}, {"data/0": NUMBERS, "byteorder": b"big"}):
        pickled = b"\x80\x02" + TENSOR % (b"K\x00", b"K\x04", b"K\x01") + b"."
        with pytest.raises(ConversionError, match=r"lacks data/0|has 15 bytes|byte order"):
            read_torch_file(archive(tmp_path / "hand", pickled, **records))
