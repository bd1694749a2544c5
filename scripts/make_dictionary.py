"""Makes `lm_server/lexicon/resources/cmudict.txt.xz` from the CMU Pronouncing Dictionary
(cmusphinx/cmudict).

Usage: python scripts/make_dictionary.py PATH/cmudict.dict

Stress digits, comments and repeated pronunciations are removed. A word keeps the order of its
pronunciations. Words with characters other than a-z, apostrophe, hyphen and full stop are left out.
A line is `word PH PH ...`. `cmudict.LICENSE` beside the result is the dictionary's licence.
"""

import argparse
import lzma
import re
from pathlib import Path

TARGET = Path(__file__).parents[1] / "lm_server/lexicon/resources/cmudict.txt.xz"


def convert(lines: list[str]) -> list[str]:
    """Convert raw dictionary lines to unique `word PH PH ...` lines in dictionary order."""
    seen: dict[str, None] = {}
    for line in lines:
        entry = line.split("#")[0].split()
        if not entry:
            continue
        word = re.sub(r"\(\d+\)$", "", entry[0]).lower()
        if re.fullmatch(r"[a-z'.-]*[a-z][a-z'.-]*", word):
            seen[" ".join([word, *(re.sub(r"\d", "", phone) for phone in entry[1:])])] = None
    return list(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="cmudict.dict of cmusphinx/cmudict")
    source = parser.parse_args().source
    lines = convert(source.read_text(encoding="utf-8").splitlines())
    TARGET.write_bytes(lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    words = len({line.split()[0] for line in lines})
    print(
        f"{TARGET.name}: {words} words, {len(lines)} pronunciations, {TARGET.stat().st_size} bytes"
    )


if __name__ == "__main__":
    main()
