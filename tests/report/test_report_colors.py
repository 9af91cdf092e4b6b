"""The colours of the families: read by everybody, told apart by everybody."""

from __future__ import annotations

import itertools

import pytest

from megacpp_nemo.contract import BlockFamily
from megacpp_nemo.report.colors import PAINTS, PLAIN, paint_of

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision
# Deficiency" (2009), at full severity, on linear RGB.
SIGHTS = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
TO_XYZ = (
    (0.4124, 0.3576, 0.1805),
    (0.2126, 0.7152, 0.0722),
    (0.0193, 0.1192, 0.9505),
)
WHITE = (0.9505, 1.0, 1.089)


def linear(color: str) -> list[float]:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def lab(color: str, sight: str) -> tuple[float, float, float]:
    seen = [min(max(part, 0), 1) for part in times(SIGHTS[sight], linear(color))]
    x, y, z = (
        (part / white) ** (1 / 3) if part / white > 0.008856 else 7.787 * part / white + 16 / 116
        for part, white in zip(times(TO_XYZ, seen), WHITE, strict=True)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def contrast(one: str, other: str) -> float:
    light = sorted(times(TO_XYZ, linear(color))[1] for color in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


def test_every_family_has_colours():
    assert set(PAINTS) == set(BlockFamily)
    assert paint_of(None) == PLAIN


@pytest.mark.parametrize("paint", [*PAINTS.values(), PLAIN], ids=lambda paint: paint.fill)
def test_a_letter_stands_out_from_its_cell(paint):
    assert contrast(*paint) >= 4.5


@pytest.mark.parametrize("sight", SIGHTS)
def test_two_families_are_told_apart_with_every_sight(sight):
    fills = [paint.fill for paint in (*PAINTS.values(), PLAIN)]
    for one, other in itertools.combinations(fills, 2):
        distance = sum(
            (a - b) ** 2 for a, b in zip(lab(one, sight), lab(other, sight), strict=True)
        )
        # A difference of 2 is just seen where two fields touch.
        assert distance**0.5 > 10, (one, other)
