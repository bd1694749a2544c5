"""Claims about `benchmarks/levers.py` that need no training."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "levers.py"


@pytest.fixture(scope="module")
def levers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("levers", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["levers"] = module  # Where dataclasses look for their annotations.
    spec.loader.exec_module(module)
    return module


def test_curves_of_other_data_steps_or_keys_are_not_taken_for_these(
    levers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    trained = []

    def train(config, seeds, files) -> None:
        trained.append(config.train.steps)
        for file in files:
            file.write_text(json.dumps(levers.Trained([1], [50.0], 1.0)._asdict()))

    monkeypatch.setattr(levers, "train", train)
    monkeypatch.setattr(levers, "gflop_per_trial", lambda *_: 1.0)
    monkeypatch.setattr(levers, "picture", lambda *_: None)
    for data in ("data", "other"):
        (tmp_path / data / "hdf5_data_final" / "day").mkdir(parents=True)

    def run(data: str = "data", *more: str) -> None:
        out = ["--out", str(tmp_path / "out"), "--levers", "gru", "--seeds", "0"]
        monkeypatch.setattr("sys.argv", ["levers", "--data", str(tmp_path / data), *out, *more])
        levers.main()

    run()
    run()
    assert trained == [1000, 1000]
    for other in (("other",), ("data", "--steps", "7"), ("data", "--keys", "model.units=8")):
        with pytest.raises(SystemExit, match="2"):
            run(*other)
        assert "give another --out" in capsys.readouterr().err
    assert len(trained) == 2
