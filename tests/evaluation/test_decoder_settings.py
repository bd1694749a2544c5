"""Which settings an evaluation uses, and what it says of those of another checkpoint."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from b2txt_jax.config import load_config
from b2txt_jax.evaluation.decoder_settings import SettingsFileError, settings_in_use
from b2txt_jax.inference.run import Run


def run_of(workdir: Path, step: int, weights: str = "raw") -> Run:
    params = {"weight": np.full(3, step, np.float32)}
    return Run(load_config("demo"), params, step, weights, workdir)


@pytest.fixture
def lm(tmp_path: Path) -> Path:
    folder = tmp_path / "lm"
    folder.mkdir()
    (folder / "lm.json").write_text("{}")
    return folder


def tuned(path: Path, run: Run | None, lm: Path, **about: Any) -> Path:
    """A settings file as `lm-server tune` writes it for logits of `run`. None: of an older one."""
    found: dict[str, Any] = {"lm_crc32": zlib.crc32((lm / "lm.json").read_bytes()), "llm": None}
    found |= {"backend": "flashlight", "expected_wer": 0.25}
    if run is not None:
        found["checkpoint"] = {**run.identity, "split": "val"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": 2, "settings": {}, "about": found | about}))
    return path


def test_settings_of_the_checkpoint_are_found_and_used(tmp_path: Path, lm: Path) -> None:
    run = run_of(tmp_path / "run", 400)
    older = tuned(tmp_path / "run/lm_settings/a.json", run, lm)
    newer = tuned(tmp_path / "run/lm_settings/b.json", run, lm)
    os.utime(older, (1e9, 1e9))
    tuned(tmp_path / "run/lm_settings/c.json", run_of(tmp_path / "run", 200), lm)
    found = settings_in_use(run, lm, ["--beam", "9"])
    assert (found.file, found.fits) == (newer, True)
    assert found.options(["--beam", "9"]) == ["--settings", str(newer), "--beam", "9"]
    assert found.to_json()["tuned_for"]["step"] == 400
    notice = found.notice(run, lm, "val")
    assert notice is not None
    assert "tuned for this checkpoint" in notice
    assert "whose WER is too good. Expected of others: 25.00 %" in notice
    assert "too good" not in str(found.notice(run, lm, "test"))


@pytest.mark.parametrize(
    ("about", "options"),
    [
        ({"lm_crc32": 1}, []),
        ({"backend": "wfst"}, []),
        ({"llm": "opt"}, []),
        ({}, ["--backend", "wfst"]),
        ({}, ["--llm=runs/opt"]),
    ],
)
def test_settings_for_another_decoder_are_not_used(
    tmp_path: Path, lm: Path, about: dict[str, Any], options: list[str]
) -> None:
    run = run_of(tmp_path / "run", 400)
    path = tuned(tmp_path / "run/lm_settings/a.json", run, lm, **about)
    found = settings_in_use(run, lm, options)
    assert (found.file, found.fits, found.options([])) == (None, False, [])
    notice = str(found.notice(run, lm, "val"))
    assert "search's defaults, tuned for no checkpoint" in notice
    assert f"{path} (step 400 (raw, parameters {run.fingerprint}), for another decoder)" in notice


def test_settings_that_tuning_expects_to_be_worse_are_not_used(tmp_path: Path, lm: Path) -> None:
    run = run_of(tmp_path / "run", 400)
    tuned(tmp_path / "run/lm_settings/a.json", run, lm, wer_before=0.2)
    found = settings_in_use(run, lm, [])
    assert found.file is None
    assert "expected to be worse than those that tuning began with" in found.others
    tuned(tmp_path / "run/lm_settings/a.json", run, lm, wer_before=0.3)
    assert settings_in_use(run, lm, []).found


def test_settings_of_another_checkpoint_are_named_with_both_steps(tmp_path: Path, lm: Path) -> None:
    now, before = run_of(tmp_path / "run", 400), run_of(tmp_path / "run", 200)
    path = tuned(tmp_path / "run/lm_settings/a.json", before, lm)
    defaults = settings_in_use(now, lm, [])
    assert defaults.file is None
    assert f"{path} (step 200 (raw, " in str(defaults.notice(now, lm, "val"))
    for options in (["--settings", str(path)], [f"--settings={path}"]):
        given = settings_in_use(now, lm, options)
        assert given.options(options) == options
        notice = str(given.notice(now, lm, "val"))
        assert notice.startswith(
            f"warning: the decoder's settings {path} were tuned for step 200 (raw, parameters "
            f"{before.fingerprint}), and this is step 400 (raw, parameters {now.fingerprint})."
        )
    assert f"--out {tmp_path}/run/lm_settings/lm_400.json" in notice
    assert (given.fits, given.to_json()["tuned_for"]["step"]) == (False, 200)


def test_averaged_weights_have_settings_of_their_own(tmp_path: Path, lm: Path) -> None:
    raw = run_of(tmp_path / "run", 400)
    tuned(tmp_path / "run/lm_settings/a.json", raw, lm)
    ema = Run(raw.config, {"weight": np.zeros(3, np.float32)}, 400, "ema", raw.workdir)
    found = settings_in_use(ema, lm, [])
    assert found.fits is False
    assert "--weights ema" in str(found.notice(ema, lm, "val"))


def test_settings_without_a_checkpoint_and_those_of_a_server_are_unknown(
    tmp_path: Path, lm: Path
) -> None:
    run = run_of(tmp_path / "run", 400)
    path = tuned(tmp_path / "old.json", None, lm)
    notice = str(settings_in_use(run, lm, ["--settings", str(path)]).notice(run, lm, "val"))
    assert f"{path} do not name the checkpoint that they were tuned for" in notice
    server = settings_in_use(run, None, [])
    assert server.fits is None
    assert "the running server's own" in str(server.notice(run, None, "val"))


@pytest.mark.parametrize("text", ["", "[]", "3"])
def test_a_file_that_is_none_of_tune_is_named(tmp_path: Path, lm: Path, text: str) -> None:
    path = tmp_path / "run/lm_settings/a.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(SettingsFileError, match=r"a\.json cannot be read .*tune again"):
        settings_in_use(run_of(tmp_path / "run", 1), lm, [])
