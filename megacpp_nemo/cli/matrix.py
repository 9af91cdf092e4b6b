"""`megacpp matrix`: which recipes lower to which releases, with which seams."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megacpp_nemo.cli.lower import to_json
from megacpp_nemo.cli.screen import Cell as Shown
from megacpp_nemo.cli.usage import Parser
from megacpp_nemo.lowering.matrix import Cell, matrix
from megacpp_nemo.lowering.releases import RELEASE_NAMES
from megacpp_nemo.lowering.seams import NEMO_ONLY, SEAMS

HEAD = ("recipe", "mode", "precision", "DSA", "MTP")
INTRODUCTION = """\
Every full-size recipe in both parallelism modes, in bf16 and with FP8 experts, with sparse
attention (DSA) on and off and with 0, 1 and 2 multi-token prediction depths, on every release.
A cell lists the seams that are left: what this package, and not Megatron-LM, has to own. Recipes
and depths that behave alike on every release share a row, and releases on which every recipe
behaves alike share a column."""


class Line(NamedTuple):
    """Recipes that behave alike, each axis a list of values, and what they do by release."""

    axes: tuple[tuple[str, ...], ...]
    results: tuple[str, ...]


def parser(name: str) -> Parser:
    """Return what `megacpp matrix` takes."""
    return Parser(
        name,
        "[--format F] ...",
        "Print which recipes lower to which releases, and with which seams.",
        ("megacpp matrix", "megacpp matrix --format md --out docs/matrix.md"),
        ("text", "md", "json"),
    )


def run(given: argparse.Namespace) -> str:
    """Return the matrix in the format asked for.

    Raises:
        UsageError: If there are words.
    """
    if given.words:
        parser(given.command).refuse("matrix takes no words", " ".join(given.words))
    cells = matrix()
    if given.format == "json":
        return to_json({"schema": 1, "cells": [_data(cell) for cell in cells]})
    refusals = _refusals(cells)
    lines, columns = grouped(cells, refusals)
    head = (*HEAD, *(", ".join(column) for column in columns))
    if given.format == "md":
        return _markdown(head, lines, refusals)
    screen = given.screen
    rows = [
        (*(", ".join(axis) for axis in line.axes), *map(_painted, line.results)) for line in lines
    ]
    notes = [screen.wrapped(f"{name}: {text}", "  ") for text, name in refusals.items()]
    return "\n".join((screen.table(head, rows), "", *notes)) + "\n"


def grouped(
    cells: Sequence[Cell], refusals: dict[str, str]
) -> tuple[list[Line], list[tuple[str, ...]]]:
    """Return the matrix as few lines, and the releases of each column."""
    results: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for cell in cells:
        case = cell.case
        sparse = "on" if case.sparse else "off"
        values = (case.family, case.mode, case.precision, sparse, str(case.mtp))
        results.setdefault(tuple((value,) for value in values), []).append(_told(cell, refusals))
    columns = _columns(list(results.values()))
    lines = [
        Line(axes, tuple(row[places[0]] for places in columns)) for axes, row in results.items()
    ]
    for axis in (HEAD.index("MTP"), HEAD.index("recipe")):
        lines = _merged(lines, axis)
    return lines, [tuple(RELEASE_NAMES[place] for place in places) for places in columns]


def _columns(rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the places of releases that follow each other and agree in every row."""
    columns: list[list[int]] = []
    for place in range(len(RELEASE_NAMES)):
        if columns and all(row[place] == row[columns[-1][-1]] for row in rows):
            columns[-1].append(place)
        else:
            columns.append([place])
    return columns


def _merged(lines: Sequence[Line], axis: int) -> list[Line]:
    """Return lines with those joined that differ in one axis alone."""
    found: dict[tuple[object, ...], Line] = {}
    for line in lines:
        key = (line.axes[:axis], line.axes[axis + 1 :], line.results)
        before = found.get(key)
        values = (before.axes[axis] if before else ()) + line.axes[axis]
        axes = (*line.axes[:axis], values, *line.axes[axis + 1 :])
        found[key] = Line(axes, line.results)
    return list(found.values())


def _refusals(cells: Sequence[Cell]) -> dict[str, str]:
    """Return a short name for each refusal, by its text."""
    texts = dict.fromkeys(cell.refusal for cell in cells if cell.refusal)
    return {text: f"refused {number}" for number, text in enumerate(texts, start=1)}


def _told(cell: Cell, refusals: dict[str, str]) -> str:
    return refusals[cell.refusal] if cell.refusal else ", ".join(cell.seams) or "all native"


def _painted(result: str) -> Shown:
    refused = result.startswith("refused")
    return Shown(result, "red" if refused else "green" if result == "all native" else "")


def _data(cell: Cell) -> dict[str, object]:
    return {
        "words": list(cell.case.words),
        "release": cell.release,
        "seams": list(cell.seams),
        "refusal": cell.refusal or None,
    }


def _markdown(head: Sequence[str], lines: Sequence[Line], refusals: dict[str, str]) -> str:
    from megacpp_nemo.cli.markdown import code, plain, table

    as_code: Callable[[str], str] = lambda text: ", ".join(map(code, text.split(", ")))  # noqa: E731
    rows = [
        (
            *(", ".join(map(code if axis < 3 else str, v)) for axis, v in enumerate(line.axes)),
            *(r if r.startswith(("refused", "all")) else as_code(r) for r in line.results),
        )
        for line in lines
    ]
    seams = [
        f"- {code(seam.id)}: {plain(seam.what)}; "
        + (f"native from {seam.native_since}" if seam.native_since else "native in no release")
        + ("" if seam.built else f"; {NEMO_ONLY}")
        for seam in SEAMS.values()
        if any(seam.id in result.split(", ") for line in lines for result in line.results)
    ]
    reasons = [f"- {name}: {plain(text)}" for text, name in refusals.items()]
    parts = [
        "# Recipes and releases",
        INTRODUCTION,
        "## Seams",
        "\n".join(seams),
        *(["## Refusals", "\n".join(reasons)] if reasons else []),
        "## Matrix",
        table(head, rows),
    ]
    return "\n\n".join(parts) + "\n"
