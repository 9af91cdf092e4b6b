"""Which folders are runs, and what they say of themselves beside their curves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megacpp_nemo.contract import RECIPE_NAMES, recipe
from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.contract.run_card import RunCard, read_card
from megacpp_nemo.host.checkpoint_folder import newest_checkpoint, step_of

EVENTS = "events.out.tfevents."
DEEPEST = 4
CHECKPOINTS = "checkpoints"
# Folders of a run that hold no run.
INNER = ("tensorboard", "plasticity", CHECKPOINTS)
_FACTORY = re.compile(r"--factory[ =](\w+)")
_MAX_STEPS = re.compile(r'"value": (-?\d+), "paths": \["<root>\.trainer\.max_steps"')
_FIELD = r"^  {}: '?([^\n']+)'?$"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder.

    Args:
        folder: The folder.
        events: TensorBoard's files in it, sorted by name.
        recipe: Name of the recipe it looks like, its pattern if no recipe has it, or empty.
        seq_length: Tokens of a sample; None if nothing says.
        max_steps: Steps after which it is over; None if nothing says, or it has no end.
        checkpoint: Step of its newest complete checkpoint, or None.
        start_step: Step at which its last process took it up; None if nothing says.
    """

    folder: Path
    events: tuple[Path, ...]
    recipe: str
    seq_length: int | None
    max_steps: int | None
    checkpoint: int | None
    start_step: int | None = None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name


def find_runs(folder: Path) -> list[Run]:
    """Return the runs in a folder, or the one that it is, sorted by path; each of them once.

    Raises:
        DataError: If there is no such folder, it cannot be read, or no run is in it.
    """
    _check_folder(folder)
    once: dict[Path, Path] = {}
    for path in sorted(_run_folders(folder, DEEPEST), key=lambda path: (len(path.parts), path)):
        once.setdefault(path.resolve(), path)
    found = [read_run(path) for path in once.values()]
    if not found:
        raise DataError(
            "There are no runs in this folder",
            given=str(folder),
            allowed="a folder of runs, each with tensorboard/ or checkpoints/ in it",
            hint="megacpp runs runs, once `nemo llm pretrain` has written one",
        )
    return sorted(found, key=lambda run: str(run.folder))


def find_run(given: Path) -> Run:
    """Return the run that a path means: its folder, or anything of it, such as a checkpoint.

    Raises:
        DataError: If there is no such path, or it belongs to no run.
    """
    if not given.exists():
        raise DataError(
            "There is no such run",
            given=str(given),
            allowed="the folder of a run, or a folder or file in it",
            hint="megacpp runs lists them",
        )
    for path in (given, *given.absolute().parents[:4]):
        if path.is_dir() and _is_run(path):
            return read_run(path)
    what, hint = "This folder is no run", "megacpp runs lists the runs of a folder"
    if (given / "weights").is_dir():
        what, hint = "This is a checkpoint without its run", "the folder that the run wrote"
    elif given.is_dir() and not any(given.iterdir()):
        what = "This folder is empty"
    elif given.is_dir() and (inner := [str(p) for p in _run_folders(given, DEEPEST)]):
        what, hint = "This folder holds runs, and is none itself", f"megacpp show {inner[0]}"
    allowed = "a folder with tensorboard/ or checkpoints/ in it, as a run writes them"
    raise DataError(what, given=str(given), allowed=allowed, hint=hint)


def read_run(folder: Path) -> Run:
    """Return what the small files of a run's folder say; its curves are not read."""
    checkpoint = _newest_checkpoint(folder)
    own = read_card(folder)
    card = own or _card_of(folder, checkpoint)
    ends = card.max_steps if card and card.max_steps > 0 else None
    return Run(
        folder=folder,
        events=tuple(sorted(_events(folder), key=lambda path: path.name)),
        recipe=_recipe(folder, card),
        seq_length=card.seq_length if card else None,
        max_steps=ends,
        checkpoint=checkpoint,
        start_step=own.start_step if own else None,
    )


def _check_folder(folder: Path) -> None:
    try:
        os.listdir(folder)
    except OSError as error:
        raise DataError(
            "The folder of runs cannot be read",
            given=f"{folder}: {(error.strerror or str(error)).lower()}",
            allowed="a folder; `runs` where none is named",
            hint="megacpp runs FOLDER",
        ) from None


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
        return
    if depth:
        for path in _folders(folder):
            yield from _run_folders(path, depth - 1)


def _folders(folder: Path) -> list[Path]:
    try:
        paths = sorted(Path(entry.path) for entry in os.scandir(folder))
    except OSError:
        return []
    # What a link that leads to itself is, `os.path.isdir` says without an error.
    return [path for path in paths if not path.name.startswith(".") and os.path.isdir(path)]


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run, and not a part of one."""
    if folder.name in INNER and _is_run(folder.parent):
        return False
    return bool(_events(folder)) or _newest_checkpoint(folder) is not None


def _events(folder: Path) -> list[Path]:
    """Return TensorBoard's files in a folder, or in the one below it that NeMo makes."""
    for place in (folder / "tensorboard", folder):
        try:
            names = sorted(os.listdir(place))
        except OSError:
            continue
        found = [place / name for name in names if name.startswith(EVENTS)]
        if found:
            return found
    return []


def _newest_checkpoint(folder: Path) -> int | None:
    found = newest_checkpoint(folder / CHECKPOINTS)
    return None if found is None else step_of(found)


def _card_of(folder: Path, checkpoint: int | None) -> RunCard | None:
    """Return what a checkpoint's context says, for a run without a card of its own."""
    context = folder / CHECKPOINTS / f"step={checkpoint}" / "context"
    try:
        model = (context / "model.yaml").read_text(encoding="utf-8")
        arguments = (context / "io.json").read_text(encoding="utf-8")
        pattern, *numbers = (
            _field(model, name)
            for name in ("hybrid_override_pattern", "num_layers", "hidden_size", "seq_length")
        )
        layers, hidden, length = map(int, numbers)
    except (OSError, ValueError):
        return None
    ends = _MAX_STEPS.search(arguments)
    return RunCard(
        pattern=pattern,
        num_layers=layers,
        hidden_size=hidden,
        seq_length=length,
        global_batch_size=0,
        max_steps=int(ends[1]) if ends else -1,
        processes=0,
        start_step=0,
        started=0.0,
    )


def _field(text: str, name: str) -> str:
    match = re.search(_FIELD.format(name), text, re.MULTILINE)
    if match is None:
        raise ValueError(name)
    return match[1]


def _recipe(folder: Path, card: RunCard | None) -> str:
    """Return the name of the recipe that a run has, by its command or by its shape."""
    for path in (folder / "cmd-args.log", *sorted(folder.glob("run_*/cmd-args.log"), reverse=True)):
        try:
            named = _FACTORY.search(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if named and named[1].removesuffix("_finetune") in RECIPE_NAMES:
            return named[1]
    if card is None:
        return ""
    for name in RECIPE_NAMES:
        known = recipe(name)
        own = (str(known.pattern), known.depth, known.model.hidden_size)
        if own == (card.pattern, card.num_layers, card.hidden_size):
            return name
    return card.pattern
