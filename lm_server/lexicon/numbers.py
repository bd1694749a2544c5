"""Numbers as they are read aloud, where there is one way to read them.

Read are numbers up to 99, round hundreds and thousands, numbers with commas (12,500), decimals
with one digit (3.5), ordinals (21st), percentages and, where the words around leave no doubt, years
before 2000. Not read are `911`, `10.30`, `5-4`, `$5` and other numbers with several readings.
"""

from __future__ import annotations

import functools
import re

_MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
_BEFORE = r"(?<![^\s(\[\"'\u201c\u2018\u2014])"
_AFTER = r"(?=[.,;:!?)\]\"'\u201d\u2019\u2014]*(?:\s|$)|-[A-Za-z])"
_YEAR = re.compile(
    rf"\b((?:in|since|until|year|{_MONTHS}),? )(1[1-9]\d\d)(?=[.,;:!?)]*$|[.,;:!?)]+\s)",
    re.IGNORECASE,
)
_ORDINAL = re.compile(rf"{_BEFORE}([1-9]\d?)(st|nd|rd|th){_AFTER}", re.IGNORECASE)
_CARDINAL = re.compile(
    rf"{_BEFORE}([1-9]?\d\.[1-9]|[1-9]\d{{0,2}}(?:,\d{{3}}){{1,3}}|[1-9]\d{{0,2}}000|[1-9]00|[1-9]?\d)"
    rf"(\s?%)?{_AFTER}"
)


def read_numbers(text: str) -> str:
    """Replace the numbers whose reading is sure by words. Leave the others as they are.

    >>> read_numbers("The 21st of 1,500 runs was 3.5 % faster than 911 in 1984.")
    'The twenty-first of one thousand five hundred runs was three point five percent faster than
    911 in nineteen eighty-four.'
    """
    text = _YEAR.sub(lambda found: found[1] + _say(found[2], "year"), text)
    text = _ORDINAL.sub(_ordinal, text)
    return _CARDINAL.sub(
        lambda found: _say(found[1], "cardinal") + (" percent" if found[2] else ""), text
    )


def _ordinal(found: re.Match[str]) -> str:
    number = int(found[1])
    suffix = "th" if number // 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return _say(found[1], "ordinal") if found[2].lower() == suffix else found[0]


@functools.lru_cache(1 << 14)
def _say(digits: str, form: str) -> str:
    # Imported late: it is an extra's, and few texts have digits that need it.
    from num2words import num2words

    bare = digits.replace(",", "")
    number = bare if "." in bare else int(bare)
    # Americans, of whose speech the dictionary is, say no "and".
    return str(num2words(number, to=form)).replace(",", "").replace(" and ", " ")
