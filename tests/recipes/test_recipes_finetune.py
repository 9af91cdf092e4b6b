"""Fine-tuning: from a checkpoint's weights, with its tokenizer."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megacpp_nemo.contract import HybridRecipe, MegaCppError, RecipeError
from tests.support.processes import in_process
from tests.support.training import configure, small_recipe, train, write_sources


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A checkpoint of 40 steps, and the losses on the way to it."""
    folder = tmp_path_factory.mktemp("pretrained")
    sources = write_sources(folder / "sources")

    def run() -> list[float]:
        partial = configure(small_recipe(), sources, folder / "run", steps=40)
        return train(partial)["loss"]

    losses = in_process(run)
    return folder / "run" / "checkpoints" / "step=40", losses


@pytest.fixture
def other_sources(tmp_path: Path) -> Path:
    return write_sources(tmp_path / "other", seed=5)


def small_run(partial: Any, sources: Path, steps: int) -> Any:
    """Make a recipe as small and quiet as those that `configure` makes."""
    quiet = configure(small_recipe(), sources, sources.parent / "run", steps=steps)
    for part in ("trainer", "log"):
        setattr(partial, part, getattr(quiet, part))
    partial.data.root, partial.data.cache_dir = quiet.data.root, quiet.data.cache_dir
    return partial


def finetune(checkpoint: Path, sources: Path, steps: int) -> tuple[list[float], bytes]:
    """Fine-tune, and return the losses and the tokenizer that the new checkpoint holds."""
    from megacpp_nemo.recipes import to_finetune

    partial = to_finetune(small_recipe(), checkpoint=checkpoint)
    losses = train(small_run(partial, sources, steps))["loss"]
    saved = sources.parent / "run" / "checkpoints" / f"step={steps}" / "context" / "tokenizer"
    return losses, (saved / "tokenizer.json").read_bytes()


def test_it_starts_from_the_weights_and_the_tokenizer_and_resumes_its_own_run(
    pretrained, other_sources
):
    checkpoint, before = pretrained
    own = (checkpoint / "context" / "tokenizer" / "tokenizer.json").read_bytes()
    losses, tokenizer = in_process(finetune, checkpoint, other_sources, 2)
    assert before[0] > 6
    assert losses[0] == pytest.approx(before[-1], abs=0.25)
    assert losses[0] < before[0] - 1.5
    assert tokenizer == own
    resumed, tokenizer = in_process(finetune, checkpoint, other_sources, 4)
    assert len(resumed) == 2
    assert resumed[0] < losses[0]
    assert tokenizer == own


def test_the_factory_finds_the_tokenizer_in_the_checkpoint(pretrained, nemo):
    checkpoint, _ = pretrained
    changes = leaves_of(small_recipe())
    task = nemo.resolved(
        f"nam56r_tiny(checkpoint='{checkpoint}',{changes})",
        "trainer.max_steps=3",
        command="finetune",
    )
    assert task.resume.restore_config.path == str(checkpoint)
    assert task.data.tokenizer_dir == str(checkpoint / "context" / "tokenizer")
    assert (task.tokenizer, task.trainer.max_steps) == ("data", 3)
    assert task.log.explicit_log_dir == "runs/nam56r_tiny_finetune"
    other = nemo.resolved(
        f"nam56r_tiny(checkpoint='{checkpoint}',{changes})",
        "data=cpp_folder(root=/src)",
        command="finetune",
    )
    assert (other.data.root, other.data.tokenizer_dir) == ("/src", task.data.tokenizer_dir)
    given = nemo.resolved(
        f"nam56r_tiny(checkpoint={checkpoint}/weights,tokenizer_dir=/data/tok,{changes})",
        command="finetune",
    )
    assert given.data.tokenizer_dir == "/data/tok"
    assert given.resume.restore_config.path == str(checkpoint)


def leaves_of(intent: HybridRecipe) -> str:
    """Return what makes nam56r_tiny this recipe, as its factory's arguments."""
    from megacpp_nemo.contract import field_paths, recipe

    base = field_paths(recipe("nam56r_tiny"))
    changed = {path: value for path, value in field_paths(intent).items() if base[path] != value}
    return ",".join(f"{path.replace('.', '__')}={value!r}" for path, value in changed.items())


def test_a_free_setting_and_stage_boundaries_may_differ(pretrained):
    from megacpp_nemo.recipes import to_finetune

    intent = small_recipe(
        pattern="AEMEAE|MEAEMR", pipeline_model_parallel_size=2, devices_per_node=2, seq_length=16
    )
    partial = to_finetune(intent, checkpoint=pretrained[0])
    assert partial.model.config.hybrid_override_pattern == "AEMEAE|MEAEMR"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, r"hidden_size=64(.|\n)*hidden_size=32"),
        ({"depth": 11}, r"'AEMEAEMEAEM'(.|\n)*'AEMEAEMEAEMR'"),
        ({"experts.num_experts": 8}, "num_experts"),
        ({"mamba.state_dim": 32}, "state_dim"),
    ],
)
def test_another_model_than_the_checkpoints_is_refused(pretrained, changes, said):
    from megacpp_nemo.recipes import to_finetune

    with pytest.raises(RecipeError, match=said):
        to_finetune(small_recipe(**changes), checkpoint=pretrained[0])


def start_sparse(checkpoint: Path, sources: Path, steps: int) -> tuple[list[float], list[str]]:
    """Fine-tune a sparse recipe from dense weights, and return the losses and our log."""
    from megacpp_nemo.recipes import to_finetune

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megacpp_nemo.host.warm_start")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # As many keys as there are: what is computed is what dense attention computes.
    intent = small_recipe(sparse_attention=True, **{"sparse_attention.indexer_topk": 32})
    partial = to_finetune(intent, checkpoint=checkpoint, fresh_indexers=True)
    return train(small_run(partial, sources, steps))["loss"], said


def test_sparse_attention_starts_from_dense_weights_if_asked_to(pretrained, other_sources):
    checkpoint, _ = pretrained
    dense, _ = in_process(finetune, checkpoint, other_sources, 1)
    shutil.rmtree(other_sources.parent / "run")
    sparse, (said,) = in_process(start_sparse, checkpoint, other_sources, 2)
    assert sparse[0] == pytest.approx(dense[0], abs=1e-5)
    assert sparse[1] != sparse[0]
    name, _, fresh = said.partition(": ")
    assert name == "drawn anew, not in the checkpoint"
    # Layer 5 is the only sparse one, A-rank 1.
    indexer = "module.decoder.layers.4.self_attention.core_attention.indexer"
    assert {each.rpartition(f"{indexer}.")[2] for each in fresh.split(", ")} == {
        "linear_wq_b.weight", "linear_wk.weight", "linear_weights_proj.weight",
        "k_norm.weight", "k_norm.bias",
    }  # fmt: skip
    # Its own checkpoints have them.
    resumed, said = in_process(start_sparse, checkpoint, other_sources, 3)
    assert (len(resumed), said) == (1, [])


def test_sparse_layers_without_indexers_are_refused_unless_these_are_to_be_fresh(pretrained):
    from megacpp_nemo.recipes import to_finetune

    intent = small_recipe(sparse_attention=True)
    with pytest.raises(RecipeError, match=r"no indexers(.|\n)*\[5\](.|\n)*fresh_indexers=True"):
        to_finetune(intent, checkpoint=pretrained[0])
    for other in ({"hidden_size": 64}, {"depth": 11}):
        intent = small_recipe(sparse_attention=True, **other)
        with pytest.raises(RecipeError, match="of another model"):
            to_finetune(intent, checkpoint=pretrained[0], fresh_indexers=True)


def test_a_sparse_checkpoint_may_get_more_indexers_and_lose_none(pretrained, tmp_path):
    from megacpp_nemo.recipes import to_finetune

    checkpoint = shutil.copytree(pretrained[0], tmp_path / "step=40")
    context = checkpoint / "context" / "model.yaml"
    saved = yaml.safe_load(context.read_text())
    saved["config"].update(dsa_a_ranks=[1], dsa_indexer_n_heads=2, dsa_indexer_head_dim=16)
    context.write_text(yaml.safe_dump(saved))

    def start(*ranks: int, **changes: Any) -> Any:
        changes = {f"sparse_attention.{name}": value for name, value in changes.items()}
        intent = small_recipe(
            sparse_attention=True, **{"sparse_attention.a_ranks": ranks, **changes}
        )
        return to_finetune(intent, checkpoint=checkpoint, fresh_indexers=True)

    start(1)
    start(0, 1)
    # Written out, they are the same layers.
    to_finetune(small_recipe(pattern="AEMEDEMEAEMR"), checkpoint=checkpoint)
    with pytest.raises(RecipeError, match=r"sparse layers=\[1\](.|\n)*sparse layers=\[5\]"):
        start(0)
    with pytest.raises(RecipeError, match=r"sparse layers=\[\]"):
        to_finetune(small_recipe(), checkpoint=checkpoint, fresh_indexers=True)
    with pytest.raises(RecipeError, match="indexer_num_heads=4"):
        start(0, 1, indexer_num_heads=4)


@pytest.mark.parametrize("damage", ["missing", "unfinished", "no weights", "no context"])
def test_a_checkpoint_that_is_not_complete_is_refused_before_anything_is_built(
    pretrained, tmp_path, damage, nemo
):
    checkpoint = tmp_path / "checkpoints" / "step=40"
    if damage != "missing":
        shutil.copytree(pretrained[0], checkpoint)
    if damage == "unfinished":
        (tmp_path / "checkpoints" / "step=40-unfinished").touch()
    if damage == "no weights":
        (checkpoint / "weights" / "metadata.json").unlink()
    if damage == "no context":
        shutil.rmtree(checkpoint / "context")
    said = nemo.refused(f"nam56r_tiny(checkpoint={checkpoint})", command="finetune")
    assert "starts from a complete checkpoint" in said
    assert str(checkpoint) in said


def test_no_checkpoint_is_refused_and_a_run_folder_points_to_its_newest(pretrained, nemo):
    checkpoint, _ = pretrained
    assert "no checkpoint" in nemo.refused("nam56r_tiny", command="finetune")
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        said = nemo.refused(f"nam56r_tiny(checkpoint={folder})", command="finetune")
        assert f"try:     checkpoint={str(checkpoint)!r}" in said


def test_a_checkpoint_without_a_tokenizer_asks_for_one(pretrained, tmp_path):
    from megacpp_nemo.recipes import to_finetune

    checkpoint = shutil.copytree(pretrained[0], tmp_path / "step=40")
    shutil.rmtree(checkpoint / "context" / "tokenizer")
    with pytest.raises(MegaCppError, match="tokenizer_dir="):
        to_finetune(small_recipe(), checkpoint=checkpoint)
    given = to_finetune(small_recipe(), checkpoint=checkpoint, tokenizer_dir="/data/tok")
    assert given.data.tokenizer_dir == "/data/tok"


def test_full_size_data_takes_the_tokenizer_too(pretrained, monkeypatch):
    from megacpp_nemo.contract import recipe
    from megacpp_nemo.recipes import finetune as module

    monkeypatch.setattr(module, "_check_same_model", lambda *_: None)
    partial = module.to_finetune(recipe("nam56r"), checkpoint=pretrained[0])
    assert partial.data.tokenizer_dir == str(pretrained[0] / "context" / "tokenizer")
    assert "paths" not in partial.data.__arguments__
