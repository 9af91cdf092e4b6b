from __future__ import annotations

import errno
import importlib
from types import SimpleNamespace

import pytest
import torch

from megacpp_nemo.contract.errors import DataError


@pytest.fixture(scope="session")
def module():
    return importlib.import_module("megacpp_nemo.data.module")


@pytest.fixture
def cpp(module, shared_tree, shared_cache, corpus):
    def make(**changes):
        settings = {"vocab_size": 300, "validation_fraction": 0.25, "seq_length": 32, **changes}
        return module.CppDataModule(root=str(shared_tree), cache_dir=str(shared_cache), **settings)

    return make


@pytest.fixture
def indexed(module, corpus, tmp_path):
    def make(**changes):
        settings = {
            "paths": {
                "train": str(corpus.train_prefix),
                "validation": str(corpus.validation_prefix),
            },
            "tokenizer_dir": str(corpus.tokenizer_dir),
            "seq_length": 32,
            "cache_dir": str(tmp_path / "cache"),
            **changes,
        }
        return module.IndexedDataModule(**settings)

    return make


def built(data, steps=4, validation=2, test=1.0):
    data.build(steps, 2, validation, test)
    data.trainer = SimpleNamespace(global_step=0)
    return data


def order(dataset, count):
    return [dataset[index]["tokens"].tolist() for index in range(count)]


def test_a_trainer_gets_batches_with_document_ids_and_no_mask(cpp):
    data = built(cpp(micro_batch_size=2, global_batch_size=4))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "document_ids"}
        assert batch["document_ids"].shape[-1] == 32
    assert len(data._train_ds) >= 16
    assert data.pin_memory is torch.cuda.is_available()
    assert data.create_attention_mask is False


def test_the_tokenizer_and_the_figures_are_those_of_the_corpus(cpp, corpus):
    data = cpp()
    assert data.corpus == corpus
    assert (data.tokenizer.eod, data.tokenizer.vocab_size) == (0, 300)
    assert data.bytes_per_token_validation == corpus.bytes_per_token("validation")
    assert data.data_sampler.seq_len == 32


def test_validation_rows_come_from_held_back_files(cpp, corpus):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    held_back = IndexedDataset(str(corpus.validation_prefix))
    row = built(cpp())._validation_ds[0]
    start = row["tokens"][row["document_ids"] == 0].tolist()
    assert len(start) > 1
    documents = [held_back[number].tolist() for number in range(len(held_back))]
    assert any(start == ids[at : at + len(start)] for ids in documents for at in range(len(ids)))


def test_with_num_train_samples_the_order_does_not_depend_on_the_steps(cpp):
    # More than one pass over the data, where Megatron's order depends on the request.
    short = built(cpp(num_train_samples=4000), steps=10)
    long = built(cpp(num_train_samples=4000), steps=450)
    assert len(short._train_ds) == len(long._train_ds) >= 4000
    assert order(short._train_ds, 80) == order(long._train_ds, 80)
    free = built(cpp(), steps=450)
    assert order(free._train_ds, 80) != order(built(cpp(), steps=10)._train_ds, 80)


def test_num_train_samples_is_a_floor_never_a_refusal(cpp, caplog):
    data = built(cpp(num_train_samples=8), steps=100)
    assert len(data._train_ds) >= 800
    assert "more than num_train_samples=8" in caplog.text


def test_the_validation_order_does_not_depend_on_the_steps(cpp):
    few, many = built(cpp(), steps=2, validation=3), built(cpp(), steps=400, validation=3)
    assert order(few._validation_ds, 24) == order(many._validation_ds, 24)


@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_a_share_of_validation_means_one_whole_pass_and_at_least_one_batch(cpp, limit):
    data = built(cpp(), validation=limit)
    assert len(data._validation_ds) == (data._tokens["validation"] - 1) // 32
    long_rows = cpp(seq_length=512, micro_batch_size=1, global_batch_size=4)
    assert len(built(long_rows, steps=1, validation=limit)._validation_ds) >= 4


def test_no_validation_can_be_asked_for(cpp):
    assert built(cpp(), validation=0, test=0)._train_ds is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 100_000}, r"train data is too small(.|\n)*at least 800,001"),
        ({"seq_length": 1500}, r"validation data is too small(.|\n)*at least 12,001"),
        ({"seq_length": 1}, "out of range"),
        ({"micro_batch_size": 0}, "out of range"),
        ({"micro_batch_size": 3, "global_batch_size": 8}, "multiple of micro_batch_size"),
        ({"vocab_size": 10}, "at least 261"),
    ],
)
def test_sizes_that_cannot_work_are_data_errors(cpp, changes, message):
    with pytest.raises(DataError, match=message):
        cpp(**changes)


def test_steps_must_be_known(cpp):
    with pytest.raises(DataError, match=r"trainer\.max_steps"):
        cpp().build(-1, 1, 1, 1)


def test_a_sample_order_cut_short_is_built_again(cpp, shared_cache, caplog):
    first = built(cpp(seed=77))
    rows = order(first._train_ds, 8)
    for path in (shared_cache / "sample_orders" / first.corpus.folder.name).glob("*.npy"):
        path.write_bytes(path.read_bytes()[:140])
    assert order(built(cpp(seed=77))._train_ds, 8) == rows
    assert "removing a damaged sample order" in caplog.text


@pytest.mark.parametrize("grouped", [False, True])
def test_a_full_disk_while_ordering_samples_is_a_data_error(cpp, monkeypatch, request, grouped):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if grouped:
        request.getfixturevalue("process_group")
    monkeypatch.setattr("numpy.save", fail)
    with pytest.raises(DataError, match="No space left"):
        built(cpp(seed=99))


def test_workers_read_the_same_rows(cpp):
    def batch(workers):
        data = built(cpp(num_workers=workers))
        return next(iter(data.train_dataloader()))["document_ids"]

    assert torch.equal(batch(0), batch(1))


@pytest.mark.parametrize("kind", ["cpp", "indexed"])
def test_a_checkpoint_records_the_arguments(kind, cpp, indexed, tmp_path):
    from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
    from nemo.lightning import io

    make = {"cpp": cpp, "indexed": indexed}[kind]
    data = make(seq_length=16)
    # NeMo marks the parent class at its first direct use; ours must not inherit the mark.
    PreTrainingDataModule(
        paths={name: ["1", str(data.build_kwargs["blend_per_split"][0][0][0])] for name in SPLITS},
        tokenizer=data.tokenizer,
    )
    data = make(seq_length=16)
    data.io_dump(tmp_path / "out", yaml_attrs=[])
    assert "seq_length" in (tmp_path / "out" / "io.json").read_text()
    loaded = io.load(tmp_path / "out")
    assert type(loaded) is type(data)
    assert loaded.seq_length == 16
    assert loaded.build_kwargs == data.build_kwargs


SPLITS = ("train", "validation", "test")


def test_nemos_command_line_sets_every_argument(module):
    import nemo_run as run
    from nemo_run.cli.cli_parser import parse_cli_args

    def pretrain(data): ...

    def parsed(cls, *arguments):
        config = run.Partial(pretrain, data=run.Config(cls))
        return parse_cli_args(config, [f"data.{text}" for text in arguments]).data

    data = parsed(
        module.CppDataModule,
        *("root=/src/cpp", "seq_length=64", "validation_fraction=0.1", "exclude=['a/*','b']"),
        *("num_train_samples=100", "cache_dir=None", "vocab_size=2048", "seed=7"),
    )
    assert (data.root, data.seq_length, data.validation_fraction) == ("/src/cpp", 64, 0.1)
    assert (data.exclude, data.num_train_samples) == (["a/*", "b"], 100)
    assert (data.cache_dir, data.vocab_size, data.seed) == (None, 2048, 7)
    for text, value in (
        ("/d/a", "/d/a"),
        ("['30','/d/a','70','/d/b']", ["30", "/d/a", "70", "/d/b"]),
        ("{'train':['a'],'validation':'b'}", {"train": ["a"], "validation": "b"}),
    ):
        assert parsed(module.IndexedDataModule, f"paths={text}").paths == value
    assert parsed(module.IndexedDataModule, "tokenizer_dir=/d/t").tokenizer_dir == "/d/t"


def test_a_config_builds_the_module(module, shared_tree, shared_cache, corpus):
    import fiddle as fdl
    import nemo_run as run

    config = run.Config(
        module.CppDataModule, root=str(shared_tree), cache_dir=str(shared_cache), vocab_size=300
    )
    config.validation_fraction = 0.25
    config.seq_length = 32
    assert fdl.build(config).corpus.folder.parent == corpus.folder.parent


@pytest.fixture
def process_group(tmp_path):
    """A group of one: Megatron's blends ask for their rank."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("weights", [False, True])
def test_indexed_files_serve_in_every_form(indexed, corpus, weights):
    train, validation = str(corpus.train_prefix), str(corpus.validation_prefix)
    by_split = indexed()
    assert by_split.bytes_per_token_validation is None
    assert order(built(by_split)._train_ds, 4)
    paths = ["30", train, "70", validation] if weights else train
    data = built(indexed(paths=paths, split="60,20,20"))
    assert set(data._train_ds[0]) >= {"tokens", "document_ids"}
    assert len(data._train_ds) >= 32


@pytest.mark.usefixtures("process_group")
def test_unweighted_paths_that_run_out_are_a_data_error(indexed, corpus):
    data = indexed(
        paths={
            "train": [str(corpus.train_prefix), str(corpus.validation_prefix)],
            "validation": [str(corpus.validation_prefix)],
        }
    )
    built(data, steps=2)
    with pytest.raises(DataError, match=r"ends before the run does(.|\n)*weight"):
        built(data, steps=5000)


def test_a_share_of_weighted_validation_is_a_data_error(indexed, corpus):
    paths = ["30", str(corpus.train_prefix), "70", str(corpus.validation_prefix)]
    with pytest.raises(DataError, match="weighted validation"):
        built(indexed(paths=paths, split="60,20,20"), validation=1.0)


def test_a_split_without_test_data_builds_none(indexed, corpus):
    assert built(indexed(paths=str(corpus.train_prefix), split="80,20,0"))._test_ds is None


def test_indexed_data_has_no_default_and_says_how_to_set_it(module, indexed, tmp_path):
    with pytest.raises(DataError, match=r"data\.paths="):
        module.IndexedDataModule()
    with pytest.raises(DataError, match=r"data\.tokenizer_dir="):
        indexed(tokenizer_dir=None)
    with pytest.raises(DataError, match="holds no tokenizer"):
        indexed(tokenizer_dir=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        indexed(tokenizer_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"none\.bin, \S*none\.idx"):
        indexed(paths=str(tmp_path / "none"))
