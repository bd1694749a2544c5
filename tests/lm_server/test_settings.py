"""Settings keep the types of their declarations, whatever JSON made of the numbers."""

import pytest

from lm_server.settings import Settings, SettingsError, changed


def test_numbers_get_the_type_of_their_setting():
    found = changed(Settings(), {"beam": 14, "nbest": 5.0})
    assert (found.beam, type(found.beam)) == (14.0, float)
    assert (found.nbest, type(found.nbest)) == (5, int)


@pytest.mark.parametrize("value", ["5", None, True, [5]])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(SettingsError, match=r"nbest is .*; needed a number"):
        changed(Settings(), {"nbest": value})


def test_a_part_of_a_whole_number_is_refused():
    with pytest.raises(SettingsError, match="nbest"):
        changed(Settings(), {"nbest": 5.5})
