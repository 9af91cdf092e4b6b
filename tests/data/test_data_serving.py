"""Corpus folders as training data: what a trainer is given, on each rank and after a resume."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.contract.structure import STRUCTURE_CHANNELS
from megacpp_nemo.data.corpus import CorpusSpec, build_folder
from tests.support.processes import in_process


@pytest.fixture(scope="session")
def module():
    return importlib.import_module("megacpp_nemo.data.module")


@pytest.fixture(scope="session")
def folders(shared_tree, tmp_path_factory):
    """Two corpora of one tokenizer, the second of fewer files."""
    base = tmp_path_factory.mktemp("folders")
    settings = {"root": shared_tree, "validation_fraction": 0.25, "structure": "all"}
    spec = CorpusSpec(vocab_size=300, **settings)
    one = build_folder(spec, base / "one", progress=False, workers=1)
    spec = CorpusSpec(tokenizer_dir=one.tokenizer_dir, exclude=("part0/*",), **settings)
    two = build_folder(spec, base / "two", progress=False, workers=1)
    return [str(one.folder), str(two.folder)]


@pytest.fixture
def serve(module, folders, tmp_path):
    """Return `make(**changes)`: the data module over the first folder."""

    def make(**changes):
        settings = {
            "folders": folders[0],
            "seq_length": 32,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "structure": "all",
            "cache_dir": str(tmp_path / "cache"),
            **changes,
        }
        return module.CorpusDataModule(**settings)

    return make


def built(data, steps=6):
    data.build(steps, 2, 2, 1.0)
    data.trainer = SimpleNamespace(global_step=0)
    return data


def batches(data, rank=0, ranks=1, consumed=0, count=None):
    """Return the micro-batches that a rank is given when `consumed` samples were served."""
    with pytest.MonkeyPatch.context() as patch:
        states = "megatron.core.parallel_state.get_data_parallel"
        patch.setattr(f"{states}_rank", lambda *_, **__: rank)
        patch.setattr(f"{states}_world_size", lambda *_, **__: ranks)
        calculator = "megatron.core.num_microbatches_calculator.update_num_microbatches"
        patch.setattr(calculator, lambda **_: None)
        data.load_state_dict({"consumed_samples": consumed})
        loader = data.data_sampler.transform_dataloader(data.train_dataloader())
        return list(itertools.islice(loader, count))


def rows_of(parts):
    """Return every row as one comparable value, all its tensors included."""
    rows = []
    for part in parts:
        channels = {f"structure.{name}": ids for name, ids in part["structure"].items()}
        tensors = {**part, **channels}
        del tensors["structure"]
        for number in range(len(part["tokens"])):
            rows.append(tuple((name, str(tensors[name][number].tolist())) for name in tensors))
    return rows


def stored_rows(data, count):
    dataset = data._train_ds
    return rows_of([torch.utils.data.default_collate([dataset[i]]) for i in range(count)])


def test_a_trainer_gets_all_channels_with_every_batch(serve, module):
    data = built(serve())
    assert data.bytes_per_token_validation == data.corpora[0].bytes_per_token("validation")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert set(batch["structure"]) == set(STRUCTURE_CHANNELS)
        for name, ids in batch["structure"].items():
            assert ids.shape == batch["tokens"].shape
            assert 0 <= ids.min() <= ids.max() <= STRUCTURE_CHANNELS[name]
            ends = batch["tokens"] == data.tokenizer.eod
            assert (ids[ends] == STRUCTURE_CHANNELS[name]).all()
    assert set(built(serve(structure="core"))._train_ds[0]["structure"]) == {
        "category",
        "dependency_level",
    }
    assert "structure" not in built(serve(structure=None))._train_ds[0]


def test_the_folder_cpp_and_indexed_modules_serve_the_same_rows(serve, module, folders, tmp_path):
    folder = folders[0]
    data = built(serve())
    indexed = module.IndexedDataModule(
        paths={"train": f"{folder}/train", "validation": f"{folder}/validation"},
        tokenizer_dir=f"{folder}/tokenizer",
        seq_length=32,
        structure="all",
        cache_dir=str(tmp_path / "cache"),
    )
    assert stored_rows(built(indexed), 20) == stored_rows(data, 20)


def test_sources_are_served_with_channels(module, shared_tree, shared_cache, serve):
    data = module.CppDataModule(
        root=str(shared_tree),
        vocab_size=300,
        validation_fraction=0.25,
        seq_length=32,
        structure="all",
        cache_dir=str(shared_cache),
    )
    assert stored_rows(built(data), 20) == stored_rows(built(serve()), 20)


def test_two_ranks_share_each_global_batch_without_overlap(serve):
    data = built(serve(fim_rate=0.5))
    first, second = (batches(data, rank, 2, count=8) for rank in range(2))
    assert len(first) == len(second) == 8
    together = [
        row for pair in zip(first, second, strict=True) for part in pair for row in rows_of([part])
    ]
    assert together == stored_rows(data, 32)
    assert len(set(together)) == 32
    assert not set(rows_of(first)) & set(rows_of(second))


@pytest.mark.parametrize("workers", [0, 2])
def test_after_a_resume_exactly_the_rows_that_were_left_are_served(serve, workers):
    data = built(serve(fim_rate=0.5))
    whole = rows_of(batches(data, 1, 2))
    resumed = built(serve(fim_rate=0.5, num_workers=workers))
    left = rows_of(batches(resumed, 1, 2, consumed=24))
    assert 10 < len(left) == len(whole) - 12
    assert left == whole[12:]


def blended(make):
    """Return the rows of a blend before and after a resume, and of which file each is."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    data = built(make(), steps=40)
    whole = batches(data)
    resumed = built(make(num_workers=2), steps=40)
    left = batches(resumed, consumed=160)
    sources = torch.cat([part["dataset_id"] for part in whole]).tolist()
    return rows_of(whole), rows_of(left), sources


def test_a_blend_resumes_and_keeps_its_weights(serve, folders):
    def make(**changes):
        weighted = ["30", folders[0], "70", folders[1]]
        return serve(folders=weighted, fim_rate=0.3, **changes)

    assert make().bytes_per_token_validation is None
    whole, left, sources = in_process(blended, make)
    assert left == whole[160:]
    assert len(left) >= 160
    for place in (50, 160, len(sources)):
        # Megatron's blend is off by less than one row at every place.
        assert abs(sources[:place].count(0) - 0.3 * place) <= 1


def test_fill_in_the_middle_is_for_training_alone(serve):
    data, plain = built(serve(fim_rate=1.0)), built(serve())
    ids = data._fim.sentinels
    sentinels = torch.tensor([ids.prefix, ids.middle, ids.suffix])
    rows = data._train_ds
    train = torch.cat([rows[index]["tokens"] for index in range(len(rows))])
    documents = data.corpora[0].manifest["splits"]["train"]["documents"]
    assert torch.isin(train, sentinels).sum() > 2.5 * documents
    for name in ("_validation_ds", "_test_ds"):
        held_back, expected = getattr(data, name), getattr(plain, name)
        assert len(held_back) == len(expected) > 4
        for index in range(len(expected)):
            assert torch.equal(held_back[index]["tokens"], expected[index]["tokens"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fim_rate": 1.5}, r"out of range(.|\n)*fim_rate=1\.5"),
        ({"fim_spm_rate": -1.0}, "out of range"),
        ({"structure": "cor"}, r"structure='cor'(.|\n)*'core', 'all'"),
        ({"folders": None}, r"data\.folders="),
        ({"folders": "/nowhere"}, "holds no corpus"),
        ({"seq_length": 100_000}, "shorter than one row"),
    ],
)
def test_arguments_that_cannot_work_are_data_errors(serve, changes, message):
    with pytest.raises(DataError, match=message):
        serve(**changes)


def test_corpora_must_have_one_tokenizer_and_the_channels(serve, folders, shared_tree, tmp_path):
    spec = CorpusSpec(root=shared_tree, vocab_size=280, validation_fraction=0.25, structure="core")
    other = str(build_folder(spec, tmp_path / "other", progress=False, workers=1).folder)
    with pytest.raises(DataError, match=rf"another tokenizer(.|\n)*{other}(.|\n)*{folders[0]}"):
        serve(folders=[folders[0], other])
    with pytest.raises(DataError, match=rf"another tokenizer(.|\n)*{folders[0]}"):
        serve(tokenizer_dir=f"{other}/tokenizer")
    lacking = r"lacks structure channels: ast_depth, sibling_index, node_type"
    with pytest.raises(
        DataError, match=rf"{lacking}(.|\n)*{other} with category, dependency_level"
    ):
        serve(folders=other)
    assert serve(folders=other, structure="core")._tokens["train"] > 0


def test_a_corpus_of_another_mapping_or_with_a_cut_channel_is_a_data_error(
    serve, folders, tmp_path
):
    from megacpp_nemo.data import cache

    copy = tmp_path / "copy"
    shutil.copytree(folders[0], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["structure"]["mapping_version"] = 999
    del manifest["checksum"], manifest["files"]
    (copy / "manifest.json").unlink()
    cache.write_manifest(copy, manifest)
    with pytest.raises(DataError, match="mapping version 999"):
        serve(folders=str(copy))
    shutil.rmtree(copy)
    shutil.copytree(folders[0], copy)
    channel = copy / "train.ast_depth.bin"
    channel.write_bytes(channel.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train\.ast_depth\.bin"):
        serve(folders=str(copy))


def test_indexed_files_without_the_channels_asked_for_are_a_data_error(module, corpus, tmp_path):
    with pytest.raises(DataError, match=r"missing beside the tokens: category, dependency_level"):
        module.IndexedDataModule(
            paths=str(corpus.train_prefix),
            split="60,40,0",
            tokenizer_dir=str(corpus.tokenizer_dir),
            seq_length=32,
            structure="core",
            cache_dir=str(tmp_path),
        )


def test_a_checkpoint_records_the_arguments(serve, folders, tmp_path):
    from nemo.lightning import io

    data = serve(folders=["1", folders[0]], fim_rate=0.25, structure="core")
    data.io_dump(tmp_path / "out", yaml_attrs=[])
    loaded = io.load(tmp_path / "out")
    assert type(loaded) is type(data)
    assert (loaded._channels, loaded._fim) == (data._channels, data._fim)
    assert loaded.build_kwargs == data.build_kwargs


def test_nemos_command_line_sets_the_arguments(module):
    import nemo_run as run
    from nemo_run.cli.cli_parser import parse_cli_args

    def pretrain(data): ...

    def parsed(cls, *arguments):
        config = run.Partial(pretrain, data=run.Config(cls))
        return parse_cli_args(config, [f"data.{text}" for text in arguments]).data

    for cls in (module.CppDataModule, module.IndexedDataModule, module.CorpusDataModule):
        data = parsed(cls, "structure=core", "fim_rate=0.5", "fim_spm_rate=0.25")
        assert (data.structure, data.fim_rate, data.fim_spm_rate) == ("core", 0.5, 0.25)
        assert parsed(cls, "structure=None").structure is None
    for text, value in (
        ("/d/a", "/d/a"),
        ("['30','/d/a','70','/d/b']", ["30", "/d/a", "70", "/d/b"]),
    ):
        assert parsed(module.CorpusDataModule, f"folders={text}").folders == value
