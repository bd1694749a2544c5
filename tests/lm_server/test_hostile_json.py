"""JSON that Python's own reader gives up on is an error like any other broken file."""

import shutil

import pytest

from lm_server.client.answers import LanguageModelError, read_answer
from lm_server.errors import UserError
from lm_server.lm.reader import read_description
from lm_server.protocol import decode_hot_words
from lm_server.settings import read_settings
from lm_server.tuning.references import read_references

DEEP, LONG = "[" * 100_000, '{"format": ' + "7" * 5_000 + "}"


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long number"])
def test_json_beyond_the_readers_limits_is_an_error(tmp_path, model_folder, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    shutil.copytree(model_folder, tmp_path / "lm")
    (tmp_path / "lm" / "lm.json").write_text(text)
    for read, given in (
        (read_settings, path),
        (read_references, path),
        (read_description, tmp_path / "lm"),
        (decode_hot_words, text),
    ):
        with pytest.raises(UserError):
            read(given)
    scoring = b"a;0.0;0.0;0.0;0.0"
    with pytest.raises(LanguageModelError, match="confidences"):
        read_answer({b"scoring": scoring, b"word_confidences": text.encode()})
