"""Executors: who starts the processes, read from files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from megacpp_nemo.contract.errors import nearest
from megacpp_nemo.launch.document import (
    GROUP,
    NUMBER,
    SWITCH,
    TEXT,
    TEXTS,
    VARIABLES,
    Document,
    Key,
    read,
)
from megacpp_nemo.launch.errors import LaunchError
from megacpp_nemo.launch.kinds import KINDS, Option
from megacpp_nemo.lowering.policy import VARIABLE

_EVERY = {"about": Key(TEXT, needed=True), "kind": Key(TEXT, needed=True)}
_EXAMPLES = {SWITCH: "true", VARIABLES: "NAME=VALUE"}
_ANY_OPTION = {name: Key(o.form) for kind in KINDS.values() for name, o in kind.options.items()}


@dataclass(frozen=True, kw_only=True)
class ExecutorFile:
    """An executor as a file says it.

    Args:
        name: The file's, without its ending.
        about: What it is for, in a sentence.
        kind: One of `KINDS`.
        options: Its options by name; those not set are not there.
        environment: Variables of this site, by name.
        path: The file.
    """

    name: str
    about: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    path: Path


def read_executor(path: Path) -> ExecutorFile:
    """Return the executor in a file.

    Raises:
        LaunchError: If it is none; the message has file, line and key.
    """
    keys = {**_EVERY, "options": Key(GROUP, keys=_ANY_OPTION), "environment": Key(VARIABLES)}
    document = read(path, keys)
    kind = document.values["kind"]
    if kind not in KINDS:
        raise document.error(
            "kind",
            f"There is no kind of executor {kind!r}",
            given=f"kind: {kind}",
            allowed=", ".join(KINDS),
            hint=f"kind: {nearest(kind, KINDS) or 'torchrun'}",
        )
    options = document.values.get("options", {})
    _check_options(document, kind, options)
    environment = document.values.get("environment", {})
    _check_environment(document, kind, environment)
    return ExecutorFile(
        name=path.stem,
        about=document.values["about"],
        kind=kind,
        options=options,
        environment=environment,
        path=path,
    )


def _check_options(document: Document, kind: str, options: Mapping[str, Any]) -> None:
    known = KINDS[kind].options
    for key in document.lines:
        name = key.removeprefix("options.").partition(".")[0]
        if key.startswith("options.") and name not in known:
            close = nearest(name, known)
            raise document.error(
                key,
                f"An executor of kind {kind} has no option {name}",
                given=key,
                allowed=", ".join(known) or "no options",
                hint=f"{close}: ..." if close else f"line {document.lines[key]} left out",
            )
    for name, value in options.items():
        key, (_, allowed) = f"options.{name}", known[name].only or ("", "")
        for text in _unfit(value, known[name]):
            raise document.error(
                key, f"{key} cannot be {text!r}", given=f"{key}: {text}", allowed=allowed,
                hint=f"{name}: as in {allowed}",
            )  # fmt: skip


def _unfit(value: Any, option: Option) -> list[str]:
    """Return the texts of an option that are not what it must match."""
    if option.only is None:
        return []
    named = isinstance(value, dict)
    texts = [f"{name}={text}" for name, text in value.items()] if named else value
    texts = [texts] if isinstance(texts, str) else texts
    return [text for text in texts if not re.fullmatch(option.only[0], text)]


def _check_environment(document: Document, kind: str, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        key = f"environment.{name}"
        if not VARIABLE.fullmatch(name) or set(value) & set("\n\0"):
            raise document.error(
                key,
                "A variable is a name and one line of text",
                given=f"{key}: {value!r}",
                allowed="a name of letters, digits and _, and one line of text",
                hint="NCCL_DEBUG: INFO",
            )
        if renames(kind, name):
            raise document.error(
                key,
                f"NeMo-Run writes names of variables in capitals for {kind}",
                given=key,
                allowed="a name in capitals",
                hint=f"{name.upper()}: {value}",
            )


def renames(kind: str, name: str) -> bool:
    """Whether NeMo-Run would change a variable's name on its way to the processes."""
    return kind == "slurm" and name != name.upper()


def with_options(executor: ExecutorFile, words: Sequence[str]) -> ExecutorFile:
    """Return an executor with options as `NAME=VALUE` words set on it.

    Raises:
        LaunchError: If a word is none, or its option is unknown, given twice or of another form.
    """
    known, given = KINDS[executor.kind].options, {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in known:
            close = nearest(name, known)
            raise LaunchError(
                f"An executor of kind {executor.kind} has no option {name!r}"
                if equals
                else "An option of an executor is NAME=VALUE",
                given=f"--set {word}",
                allowed=", ".join(known) or "no options",
                hint=f"--set {close or next(iter(known), 'NAME')}=VALUE" if known else "no --set",
            )
        if name in given:
            raise LaunchError(
                f"The option {name} is given twice",
                given=f"--set {word}",
                allowed="each option once",
                hint=f"--set {word} alone",
            )
        given[name] = _parsed(name, text, known[name])
    return replace(executor, options={**executor.options, **given})


def _parsed(name: str, text: str, option: Option) -> Any:
    parts = [part for part in text.split(",") if part]
    if option.form == TEXT and text.strip() and not _unfit(text, option):
        return text
    if option.form == TEXTS and text and not _unfit(parts, option):
        return parts
    if option.form == VARIABLES and text and all("=" in part for part in parts):
        named = dict(part.split("=", 1) for part in parts)
        if not _unfit(named, option):
            return named
    if option.form in (SWITCH, NUMBER):
        value = yaml.safe_load(text) if re.fullmatch(r"\w+", text) else None
        if type(value) is (bool if option.form == SWITCH else int):
            return value
    allowed = option.only[1] if option.only else option.form
    raise LaunchError(
        f"{name} takes {allowed}", given=f"--set {name}={text}", allowed=allowed,
        hint=f"--set {name}={_EXAMPLES.get(option.form, 'VALUE')}",
    )  # fmt: skip


def missing(executor: ExecutorFile) -> list[str]:
    """Return the options that a launch needs and that are not set."""
    known = KINDS[executor.kind].options
    lacking = [name for name, option in known.items() if option.needed]
    if executor.options.get("host"):
        lacking += ["user", "job_dir"]
    return [name for name in lacking if not executor.options.get(name)]
