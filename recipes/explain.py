"""What is wrong with an override on NeMo-Run's command line, found out after it failed.

- `check_form`: every override is `PATH=VALUE`
- `overrides`: the first one that does not fit the recipe
- `part`: a part such as `model=...` that cannot be made
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import catalogue
from nemo_run.cli import cli_parser
from nemo_run.cli.api import extract_constituent_types
from nemo_run.config import get_type_namespace

from megacpp_nemo.contract import MegaCppError, RecipeError
from megacpp_nemo.contract.errors import nearest
from megacpp_nemo.recipes.reading import elements

FACTORY = re.compile(r"(\w+)(?:\(.*\))?", re.DOTALL)
OVERRIDE = re.compile(r"([\w.\[\]]+)\s*[-+*/|&]?=(.+)", re.DOTALL)
HELP = "nemo llm pretrain --help"
CALLBACKS = "trainer.callbacks"


def factory_name(text: str) -> str:
    """Return the name in `NAME` or `NAME(ARGUMENTS)`, or nothing if it is neither."""
    match = FACTORY.fullmatch(text)
    return match[1] if match else ""


def factories(*targets: Any) -> dict[str, Callable[..., Any]]:
    """Return the factories registered for any of these types or functions, by name."""
    spaces = [get_type_namespace(target) for target in targets]
    return {key[-1]: fn for space in spaces for key, fn in catalogue._get_all((space,)).items()}


def value_at(recipe: Any, path: str) -> Any:
    """Return what stands at a dotted path of a recipe, which may have `[index]` in it."""
    for name in path.split("."):
        recipe = cli_parser.parse_attribute(name, recipe)
    return recipe


def check_form(args: Sequence[str]) -> None:
    """Raise RecipeError unless every argument is an override that NeMo-Run reads as it is meant.

    It drops options that it does not know, such as a misspelled `--dry-run`; of two overrides
    such as `path+=` it drops the first; and a callback that is added without being in a list is
    taken apart into what it is made of.
    """
    added: dict[str, str] = {}
    for arg in args:
        if not OVERRIDE.fullmatch(arg):
            raise RecipeError(
                "NeMo-Run has no such option" if arg.startswith("-") else "This is no override",
                given=repr(arg),
                allowed=f"the options of {HELP}, or PATH=VALUE",
                hint="--dryrun, --yes, trainer.max_steps=100",
            )
        before, _, value = arg.partition("=")
        if before[-1] not in "+-*/|&":
            continue
        path = before[:-1].strip()
        if path == CALLBACKS and not value.lstrip().startswith("["):
            bare = value.strip().strip("\"'").strip("[]")
            raise RecipeError(
                f"What is added to {CALLBACKS} is a list",
                given=arg,
                allowed=f"{CALLBACKS}+=[CALLBACK, ...]",
                hint=f"{before}=[{bare}]",
            )
        if before in added:
            raise RecipeError(
                f"{before}= is given twice, and NeMo-Run keeps the last",
                given=f"{added[before]}, {arg}",
                allowed="each operation on a path once",
                hint=_joined(added[before], arg),
            )
        added[before] = arg


def _joined(one: str, other: str) -> str:
    """Return two additions to a list as one; the second, where they are none."""
    before, _, value = one.partition("=")
    first, second = elements(value), elements(other.partition("=")[2])
    lists = value.lstrip().startswith("[")
    return f"{before}=[{','.join([*first, *second])}]" if lists else f"{other} alone"


def overrides(recipe: Any, args: Sequence[str]) -> None:
    """Apply overrides to a recipe, one by one, and raise what is wrong with the first bad one.

    Raises:
        MegaCppError: If there is a bad one.
    """
    for arg in args:
        path, value = OVERRIDE.fullmatch(arg).groups()  # type: ignore[union-attr]
        annotation = _annotation(recipe, path, arg)
        try:
            cli_parser.parse_cli_args(recipe, [arg])
        except Exception as error:
            if "." not in path:
                part(recipe, path, value)
            if path == CALLBACKS:
                for element in elements(value):
                    _made(recipe.trainer, path, annotation, element)
            raise RecipeError(
                f"{path} cannot be {value!r}",
                given=arg,
                allowed=f"a value of type {_shown(annotation)}",
                hint=f"{path}={value_at(recipe, path)!r}",
            ) from error


def part(recipe: Any, path: str, value: str) -> None:
    """Raise what is wrong with a part of a recipe that is named by `path=value`.

    A value that is a path, or might be one on another machine, is left alone.

    Raises:
        MegaCppError: If there is no such part, or its arguments do not fit it.
    """
    name = factory_name(value)
    if not name or Path(value).exists():
        return
    annotation = inspect.signature(recipe.__fn_or_cls__).parameters[path].annotation
    _made(recipe, path, annotation, value)


def _made(owner: Any, path: str, annotation: Any, value: str) -> None:
    """Raise what is wrong with a factory and its arguments, named where `annotation` stands.

    Raises:
        MegaCppError: If there is no such factory, or its arguments do not fit it.
    """
    name, last = factory_name(value), path.rpartition(".")[2]
    known = factories(*extract_constituent_types(annotation))
    if name not in known:
        ours = [key for key, fn in known.items() if fn.__module__.startswith("megacpp_nemo")]
        raise unknown(last.rstrip("s"), name or value, ours, known)
    try:
        cli_parser.parse_factory(owner.__fn_or_cls__, last, annotation, value)
    except MegaCppError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{name} cannot be made with these arguments",
            given=f"{path}={value}",
            allowed=", ".join(inspect.signature(known[name]).parameters),
            hint=name if path == CALLBACKS else f"{path}={name}",
        ) from error


def unknown(kind: str, name: str, shown: Iterable[str], names: Iterable[str]) -> RecipeError:
    """Return the error of a name that is not one of `names`, of which some are shown."""
    names = list(names)
    return RecipeError(
        f"No {kind} is called {name!r}",
        given=repr(name),
        allowed=_listed(shown, names),
        hint=nearest(name, names) or HELP,
    )


def _annotation(recipe: Any, path: str, arg: str) -> Any:
    """Return the type of the setting at a dotted path; raise RecipeError if there is none."""
    parent, _, last = path.rpartition(".")
    owner = recipe
    for name in parent.split(".") if parent else ():
        try:
            owner = cli_parser.parse_attribute(name, owner)
        except cli_parser.CLIException:
            raise _no_setting(owner, name, arg) from None
        except ValueError:  # a dataclass in a recipe, made anew where it is not configured
            raise RecipeError(
                f"The recipe leaves {name} at its defaults, and nothing below it can be overridden",
                given=arg,
                allowed=f"what is configured beside it: {', '.join(owner.__arguments__)}",
                hint=f"{name} as an argument of the recipe, or in another callback",
            ) from None
    parameters = _parameters(owner)
    name = last.partition("[")[0]
    if name in parameters:
        return parameters[name].annotation
    if any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return Any
    raise _no_setting(owner, name, arg)


def _parameters(config: Any) -> dict[str, inspect.Parameter]:
    target = getattr(config, "__fn_or_cls__", None)
    return dict(inspect.signature(target).parameters) if target else {}


def _no_setting(owner: Any, name: str, arg: str) -> RecipeError:
    names = sorted(_parameters(owner))
    close = difflib.get_close_matches(name, names, n=8, cutoff=0.5)
    path = arg.partition("=")[0]
    if name == "executor":
        hint = f"run.{arg}"
    elif "[" in name:
        hint = path.replace(name, f"{name.partition('[')[0]}[0]")
    else:
        hint = path.replace(name, close[0]) if close else HELP
    return RecipeError(
        f"The recipe has no setting {path}",
        given=arg,
        allowed=_listed(close or names[:8], names) if names else f"nothing below what is {owner!r}",
        hint=hint,
    )


def _listed(shown: Iterable[str], names: Sequence[str]) -> str:
    shown = list(shown)
    return ", ".join(shown) + (f", ... ({len(names)} in all)" if len(shown) < len(names) else "")


def _shown(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")
