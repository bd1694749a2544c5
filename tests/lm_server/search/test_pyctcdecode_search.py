"""pyctcdecode's search gives a sentence for speech, or says that it has none."""

import numpy as np
import pytest
from rich.console import Console
from small_model import say

from lm_server.lm.build import build
from lm_server.offline import decode_trial
from lm_server.protocol import LM_CLASSES, SILENCE, to_rnn_order
from lm_server.search.interface import NoSentenceError
from lm_server.search.load import default_settings, load_model
from lm_server.settings import Settings


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(model_folder, "pyctcdecode")


def babble(seed):
    """Logits of 15 phonemes that spell no words."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (45, len(LM_CLASSES))).astype(np.float32)
    for number, one in enumerate(rng.integers(1, 40, 15)):
        logits[3 * number : 3 * number + 2, one] += 9
        logits[3 * number + 2, 0] += 9
    return logits


@pytest.mark.slow
def test_speech_whose_hypotheses_all_die_is_searched_again_and_wider(model):
    search = model.search(default_settings("pyctcdecode"))
    wide = model.search(Settings(beam=50.0, max_active=100, max_classes=41))
    for one in (search, wide):
        for chunk in np.split(babble(0), [7, 30]):
            one.step(chunk)
    found = search.finish()
    assert found[0].words
    assert found == wide.finish()
    # What it kept is gone with the sentence.
    search.step(say(["the", "cat"]))
    assert search.finish()[0].sentence == "the cat"


def test_silence_alone_stays_an_empty_sentence(model):
    silence = np.zeros((20, len(LM_CLASSES)), np.float32)
    silence[:, LM_CLASSES.index(SILENCE)] = 9.0
    search = model.search(default_settings("pyctcdecode"))
    search.step(silence)
    assert search.finish()[0].words == ()
    assert search.finish() == ()


def test_a_sentence_that_no_word_fits_is_an_error_and_not_an_empty_answer(tmp_path):
    (tmp_path / "lexicon.txt").write_text("zebra Z IY B R AH\n")
    (tmp_path / "text.txt").write_text("zebra zebra\n" * 9)
    folder = tmp_path / "lm"
    build([tmp_path / "text.txt"], 1, tmp_path / "lexicon.txt", folder, Console(quiet=True))
    logits = np.full((3, len(LM_CLASSES)), -900.0, np.float32)
    logits[:, LM_CLASSES.index("Z")] = 0.0
    search = load_model(folder, "pyctcdecode").search(Settings(silence_penalty=1000.0))
    search.step(logits)
    with pytest.raises(NoSentenceError, match=r"fits these 3 frames.*use the search flashlight"):
        search.finish()
    assert search.finish() == ()
    outcome = decode_trial(search, "t1", to_rnn_order(logits))
    assert outcome.problem is not None
    assert outcome.problem.startswith("trial t1: no sentence")
