"""`megacpp data inspect`: in the terminal, as JSON and as a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.report.channels import CATEGORY_MARKS, id_name, keys, paints, terminal_color
from megacpp_nemo.report.source import of_file, spelled
from megacpp_nemo.report.source_page import source_page
from megacpp_nemo.syntax.paint import read_syntax
from megacpp_nemo.syntax.table import CATEGORIES
from tests.cli.corpora import HOSTILE, apart

PAINT = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture
def box(corpus):
    return str(corpus.sources / "box.h")


def test_a_mark_stands_below_every_first_character(megacpp, tmp_path):
    path = tmp_path / "a.h"
    path.write_text("#pragma once\nint f() { return 1; }  // one\n")
    result = megacpp("data", "inspect", str(path))
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[2] == "1  #pragma once"
    assert lines[4] == "2  int f() { return 1; }  // one"
    expected = [[" "] * 40, [" "] * 40]
    data = json.loads(megacpp("data", "inspect", str(path), "--format", "json").out)
    for token in data["tokens"]:
        line = int(token["byte"] >= len("#pragma once\n"))
        column = token["byte"] - line * len("#pragma once\n")
        expected[line][column] = CATEGORY_MARKS[token["category"]]
    assert [lines[3], lines[5]] == ["   " + "".join(line).rstrip() for line in expected]
    assert lines[5].startswith("   f  f f ")
    assert re.search(r" p  preamble \d", result.out)
    assert "--data DIR" in result.out


def test_categories_are_those_of_the_parser(megacpp, box):
    data = json.loads(megacpp("data", "inspect", box, "--format", "json").out)
    syntax = read_syntax(HOSTILE.encode())
    for token in data["tokens"]:
        for channel in syntax.channels:
            assert token[channel] == syntax.channels[channel][token["byte"]]
    assert "".join(token["text"] for token in data["tokens"]) == HOSTILE
    assert data["lines"] == [1, 13]
    assert "dependency_level" not in data["tokens"][0]
    counted = {key["name"]: key["tokens"] for key in data["channels"]["category"]}
    assert set(counted) <= {*CATEGORIES, "absent"}
    assert sum(counted.values()) == len(data["tokens"])


def test_tokens_and_levels_are_those_of_the_corpus(corpus, box):
    words = ("data", "inspect", box, "--data", str(corpus.folder), "--format", "json")
    data = json.loads(apart(*words).stdout)
    assert data["notes"] == []
    number = json.loads((corpus.folder / "documents.json").read_text())
    split = next(name for name in number if any(path == "box.h" for path, _ in number[name]))
    place = [path for path, _ in number[split]].index("box.h")
    from megacpp_nemo.data.corpus_spec import Corpus
    from megacpp_nemo.data.verify_sources import document_elements

    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    stored = Corpus(folder=corpus.folder, manifest=manifest)
    for key, channel in (("id", None), *((name, name) for name in STRUCTURE_CHANNELS)):
        values = [token[key] for token in data["tokens"]]
        assert values == document_elements(stored, split, place, channel)[:-1].tolist()


def test_a_file_that_the_corpus_does_not_have_is_shown_without_levels(corpus, tmp_path):
    other = tmp_path / "other.h"
    other.write_text("int a;\n")
    done = apart("data", "inspect", str(other), "--data", str(corpus.folder))
    assert done.returncode == 0, done.stderr
    assert f"the corpus, of {corpus.sources}, has no such file" in done.stdout.replace("\n", " ")
    refused = apart(
        *("data", "inspect", str(other), "--data", str(corpus.folder)),
        *("--channel", "dependency_level"),
    )
    assert refused.returncode == 3
    assert "has no such file" in refused.stderr


def test_lines_are_cut_out(megacpp, box):
    whole = megacpp("data", "inspect", box).out
    part = megacpp("data", "inspect", box, "--lines", "6:8").out
    assert "lines 6 to 8 of 13" in part
    for line in ("6   public:", "7          explicit Box(int value)"):
        assert any(one.startswith(line) for one in part.splitlines())
        assert f" {line}" in whole
    assert "Base {" not in part
    data = json.loads(megacpp("data", "inspect", box, "--lines", "9:", "--format", "json").out)
    assert data["lines"] == [9, 13]
    one = json.loads(megacpp("data", "inspect", box, "--lines", "4", "--format", "json").out)
    assert [token["text"] for token in one["tokens"]] == ["namespace", " lab", " {", "\n"]


def test_the_tokens_as_a_table(megacpp, box):
    result = megacpp("data", "inspect", box, "--tokens", "--lines", "4")
    rows = [line.split("  ") for line in result.out.splitlines()[4:8]]
    assert [[cell.strip() for cell in row if cell][2:4] for row in rows] == [
        ['"namespace"', "namespace"],
        ['" lab"', "namespace"],
        ['" {"', "namespace"],
        ['"\\n"', "namespace"],
    ]


def test_colour_is_for_terminals_and_for_those_who_ask(megacpp, box):
    plain = megacpp("data", "inspect", box).out
    assert "\x1b" not in plain
    drawn = megacpp("data", "inspect", box, "--color", "always").out
    assert "\x1b[38;5;16;48;5;" in drawn
    assert "\x1b[4;38;5;16;48;5;" in drawn
    text = [line[4:] for line in PAINT.sub("", drawn).splitlines()[2:15]]
    assert text[3] == "namespace lab {"
    assert text[6] == "        explicit Box(int value) : value_(value) {}"


@pytest.mark.parametrize("text", ["a\x1b[31mb", "a\x9bb", "a\u202eb", "a\rb", "a\x07b"])
def test_control_characters_of_a_file_are_spelled(megacpp, tmp_path, text):
    path = tmp_path / "a.h"
    path.write_text(f"// {text}\n", encoding="utf-8", newline="")
    for words in ((), ("--color", "always"), ("--tokens",)):
        out = megacpp("data", "inspect", str(path), *words).out
        assert text not in out
        assert not set(PAINT.sub("", out)) & set("\x1b\x9b\u202e\r\x07")
    assert spelled("a\r\nb\tc") == "a\nb\tc"


class Page(HTMLParser):
    """The text of a page's source, and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[tuple[str, str]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "i"
        if self.inside:
            self.tokens.append((dict(attrs)["class"], ""))

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1] = (self.tokens[-1][0], self.tokens[-1][1] + data)


def test_a_page_holds_the_file_and_none_of_its_elements(megacpp, box, tmp_path):
    out = tmp_path / "page.html"
    assert megacpp("data", "inspect", box, "--out", str(out)).code == 0
    text = out.read_text("utf-8")
    page = Page(text)
    assert "".join(token for _, token in page.tokens) == spelled(HOSTILE)
    assert (page.tags.count("script"), page.tags.count("img"), page.tags.count("b")) == (2, 0, 0)
    assert not re.findall(r"https?://|src=\"|@import|url\(", text.replace("src=x", ""))
    assert "default-src &#39;none&#39;" in text
    assert "prefers-color-scheme: dark" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert set(data["channels"]) == set(STRUCTURE_CHANNELS) - {"dependency_level"}
    own = [data["keys"]["category"][str(i)][0] for i in data["channels"]["category"]]
    assert own == [paint for paint, _ in page.tokens]
    assert {paint for paint, _ in page.tokens} <= {*paints(), "n"}


def test_a_page_goes_to_standard_output_when_asked(megacpp, box):
    result = megacpp("data", "inspect", box, "--format", "html", "--channel", "ast_depth")
    assert result.out.startswith("<!doctype html>")
    assert 'value="ast_depth" checked' in result.out


def test_a_long_file_is_cut_at_a_line_and_the_page_says_so():
    content = b"".join(b"int variable_%d = %d;\n" % (i, i) for i in range(9000))
    source = of_file("long.h", content)
    part = source.at_most(20_000)
    assert part.last - part.first <= 20_000
    last = part.line_numbers[1]
    assert part.at_most(1).line_numbers == (1, 1)
    page = source_page(part, "category")
    assert len(page) < 4_000_000
    assert f"Lines {last + 1:,} and on are not on this page: --lines {last + 1}: has them" in page
    rest = source.lines(last + 1, None)
    assert rest.first == part.last
    assert "not on this page" not in source_page(of_file("a.h", b"int a;\n"), "category")


def test_characters_of_many_bytes_are_shown_once():
    content = "// \u4e2d\u6587 \U0001f600 caf\u00e9\n".encode()
    source = of_file("a.h", content)
    assert "".join(text for _, text in source.pieces()) == content.decode()
    # As a tokenizer of single bytes places them: tokens of a character start where it starts.
    starts = np.array([0, 2, 3, 3, 3, 6, 6, 6])
    single = type(source)(
        **{
            **vars(source),
            "starts": starts,
            "channels": {n: ids[:8] for n, ids in source.channels.items()},
            "last": 8,
        }
    )
    assert "".join(text for _, text in single.pieces()) == content.decode()


def test_names_marks_and_colours():
    for channel, size in STRUCTURE_CHANNELS.items():
        found = keys(channel, np.arange(size + 1))
        assert [key.name for key in found.values()][-1] == "absent"
        assert len({key.name for key in found.values()}) == size + 1
        assert {key.paint for key in found.values()} <= {*paints(), "n"}
    assert id_name("dependency_level", 15) == "15"
    assert id_name("ast_depth", 63) == "63 or more"
    often = keys("node_type", np.array([7, 40, 40, 256]))
    assert [(key.id, key.mark, key.tokens) for key in often.values()] == [
        (40, "a", 2),
        (7, "b", 1),
        (256, "-", 1),
    ]
    assert terminal_color("#ffffff") == 231
    assert terminal_color("#000000") == 16


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(part * share for part, share in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def test_the_ramp_only_gets_darker_and_text_stands_out_on_all_colours():
    lights = [luminance(fill) for name, fill in paints().items() if name.startswith("s")]
    assert all(one > other for one, other in pairwise(lights))
    ink = luminance("#111111")
    assert all((luminance(fill) + 0.05) / (ink + 0.05) >= 4.5 for fill in paints().values())


@pytest.mark.parametrize(
    ("words", "code", "what", "hint"),
    [
        ("", 2, "data inspect takes one source file", "megacpp data inspect --help"),
        ("src/box.h src/base.h", 2, "data inspect takes one source file", "megacpp data"),
        ("nowhere.h", 3, "The source file cannot be read as text", "another file"),
        ("src", 3, "The source file cannot be read as text", "another file"),
        ("src/empty.h", 3, "The source file cannot be read as text", "another file"),
        ("src/latin.h", 3, "The source file cannot be read as text", "iconv -f LATIN1 -t UTF-8"),
        ("corpus/train.bin", 3, "The source file cannot be read as text", ""),
        ("src/box.h --channel categry", 2, "There is no channel 'categry'", "--channel category"),
        ("src/box.h --channel dependency_level", 2, "Dependency levels are read", "--data DIR"),
        ("src/box.h --lines 99", 2, "The file has no such lines", "--lines 13:13"),
        ("src/box.h --lines 9:3", 2, "The file has no such lines", "--lines 9:13"),
        ("src/box.h --lines 0:3", 2, "The file has no such lines", "--lines 1:13"),
        ("src/box.h --lines 3:14", 2, "The file has no such lines", "--lines 3:13"),
        ("src/box.h --lines all", 2, "The file has no such lines", "--lines 1:13"),
        ("src/box.h --data nowhere", 3, "The folder of a corpus cannot be read", "another"),
        ("src/box.h --data src", 3, "This folder holds no corpus", "megacpp data build FOLDER"),
        ("src/box.h --out nowhere/a.html", 3, "The output file cannot be written", "--out FILE"),
        ("src/box.h --format svg", 2, "data inspect knows no --format 'svg'", "--format text"),
    ],
)
def test_what_cannot_be_shown_is_said(megacpp, corpus, monkeypatch, words, code, what, hint):
    monkeypatch.chdir(corpus.sources.parent)
    result = megacpp("data", "inspect", *words.split())
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"megacpp: {what}")
    assert "\n  given:   " in result.err
    assert f"\n  try:     {hint}" in result.err
