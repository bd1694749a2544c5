"""What a checkpoint on a bad disk does: a changed bit is an error, not another weight."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from b2txt_jax.config import with_overrides
from b2txt_jax.training.checkpoint import BestScore, CheckpointError, Checkpoints
from b2txt_jax.training.checksum import checksums
from b2txt_jax.training.loop import train

PARAMS = {"a": np.arange(3000, dtype=np.float32).reshape(50, 60), "b": np.zeros(7, np.int32)}


def flip(path, position):
    """Flips one bit of the byte at this share of a file."""
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 0x10
    path.write_bytes(content)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.slow
def test_a_flipped_bit_and_a_short_file_name_the_step_and_the_way_back_and_that_way_works(
    tiny_config, tmp_path, request
):
    config = with_overrides(tiny_config, ["--config.train.steps=4"])
    train(with_overrides(config, ["--config.train.steps=3"]), tmp_path)
    latest = tmp_path / "checkpoints" / "latest"
    assert sorted(path.name for path in latest.iterdir()) == ["2", "3"]
    flip(largest_file(latest / "3"), 0.5)
    told = r"latest/3 cannot be read.*not what was saved.*remove that folder to go on from step 2"
    with pytest.raises(CheckpointError, match=told):
        train(config, tmp_path)
    for path in (latest / "3").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:
            path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"latest/3 cannot be read.*to go on from step 2"):
        train(config, tmp_path)
    shutil.rmtree(latest / "3")
    request.getfixturevalue("not_compiled")
    assert train(config, tmp_path).step == 2  # from which it goes on


def test_no_flipped_bit_of_the_best_parameters_gives_others(tmp_path):
    told = 0
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(5, PARAMS, BestScore(0.5, 1.0, 5))
        checkpoints.wait()
        path = largest_file(tmp_path / "checkpoints" / "best" / "5")
        whole = path.read_bytes()
        for position in np.linspace(0.01, 0.99, 25):
            flip(path, position)
            try:
                restored, _ = checkpoints.restore_best(PARAMS)
            except CheckpointError:
                told += 1
            else:  # bytes that nothing is read from
                jax.tree.map(np.testing.assert_array_equal, restored, PARAMS)
            path.write_bytes(whole)
    assert told > 15


def test_a_changed_score_is_told(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(5, PARAMS, BestScore(0.5, 1.0, 5))
        checkpoints.wait()
        path = tmp_path / "checkpoints" / "best" / "5" / "extra" / "metadata"
        extra = json.loads(path.read_text())
        extra["best"]["per"] = 0.25
        path.write_text(json.dumps(extra))
        with pytest.raises(CheckpointError, match=r"score and checksums are not what was saved"):
            checkpoints.restore_best(PARAMS)


def test_a_checkpoint_without_checksums_is_taken_with_a_warning(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_best(5, PARAMS, BestScore(0.5, 1.0, 5))
        checkpoints.wait()
        path = tmp_path / "checkpoints" / "best" / "5" / "extra" / "metadata"
        path.write_text(json.dumps({"best": json.loads(path.read_text())["best"]}))
        with pytest.warns(UserWarning, match="best/5 was written without checksums"):
            restored, _ = checkpoints.restore_best(PARAMS)
    np.testing.assert_array_equal(restored["a"], PARAMS["a"])


def test_every_kind_of_change_changes_the_checksum():
    values = jax.random.normal(jax.random.key(0), (4, 6))
    bits = np.asarray(values).view(np.uint32)

    def of(changed):
        return checksums({"x": changed.view(np.float32)})["x"]

    seen = {of(bits)}
    for row, column in np.ndindex(bits.shape):
        for bit in range(32):
            changed = bits.copy()
            changed[row, column] ^= np.uint32(1 << bit)
            seen.add(of(changed))
    for changed in (
        bits ^ np.uint32(1 << 31),  # all signs: changes that a plain sum would cancel
        np.roll(bits, 1, axis=1),
        bits[::-1].copy(),
        np.zeros_like(bits),
    ):
        seen.add(of(changed))
    assert len(seen) == 1 + bits.size * 32 + 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_])
def test_each_type_has_a_checksum_and_a_scalar_too(dtype):
    one, other = jnp.ones((), dtype), jnp.zeros((), dtype)
    assert checksums({"x": one}) != checksums({"x": other})
    assert checksums([{"x": one}, other]).keys() == {"0/x", "1"}
