"""Documents of a corpus made again from their sources, and compared element by element."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data.corpus_spec import SPLITS, Corpus, Split
from megacpp_nemo.data.indexed import open_indexed, read_elements
from megacpp_nemo.data.positions import DocumentEncoder
from megacpp_nemo.data.shards import sampled
from megacpp_nemo.data.sources import SourceFile, read_content


def reparse_documents(corpus: Corpus, count: int) -> tuple[int, int, list[str]]:
    """Tokenize and parse up to `count` documents, spread evenly over the corpus.

    Dependency levels need the whole corpus and are not made again. A tokenizer's reserved tokens
    and its offsets are treated as they were in the build, in the plainest way there is.

    Returns:
        How many were compared; how many were not, their source being gone or changed; and a
        sentence for each that differs.
    """
    every = [(split, i) for split in SPLITS for i in range(len(corpus.documents(split)))]
    drawn = [every[i * len(every) // min(count, len(every))] for i in range(min(count, len(every)))]
    text = (corpus.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    encoder = DocumentEncoder(text, by_sums=False)
    compared, findings = 0, []
    for split, document in drawn:
        path, digest = corpus.listing[split][document]
        source = SourceFile(path=path, size_bytes=0, sha256=digest)
        try:
            content = read_content(Path(corpus.manifest["spec"]["root"]), source)
        except DataError:
            continue
        compared += 1
        different = list(_differences(corpus, split, document, encoder, content))
        if different:
            findings.append(
                f"Document {document} of {split} ({path}) is not what its source gives: "
                f"{', '.join(different)}."
            )
    return compared, len(drawn) - compared, findings


def _differences(
    corpus: Corpus, split: Split, document: int, encoder: DocumentEncoder, content: bytes
) -> Iterator[str]:
    (ids,), (places,) = encoder.ids_and_places([content])
    tokens = document_elements(corpus, split, document, None)
    if tokens[:-1].tolist() != ids:
        yield "tokens"
        return
    names = tuple(name for name in corpus.channels if name != "dependency_level")
    if not names:
        return
    (arrays,), _ = sampled(names, [content], [places])
    for name in names:
        found = document_elements(corpus, split, document, name)
        wrong = int((found != arrays[name]).sum())
        if wrong:
            yield f"{wrong:,} ids of {name}"


def document_elements(
    corpus: Corpus, split: Split, document: int, channel: str | None
) -> npt.NDArray[Any]:
    """Return the tokens of one document, or its ids in a channel, [tokens]."""
    prefix = corpus.prefix(split, channel)
    ends = np.cumsum(open_indexed(prefix).sequence_lengths, dtype=np.int64)
    start = int(ends[document - 1]) if document else 0
    return read_elements(prefix)[start : int(ends[document])]
