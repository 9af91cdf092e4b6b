"""Small generated corpora; nothing here touches the real cache."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megacpp_nemo.data.corpus import Corpus, CorpusSpec, build_corpus
from megacpp_nemo.host import compat
from tests.data.trees import cpp_text, write_tree


@pytest.fixture(scope="session", autouse=True)
def _adapters() -> None:
    compat.install()


@pytest.fixture(autouse=True)
def _private_user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def cpp_texts() -> list[str]:
    return [cpp_text(seed) for seed in range(8)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "src")


@pytest.fixture
def make_spec(tree: Path) -> Callable[..., CorpusSpec]:
    def make(**changes) -> CorpusSpec:
        return CorpusSpec(
            **{"root": tree, "vocab_size": 300, "validation_fraction": 0.25, **changes}
        )

    return make


@pytest.fixture(scope="session")
def shared_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("shared") / "src", files=40)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture(scope="session")
def corpus(shared_tree: Path, shared_cache: Path) -> Corpus:
    """A corpus that tests only read."""
    spec = CorpusSpec(root=shared_tree, vocab_size=300, validation_fraction=0.25)
    return build_corpus(spec, shared_cache, progress=False)


@pytest.fixture
def write_indexed(tmp_path: Path) -> Callable[..., str]:
    """Write documents as a Megatron indexed file and return its prefix."""

    def write(name: str, documents: list[list[int]], dtype: str = "uint16") -> str:
        import numpy as np
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(dtype).type)
        for ids in documents:
            builder.add_document(np.asarray(ids), [len(ids)])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


def made_documents(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    """Return `count` documents of made-up ids that end in token 0."""
    rng = random.Random(seed)
    return [
        [*(rng.randrange(5, 250) for _ in range(rng.randrange(1, longest))), 0]
        for _ in range(count)
    ]


@pytest.fixture
def documents() -> Callable[..., list[list[int]]]:
    return made_documents


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[..., Any]:
    """Return `make(cls, prefix, seq_length, **config)`: rows of a whole indexed file."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megacpp_nemo.data.dataset import DocumentDatasetConfig

    def make(cls, prefix, seq_length, samples=None, pad=4, index_split=Split.train, **config):
        tokenizer = SimpleNamespace(
            eod=0, eos=0, pad=pad, vocab_size=256, unique_identifiers=OrderedDict()
        )
        settings = {
            "random_seed": 1,
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
            **config,
        }
        indexed = IndexedDataset(prefix)
        return cls(
            indexed,
            prefix,
            np.arange(len(indexed), dtype=np.int32),
            samples,
            index_split,
            DocumentDatasetConfig(
                sequence_length=seq_length,
                tokenizer=tokenizer,
                path_to_cache=str(tmp_path / "orders"),
                blend=([prefix], None),
                split="1",
                **settings,
            ),
        )

    return make
