"""A grammar that Kaldi's own arpa2fst makes scores, once imported, as the ARPA that it is of."""

import gzip
import json
import lzma
import math
import re
import struct
from collections import defaultdict

import kaldifst
import kaldilm
import kenlm
import numpy as np
import pytest
from rich.console import Console
from test_kneser_ney import MEGABYTE, as_dictionary, encode, zipf_text

from lm_server.__main__ import main
from lm_server.errors import UserError
from lm_server.lexicon.pronunciations import LexiconError
from lm_server.lm.arpa import ModelError
from lm_server.lm.estimate.kneser_ney import estimate
from lm_server.lm.kaldi import openfst
from lm_server.lm.kaldi.grammar import read_symbols, to_model
from lm_server.lm.kaldi.importer import Dropped, import_kaldi, kaldi_entries
from lm_server.lm.kaldi.openfst import Fst, FstError, read_fst

QUIET = Console(quiet=True)
WORDS = (  # noqa: SIM905
    "the of and to in is that it was for on are as with "
    "his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will "
    "each about how up out them then she many some so these would other "
).split()


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    """(path, n-gram -> (log10 p, log10 back-off)) of a pruned 4-gram model over common words."""
    folder = tmp_path_factory.mktemp("arpa")
    sentences = [[WORDS[int(w[1:])] for w in s] for s in zipf_text(5, 1500, len(WORDS))]
    tokens, words = encode(sentences)
    model = estimate(tokens, words, 4, 64 * MEGABYTE, folder, [0, 0, 1, 1]).model
    found = {
        gram: (math.log10(p) if p > 1e-90 else -99.0, math.log10(b))
        for gram, (p, b) in as_dictionary(model).items()
    }
    lines = ["\\data\\"]
    by_order = defaultdict(list)
    for gram, (p, b) in found.items():
        by_order[len(gram)].append(f"{p:.7f}\t{' '.join(gram)}" + (f"\t{b:.7f}" if b else ""))
    lines += [f"ngram {n}={len(rows)}" for n, rows in by_order.items()]
    for n, rows in by_order.items():
        lines += ["", f"\\{n}-grams:", *rows]
    path = folder / "lm.arpa"
    path.write_text("\n".join([*lines, "", "\\end\\"]) + "\n")
    return path, found


def symbols(found):
    """words.txt of Kaldi for the model."""
    words = sorted({gram[0] for gram in found if len(gram) == 1} - {"<unk>", "<s>", "</s>"})
    names = ["<eps>", "<UNK>", *words, "#0", "<s>", "</s>"]
    return "".join(f"{name} {number}\n" for number, name in enumerate(names))


def grammar(path, found, folder, change=lambda lines: lines, const=False, style="#0"):
    """A folder with words.txt and the G.fst of an ARPA."""
    folder.mkdir()
    (folder / "words.txt").write_text(symbols(found))
    text = kaldilm.arpa2fst(
        str(path),
        disambig_symbol=style,
        read_symbol_table=str(folder / "words.txt"),
        max_arpa_warnings=0,
    )
    lines = [line.split() for line in text.splitlines() if line.strip()]
    fst = kaldifst.compile("\n".join("\t".join(line) for line in change(lines)) + "\n", False)
    fst = kaldifst.StdConstFst(fst) if const else fst
    fst.write(str(folder / "G.fst"))
    return folder


def shuffle_states(lines):
    """States in another order, as after any tool that renumbers them; the start stays first."""
    states = sorted({line[0] for line in lines} | {line[1] for line in lines if len(line) > 2})
    names = dict(zip(states, np.random.default_rng(3).permutation(len(states)), strict=True))
    rest = [
        [str(names[f]) if i == 0 or (i == 1 and len(line) > 2) else f for i, f in enumerate(line)]
        for line in lines
    ]
    start, others = rest[0], rest[1:]
    return [start, *others[::-1]]


def without_redundant_states(lines):
    """As Kaldi does it: states that only go back are skipped, their weights added to the arcs."""
    label = next(line[2] for line in lines if len(line) > 3 and line[3] == "0" and line[2] != "0")
    leaving = defaultdict(list)
    for line in lines:
        leaving[line[0]].append(line)

    def follow(state, weight):
        arcs = leaving[state]
        if len(arcs) == 1 and len(arcs[0]) > 3 and arcs[0][2] == label:
            return follow(arcs[0][1], weight + float([*arcs[0], "0"][4]))
        return state, weight

    changed = []
    for line in lines:
        if len(line) > 2:
            state, weight = follow(line[1], float([*line, "0"][4]))
            line = [line[0], state, line[2], line[3], repr(weight)]
        changed.append(line)
    reached = {changed[0][0]} | {line[1] for line in changed if len(line) > 2}
    assert len(reached) < len(leaving)
    return [line for line in changed if line[0] in reached]


def check_scores(folder, path, found):
    ours = kenlm.Model(str(folder / "lm.bin"))
    theirs = kenlm.Model(str(path))
    rng = np.random.default_rng(0)
    names = [gram[0] for gram in found if len(gram) == 1 and gram[0][0] != "<"]
    sentences = [list(rng.choice(names, rng.integers(0, 9))) for _ in range(150)]
    sentences += [[WORDS[int(w[1:])] for w in s] for s in zipf_text(5, 150, len(WORDS))]
    for words in sentences:
        sentence = " ".join(w for w in words if w in names)
        assert ours.score(sentence) == pytest.approx(theirs.score(sentence), abs=2e-4), sentence


@pytest.mark.parametrize(
    ("change", "const", "style"),
    [
        (lambda lines: lines, False, "#0"),
        (lambda lines: lines, True, "#0"),
        (shuffle_states, False, "#0"),
        (without_redundant_states, False, "#0"),
        (lambda lines: lines, False, ""),
    ],
    ids=["vector", "const", "renumbered", "without redundant states", "older style"],
)
def test_an_imported_grammar_scores_as_its_arpa(tmp_path, arpa, change, const, style):
    path, found = arpa
    folder = grammar(path, found, tmp_path / "kaldi", change, const, style)
    import_kaldi(folder, tmp_path / "lm", console=QUIET)
    check_scores(tmp_path / "lm", path, found)
    assert json.loads((tmp_path / "lm" / "lm.json").read_text())["order"] == 4


def test_an_imported_arpa_scores_as_it_is(tmp_path, arpa):
    path, found = arpa
    (tmp_path / "text.txt").write_text("The of and zebras.\n")
    import_kaldi(path, tmp_path / "lm", console=QUIET, held_out=[tmp_path / "text.txt"])
    check_scores(tmp_path / "lm", path, found)
    figures = json.loads((tmp_path / "lm" / "lm.json").read_text())
    scores = list(kenlm.Model(str(path)).full_scores("the of and zebras"))
    inside = sum(not outside for *_, outside in scores)
    assert 1 < inside < 5
    assert figures["oov_rate"] == (5 - inside) / 4
    log10 = sum(score for score, _, outside in scores if not outside)
    assert figures["perplexity"] == pytest.approx(10 ** (-log10 / inside), rel=1e-3)
    words = {line.split()[0] for line in (tmp_path / "lm" / "lexicon.txt").open()}
    assert words == {gram[0] for gram in found if len(gram) == 1 and gram[0][0] != "<"}


TINY = """\
\\data\\
ngram 1=9
ngram 2=2

\\1-grams:
-1.5\t<UNK>
-99\t<s>\t-0.3
-0.9\t</s>
-0.7\tTHE\t-0.25
-1.1\tCat
-1.9\tcat
-1.3\tblorked
-1.4\tr2d2
-1.8\tsat

\\2-grams:
-0.2\t<s> THE
-0.5\tTHE Cat

\\end\\
"""


def test_what_is_dropped_is_named_and_what_is_missing_is_guessed(tmp_path, capsys):
    (tmp_path / "lm.arpa").write_text(TINY)
    (tmp_path / "lexicon.txt").write_text(
        "!SIL SIL\nsat S AE1 T SIL\nsat S AE1 T\nsat 0.5 S_B AA_I T_E\ncat K QQ T\n"
    )
    assert main(["import-kaldi", str(tmp_path), "--out", str(tmp_path / "lm")]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    for part in (
        "dropped 2 words (no words of a-z, apostrophe and hyphen): r2d2, <UNK>",
        "dropped 1 words (written as a likelier word but for capitals): cat",
        "dropped 1 words (lexicon entries with unknown phonemes): cat",
        "4 words (1 with guessed pronunciations)",
    ):
        assert part in shown, shown
    lexicon = (tmp_path / "lm" / "lexicon.txt").read_text()
    assert "sat S AE T\nsat S AA T\n" in lexicon
    assert re.search(r"^blorked B L AO", lexicon, re.MULTILINE)
    model = kenlm.Model(str(tmp_path / "lm" / "lm.bin"))
    assert model.score("the cat", eos=False) == pytest.approx(-0.2 - 0.5)
    # Kaldi's word for unknown ones gives its probability, but not more than the rarest word's.
    assert model.score("nonsense", bos=False, eos=False) == pytest.approx(-1.8)
    arguments = ["import-kaldi", str(tmp_path / "lm.arpa"), "--no-g2p", "--quantise", "8"]
    assert main([*arguments, "--out", str(tmp_path / "lm")]) == 0
    assert "(without a pronunciation): blorked" in " ".join(capsys.readouterr().err.split())


def test_lexicon_lines_lose_silences_stress_and_marks():
    lines = ["A AH0 SIL", "ab 1.0 AE1_B B_E", "<SIL> SIL", "x 0.25 K S #1", "", "odd"]
    dropped = Dropped()
    assert list(kaldi_entries(lines, dropped)) == [
        ("a", ("AH",)),
        ("ab", ("AE", "B")),
        ("x", ("K", "S")),
    ]
    assert not dropped.words


def test_files_that_are_no_grammar_are_refused(tmp_path, arpa, capsys):
    path, found = arpa
    folder = grammar(path, found, tmp_path / "kaldi")
    whole = (folder / "G.fst").read_bytes()
    log = bytearray(whole)
    log[18:26] = b"log_arcs"
    for content, reason in (
        (b"", "is no OpenFst file"),
        (b"\\data\\ and more", "is no OpenFst file"),
        (whole[: len(whole) // 2], "is cut short"),
        (whole[:40], "is cut short"),
        (bytes(log), "transducer with log_arcs arcs"),
        (whole[:-4] + struct.pack("<i", 10**6), "is damaged"),
    ):
        (folder / "G.fst").write_bytes(content)
        with pytest.raises(FstError, match=reason):
            read_fst(folder / "G.fst")
    (folder / "G.fst").write_bytes(whole)
    names = symbols(found).splitlines(keepends=True)
    (folder / "words.txt").write_text("".join(n for n in names if not n.startswith("when ")))
    with pytest.raises(ModelError, match=r"which words\.txt lacks"):
        import_kaldi(folder, tmp_path / "lm", console=QUIET)
    (folder / "words.txt").unlink()
    with pytest.raises(ModelError, match=r"there is no .*words.txt"):
        import_kaldi(folder, tmp_path / "lm", console=QUIET)
    (folder / "G.fst").unlink()
    assert main(["import-kaldi", str(folder), "--out", str(tmp_path / "lm")]) == 2
    assert "has no G.fst, and of ARPA files it has none" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not (tmp_path / "lm").exists()


def test_a_transducer_that_is_no_grammar_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text("<eps> 0\nthe 1\n#0 2\n<s> 3\n</s> 4\n")
    text = "0 1 1 1 0.5\n0 2 2 0 0.1\n1 3 2 0 0.1\n2 0 1 1 0.2\n3 1 1 1 0.2\n2\n"
    kaldifst.compile(text, False).write(str(tmp_path / "G.fst"))
    with pytest.raises(ModelError, match="has 2 states that could be the empty history"):
        import_kaldi(tmp_path, tmp_path / "lm", console=QUIET)


NAMES = ["lm.gz", "lm", "lm.ARPA", "lm_tgmed", "lm.arpa.GZ", "lm.lm.xz", "lm.txt", "packed"]


@pytest.mark.parametrize("name", NAMES)
def test_an_arpa_is_found_under_any_name(tmp_path, name):
    pack = {"z": gzip.compress, "d": gzip.compress, "Z": gzip.compress, "x": lzma.compress}
    form = "x" if name.endswith("xz") else name[-1]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(pack.get(form, bytes)(b"A preamble.\n" + TINY.encode()))
    (tmp_path / "in" / "final.mdl").write_bytes(bytes(range(256)))
    for source in (tmp_path / "in" / name, tmp_path / "in"):
        import_kaldi(source, tmp_path / "lm", console=QUIET)
        model = kenlm.Model(str(tmp_path / "lm" / "lm.bin"))
        assert model.score("the cat", eos=False) == pytest.approx(-0.2 - 0.5)


@pytest.mark.parametrize("weight", ["nan", "-inf", "-0.5"])
@pytest.mark.parametrize("place", ["word", "end"])
def test_a_grammar_with_a_weight_that_is_no_probability_is_refused(tmp_path, weight, place):
    (tmp_path / "words.txt").write_text("<eps> 0\nthe 1\n#0 2\n<s> 3\n</s> 4\n")
    arcs = np.array([(1, 1, 0.5, 1), (2, 2, 0.1, 1)], openfst._ARC)
    ends = [np.inf, 0.7]
    if place == "word":
        arcs["weight"][0] = float(weight)
    else:
        ends[1] = float(weight)
    fst = Fst(0, np.float32(ends), np.array([0, 0]), arcs["label"], arcs["weight"], arcs["target"])
    with pytest.raises(ModelError, match="1 weights that are no -ln of a probability"):
        to_model(fst, read_symbols(tmp_path / "words.txt"))


@pytest.mark.parametrize("const", [False, True], ids=["vector", "const"])
def test_a_damaged_grammar_is_an_error_whatever_is_damaged(tmp_path, const):
    (tmp_path / "lm.arpa").write_text(TINY)
    found = {(line.split()[1],): None for line in TINY.splitlines() if line.count("\t")}
    folder = grammar(tmp_path / "lm.arpa", found, tmp_path / "kaldi", const=const)
    whole, numbers = (folder / "G.fst").read_bytes(), read_symbols(folder / "words.txt")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = np.frombuffer(whole, np.uint8).copy()
        place = int(rng.integers(0, len(damaged) - 4)) // 4 * 4
        value = rng.choice([-1, 1, 2**31 - 1, -(2**31), int(rng.integers(0, 2**31))])
        damaged[place : place + 4] = np.int32([value]).view(np.uint8)
        damaged = damaged[: rng.choice([len(damaged), int(rng.integers(0, len(damaged)))])]
        (folder / "G.fst").write_bytes(damaged.tobytes())
        try:
            to_model(read_fst(folder / "G.fst"), numbers)
        except UserError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", r"words\.txt is empty"), ("a " + "7" * 5000, "line 1"), ("a \u00b2", "line 1")],
)
def test_a_symbol_table_that_cannot_be_used_is_refused(tmp_path, text, reason):
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(ModelError, match=reason):
        read_symbols(tmp_path / "words.txt")


def test_files_that_are_no_text_are_refused_in_one_line(arpa, tmp_path, capsys):
    path, found = arpa
    folder = grammar(path, found, tmp_path / "kaldi")
    binary = tmp_path / "lexicon.bin"
    binary.write_bytes(bytes(range(128, 256)) * 9)
    out = ["--out", str(tmp_path / "lm")]
    assert main(["import-kaldi", str(path), "--lexicon", str(binary), *out]) == 2
    assert "lexicon.bin is not UTF-8 text" in " ".join(capsys.readouterr().err.split())
    (folder / "words.txt").write_bytes(binary.read_bytes())
    assert main(["import-kaldi", str(folder), *out]) == 2
    assert "words.txt is not UTF-8 text" in " ".join(capsys.readouterr().err.split())


def test_a_lexicon_without_one_line_of_phonemes_is_refused(arpa, tmp_path):
    path, _ = arpa
    (tmp_path / "text.txt").write_text("the cat sat on the mat\nof all that there is\n")
    (tmp_path / "none.txt").write_text("\n")
    for name, reason in (("text", "2 lines have unknown phonemes"), ("none", "holds no word")):
        with pytest.raises(LexiconError, match=reason):
            import_kaldi(path, tmp_path / "lm", tmp_path / f"{name}.txt", console=QUIET)
    # One good line is a lexicon, whatever else the file has.
    (tmp_path / "text.txt").write_text("the DH AH\nof all that there is\n")
    import_kaldi(path, tmp_path / "lm", tmp_path / "text.txt", console=QUIET)


def test_a_file_that_is_neither_grammar_nor_arpa_is_called_so(tmp_path):
    (tmp_path / "small.txt").write_text("the cat sat\n")
    with pytest.raises(ModelError, match=r"neither a grammar .* nor an ARPA file"):
        import_kaldi(tmp_path / "small.txt", tmp_path / "lm", console=QUIET)
