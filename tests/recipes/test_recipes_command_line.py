"""What `nemo llm pretrain` makes of its arguments, by the value that is about to run."""

from __future__ import annotations

import pytest

from megacpp_nemo.contract import RECIPE_NAMES, describe


def test_help_lists_every_recipe_and_its_parts(nemo):
    listed = nemo("pretrain", "--help").output
    for name in RECIPE_NAMES:
        # Of a type with several members, such as the model's, NeMo-Run lists any one.
        for full in (name, f"{name}_data", f"{name}_trainer"):
            assert f"│ {full} " in listed
    parts = ("cpp_headers", "cpp_folder", "corpus_folders", "indexed_files")
    assert all(f"│ {name} " in listed for name in parts)
    assert all(f"│ {name} " in nemo("finetune", "--help").output for name in RECIPE_NAMES)


def test_help_with_docs_says_what_each_recipe_is(nemo, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nemo", "llm", "pretrain", "--help", "--docs"])
    monkeypatch.setenv("COLUMNS", "240")
    listed = nemo("pretrain", "--help").output
    for name in RECIPE_NAMES:
        line = next(line for line in listed.splitlines() if f"│ {name} " in line)
        assert " ".join(describe(name).split()[:3]) in line
    assert "checkpoint: Folder 'step=N' of a run." in nemo("finetune", "--help").output


def test_a_recipe_is_what_its_function_returns(nemo):
    from megacpp_nemo.recipes import nam56r, nam56r_tiny

    assert nemo.resolved("nam56r") == nam56r()
    assert nemo.resolved("nam56r_tiny") == nam56r_tiny()


@pytest.mark.parametrize(
    ("factory", "path", "value"),
    [
        ("nam56r(num_nodes=2)", "trainer.num_nodes", 2),
        ("nam56r(num_gpus_per_node=4)", "trainer.devices", 4),
        ("nam56r(mode=author_dp)", "trainer.strategy.tensor_model_parallel_size", 1),
        ("nam56r(precision=fp8)", "trainer.plugins.fp8", "hybrid"),
        ("nam56r(mtp_num_layers=2)", "model.config.mtp_num_layers", 2),
        ("nam56r(ngram_hash=False)", "model.config.ngram_hash", False),
        ("nam56r_tiny(depth=24)", "model.config.num_layers", 24),
        ("nam56r_tiny(num_layers=24)", "model.config.num_layers", 24),
        ("nam56r_tiny(pattern=AEMR)", "model.config.hybrid_override_pattern", "AEMR"),
        ("nam56r_tiny(pattern='a e m r')", "model.config.hybrid_override_pattern", "AEMR"),
        ("nam56r_tiny(train_steps=9, hidden_size=64)", "trainer.max_steps", 9),
        ("nam56r_tiny(max_steps=9)", "trainer.max_steps", 9),
        ("nam56r_tiny(lr=1e-4,min_lr=0)", "optim.config.lr", 1e-4),
        ("nam56r_tiny(mamba__num_heads=8)", "model.config.mamba_num_heads", 8),
        ("nam56r_tiny(recompute=full)", "model.config.recompute_granularity", "full"),
        ("nam56r_tiny(recompute='none')", "model.config.recompute_granularity", None),
        ("nam56r_tiny(log_dir='runs/a-b.c')", "log.explicit_log_dir", "runs/a-b.c"),
    ],
)
def test_a_recipe_takes_its_fields_as_arguments(nemo, factory, path, value):
    from megacpp_nemo.recipes.explain import value_at

    assert value_at(nemo.resolved(factory), path) == value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("trainer.max_steps=7", 7),
        ("trainer.max_steps+=7", 247),
        ("model.config.hidden_size=64", 64),
        ("data.seq_length=64", 64),
        ("data.root=/src/project", "/src/project"),
        ("data.exclude=['a/*','b']", ["a/*", "b"]),
        ("optim.config.lr=2e-4", 2e-4),
        ("trainer.strategy.ckpt_async_save=True", True),
        ("trainer.callbacks[0].refresh_rate=5", 5),
        ("log.ckpt.keep=1", 1),
    ],
)
def test_an_override_changes_one_value_and_nothing_else(nemo, override, value):
    from megacpp_nemo.recipes import nam56r_tiny
    from megacpp_nemo.recipes.explain import OVERRIDE, value_at

    task, expected = nemo.resolved("nam56r_tiny", override), nam56r_tiny()
    path = OVERRIDE.fullmatch(override)[1]
    assert value_at(task, path) == value
    parent, _, last = path.rpartition(".")
    setattr(value_at(expected, parent), last, value)
    assert task == expected


def test_parts_are_taken_from_the_registry_with_their_arguments(nemo):
    import megacpp_nemo.recipes as recipes

    for part in ("model", "data", "trainer", "optim"):
        full = f"nam56r_smoke_{part}"
        task = nemo.resolved("nam56r_tiny", f"{part}={full}")
        assert getattr(task, part) == getattr(recipes.nam56r_smoke(), part)
    task = nemo.resolved("nam56r_tiny", "model=nam56r_tiny_model(depth=24)", "trainer.max_steps=7")
    assert task.model == recipes.nam56r_tiny(depth=24).model
    assert task.trainer.max_steps == 7
    assert task.data == recipes.nam56r_tiny().data


def test_data_named_by_what_it_is_keeps_the_recipes_rows_and_batches(nemo):
    from megacpp_nemo.data.module import CorpusDataModule, CppDataModule, IndexedDataModule
    from megacpp_nemo.recipes import nam56r, nam56r_smoke

    data = nemo.resolved("nam56r_smoke", "data=cpp_folder(root=/src/project)").data
    own = nam56r_smoke().data
    assert (data.__fn_or_cls__, data.root) == (CppDataModule, "/src/project")
    names = ("seq_length", "micro_batch_size", "global_batch_size", "seed", "num_train_samples")
    assert [getattr(data, name) for name in names] == [getattr(own, name) for name in names]
    data = nemo.resolved("nam56r", "data=cpp_headers", "data.seq_length=1024").data
    assert (data.seq_length, data.micro_batch_size) == (1024, nam56r().data.micro_batch_size)
    data = nemo.resolved(
        "nam56r",
        "data=indexed_files(tokenizer_dir=/data/tok)",
        "data.paths=['30','/data/a','70','/data/b']",
    ).data
    assert (data.__fn_or_cls__, data.tokenizer_dir) == (IndexedDataModule, "/data/tok")
    assert data.paths == ["30", "/data/a", "70", "/data/b"]
    assert data.global_batch_size == nam56r().data.global_batch_size
    data = nemo.resolved(
        "nam56r_tiny",
        "data=corpus_folders(folders=['30','/c/a','70','/c/b'])",
        "data.fim_rate=0.5",
        "data.structure=all",
    ).data
    assert (data.__fn_or_cls__, data.fim_rate) == (CorpusDataModule, 0.5)
    assert (data.folders, data.structure) == (["30", "/c/a", "70", "/c/b"], "all")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("nam56x", "No recipe is called 'nam56x'"),
        ("nam56x(depth=3)", "nam56r_tiny"),
        ("nam56r_tiny(depth=0)", "a whole number from 1 to 1,000"),
        ("nam56r_tiny(depth=abc)", "depth cannot be 'abc'"),
        ("nam56r_tiny(depht=3)", "try:     'depth'"),
        ("nam56r_tiny(depth=3,num_layers=4)", "changed twice"),
        ("nam56r_tiny(pattern=AEMQ)", "Unknown block letter 'Q'"),
        ("nam56r_tiny(pattern='AEME|AEMR')", "must equal the depth"),
        ("nam56r_tiny(mode=fast)", "author_dp"),
        ("nam56r_tiny(precision=fp16)", "fp8_experts"),
        ("nam56r(tensor_model_parallel_size=3)", "sizes whose product divides 8"),
    ],
)
def test_a_wrong_recipe_is_refused_in_four_parts(nemo, factory, said):
    assert said in nemo.refused(factory)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.config.hiden_size=1", "try:     model.config.hidden_size"),
        ("model.confg.hidden_size=1", "try:     model.config.hidden_size"),
        ("model.config.num_layers=abc", "a value of type int"),
        ("trainer.max_steps+=abc", "trainer.max_steps cannot be 'abc'"),
        ("trainer.plugins.fp8=hybrid", "nothing below what is None"),
        ("trainer.callbacks[7].refresh_rate=1", "trainer.callbacks[0].refresh_rate"),
        ("trainer.max_steps", "PATH=VALUE"),
        ("--dry-run", "NeMo-Run has no such option"),
        ("executor=local", "try:     run.executor=local"),
        ("model=nam56x_model", "nam56r_4096_tiny_model"),
        ("model=nam56r_tiny_model(depth=0)", "depth cannot be 0"),
        ("data=nope", "cpp_headers, cpp_folder, corpus_folders, indexed_files"),
        ("data=cpp_folder", "No folder of C++ sources"),
        ("data=cpp_folder(rot=/src)", "root, tokenizer_dir"),
        ("trainer=nope", "nam56r_tiny_trainer"),
        ("optim=nope", "nam56r_tiny_optim"),
        ("trainer.strategy.tensor_model_parallel_size=3", "product 3 for 1 processes"),
        ("data.global_batch_size=7", "multiples of 8"),
    ],
)
def test_a_wrong_override_is_refused_in_four_parts(nemo, override, said):
    assert said in nemo.refused("nam56r_tiny", override)


def test_a_wrong_override_after_a_replaced_part_is_found(nemo):
    said = nemo.refused("nam56r", "model=nam56r_tiny_model", "model.config.num_layers=x")
    assert "try:     model.config.num_layers=12" in said


def test_a_model_may_be_the_path_of_a_checkpoint(nemo, tmp_path):
    assert nemo.resolved("nam56r_tiny", f"model={tmp_path}").model == tmp_path


def test_recipes_of_others_are_left_alone(nemo):
    task = nemo.resolved("llama3_8b", "trainer.max_steps=5", "--unknown")
    assert task.trainer.max_steps == 5
    result = nemo("pretrain", "--factory", "llama3_8b", "trainer.bogus=1", "--dryrun")
    assert result.exit_code == 1
    assert "No parameter named 'bogus'" in result.output
    assert "  allowed:" not in result.output


def test_installing_twice_changes_nothing():
    from nemo_run.cli.api import RunContext

    from megacpp_nemo.recipes import command_line

    before = RunContext.parse_fn
    command_line.install()
    assert RunContext.parse_fn is before
