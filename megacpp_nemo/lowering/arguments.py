"""An argument vector read as a Megatron-LM release's own parser would read it.

    arguments = parse(["--lr", "3e-4", "--bf16"], load_release("0.16.1"))
    arguments["--lr"]  # 0.0003
    arguments.argv     # ("--lr", "3e-4", "--bf16")

Stricter than argparse where argparse would hide a slip: a flag stands once, under one spelling,
and nothing is abbreviated. All that is wrong with a vector is said in one error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megacpp_nemo.contract.errors import LoweringError, nearest
from megacpp_nemo.lowering.conditions import Facts, holds
from megacpp_nemo.lowering.releases import RELEASE_NAMES, Flag, Release, load_release
from megacpp_nemo.lowering.values import Wrong, converted

# What argparse takes for a value although it begins with a dash.
NEGATIVE_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")
HELP = "-h"
MANY = ("*", "+")


@dataclass(frozen=True)
class Given:
    """One flag as it was given.

    Args:
        spelling: The spelling to write: canonical, or `--no-x` of a flag that has it.
        texts: Its values as text.
        value: Its value as the release's parser would set it.
    """

    spelling: str
    texts: tuple[str, ...]
    value: Any

    @property
    def argv(self) -> tuple[str, ...]:
        """The flag and its values; joined by `=` where the value begins with a dash."""
        if len(self.texts) == 1 and self.texts[0].startswith("-"):
            return (f"{self.spelling}={self.texts[0]}",)
        return (self.spelling, *self.texts)


class Arguments(Mapping[str, Any]):
    """Values by canonical flag, in the order in which they were given."""

    def __init__(self, given: Mapping[str, Given]) -> None:
        self._given = dict(given)

    def __getitem__(self, flag: str) -> Any:
        return self._given[flag].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def __repr__(self) -> str:
        return f"Arguments({dict(self)!r})"

    @property
    def argv(self) -> tuple[str, ...]:
        """The argument vector in canonical spelling, every value as it was written."""
        return tuple(token for given in self._given.values() for token in given.argv)

    def words(self, flag: str) -> tuple[str, ...]:
        """Return a flag as it stands in `argv`, with its values."""
        return self._given[flag].argv


@dataclass(frozen=True)
class DeadFlag:
    """A flag that the parser accepts and nothing in this model reads.

    Args:
        flag: Canonical spelling.
        why: What goes unread, with the upstream file that shows it.
    """

    flag: str
    why: str


def parse(argv: Sequence[str], release: Release) -> Arguments:
    """Return what `argv` gives, as `release`'s own parser would read it.

    Raises:
        LoweringError: If it is no list of words; or naming everything that is wrong: unknown or
            abbreviated flags, positional arguments, a wrong number, type or choice of values, a
            flag given twice.
    """
    given: dict[str, Given] = {}
    wrong: list[Wrong] = []
    by_dest: dict[str, str] = {}
    for spelling, joined, texts in _grouped(_words(argv), release, wrong):
        flag = release.flags.get(spelling)
        if flag is None:
            wrong.append(_unknown(spelling, release))
            continue
        before = by_dest.setdefault(flag.dest, spelling)
        if flag.name in given or before != spelling:
            wrong.append(_twice(before, spelling))
            continue
        texts, rest = _taken(flag, joined, texts)
        wrong.extend(_positional(text) for text in rest)
        try:
            value = converted(flag, spelling, texts, joined)
        except ValueError as error:
            (problem,) = error.args
            wrong.append(problem)
            continue
        switched_off = flag.action == "boolean_optional" and spelling.startswith("--no-")
        given[flag.name] = Given(spelling if switched_off else flag.name, texts, value)
    if wrong:
        raise _all(wrong, release)
    return Arguments(given)


def _words(argv: Any) -> list[str]:
    if isinstance(argv, (str, bytes, Mapping)) or not isinstance(argv, Iterable):
        raise LoweringError(
            "An argument vector is a list of words",
            given=repr(argv)[:80],
            allowed="a list or a tuple of text",
            hint="shlex.split(TEXT), where it is the text of a command line",
        )
    return list(map(str, argv))


def dead_flags(arguments: Arguments, release: Release) -> tuple[DeadFlag, ...]:
    """Return the flags among `arguments` that nothing in the model reads, in their order."""
    facts = _facts(arguments, release)
    unread: dict[str, str] = {}
    for rule in release.dead:
        here = [flag for flag in rule.flags if flag in arguments and flag not in unread]
        if here and not holds(rule.needs, facts):
            unread.update(dict.fromkeys(here, rule.why))
    return tuple(DeadFlag(flag, unread[flag]) for flag in arguments if flag in unread)


def _facts(arguments: Arguments, release: Release) -> Facts:
    own = (release.pattern_flag, *release.deprecated_pattern_flags)
    patterns = [str(arguments[flag]) for flag in own if flag in arguments]
    kinds = {symbol: kind for kind, symbol in release.symbols.items()}
    spec = arguments.get("--spec")
    return Facts(
        given=arguments,
        defaults=lambda flag: release.flags[flag].default,
        layers={kinds[s] for s in "".join(patterns) if s in kinds} if patterns else None,
        has_mtp=len(patterns) > 1 or any((release.mtp_separator or "\0") in p for p in patterns),
        custom_spec=spec is not None and tuple(spec) != release.stock_spec,
    )


def _is_value(token: str, flags: Collection[str]) -> bool:
    """Return whether argparse takes `token` for a value wherever it stands."""
    if not token.startswith("-") or token == "-":
        return True
    # argparse sees its own `-h` before it sees the space of `-h x`.
    if token.partition("=")[0] in flags or token.startswith(HELP):
        return False
    return bool(NEGATIVE_NUMBER.match(token)) or " " in token


def _grouped(
    argv: list[str], release: Release, wrong: list[Wrong]
) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """Yield each flag with whether its value is joined by `=`, and the values that follow it."""
    place = 0
    while place < len(argv):
        token = argv[place]
        place += 1
        if _is_value(token, release.flags):
            wrong.append(_positional(token))
            continue
        start = place
        while place < len(argv) and _is_value(argv[place], release.flags):
            place += 1
        spelling, equals, value = token.partition("=")
        if token in release.flags or not equals:
            yield token, False, tuple(argv[start:place])
        else:
            wrong.extend(_positional(text) for text in argv[start:place])
            yield spelling, True, (value,)


def _taken(
    flag: Flag, joined: bool, texts: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the values that belong to the flag, and those left over."""
    if joined or flag.nargs in MANY:
        return texts, ()
    most = flag.nargs if isinstance(flag.nargs, int) else 1
    most = most if flag.action in ("store", "append") else 0
    return texts[:most], texts[most:]


def _unknown(spelling: str, release: Release) -> Wrong:
    others = [name for name in RELEASE_NAMES if spelling in load_release(name).flags]
    full = sorted(name for name in release.flags if name.startswith(spelling))
    if full and not others and len(spelling) > len("--"):
        return Wrong(
            spelling, "is not a flag, and flags are not abbreviated", f"write {', '.join(full[:3])}"
        )
    known = f", but of {', '.join(others)}" if others else ""
    close = nearest(spelling, release.flags)
    hint = f"{close}, the nearest flag of {release.name}" if close else f"leave {spelling} out"
    return Wrong(spelling, f"is not a flag of {release.name}{known}", hint)


def _positional(text: str) -> Wrong:
    return Wrong(repr(text), "belongs to no flag", hint=f"put a flag before {text!r}")


def _twice(before: str, spelling: str) -> Wrong:
    if before == spelling:
        return Wrong(spelling, "is given twice", hint=f"give {spelling} once")
    what = f"sets the same as {before}, which is given too"
    return Wrong(spelling, what, hint=f"give {before} or {spelling}")


def _all(wrong: Sequence[Wrong], release: Release) -> LoweringError:
    rules = dict.fromkeys(problem.allowed for problem in wrong if problem.allowed)
    hints = dict.fromkeys(problem.hint for problem in wrong)
    return LoweringError(
        f"Megatron-LM {release.name} does not take this argument vector",
        given="; ".join(f"{problem.where} {problem.what}" for problem in wrong),
        allowed="; ".join(rules) or f"flags of {release.name}, each in full and once",
        hint="; ".join(hints),
    )
