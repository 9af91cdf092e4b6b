from __future__ import annotations

import functools
import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.syntax.paint import FileFacts, FileSyntax, read_syntax, read_syntaxes
from megacpp_nemo.syntax.table import (
    CATEGORIES,
    FIRST_NAMED,
    NODE_TYPES,
    node_type_bucket,
    without_macros,
)
from megacpp_nemo.syntax.tree import grammar
from tests.syntax.naive_syntax import naive_channels

P, S, B, D, M, C, T, N, OTHER = CATEGORIES
ABSENT = "absent"


@functools.cache
def some_headers() -> list[bytes]:
    """Return the same of torch's smaller headers every time."""
    folder = importlib.util.find_spec("torch").submodule_search_locations[0]
    paths = random.Random(7).sample(sorted(Path(folder, "include").rglob("*.h")), 120)
    contents = [path.read_bytes() for path in paths]
    return [content for content in contents if len(content) <= 40_000]


@pytest.fixture
def headers() -> list[bytes]:
    return some_headers()


def categories(content: bytes) -> list[str]:
    names = [*CATEGORIES, ABSENT]
    return [names[value] for value in read_syntax(content).channels["category"]]


def assert_well_formed(content: bytes, syntax: FileSyntax) -> None:
    assert set(syntax.channels) == set(STRUCTURE_CHANNELS) - {"dependency_level"}
    for name, values in syntax.channels.items():
        assert values.dtype == np.uint16
        assert values.shape == (len(content),)
        assert values.max(initial=0) <= STRUCTURE_CHANNELS[name]
    assert syntax.units.shape == (len(content),)
    assert syntax.units.min(initial=-1) >= -1
    assert syntax.units.max(initial=-1) < len(syntax.facts.definitions)
    absent = {
        int(np.count_nonzero(values == STRUCTURE_CHANNELS[name]))
        for name, values in syntax.channels.items()
    }
    assert absent == {syntax.unparsed_bytes}
    assert syntax.parsed == (syntax.unparsed_bytes == 0)


REGIONS = {
    "preprocessor": [
        ('#pragma once\n#include <a>\n#include "b/c.h"\n#define X(y) \\\n  (y)\n', P),
        ("#ifdef", P),
        (" ", OTHER),
        ("X", P),
        ("\n", OTHER),
        ("int x;", OTHER),
        ("\n", OTHER),
        ("#elif", P),
        (" ", OTHER),
        ("defined(Y) && Z > 2\n", P),
        ("int f();", S),
        ("\n", OTHER),
        ("#endif", P),
        ("\n", OTHER),
        ("using std::vector;", P),
    ],
    "functions": [
        ("static int f(int a, char* b = 0) noexcept ", S),
        ("{ if (a) { return 1; } ", B),
        ("// why", C),
        ("\n auto g = [&](int x) { return x; }; }", B),
        ("\n", OTHER),
        ("int* g(int);", S),
        ("\n", OTHER),
        ("template <class T> T& h(T&);", S),
        ("\n", OTHER),
        ("A::A() ", S),
        (": x(1)", B),
        (" ", S),
        ("{}", B),
        ("\n", OTHER),
        ("int v = f(1, 0);", OTHER),
    ],
    "class": [
        ("template <class T>\nclass A final : public B<T> {\n public:\n  ", D),
        ("int x = 1;", M),
        ("  ", D),
        ("/* y */", C),
        (" ", D),
        ("A(int y) ", M),
        (": x(y)", B),
        (" ", M),
        ("{ x = y; }", B),
        ("\n  ", D),
        ("void f() const;", M),
        (" ", D),
        ("using I = int;", T),
        (" ", D),
        ("enum class E : char { ", D),
        ("P = 1", M),
        (", ", D),
        ("Q", M),
        (" }", D),
        # What a body is followed by belongs to the field that it is the type of.
        (";", M),
        (" };", D),
        ("\n", OTHER),
        ("struct Forward", D),
        (";", OTHER),
        ("\n", OTHER),
        ("struct Forward* p;", OTHER),
    ],
    "namespaces": [
        ("namespace a::b {\n", N),
        ("int f() ", S),
        ("{}", B),
        ("\n", N),
        ("int x;", OTHER),
        (" }", N),
        (" ", OTHER),
        ("// a::b", C),
        ("\n", OTHER),
        ("namespace c = a::b;", N),
        ("\n", OTHER),
        ('extern "C" { ', N),
        ("int g();", S),
        (" }", N),
        ("\n", OTHER),
        ('extern "C" ', N),
        ("int h();", S),
    ],
    "typedefs": [
        ("typedef struct ", None),
        ("{ ", D),
        ("int a;", M),
        (" }", D),
        (" A, *B;", T),
        ("\n", OTHER),
        ("typedef int (*F)(int);", T),
        ("\n", OTHER),
        ("template <class T> using V = W<T>;", T),
    ],
    "a class in a function": [
        ("void f() ", S),
        ("{ ", B),
        ("struct L { ", D),
        ("int a;", M),
        (" ", D),
        ("int g() ", M),
        ("{ return 1; }", B),
        (" }", D),
        ("; L l; }", B),
    ],
    # Blanked macros are white space: of the node around them.
    "macros among words": [
        ("class MY_API A { MY_INLINE ", D),
        ("int f() ", M),
        ("{}", B),
        (" }", D),
        (";", OTHER),
        ("\n", OTHER),
        ("MY_EXPORT ", OTHER),
        ("int g();", S),
        ("\n__host__ ", OTHER),
        ("int __device__ h() ", S),
        ("{}", B),
    ],
}


@pytest.mark.parametrize("name", REGIONS)
def test_every_region_has_the_category_written_beside_it(name):
    parts = REGIONS[name]
    found = categories("".join(text for text, _ in parts).encode())
    place = 0
    for text, category in parts:
        here, place = found[place : place + len(text)], place + len(text)
        if category is not None:
            assert set(here) == {category}, (text, here)


def test_depth_siblings_and_types_are_those_of_the_innermost_node():
    content = b"int f(int a, char b);"
    channels = read_syntax(content).channels

    def at(text: bytes) -> tuple[int, int, int]:
        place = content.index(text)
        return tuple(
            int(channels[name][place]) for name in ("ast_depth", "sibling_index", "node_type")
        )

    bucket = {name: FIRST_NAMED + place for place, name in enumerate(NODE_TYPES)}
    # translation_unit > declaration > function_declarator > parameter_list > parameter
    assert at(b"int") == (2, 0, bucket["primitive_type"])
    assert at(b" f") == (1, 0, bucket["declaration"])
    assert at(b"f") == (3, 0, bucket["identifier"])
    assert at(b"char") == (5, 0, bucket["primitive_type"])
    assert at(b" b") == (4, 1, bucket["parameter_declaration"])
    assert at(b"b)") == (5, 1, bucket["identifier"])
    assert at(b",") == (4, 1, node_type_bucket(",", named=False))
    assert at(b";") == (2, 2, node_type_bucket(";", named=False))


def test_every_named_kind_of_the_grammar_has_a_bucket_of_its_own():
    language = grammar()
    kinds = range(language.node_kind_count)
    visible = [kind for kind in kinds if language.node_kind_is_visible(kind)]
    named = {language.node_kind_for_id(k) for k in visible if language.node_kind_is_named(k)}
    unnamed = {language.node_kind_for_id(k) for k in visible if not language.node_kind_is_named(k)}
    buckets = {name: node_type_bucket(name, named=True) for name in named}
    assert len(set(buckets.values())) == len(named)
    assert min(buckets.values()) >= FIRST_NAMED
    assert max(buckets.values()) < STRUCTURE_CHANNELS["node_type"]
    assert {node_type_bucket(name, named=False) for name in unnamed} <= set(range(1, FIRST_NAMED))
    assert node_type_bucket("a_kind_of_tomorrow", named=True) == 0
    assert len(set(NODE_TYPES)) == len(NODE_TYPES)


def test_painting_equals_a_painter_that_goes_node_by_node(headers):
    for content, syntax in zip(headers, read_syntaxes(headers), strict=True):
        for name, expected in naive_channels(content).items():
            np.testing.assert_array_equal(syntax.channels[name], expected, name)


def test_files_read_together_are_what_they_are_alone(headers):
    some = [b"", *headers[:20], b"", b"int x;", b"\n"]
    for content, together in zip(some, read_syntaxes(some), strict=True):
        alone = read_syntax(content)
        assert alone.facts == together.facts
        np.testing.assert_array_equal(alone.units, together.units)
        for name, values in alone.channels.items():
            np.testing.assert_array_equal(values, together.channels[name])


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300))
def test_bytes_that_are_no_code_are_read(content):
    assert_well_formed(content, read_syntax(content))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_headers_are_read(data):
    pieces, headers = [], some_headers()
    for _ in range(data.draw(st.integers(1, 3))):
        content = data.draw(st.sampled_from(headers))
        first = data.draw(st.integers(0, len(content)))
        pieces.append(content[first : first + data.draw(st.integers(0, 3000))])
    content = b"".join(pieces)
    syntax = read_syntax(content)
    assert_well_formed(content, syntax)
    for name, expected in naive_channels(content).items():
        np.testing.assert_array_equal(syntax.channels[name], expected, name)


@pytest.mark.parametrize("content", [b"", b" ", b"\n\n\t ", b"\xef\xbb\xbf", b"\0", b"\xff\xfe"])
def test_next_to_nothing_is_read(content):
    syntax = read_syntax(content)
    assert_well_formed(content, syntax)
    assert syntax.facts == FileFacts(includes=(), definitions=(), uses=())


def test_white_space_alone_is_of_the_root():
    channels = read_syntax(b" \n\t ").channels
    assert set(channels["category"]) == {CATEGORIES.index("other")}
    assert set(channels["ast_depth"]) == {0}


CODE = (
    b'#include "a.h"\n// \xc3\xa4\nint f(int a) {\n\treturn a; // b\n}\nstruct A {\n\tint x;\n};\n'
)


def test_other_line_ends_change_nothing_else():
    lines, other = read_syntax(CODE), read_syntax(CODE.replace(b"\n", b"\r\n"))
    kept = np.frombuffer(CODE, np.uint8) != ord("\n")
    kept_other = ~np.isin(np.frombuffer(CODE.replace(b"\n", b"\r\n"), np.uint8), [10, 13])
    assert other.parsed
    assert other.facts == lines.facts
    for name, values in lines.channels.items():
        np.testing.assert_array_equal(other.channels[name][kept_other], values[kept], name)


def test_a_byte_order_mark_shifts_what_follows():
    lines, other = read_syntax(CODE), read_syntax(b"\xef\xbb\xbf" + CODE)
    for name, values in lines.channels.items():
        np.testing.assert_array_equal(other.channels[name][3:], values, name)


def test_letters_of_several_bytes_are_painted_whole():
    content = 'auto s = "äöü€";  // 漢字\nint x;'.encode()
    found = categories(content)
    start = content.index(b"//")
    assert set(found[start : content.index(b"\n")]) == {"comment"}
    assert set(found[content.index(b"int") :]) == {"other"}


def test_what_cannot_be_placed_is_absent_and_the_rest_is_kept():
    good, bad = b"int f() { return 1; }\n", b"@@ ) ]] @@\n"
    found = categories(good + bad + good)
    lost = [place for place, name in enumerate(found) if name == ABSENT]
    assert lost
    assert len(good) <= min(lost)
    assert max(lost) < len(good + bad)
    assert found[: len(good) - 1] == categories(good)[:-1]
    assert found[len(good + bad) :] == categories(good)
    assert not read_syntax(good + bad).parsed


@pytest.mark.parametrize("unit", [b"(", b"{", b"namespace a {", b"f(", b"struct A {", b"[]{"])
@pytest.mark.parametrize("closed", [True, False])
def test_depth_of_nesting_has_no_limit(unit, closed):
    times = 4000
    end = {b"(": b")", b"[": b"}"}.get(unit[-1:], b"}") if closed else b""
    content = b"int x = " * (unit == b"(") + unit * times + end * times
    syntax = read_syntax(content)
    assert_well_formed(content, syntax)


def test_a_large_file_is_read():
    content = CODE * 8000
    assert len(content) > 600_000
    syntax = read_syntax(content)
    assert_well_formed(content, syntax)
    assert syntax.parsed
    assert len(syntax.facts.definitions) == 8000


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("class A_API B {", "class       B {"),
        ("class A_API\nB;", "class      \nB;"),
        ("struct SOME_THING B : C {", "struct            B : C {"),
        ('A_DEPRECATED("no") int f();', "                   int f();"),
        ("static A_INLINE_2 int f();", "static            int f();"),
        ("__global__ void f();", "           void f();"),
        ("__launch_bounds__(1, 2) void f();", "                        void f();"),
        ("[=] __device__ (int x) {}", "[=]            (int x) {}"),
        *((same, same) for same in (
            "#define A_API extern",
            "#ifdef A_API\nint x;",
            "  # ifdef A_API\nint x;",
            "A_API;",
            "x = A_API + b;",
            "FILE* f; DWORD x; struct FOO x;",
            "my_A_API x;",
            "__attribute__((a)) int x;",
            "__restrict__ int",
        )),
    ],
)  # fmt: skip
def test_macros_that_stand_among_words_are_blanked(written, read):
    assert without_macros(written.encode()) == read.encode()


def test_facts_are_includes_definitions_and_uses():
    content = b"""
#include <vector>
#include "a/b.h"  // of b
#include MACRO
namespace n {
template <class T, class U = Default>
class MY_API Widget : public Base<T> {
 public:
  struct Part { Other* other; Part* next; };
  using Alias = Aliased;
  Alias make(Part part, U u) { return Scope::make(part); }
  friend class Friend;
  enum Kind { A, B };
};
template <> struct Widget<int> { Inner inner; };
struct Forward;
template <class V> class ForwardToo;
typedef struct { Field field; } Point;
typedef Result (*Function)(Argument);
using Vector = std::vector<Element>;
template <class T> T convert(const Widget<T>& widget, Free free) { struct Local { Deep d; }; }
Free* global;
}
"""
    facts = read_syntax(content).facts
    assert facts.includes == ("vector", "a/b.h")
    assert {(unit.name, unit.uses) for unit in facts.definitions} == {
        ("Widget", ("Aliased", "Base", "Default", "Other", "Scope")),
        ("Widget", ("Inner",)),
        ("Point", ("Field",)),
        ("Function", ("Argument", "Result")),
        ("Vector", ("Element", "std", "vector")),
    }
    assert facts.uses == ("Deep", "Free", "Widget")
    assert FileFacts.from_json(facts.to_json()) == facts


def test_units_cover_definitions_and_nothing_else():
    content = (
        b"int x;\ntemplate <class T>\nstruct A { int y; };\nvoid f() { struct L {}; }\nenum E {};"
    )
    syntax = read_syntax(content)
    assert [unit.name for unit in syntax.facts.definitions] == ["A", "E"]
    for place, text in enumerate((b"template <class T>\nstruct A { int y; };", b"enum E {}")):
        assert content[np.flatnonzero(syntax.units == place)[0] :].startswith(text)
        assert np.count_nonzero(syntax.units == place) == len(text)
