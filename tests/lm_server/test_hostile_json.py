"""JSON that Python's own reader gives up on is an error like any other broken file."""

import argparse
import os
import shutil

import pytest

from lm_server.client.answers import LanguageModelError, read_answer
from lm_server.commands.options import hot_words_from
from lm_server.errors import UserError
from lm_server.files.logits_file import read_logits
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


@pytest.mark.parametrize("text", ['{"cat": 1, "cat": 2}', '{"cat": {"weight": 1, "weight": 2}}'])
def test_a_name_given_twice_is_an_error_and_not_its_last_value(tmp_path, text):
    with pytest.raises(UserError, match="given twice"):
        decode_hot_words(text)
    path = tmp_path / "settings.json"
    path.write_text('{"format": 2, "settings": {"nbest": 3, "nbest": 4}}')
    with pytest.raises(UserError, match="'nbest' is given twice"):
        read_settings(path)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "settings.json"
    os.mkfifo(path)
    with pytest.raises(UserError, match="no regular file"):
        read_settings(path)
    with pytest.raises(UserError, match="no regular file"):
        hot_words_from(argparse.Namespace(hot_words=path))
    with pytest.raises(UserError, match="no regular file"):
        read_logits(path)
