from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal

from megacpp_nemo.contract import (
    FULL_NAM52_PATTERN,
    FULL_NAM56R_PATTERN,
    BlockFamily,
    LayerPattern,
    PatternError,
    recipe,
)

A, D, E = BlockFamily.ATTENTION, BlockFamily.SPARSE_ATTENTION, BlockFamily.EXPERTS
M, R = BlockFamily.MAMBA, BlockFamily.RECURRENT

segments = st.lists(st.sampled_from(list(BlockFamily)), min_size=1, max_size=20).map(tuple)
patterns = st.lists(segments, min_size=1, max_size=6).map(tuple).map(LayerPattern)
units = segments.map(LayerPattern.of)
depths = st.integers(1, 80)


class TestReadingAndPrinting:
    @given(patterns)
    def test_parsing_what_was_printed_gives_the_pattern_back(self, pattern):
        assert LayerPattern.parse(str(pattern)) == pattern

    @given(patterns)
    def test_printing_what_was_parsed_gives_the_text_back(self, pattern):
        assert str(LayerPattern.parse(str(pattern))) == str(pattern)

    @given(patterns, st.sampled_from([str.lower, str.upper, str.title, str.swapcase]))
    def test_case_does_not_matter(self, pattern, spell):
        assert LayerPattern.parse(spell(str(pattern))) == pattern

    @given(patterns, st.data())
    def test_aliases_mean_their_letters(self, pattern, data):
        def spelled(family: BlockFamily) -> str:
            return data.draw(st.sampled_from((family.letter, *family.aliases)))

        separator = data.draw(st.sampled_from([" ", ", ", ",", "\t", " , "]))
        text = " | ".join(separator.join(map(spelled, part)) for part in pattern.segments)
        assert LayerPattern.parse(text) == pattern

    @pytest.mark.parametrize(
        ("text", "letters"),
        [
            ("ablock eblock mblock rblock", "AEMR"),
            ("attention, experts, mamba, recurrent", "AEMR"),
            ("sparse_attention gated_delta_net", "DG"),
            ("dblock gblock", "DG"),
            ("MAMBA", "M"),
            ("AEM rblock EM", "AEMREM"),
            (" ae me | Ae Mr ", "AEME|AEMR"),
        ],
    )
    def test_words_and_runs_of_letters_mix(self, text, letters):
        assert str(LayerPattern.parse(text)) == letters

    @given(st.lists(segments, min_size=1, max_size=6))
    def test_pipes_separate_segments(self, parts):
        text = "|".join("".join(family.letter for family in part) for part in parts)
        pattern = LayerPattern.parse(text)
        assert pattern.segments == tuple(parts)
        assert pattern.is_segmented is (len(parts) > 1)

    def test_a_very_long_pattern_prints_whole(self):
        pattern = LayerPattern.parse("AEM").tile(30_000)
        assert str(pattern) == "AEM" * 10_000

    @given(patterns)
    def test_patterns_are_values(self, pattern):
        again = LayerPattern.parse(str(pattern))
        assert {pattern: 1}[again] == 1

    @pytest.mark.parametrize("family", list(BlockFamily))
    def test_a_family_is_found_by_letter_alias_and_itself(self, family):
        for name in (family, family.letter, family.letter.lower(), *family.aliases):
            assert BlockFamily.from_name(name) is family
            assert BlockFamily.from_name(str(getattr(name, "value", name)).upper()) is family


class TestRefusals:
    @pytest.mark.parametrize("text", ["", " ", "\t\n", "|", "||", "|||", " | ", ",", ", |"])
    def test_nothing_but_space_and_pipes(self, text):
        assert "at least one layer" in refusal(PatternError, LayerPattern.parse, text).what

    @pytest.mark.parametrize("text", ["|AE", "AE|", "AE||MR", "AE| |MR", "AE|,|MR"])
    def test_leading_trailing_and_doubled_pipes(self, text):
        error = refusal(PatternError, LayerPattern.parse, text)
        assert "without a leading, trailing or doubled '|'" in str(error.hint)

    @pytest.mark.parametrize("value", [None, 3, 1.5, True, b"AEMR", ["A", "E"], A, object()])
    def test_what_is_not_text(self, value):
        error = refusal(PatternError, LayerPattern.parse, value)
        assert error.what == "A pattern is text"
        assert error.given == repr(value)

    @pytest.mark.parametrize(
        ("text", "letter"), [("AEXM", "X"), ("A*E", "*"), ("AE-M", "-"), ("AE/M", "/"), ("A1", "1")]
    )
    def test_an_unknown_letter_is_named_and_the_known_ones_listed(self, text, letter):
        error = refusal(PatternError, LayerPattern.parse, text)
        assert f"{letter!r}" in error.what
        assert error.given == repr(text)
        assert all(f"{family.letter} (" in str(error.allowed) for family in BlockFamily)

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("\u0410EM", "\\u0410"),  # Cyrillic A
            ("A\u0395M", "\\u0395"),  # Greek Epsilon
            ("AE\uff2d", "\\uff2d"),  # full-width M
            ("AE\u200bM", "\\u200b"),  # zero-width space
            ("AE\uff5cMR", "\\uff5c"),  # full-width |
        ],
    )
    def test_a_letter_that_only_looks_right_is_shown_by_its_code(self, text, shown):
        assert shown in refusal(PatternError, LayerPattern.parse, text).what

    def test_a_misspelt_alias_suggests_the_right_one(self):
        assert refusal(PatternError, LayerPattern.parse, "ablock exprts").hint == "'experts'"
        assert refusal(PatternError, BlockFamily.from_name, "atention").hint == "'attention'"

    @given(st.text(max_size=12))
    def test_any_text_is_read_or_refused(self, text):
        try:
            pattern = LayerPattern.parse(text)
        except PatternError:
            return
        assert LayerPattern.parse(str(pattern)) == pattern

    @pytest.mark.parametrize("name", [None, 3, "", "x", ["a"]])
    def test_a_name_that_no_family_has(self, name):
        refusal(PatternError, BlockFamily.from_name, name)

    @pytest.mark.parametrize("layers", [["A"], "AE", [A, None]])
    def test_a_pattern_of_something_else_than_families(self, layers):
        assert "block families" in refusal(PatternError, LayerPattern.of, layers).what

    def test_a_pattern_without_layers(self):
        refusal(PatternError, LayerPattern.of, [])
        refusal(PatternError, LayerPattern, ())
        refusal(PatternError, LayerPattern, ((A,), ()))


class TestTiling:
    @given(units, depths)
    def test_layer_i_is_the_units_layer_i_modulo_its_length(self, unit, depth):
        tiled = unit.tile(depth)
        assert len(tiled) == depth
        assert all(family is unit.layers[i % len(unit)] for i, family in enumerate(tiled))

    @given(units, depths, depths)
    def test_a_shallower_model_is_a_prefix_of_a_deeper_one(self, unit, one, other):
        shallow, deep = sorted((one, other))
        assert unit.tile(deep).layers[:shallow] == unit.tile(shallow).layers

    @given(units, depths)
    def test_tiling_again_changes_nothing(self, unit, depth):
        assert unit.tile(depth).tile(depth) == unit.tile(depth)

    @given(patterns.filter(lambda pattern: pattern.is_segmented), depths)
    def test_a_pattern_with_pipes_is_never_tiled(self, pattern, depth):
        assert pattern.tile(len(pattern)) is pattern
        if depth != len(pattern):
            error = refusal(PatternError, pattern.tile, depth)
            assert str(error.hint).startswith(f"depth={len(pattern)},")

    @pytest.mark.parametrize("depth", [0, -1, 1.0, "52", None, True, float("nan")])
    def test_a_depth_that_is_no_number_of_layers(self, depth):
        error = refusal(PatternError, LayerPattern.parse("AE").tile, depth)
        assert error.given == repr(depth)


class TestCountingAndIndexing:
    @given(patterns)
    def test_counts_sum_to_the_depth(self, pattern):
        assert sum(pattern.counts().values()) == len(pattern) == len(list(pattern))

    @given(patterns)
    def test_counts_and_indices_agree(self, pattern):
        for family in BlockFamily:
            assert len(pattern.indices(family)) == pattern.counts().get(family, 0)
            assert all(pattern.layers[i] is family for i in pattern.indices(family))

    @given(patterns)
    def test_every_layer_has_exactly_one_index(self, pattern):
        found = [i for family in BlockFamily for i in pattern.indices(family)]
        assert sorted(found) == list(range(len(pattern)))

    @given(patterns, st.sampled_from(list(BlockFamily)))
    def test_layer_numbers_are_indices_from_one(self, pattern, family):
        assert pattern.layer_numbers(family) == tuple(i + 1 for i in pattern.indices(family))

    @given(patterns)
    def test_a_ranks_number_the_attention_layers_from_zero(self, pattern):
        ranks = pattern.a_ranks()
        assert list(ranks) == list(range(pattern.counts().get(A, 0)))
        assert tuple(ranks.values()) == pattern.layer_numbers(A)


class TestSplitting:
    @given(patterns, st.integers(1, 12))
    def test_the_parts_put_together_are_the_whole(self, pattern, stages):
        try:
            parts = pattern.split(stages)
        except PatternError:
            count = len(pattern.segments) if pattern.is_segmented else len(pattern)
            assert count % stages
            return
        assert tuple(family for part in parts for family in part) == pattern.layers
        assert len(parts) % stages == 0

    @given(units, st.integers(1, 12), st.integers(1, 8))
    def test_without_pipes_the_parts_are_equal(self, unit, stages, size):
        parts = unit.tile(stages * size).split(stages)
        assert [len(part) for part in parts] == [size] * stages

    @given(patterns.filter(lambda pattern: pattern.is_segmented))
    def test_pipes_are_the_boundaries(self, pattern):
        assert tuple(part.layers for part in pattern.split(1)) == pattern.segments

    def test_nam56r_over_two_stages_of_two_chunks(self):
        parts = LayerPattern.parse(FULL_NAM56R_PATTERN).tile(52).split(4)
        assert [len(part) for part in parts] == [13, 13, 13, 13]

    @given(units, st.integers(2, 12))
    def test_a_refused_split_suggests_boundaries_or_a_depth_that_work(self, unit, stages):
        if len(unit) % stages == 0:
            return
        hint = str(refusal(PatternError, unit.split, stages).hint)
        name, _, value = hint.partition("=")
        if name == "pattern":
            suggested = LayerPattern.parse(value.strip("'"))
            sizes = [len(part) for part in suggested.split(stages)]
            assert suggested.layers == unit.layers
            assert len(sizes) == stages
            assert max(sizes) - min(sizes) <= 1
        else:
            assert len(unit.tile(int(value)).split(stages)) == stages

    @pytest.mark.parametrize("stages", [0, -2, 1.0, "2", None, True])
    def test_a_number_of_stages_that_is_none(self, stages):
        refusal(PatternError, LayerPattern.parse("AE").split, stages)


class TestTheFamilies:
    def test_nam56r_is_13_attention_22_expert_13_mamba_and_4_recurrent_layers(self):
        layers = LayerPattern.parse("AEMEAEMEAEMR").tile(52)
        assert layers.counts() == {A: 13, E: 22, M: 13, R: 4}
        assert layers.layer_numbers(R) == (12, 24, 36, 48)
        assert layers.layer_numbers(A) == tuple(range(1, 50, 4))

    def test_nam52_is_13_attention_22_expert_and_17_mamba_layers(self):
        assert LayerPattern.parse(FULL_NAM52_PATTERN).tile(52).counts() == {A: 13, E: 22, M: 17}

    def test_nam56r_uses_dsa_on_nine_layers_and_plain_latent_attention_on_four(self):
        nam56r = recipe("nam56r")
        sparse = nam56r.sparse_layer_numbers
        assert sparse == (5, 9, 13, 21, 25, 29, 37, 41, 45)
        plain = set(nam56r.layers.layer_numbers(A)) - set(sparse)
        assert sorted(plain) == [1, 17, 33, 49]
