"""Layer patterns: what each layer of a hybrid model is.

- `BlockFamily`: the kinds of block, by meaning; a letter is one spelling of a family.
- `LayerPattern`: parse, tile, print, count and index a sequence of families.

All reading and writing of patterns happens here; no other module counts characters.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megacpp_nemo.contract.errors import PatternError, lookup, nearest

STAGE_SEPARATOR = "|"


class BlockFamily(enum.Enum):
    """What a layer does. The value is the family's letter in our patterns.

    Letters are ours: Megatron's releases spell the same families with other symbols, so a
    family is translated by meaning and never by letter.
    """

    ATTENTION = "A"
    SPARSE_ATTENTION = "D"
    EXPERTS = "E"
    GATED_DELTA_NET = "G"
    MAMBA = "M"
    RECURRENT = "R"

    @property
    def letter(self) -> str:
        """The family's letter in our patterns."""
        return self.value

    @property
    def aliases(self) -> tuple[str, ...]:
        """Lower-case words that name the family in a pattern, besides its letter."""
        return _ALIASES[self]

    @classmethod
    def from_name(cls, name: str | BlockFamily) -> BlockFamily:
        """Return the family spelled by a letter or an alias, in any case.

        Raises:
            PatternError: If no family has that letter or alias.
        """
        what = f"No block family is called {name!a}"
        return lookup(_BY_NAME, name, what=what, error=PatternError)


_ALIASES: dict[BlockFamily, tuple[str, ...]] = {
    BlockFamily.ATTENTION: ("ablock", "attention"),
    BlockFamily.SPARSE_ATTENTION: ("dblock", "sparse_attention"),
    BlockFamily.EXPERTS: ("eblock", "experts"),
    BlockFamily.GATED_DELTA_NET: ("gblock", "gated_delta_net"),
    BlockFamily.MAMBA: ("mblock", "mamba"),
    BlockFamily.RECURRENT: ("rblock", "recurrent"),
}
_BY_NAME: dict[str, BlockFamily] = {
    name: family for family in BlockFamily for name in (family.letter.lower(), *_ALIASES[family])
}


def _known_names() -> str:
    return ", ".join(f"{family.letter} ({', '.join(family.aliases)})" for family in BlockFamily)


@dataclass(frozen=True)
class LayerPattern:
    """A sequence of block families, cut into one or more pipeline segments.

    Args:
        segments: The families of each segment in order. One segment means that the pattern
            says nothing about pipeline stages.

    Raises:
        PatternError: If there is no segment, a segment is empty, or a layer is not a family.
    """

    segments: tuple[tuple[BlockFamily, ...], ...]

    def __post_init__(self) -> None:
        if not all(isinstance(family, BlockFamily) for family in self.layers):
            raise PatternError(
                "A pattern is made of block families",
                given=repr(self.segments),
                allowed="a tuple of tuples of BlockFamily",
                hint="LayerPattern.parse('AEME|AEMR') to read letters",
            )
        if not self.segments or not all(self.segments):
            raise PatternError(
                "A pattern needs at least one layer in every pipeline segment",
                given=repr(str(self)),
                allowed="letters with single '|' between non-empty segments",
                hint="'AEME|AEMR', without a leading, trailing or doubled '|'",
            )

    @classmethod
    def parse(cls, text: str) -> LayerPattern:
        """Read a pattern such as `AEME|AEMR` or `ablock eblock mblock`.

        Letters are read in any case; words separated by spaces or commas may be aliases or
        runs of letters; `|` marks a pipeline stage boundary.

        Raises:
            PatternError: On an unknown letter, an empty pattern or an empty segment.
        """
        if not isinstance(text, str):
            raise PatternError(
                "A pattern is text",
                given=repr(text),
                allowed="letters or aliases of block families, and '|' between pipeline stages",
                hint=repr(FULL_NAM56R_PATTERN),
            )
        return cls(tuple(tuple(_read_segment(part, text)) for part in text.split(STAGE_SEPARATOR)))

    @classmethod
    def of(cls, layers: Iterable[BlockFamily]) -> LayerPattern:
        """Return a pattern of one segment from families."""
        return cls((tuple(layers),))

    @property
    def layers(self) -> tuple[BlockFamily, ...]:
        """All families in order, stage boundaries left out."""
        return tuple(family for segment in self.segments for family in segment)

    @property
    def is_segmented(self) -> bool:
        """Whether the pattern fixes pipeline stage boundaries."""
        return len(self.segments) > 1

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    def __iter__(self) -> Iterator[BlockFamily]:
        return iter(self.layers)

    def __str__(self) -> str:
        return STAGE_SEPARATOR.join(_letters(segment) for segment in self.segments)

    def tile(self, depth: int) -> LayerPattern:
        """Lay the pattern from the left until `depth` layers are laid; the last may be cut.

        A segmented pattern is not tiled: its length must equal `depth`.

        Raises:
            PatternError: If `depth` is not positive, or a segmented pattern has another length.
        """
        _require_positive("The depth of a pattern", depth, "depth=52")
        if not self.is_segmented:
            unit = self.layers
            return LayerPattern.of(unit[i % len(unit)] for i in range(depth))
        if len(self) != depth:
            raise PatternError(
                "A pattern with '|' is not tiled, so its length must equal the depth",
                given=f"{self} ({len(self)} layers) for depth {depth}",
                allowed=f"exactly {depth} letters besides '|'",
                hint=f"depth={len(self)}, or write out all {depth} layers",
            )
        return self

    def counts(self) -> dict[BlockFamily, int]:
        """Return the number of layers per family that occurs, in the order of `BlockFamily`."""
        layers = self.layers
        return {family: layers.count(family) for family in BlockFamily if family in layers}

    def indices(self, family: BlockFamily) -> tuple[int, ...]:
        """Return the 0-based positions of `family`."""
        return tuple(i for i, found in enumerate(self.layers) if found is family)

    def layer_numbers(self, family: BlockFamily) -> tuple[int, ...]:
        """Return the 1-based positions of `family`, Megatron's `layer_number`."""
        return tuple(i + 1 for i in self.indices(family))

    def a_ranks(self) -> dict[int, int]:
        """Map each A-rank (0-based index among the attention layers) to its layer number."""
        return dict(enumerate(self.layer_numbers(BlockFamily.ATTENTION)))

    def split(self, stages: int) -> tuple[LayerPattern, ...]:
        """Return one pattern per pipeline segment, for `stages` pipeline stages.

        A segmented pattern gives its own segments; any other is cut into `stages` equal parts.

        Raises:
            PatternError: If `stages` is not positive, or the segments or the layers do not
                divide over the stages.
        """
        _require_positive("The number of pipeline stages", stages, "pipeline_model_parallel_size=1")
        cut = self if self.is_segmented else self._cut(stages)
        if self.is_segmented and len(self.segments) % stages:
            raise PatternError(
                "The number of pipeline segments must be a multiple of the pipeline stages",
                given=f"{self} ({len(self.segments)} segments) for {stages} stages",
                allowed=f"{stages}, {2 * stages}, {3 * stages}, ... segments",
                hint=f"pipeline_model_parallel_size={len(self.segments)}, or move the '|'",
            )
        if not self.is_segmented and len(self) % stages:
            raise PatternError(
                "The layers do not divide evenly over the pipeline stages",
                given=f"{len(self)} layers for {stages} stages",
                allowed="a depth divisible by the stages, or a pattern with '|' at each boundary",
                hint=f"pattern={str(cut)!r}" if stages <= len(self) else f"depth={stages}",
            )
        return tuple(LayerPattern((segment,)) for segment in cut.segments)

    def _cut(self, stages: int) -> LayerPattern:
        """Return the layers in `stages` segments (never an empty one), as even as they can be."""
        stages = min(stages, len(self))
        ends = [len(self) * i // stages for i in range(stages + 1)]
        return LayerPattern(tuple(self.layers[a:b] for a, b in itertools.pairwise(ends)))


FULL_NAM56R_PATTERN = "AEMEAEMEAEMR"
FULL_NAM52_PATTERN = "AEMEAEMEAEMM"


def _require_positive(what: str, count: int, hint: str) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise PatternError(
            f"{what} is a whole number", given=repr(count), allowed="1 or more", hint=hint
        )


def _letters(segment: Iterable[BlockFamily]) -> str:
    return "".join(family.letter for family in segment)


def _read_segment(text: str, whole: str) -> Iterator[BlockFamily]:
    for word in text.replace(",", " ").split():
        if word.lower() in _BY_NAME:
            yield BlockFamily.from_name(word)
            continue
        for letter in word:
            if letter.lower() not in _BY_NAME:
                close = nearest(word, _BY_NAME) if len(word) > 1 else None
                raise PatternError(
                    # `!a` shows a Cyrillic or full-width look-alike as its code point.
                    f"Unknown block letter {letter!a} in a pattern",
                    given=repr(whole),
                    allowed=_known_names() + ", and '|' between pipeline stages",
                    hint=f"{close!r}" if close else f"{FULL_NAM56R_PATTERN!r}",
                )
            yield BlockFamily.from_name(letter)
