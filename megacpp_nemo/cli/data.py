"""`megacpp data`: corpora of C++ that carry the structure of their code."""

from __future__ import annotations

import argparse

from megacpp_nemo.cli.group import Action, Group

ACTIONS = (
    Action("build", "a folder of C++ as tokens and structure channels to train on"),
    Action("inspect", "a source file with its tokens coloured by a channel"),
    Action("verify", "whether the files of a corpus are whole, aligned and in range"),
)
NO_COMMAND = 2


def parser(name: str) -> Group:
    """Return what `megacpp data` takes."""
    return Group(
        name,
        "Build corpora of C++ whose tokens carry five structure channels read off the syntax\n"
        "tree (category, dependency level, depth, sibling index, node type), look at them, and\n"
        "check them.",
        ACTIONS,
        (
            "megacpp data build src --out corpus",
            "megacpp data inspect src/main.cpp --data corpus",
            "megacpp data verify corpus --reparse 100",
        ),
        "megacpp_nemo.cli.data",
    )


def run(given: argparse.Namespace) -> str | bytes:
    """Return what the command of the group prints; the group's help where none is named.

    Raises:
        MegaCppError: What the command refuses.
    """
    name, _, action = given.command.partition(" ")
    group = parser(name)
    if not action:
        given.status = NO_COMMAND
        return group.format_help()
    printed: str | bytes = group.module_of(action).run(given)
    return printed
