"""Claims about `b2txt evaluate --with`: several runs that answer each trial together."""

from dataclasses import replace
from pathlib import Path

import pytest

from b2txt_jax.cli import main
from b2txt_jax.config import Config
from b2txt_jax.data.reader import open_folder
from b2txt_jax.evaluation.combine import as_result
from b2txt_jax.evaluation.results import read_result
from b2txt_jax.interop.convert import write_workdir
from b2txt_jax.interop.nejm import Run as Weights
from b2txt_jax.training.checkpoint import BestScore
from b2txt_jax.training.step import init_state
from lm_server.lexicon.text_rules import normalise
from lm_server.rescoring.consensus import agree


def test_a_result_of_several_runs_needs_a_place_of_its_own(tmp_path: Path, capsys) -> None:
    assert main(["evaluate", "--workdir", str(tmp_path), "--with", "other", "--lm", "lm"]) == 2
    assert "--with is given without --out" in capsys.readouterr().err


def test_a_trial_that_no_system_answers_fails_and_a_problem_of_one_is_kept() -> None:
    nobody = as_result("t", agree([[], []]))
    assert (nobody.answer, nobody.error) == (None, "no system has a sentence")
    some = as_result("t", agree([[], [("a b", -1.0)]]), 2.5, "out of memory")
    assert some.answer is not None
    assert (some.answer.sentence, some.answer.confidence, some.seconds) == ("a b", 1.0, 2.5)
    assert some.answer.problem == "out of memory"


@pytest.mark.slow
def test_they_answer_what_their_own_results_agree_on(
    tiny_config: Config, simulated: Path, build_lm, tmp_path: Path, capsys
) -> None:
    """Against `b2txt consensus` of the results that each run has alone."""
    days = sorted(path.name for path in (simulated / "hdf5_data_final").iterdir())
    config = replace(tiny_config, data=replace(tiny_config.data, sessions=tuple(days)))
    folders = []
    for seed in (1, 2):
        one = replace(config, train=replace(config.train, seed=seed))
        folders.append(str(tmp_path / f"run_{seed}"))
        state = init_state(one, len(days))
        write_workdir(Path(folders[-1]), Weights(one, state, BestScore(0.5, 9.0, 0)))
    reader = open_folder(config.data.root, config.data.feature_count)
    refs = reader.find_trials(days, "val", labels_needed=False)
    lm = ["--lm", str(build_lm([normalise(reader.sample(ref).sentence or "") for ref in refs]))]
    for folder in folders:
        main(["evaluate", "--workdir", folder, *lm])
    alone = [str(path) for folder in folders for path in (Path(folder) / "val").iterdir()]
    outs = {name: str(tmp_path / name) for name in ("consensus", "mbr", "logits", "passes")}
    main(["consensus", *alone, "--out", outs["consensus"]])
    capsys.readouterr()
    together = ["evaluate", "--workdir", folders[0], "--with", folders[1], *lm]
    main([*together, "--out", outs["mbr"]])
    shown = capsys.readouterr().out
    assert all(f"{folder}: WER" in shown for folder in folders)
    assert "mean of the 2 systems" in shown
    found, expected = (read_result(Path(outs[name])) for name in ("mbr", "consensus"))
    assert [one.decoded for one in found.trials] == [one.decoded for one in expected.trials]
    assert found.rate("wer") == expected.rate("wer")
    assert found.rate("per") is not None
    main([*together, "--combine", "logits", "--out", outs["logits"]])
    averaged = read_result(Path(outs["logits"]))
    assert averaged.rate("per") == found.rate("per")
    assert averaged.content["settings"]["combine"] == "logits"
    assert averaged.parameters not in {read_result(Path(one)).parameters for one in alone}
