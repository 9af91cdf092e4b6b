"""The text of a command line: one argument a line, or shell text.

    command = read_command(open("run.sh").read())
    command.arguments   # ["--bf16", "--lr", "3e-4"]
    command.sizes       # {"--nnodes": "2"}

Which of the two it is, its lines tell: in an argument vector the first is a flag, and no flag
shares its line with more words. What the values look like decides nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from megacpp_nemo.cli.shell_text import Word, shell_lines
from megacpp_nemo.cli.usage import UsageError

SIZES = ("--nnodes", "--nproc-per-node")
LAUNCHER = re.compile(r"(.*/)?(torchrun|python[\d.]*)")
# Options of torchrun and python that may stand before the script: with a value, and without.
VALUED = (
    *SIZES, "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--max-restarts",
    "--monitor-interval", "--start-method", "--event-log-handler", "--role", "--log-dir",
    "--redirects", "--tee", "--local-ranks-filter", "--node-rank", "--master-addr",
    "--master-port", "--local-addr", "--logs-specs", "--numa-binding", "--signals-to-handle",
    "-r", "-t", "-m", "-X", "-W",
)  # fmt: skip
BARE = (
    "--standalone", "--no-python", "--run-path", "--virtual-local-rank",
    "-u", "-O", "-OO", "-B", "-E", "-I", "-P", "-q", "-s", "-S", "-v",
)  # fmt: skip
_FLAG_ALONE = re.compile(r"--?[\w-]+(=[^ \t]*)?")
_FLAG_AND_MORE = re.compile(r"--?[\w-]+[ \t]")


class Command(NamedTuple):
    """The arguments of a script, and torchrun's sizes as they are written, by `SIZES`."""

    arguments: list[str]
    sizes: dict[str, str]


def read_command(text: str) -> Command:
    """Return what a command in text gives its script.

    Raises:
        UsageError: If it is shell text that runs no script or several, whose quotes do not
            match, or in whose arguments a shell would put something else in place.
    """
    lines = [line for line in text.split("\n") if line]
    if all(line.endswith("\r") for line in lines):  # a file from Windows
        text = text.replace("\r\n", "\n")
        lines = [line for line in text.split("\n") if line]
    alone = lines and _FLAG_ALONE.fullmatch(lines[0])
    if alone and not any(map(_FLAG_AND_MORE.match, lines)):
        return Command(lines, {})
    return command_of(shell_lines(text))


def command_of(lines: Sequence[Sequence[Word]]) -> Command:
    """Return what the command among lines of words gives its script; flags alone need none.

    Raises:
        UsageError: As `read_command`.
    """
    scripts = [(number, _script(words)) for number, words in enumerate(lines)]
    found = [(number, place) for number, place in scripts if place is not None]
    if not found and all(words[0].text.startswith("-") for words in lines):
        return Command(_plain([word for words in lines for word in words]), {})
    if len(found) != 1:
        names = [lines[number][place].text for number, place in found]
        raise UsageError(
            "The text of a command line runs one .py script",
            given=", ".join(names) or " ".join(word.text for word in lines[0])[:80],
            allowed="the arguments alone, or one command: torchrun, its own options, the script",
            hint="a file with that command alone",
        )
    ((number, place),) = found
    for words in lines[number + 1 :]:
        if words[0].text.startswith("-"):
            raise UsageError(
                "A flag begins a line that the command before does not go on to",
                given=words[0].text,
                allowed="a backslash at the end of every line of the command but its last",
                hint=f"a backslash at the end of the line before {words[0].text}",
            )
    launch, arguments = lines[number][:place], lines[number][place + 1 :]
    return Command(_plain(arguments), _sizes(launch))


def _script(words: Sequence[Word]) -> int | None:
    """Return the place of the script that a command runs, before any option but torchrun's."""
    if words[0].text.startswith("-"):
        return None
    launchers = (n for n, word in enumerate(words, start=1) if LAUNCHER.fullmatch(word.text))
    place = next(launchers, 0)
    while place < len(words):
        text = words[place].text
        if text.startswith("-"):
            option, equals, _ = text.partition("=")
            option = _dashed(option)
            if option not in (*VALUED, *BARE):
                return None
            place += 1 if equals or option in BARE else 2
        elif text.endswith(".py"):
            return place
        else:
            place += 1
    return None


def _dashed(option: str) -> str:
    """Return an option of torchrun, which has each with `-` and with `_`, with `-`."""
    return option.replace("_", "-")


def _sizes(launch: Sequence[Word]) -> dict[str, str]:
    sizes = {}
    for word, after in itertools.pairwise([*launch, Word("")]):
        option, equals, value = word.text.partition("=")
        if _dashed(option) in SIZES:
            sizes[_dashed(option)] = value if equals else after.text
    return sizes


def _plain(words: Sequence[Word]) -> list[str]:
    """Return words as text, if they are what a shell would hand over."""
    live = [word.unexpanded for word in words if word.unexpanded]
    if live:
        raise UsageError(
            "A shell would put something else in the place of a part of this command line",
            given=" ".join(live),
            allowed="words as they reach the script: nothing is expanded, redirected or run here",
            hint="the value itself, or single quotes where it is meant as it stands",
        )
    return [word.text for word in words]
