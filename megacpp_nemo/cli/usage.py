"""What the `megacpp` command takes: its commands, their options, and what is wrong with words.

Options and words may stand in any order. Nothing is abbreviated.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from megacpp_nemo.cli.screen import COLORS
from megacpp_nemo.contract.errors import MegaCppError, lookup, nearest

# What `whole_number` says is wrong, for `Parser.error` to say with the option's name.
TAKES, GIVEN = "takes ", "; given "
DIGITS = 18
OUT = "write to this file, whole or not at all; its ending may say the format"


class UsageError(MegaCppError):
    """Words that the command does not take."""


class Command(NamedTuple):
    """A command, the module that runs it, and what it does in a line."""

    name: str
    module: str
    summary: str


COMMANDS = (
    Command("lower", "lower", "a recipe as Megatron's command line, with its seams"),
    Command("seams", "lower", "what of a recipe Megatron does not own"),
    Command("strip", "strip", "the layers of a recipe as a picture, with what each costs"),
    Command("report", "report", "a recipe as one HTML page: layers, sizes, memory, command"),
    Command("plan", "plan", "what a recipe costs: parameters, operations, memory, traffic"),
    Command("balance", "balance", "pipeline stages of a recipe that have equally much to do"),
    Command("fit", "fit", "the layouts of a recipe that fit some GPUs, and why others do not"),
    Command("lift", "lift", "a Megatron command line as a recipe"),
    Command("audit", "changes", "what moving a recipe to another release changes"),
    Command("diff", "changes", "how two recipes differ"),
    Command("table", "table", "every setting and all its places"),
    Command("matrix", "matrix", "which recipes lower to which releases, with which seams"),
    Command("data", "data", "corpora of C++ with structure channels: build, inspect, verify"),
    Command("launch", "launch", "a recipe here or on a cluster, started by NeMo-Run"),
    Command("plasticity", "plasticity", "what a lever touches in a model, or did in a run"),
    Command("generate", "generate", "how the model of a run goes on with a text"),
    Command("runs", "runs", "the runs in a folder: step, loss, rate, recipe"),
    Command("show", "show", "the curves of a run, drawn"),
    Command("doctor", "doctor", "what works on this machine, and what repairs the rest"),
    Command("releases", "releases", "the Megatron releases that are known, and new ones"),
)


def overview() -> str:
    """Return the help of the whole command."""
    commands = "\n".join(f"  {command.name:<10} {command.summary}" for command in COMMANDS)
    return f"""\
usage: megacpp COMMAND ...

Recipes for hybrid language models, as Megatron-LM's own command line and back.

commands:
{commands}

  megacpp COMMAND --help says what a command takes; megacpp --version, the version.

examples:
  megacpp lower nam56r
  megacpp lower nam56r precision=fp8 --release 0.19.0 --format shell --out run.sh
  megacpp audit nam56r --from 0.16.1 --to 0.19.0

Exit status: 0 done, 2 wrong usage, 3 refused; of doctor and data verify, 1 something is broken.
"""


class _Once(argparse.Action):
    """Keeps the value of an option that is given once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Keep the value; refuse another one."""
        if self.dest in namespace.seen:
            raise UsageError(
                f"{option_string} is given twice",
                given=f"{option_string} {getattr(namespace, self.dest)}, {option_string} {values}",
                allowed="one of the two",
                hint=f"{option_string} {values} alone",
            )
        namespace.seen.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """The options of one command. Words that are no options are kept in `words`.

    Args:
        name: The command.
        takes: What it takes, in short.
        about: What it does.
        examples: Commands to learn from.
        formats: What `--format` may be, the default first.
        takes_rest: Whether words may stand behind `--`.
        exact_text: Whether its text is read by commands too, and must be the same everywhere.
    """

    def __init__(
        self,
        name: str,
        takes: str,
        about: str,
        examples: Sequence[str],
        formats: Sequence[str],
        *,
        takes_rest: bool = False,
        exact_text: bool = False,
    ) -> None:
        listed = "\n".join(f"  {example}" for example in examples)
        super().__init__(
            prog=f"megacpp {name}",
            usage=f"megacpp {name} {takes}".rstrip(),
            description=about,
            epilog=f"examples:\n{listed}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.name, self.takes, self.formats = name, takes, tuple(formats)
        self.takes_rest, self.exact_text = takes_rest, exact_text
        self.spellings: list[str] = []
        self.add("--format", metavar="F", default=formats[0], help=", ".join(formats))
        self.add("--out", metavar="FILE", help=OUT)
        self.add("--color", metavar="WHEN", default="auto", help=", ".join(COLORS))
        self.add("--help", "-h", action="store_true", help="show this")

    def add(self, *spellings: str, **more: Any) -> None:
        """Add an option; as `add_argument`, and given once unless `action` says otherwise."""
        self.spellings += spellings
        self.add_argument(*spellings, **{"action": _Once, **more})

    def describe_out(self, metavar: str, words: str) -> None:
        """Say what `--out` is of a command that writes something else than one file."""
        for action in self._actions:
            if action.dest == "out":
                action.metavar, action.help = metavar, words

    def chosen(self, words: Sequence[str]) -> tuple[Parser, list[str]]:
        """Return what reads these words, and the words it reads: of a group, one of its own."""
        return self, list(words)

    def asks_for_help(self, words: Sequence[str]) -> bool:
        """Whether help is asked for, before `--`."""
        own = words[: words.index("--")] if "--" in words else words
        return "--help" in own or "-h" in own

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the options, with the other words as `words` and those behind `--` as `rest`.

        Raises:
            UsageError: If an option is unknown, incomplete or given twice, there is no such
                format, or words stand behind `--` and mean nothing there.
        """
        cut = words.index("--") if "--" in words else len(words)
        seen = argparse.Namespace(seen=set())
        given, others = self.parse_known_args(list(words[:cut]), seen)
        for word in others:
            if word.startswith("-") and word != "-":
                self._refuse_option(word.partition("=")[0])
        given.command, given.words = self.name, others
        given.rest = list(words[cut + 1 :]) if cut < len(words) else None
        given.status = 0
        if given.rest and not self.takes_rest:
            self.refuse(f"{self.name} takes no words behind '--'", " ".join(words[cut:]))
        if given.out == "":
            self.refuse("--out needs the name of a file", "--out ''", hint="--out FILE")
        for option, choices in (("format", self.formats), ("color", COLORS)):
            known = {choice: choice for choice in choices}
            value = getattr(given, option)
            what = f"{self.name} knows no --{option} {value!r}"
            chosen = lookup(known, value, what=what, field=f"--{option}", error=UsageError)
            setattr(given, option, chosen)
        ending = (given.out or "").rpartition(".")[2].lower()
        if "format" not in given.seen and ending in self.formats:
            given.format = ending
        return given

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        name, _, problem = message.removeprefix("argument ").partition(": ")
        if name.endswith("are required"):
            self.refuse(f"{self.name} needs {problem}", "neither" if "," in problem else "none")
        if problem.startswith("expected"):
            self.refuse(f"{name} needs a value", f"{name} alone")
        if problem.startswith(TAKES):
            allowed, _, text = problem.removeprefix(TAKES).partition(GIVEN)
            known = [action.default for action in self._actions if name in action.option_strings]
            example = next((value for value in known if isinstance(value, int)), 8)
            raise UsageError(
                f"{name} takes {allowed}",
                given=f"{name} {text}",
                allowed=allowed,
                hint=f"{name} {example}",
            )
        self.refuse(f"{self.name} cannot read its options", message)

    def one_word(self, given: argparse.Namespace, what: str) -> str:
        """Return the only word that was given.

        Raises:
            UsageError: If there is none, or there are several.
        """
        if len(given.words) != 1:
            self.refuse(f"{self.name} takes one {what}", " ".join(given.words) or "none")
        return str(given.words[0])

    def refuse(self, what: str, given: str, hint: str | None = None) -> NoReturn:
        """Raise a refusal of words that were given.

        Raises:
            UsageError: Always.
        """
        allowed = f"megacpp {self.name} {self.takes}".rstrip()
        raise UsageError(
            what, given=given, allowed=allowed, hint=hint or f"megacpp {self.name} --help"
        )

    def _refuse_option(self, option: str) -> NoReturn:
        close = nearest(option, self.spellings)
        self.refuse(f"{self.name} has no option {option}", option, hint=close)


def whole_number(least: int) -> Callable[[str], int]:
    """Return what reads the value of an option that takes a whole number.

    Raises:
        ArgumentTypeError: If it reads something else, or less than `least`; `Parser.error` says
            so with the option's name.
    """

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > DIGITS or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{TAKES}a whole number, {least} or more{GIVEN}{text!r}"
            )
        return int(text)

    return read


def add_recipe_options(parser: Parser) -> None:
    """Add what every command that reads a recipe takes."""
    parser.add("--mode", metavar="M", default=None, help="nemo_native (default) or author_dp")


def add_release(parser: Parser, default: str | None) -> None:
    """Add the release; required where there is no default."""
    parser.add(
        "--release",
        metavar="R",
        default=default,
        required=default is None,
        help="a name of `megacpp releases`, or the path of a release file"
        + (f"; {default} by default" if default else ""),
    )
