"""Write the files of a corpus: tokenizer first, then shards, then both splits as indexed files.

The tokenizer is trained on the training files, or one that is already there is taken over.

Neither the texts nor the tokens of a corpus are ever all in memory: files are read again for
training the tokenizer and for the shard that they belong to, and shards are merged one by one.
What is complete in the work folder of an earlier, interrupted build of the same corpus is taken
as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpp_nemo.data.cache import file_sha256
from megacpp_nemo.data.corpus_spec import DOCUMENTS, CorpusSpec, structure_versions
from megacpp_nemo.data.indexed_writer import token_dtype
from megacpp_nemo.data.merge import merge_shards
from megacpp_nemo.data.shard_file import write_whole
from megacpp_nemo.data.shards import (
    Shard,
    ShardJob,
    channel_dtype,
    missing_shards,
    plan_shards,
)
from megacpp_nemo.data.sources import SourceFile, SourceScan, read_source
from megacpp_nemo.data.split import split_files
from megacpp_nemo.data.tokenizer import (
    EOD_ID,
    copy_tokenizer,
    load_trained,
    save_tokenizer,
    tokenizer_hashes,
    train_tokenizer,
)
from megacpp_nemo.data.workers import make_shards

if TYPE_CHECKING:
    from tqdm import tqdm

_TOKENIZER, _ENCODER, _SHARDS = "tokenizer", "encoder.json", "shards"


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """The tokenizer of a build: its serialized text, its end token and its number of tokens."""

    text: str
    end_id: int
    vocab_size: int


def write_corpus(
    spec: CorpusSpec,
    scan: SourceScan,
    folder: Path,
    work: Path,
    *,
    key: str,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    """Write all files but the manifest into `folder` and return the facts about them.

    The same scan and settings give the same bytes, whatever the number of workers and however
    often the build was interrupted. Cleaning up after an error is the caller's.

    Args:
        spec: What to build.
        scan: Its sources.
        folder: Where the corpus's files go; empty.
        work: Folder of what an interrupted build goes on from; only ever given with one key.
        key: Names all that decides the output.
        workers: Processes that make shards; 1 makes them in this one.
        progress: Show a progress bar on stderr.

    Raises:
        DataError: Fewer than two files, a file changed since the scan, the given tokenizer is
            not usable, or a worker died.
    """
    from tqdm import tqdm

    training, validation = split_files(scan.files, spec.validation_fraction, spec.seed)
    shards = plan_shards({"train": training, "validation": validation})
    trained_bytes = sum(file.size_bytes for file in training) * (spec.tokenizer_dir is None)
    (work / _SHARDS).mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=trained_bytes + 2 * scan.total_bytes,
        desc="building the corpus: the tokenizer",
        unit="B",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        encoder = _kept_encoder(work)
        if encoder is None:
            encoder = _make_encoder(spec, _texts(scan, training, bar), work)
        else:
            bar.update(trained_bytes)
        job = _job(spec, scan, encoder, work / _SHARDS, key)
        _make_missing(job, shards, workers, bar)
        bar.set_description("building the corpus: joining the parts")
        facts = merge_shards(
            job, shards, folder, lambda shard: bar.update(shard.size_bytes) and None
        )
    shutil.copytree(work / _TOKENIZER, folder / "tokenizer")
    _write_documents({"train": training, "validation": validation}, folder / DOCUMENTS)
    if "structure" in facts:
        facts["structure"] = structure_versions() | facts["structure"]
    facts["tokenizer"] = {
        "vocab_size": encoder.vocab_size,
        "sha256": file_sha256(folder / "tokenizer" / "tokenizer.json"),
        "library_version": metadata.version("tokenizers"),
    }
    return facts


def is_begun(work: Path) -> bool:
    """Return whether a build left something in its work folder to go on from."""
    return (work / _ENCODER).is_file()


def estimated_bytes(spec: CorpusSpec, scan: SourceScan) -> int:
    """Return about how many bytes a build of this scan takes, erring on the large side.

    Source code has more than two bytes per token. A token takes two bytes (four in a vocabulary
    beyond 16 bits) and one or two in each channel, once in its shard and once in the corpus; 20
    bytes index a document in each file.
    """
    token_bytes = 2 + sum(channel_dtype(channel).itemsize for channel in spec.channels)
    shard_bytes = token_bytes + (4 if spec.channels else 0)
    index_bytes = 20 * (1 + len(spec.channels)) * len(scan.files)
    return scan.total_bytes * (token_bytes + shard_bytes) // 2 + index_bytes + (2 << 20)


def _job(spec: CorpusSpec, scan: SourceScan, encoder: _Encoder, folder: Path, key: str) -> ShardJob:
    return ShardJob(
        root=scan.root,
        folder=folder,
        identity=sha256(f"{key}\0{encoder.text}".encode()).hexdigest(),
        tokenizer=encoder.text,
        end_id=encoder.end_id,
        token_dtype=token_dtype(encoder.vocab_size).name,
        channels=spec.channels,
    )


def _make_missing(job: ShardJob, shards: Sequence[Shard], workers: int, bar: tqdm) -> None:
    missing = missing_shards(job, shards)
    bar.update(sum(s.size_bytes for s in shards) - sum(s.size_bytes for s in missing))
    doing = "encoding and parsing" if job.channels else "encoding"
    bar.set_description(f"building the corpus: {doing}")

    def done(shard: Shard) -> None:
        bar.update(shard.size_bytes)

    make_shards(job, missing, workers, done)


def _kept_encoder(work: Path) -> _Encoder | None:
    """Return the tokenizer that an earlier build left, if all of it is there."""
    try:
        kept = json.loads((work / _ENCODER).read_text(encoding="utf-8"))
        if tokenizer_hashes(work / _TOKENIZER) == kept.pop("files"):
            return _Encoder(**kept)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _make_encoder(spec: CorpusSpec, texts: Iterator[str], work: Path) -> _Encoder:
    folder = work / _TOKENIZER
    shutil.rmtree(folder, ignore_errors=True)
    if spec.tokenizer_path is None:
        tokenizer, end_id = train_tokenizer(texts, spec.vocab_size), EOD_ID
        save_tokenizer(tokenizer, folder)
    else:
        tokenizer, end_id = load_trained(spec.tokenizer_path)
        copy_tokenizer(spec.tokenizer_path, folder)
    encoder = _Encoder(
        text=tokenizer.to_str(), end_id=end_id, vocab_size=tokenizer.get_vocab_size()
    )
    kept = {**vars(encoder), "files": tokenizer_hashes(folder)}
    write_whole(work / _ENCODER, [json.dumps(kept).encode()])
    return encoder


def _write_documents(splits: dict[str, list[SourceFile]], path: Path) -> None:
    """List path and sha256 of each document's source, one a line."""
    listing = {name: [(file.path, file.sha256) for file in files] for name, files in splits.items()}
    lines = ",\n".join(
        f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, entries)) + "\n]"
        for name, entries in listing.items()
    )
    path.write_text("{" + lines + "}\n", encoding="utf-8")


def _texts(scan: SourceScan, files: Sequence[SourceFile], bar: tqdm) -> Iterator[str]:
    for file in files:
        yield read_source(scan, file)
        bar.update(file.size_bytes)
