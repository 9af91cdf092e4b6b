"""The start of the `megacpp` command: which command is meant, and how it ends.

Each command is a module with `parser()`, which says what it takes, and `run(given)`, which
returns what it prints. Only the module of the command that runs is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from megacpp_nemo.cli.output import OutputLost, native_path, received, say, write
from megacpp_nemo.cli.screen import on_terminal, screen_for, visible
from megacpp_nemo.cli.usage import COMMANDS, UsageError, overview
from megacpp_nemo.contract.errors import MegaCppError, lookup

DONE, WRONG_USAGE, REFUSED = 0, 2, 3
# As a shell reports a program that ended by SIGINT or SIGPIPE.
INTERRUPTED, PIPE_CLOSED = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run `megacpp` with these arguments, those of the process by default.

    Returns:
        0 done, 2 wrong usage, 3 refused; 130 interrupted and 141 nobody reads the output. A
        command may end with a status of its own, as `doctor` does where something is broken.
    """
    words = [received(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        return _run(words)
    except UsageError as error:
        _tell(error, words)
        return WRONG_USAGE
    except MegaCppError as error:
        _tell(error, words)
        return REFUSED
    except OutputLost:
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(words: list[str]) -> int:
    if not words:
        write(overview(), screen=screen_for("auto", None))
        return WRONG_USAGE
    name = words[0]
    if name in ("-h", "--help", "help"):
        write(overview(), screen=screen_for("auto", None))
        return DONE
    if name == "--version":
        from megacpp_nemo import __version__

        write(f"megacpp {__version__}\n", screen=screen_for("auto", None))
        return DONE
    module: Any = importlib.import_module(f"megacpp_nemo.cli.{_command(name)}")
    parser, rest = module.parser(name.lower()).chosen(words[1:])
    if parser.asks_for_help(rest):
        write(parser.format_help(), screen=screen_for("auto", None))
        return DONE
    given = parser.read(rest)
    given.screen = screen_for(given.color, _file(given.out))
    text = module.run(given)
    out, executable = _file(given.out), given.format == "shell"
    exact = given.format != "text" or (parser.exact_text and not on_terminal(out))
    write(text, screen=given.screen, out=out, exact=exact, executable=executable)
    if out:
        say(f"Wrote {visible(native_path(out))}")
    return int(given.status)


def _file(out: str | None) -> str | None:
    """Return the file of `--out`; None for standard output, which `-` stands for too."""
    return None if out == "-" else out


def _command(name: str) -> str:
    if name.startswith("-"):
        raise UsageError(
            f"There is no option {name} before a command",
            given=name,
            allowed="--help, --version, or a command and then its options",
            hint="megacpp --help",
        )
    commands = {command.name: command.module for command in COMMANDS}
    return lookup(commands, name, what=f"No command is called {name!r}", error=UsageError)


def _tell(error: MegaCppError, words: Sequence[str]) -> None:
    """Write an error to standard error, in colour on a terminal."""
    from megacpp_nemo.cli.errors import told

    say(told(error, words))
