"""A published graph is searched frame by frame, and a folder that has none is refused."""

import numpy as np
import pytest
from brute_force import Problem
from graph import write_graph

from lm_server.lm.reader import ModelFolderError
from lm_server.protocol import LM_CLASSES, SILENCE, ProtocolError
from lm_server.search.hot_words import HotWord
from lm_server.search.interface import BackendError
from lm_server.search.load import default_settings, load_model
from lm_server.settings import Settings

PROBLEM = Problem(
    {"at": (("AH", "T"),), "za": (("Z", "AH"),), "t": (("T",),)},
    {"<unk>": -2.0, "<s>": -99.0, "</s>": -1.0, "at": -0.7, "za": -0.8, "t": -1.1},
    {"<s>": -0.3, "at": -0.2, "za": -0.4, "t": -0.1},
    {("<s>", "za"): -0.3, ("za", "at"): -0.2},
    np.zeros((0, 41), np.float32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_graph(PROBLEM, tmp_path_factory.mktemp("graph"))


def clear(names):
    classes = [SILENCE if name == "sil" else name for name in names.split()]
    rows = [row for name in classes for row in [LM_CLASSES.index(name)] * 2 + [0]]
    logits = np.zeros((len(rows), 41), np.float32)
    logits[np.arange(len(rows)), rows] = 25.0
    return logits


def test_a_sentence_grows_word_by_word_in_any_chunks(folder):
    model = load_model(folder, "wfst")
    assert sorted(model.words) == ["at", "t", "za"]
    logits = clear("Z AH sil AH T sil T")
    for settings in (default_settings("wfst"), Settings(), Settings(max_active=1, min_active=0)):
        search = model.search(settings)
        partials = [search.step(frame[None]) for frame in logits]
        assert partials[-1][:2] == ("za", "at")
        assert ("za",) in partials
        (best,) = search.finish()
        # The last word has no silence.
        assert best.words == ("za", "at", "t")
        search.step(logits)
        (again,) = search.finish()
        assert again.words == best.words
        assert again.acoustic == pytest.approx(best.acoustic, rel=1e-5)
        assert search.step(logits[:0]) == ()
        assert search.finish() == ()


def test_sure_blanks_are_skipped_without_a_change_of_score(folder):
    model = load_model(folder, "wfst")
    blanks = np.zeros((6, 41), np.float32)
    blanks[:, 0] = 25.0
    logits = np.concatenate([blanks, clear("Z AH sil"), blanks, clear("AH T"), blanks])
    found = []
    for threshold in (1.0, 0.9):
        search = model.search(Settings(ctc_blank_skip_threshold=threshold))
        search.step(logits)
        found += search.finish()
    assert found[0].words == found[1].words == ("za", "at")
    assert found[1].acoustic == pytest.approx(found[0].acoustic, rel=1e-4)
    assert found[1].ngram == pytest.approx(found[0].ngram, rel=1e-5)


def test_bad_frames_are_refused_and_the_sentence_goes_on(folder):
    search = load_model(folder, "wfst").search(Settings())
    search.step(clear("Z AH sil"))
    with pytest.raises(ProtocolError):
        search.step(np.full((2, 41), np.nan, np.float32))
    search.step(clear("AH T sil"))
    assert search.finish()[0].words == ("za", "at")


def test_a_graph_takes_no_hot_words_and_says_what_does(folder):
    with pytest.raises(BackendError, match=r"its graph is fixed.*use the search flashlight"):
        load_model(folder, "wfst").search(Settings(), {"zoe": HotWord(1.0, (("Z", "OW"),))})


def test_a_folder_without_a_graph_is_refused_by_what_it_lacks(folder, tmp_path, model_folder):
    def refused(reason):
        with pytest.raises(ModelFolderError, match=reason):
            load_model(tmp_path, "wfst")

    with pytest.raises(ModelFolderError, match=r"no TLG\.fst.*lm-server import-kaldi"):
        load_model(model_folder, "wfst")
    (tmp_path / "TLG.fst").write_bytes(b"this is no graph")
    refused(r"has no words\.txt")
    (tmp_path / "words.txt").write_text("<eps> 0\nat one\n")
    refused(r"words\.txt, line 2, is 'at one'; needed a word and its number")
    (tmp_path / "words.txt").write_text("<eps> 0\nat 1\n")
    refused(r"TLG\.fst")
    (tmp_path / "TLG.fst").write_bytes((folder / "TLG.fst").read_bytes())
    search = load_model(tmp_path, "wfst").search(Settings())
    with pytest.raises(ModelFolderError, match=r"which words\.txt lacks"):
        search.step(clear("Z AH sil AH T sil"))
