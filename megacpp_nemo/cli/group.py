"""A command that is several: `megacpp data build`, `megacpp data inspect`.

Each is a module of its own, `data_build` of the group `data`, and is read as every command is.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from megacpp_nemo.cli.usage import Parser, UsageError
from megacpp_nemo.contract.errors import lookup


class Action(NamedTuple):
    """A command of a group, and what it does in a line."""

    name: str
    summary: str


class Group(Parser):
    """What a group of commands takes: the name of one, and what that one takes.

    Args:
        name: The group.
        about: What its commands are about.
        actions: Its commands.
        examples: Commands to learn from.
        module: Prefix of the modules, without the command's name.
    """

    def __init__(
        self,
        name: str,
        about: str,
        actions: Sequence[Action],
        examples: Sequence[str],
        module: str,
    ) -> None:
        super().__init__(name, "COMMAND ...", about, examples, ("text",))
        self.actions = tuple(actions)
        self.module = module

    def chosen(self, words: Sequence[str]) -> tuple[Parser, list[str]]:
        """Return the parser of the command that words begin with, and the words behind it.

        The group itself where they begin with an option, or there are none.

        Raises:
            UsageError: If there is no such command.
        """
        if not words or words[0].startswith("-"):
            return self, list(words)
        known = {action.name: action.name for action in self.actions}
        what = f"{self.name} has no command {words[0]!r}"
        action = lookup(known, words[0], what=what, error=UsageError)
        made: Parser = self.module_of(action).parser(f"{self.name} {action}")
        return made, list(words[1:])

    def module_of(self, action: str) -> Any:
        """Return the module of a command."""
        return importlib.import_module(f"{self.module}_{action}")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the options of the command that the words begin with; the group's for none.

        Raises:
            UsageError: If the words begin with an option, or the command cannot read the rest.
        """
        made, rest = self.chosen(words)
        if made is not self:
            return made.read(rest)
        if words:
            raise UsageError(
                f"{self.name} takes one of its commands first",
                given=" ".join(words),
                allowed=", ".join(action.name for action in self.actions),
                hint=f"megacpp {self.name} {self.actions[0].name} --help",
            )
        return super().read(rest)

    def format_help(self) -> str:
        """Return the help of the group: its commands, a line each."""
        wide = max(len(action.name) for action in self.actions)
        listed = "\n".join(f"  {action.name:<{wide}}  {action.summary}" for action in self.actions)
        return (
            f"usage: {self.usage}\n\n{self.description}\n\ncommands:\n{listed}\n\n"
            f"  megacpp {self.name} COMMAND --help says what a command takes.\n\n{self.epilog}\n"
        )
