"""A run that starts from a checkpoint with another input side, or goes on from its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from megacpp_nemo.contract import RecipeError
from tests.support.processes import RankError, in_process
from tests.support.training import configure, small_recipe, train

INPUTS: dict[str, Any] = {
    "features.ngram_hash": True,
    "model.embedding.ngram.table_size": 100,
    "features.structure": "core",
}
NONE: dict[str, Any] = {"features.ngram_hash": False, "features.structure": None}
TENSORS = {
    "ngram_hash.table.weight",
    "ngram_hash.out_proj.weight",
    "structure.scale",
    "structure.table.weight",
    "structure.up_proj.weight",
}


def run(
    sources: Path,
    folder: Path,
    start: Path | None = None,
    *,
    steps: int,
    goes_on: bool = False,
    drop_inputs: bool = False,
    **changes: Any,
) -> tuple[dict[str, list[float]], list[str]]:
    """Train from a checkpoint's weights, or go on from it; return what was recorded and logged."""
    from megacpp_nemo.recipes import to_finetune

    intent = small_recipe(**changes)
    partial = configure(intent, sources, folder, steps=steps, save_interval=2)
    if goes_on:
        partial.resume.resume_from_path = str(start)
    elif start is not None:
        started = to_finetune(intent, checkpoint=start, drop_inputs=drop_inputs)
        partial.resume.restore_config = started.resume.restore_config
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megacpp_nemo.host.warm_start")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return train(partial), said


def named(said: str) -> tuple[str, set[str]]:
    """Return what a line of the log says, and which parts of the input embedding it names."""
    what, _, names = said.partition(": ")
    return what, {name.rpartition("module.embedding.")[2] for name in names.split(", ")}


@pytest.fixture(scope="module")
def plain(checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two steps from the starting checkpoint recorded, without the input parts."""
    folder = tmp_path_factory.mktemp("plain")
    return in_process(lambda: run(sources, folder, checkpoint, steps=2, **NONE))


@pytest.fixture(scope="module")
def begun(checkpoint: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run of four steps that got them, and what it recorded and logged."""
    folder = tmp_path_factory.mktemp("begun")
    return folder, *in_process(lambda: run(sources, folder, checkpoint, steps=4, **INPUTS))


def test_a_model_that_gets_them_starts_as_it_was_to_the_bit(plain: Any, begun: Any) -> None:
    (before, nothing_said), (_, recorded, (said,)) = plain, begun
    assert recorded["loss"][0] == before["loss"][0]
    assert recorded["loss"][1] != before["loss"][1]
    assert named(said) == ("drawn anew, not in the checkpoint", TENSORS)
    assert nothing_said == []


def test_it_goes_on_from_its_own_checkpoint_bit_for_bit(
    begun: Any, sources: Path, tmp_path: Path
) -> None:
    folder, unbroken, _ = begun
    start = folder / "checkpoints" / "step=2"
    resumed, said = in_process(
        lambda: run(sources, tmp_path, start, steps=4, goes_on=True, **INPUTS)
    )
    assert resumed == {name: values[2:] for name, values in unbroken.items()}
    assert len(resumed["loss"]) == 2
    assert said == []


def test_they_are_left_out_if_asked_to_and_named(begun: Any, sources: Path, tmp_path: Path) -> None:
    start = begun[0] / "checkpoints" / "step=4"
    recorded, (said,) = in_process(
        lambda: run(sources, tmp_path, start, steps=2, drop_inputs=True, **NONE)
    )
    assert named(said) == ("left out, in the checkpoint", TENSORS)
    assert len(recorded["loss"]) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (NONE, r"n-gram memory and no structure channels(.|\n)*structure='core'(.|\n)*drop_inputs"),
        ({**INPUTS, "features.ngram_hash": False}, r"no n-gram memory(.|\n)*ngram_hash=True"),
        ({**INPUTS, "model.embedding.ngram.table_size": 90}, r"ngram.table_size=90(.|\n)*=100"),
        ({**INPUTS, "model.embedding.ngram.orders": (2, 4)}, r"orders=\(2, 4\)(.|\n)*\[2, 3\]"),
        # As many rows, of other channels.
        ({**INPUTS, "features.structure": "category+ast_depth"}, "structure='category.ast_depth'"),
    ],
)
def test_another_input_side_than_the_checkpoints_is_refused_before_anything_is_built(
    begun: Any, changes: dict[str, Any], said: str
) -> None:
    from megacpp_nemo.recipes import to_finetune

    start = begun[0] / "checkpoints" / "step=4"
    with pytest.raises(RecipeError, match=said):
        to_finetune(small_recipe(**changes), checkpoint=start)


def test_other_names_of_the_same_channels_and_another_place_of_the_tables_are_the_same(
    begun: Any,
) -> None:
    from megacpp_nemo.recipes import to_finetune

    written = {
        **INPUTS,
        "features.structure": "dependency_level+category",
        "model.embedding.ngram.placement": "host",
    }
    to_finetune(small_recipe(**written), checkpoint=begun[0] / "checkpoints" / "step=4")


@pytest.mark.parametrize(
    ("has", "changes", "said"),
    [
        (True, NONE, "The model has no n-gram memory and structure channels"),
        (False, INPUTS, "has no n-gram memory and structure channels, nor its optimizer"),
        (True, {**INPUTS, "model.embedding.ngram.orders": (2, 4)}, r"another input side.*\(2, 4\)"),
    ],
    ids=["lost", "new", "other"],
)
def test_a_run_that_goes_on_with_another_input_side_is_refused(
    has: bool,
    changes: dict[str, Any],
    said: str,
    begun: Any,
    checkpoint: Path,
    sources: Path,
    tmp_path: Path,
) -> None:
    start = begun[0] / "checkpoints" / "step=2" if has else checkpoint
    with pytest.raises(RankError, match=rf"(?s)RuntimeRefusal: .*{said}.*allowed:.*try:"):
        in_process(lambda: run(sources, tmp_path, start, steps=4, goes_on=True, **changes))
