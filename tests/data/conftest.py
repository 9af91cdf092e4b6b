"""Small generated corpora; nothing here touches the real cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megacpp_nemo.data.corpus import Corpus, CorpusSpec, build_corpus
from megacpp_nemo.host import compat


@pytest.fixture(scope="session", autouse=True)
def _adapters() -> None:
    compat.install()


@pytest.fixture(autouse=True)
def _private_user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def cpp_text(seed: int, lines: int = 40) -> str:
    """Return made-up C++ that differs from every other seed's."""
    rng = random.Random(seed)
    words = ["tensor", "stride", "kernel", "buffer", "offset", "index", "scale", "bias"]
    body = [
        f"  auto {rng.choice(words)}{rng.randrange(50)} = {rng.choice(words)}({rng.randrange(99)});"
        for _ in range(lines)
    ]
    return f"// file {seed}\nint function_{seed}() {{\n" + "\n".join(body) + "\n  return 0;\n}\n"


def write_tree(root: Path, files: int = 24, lines: int = 40) -> Path:
    """Write `files` distinct sources under `root`, some in folders."""
    for number in range(files):
        path = root / f"part{number % 3}" / f"unit{number:03d}.cpp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cpp_text(number, lines), encoding="utf-8")
    return root


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

    def write(name: str, documents: list[list[int]]) -> str:
        import numpy as np
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
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
