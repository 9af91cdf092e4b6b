"""NeMo data modules: C++ sources made ready on the spot, or files made before.

- `CppDataModule`: a folder of C++ sources, by default the headers that ship with torch
- `CorpusDataModule`: folders that `megacpp data build` made
- `IndexedDataModule`: existing Megatron `.bin/.idx` files and their tokenizer

Every argument is a plain value, so that NeMo's command line can set it (`data.seq_length=512`)
and a checkpoint can record it.
"""

# NeMo-Run's command line reads these signatures: it resolves neither annotations kept as text
# nor `X | Y`, so this module has no `annotations` import and writes Optional and Union. In a
# Union the first type that accepts a text wins, and `str` accepts all.
# ruff: noqa: UP006, UP007, UP035, UP045

from typing import Any, Dict, List, Optional, Union

from megacpp_nemo.data.base_module import DocumentDataModule
from megacpp_nemo.data.blend import blend_tokens, normalized_paths
from megacpp_nemo.data.cache import cache_root
from megacpp_nemo.data.checks import check_structure
from megacpp_nemo.data.corpora import corpus_paths, open_corpora
from megacpp_nemo.data.corpus import CorpusSpec, build_corpus
from megacpp_nemo.data.indexed import fingerprint


class CppDataModule(DocumentDataModule):
    """Pre-training data from a folder of C++ sources.

    The corpus is built on first use and cached (see `build_corpus`); all ranks of a run may
    construct the module at once. Files held back for validation also serve as test data.

    Args:
        root: Folder of C++ sources; None is the headers that ship with torch.
        exclude: Globs of paths below `root` to leave out.
        seq_length: Tokens in a row.
        micro_batch_size: Rows of one forward pass on one device.
        global_batch_size: Rows of one optimizer step over all devices.
        vocab_size: Tokens of the tokenizer trained for this corpus. A very small corpus can give
            fewer; `tokenizer.vocab_size` is the number to build a model with.
        tokenizer_dir: Folder of a tokenizer to encode with, such as a checkpoint's; none is then
            trained, and `vocab_size` is not used.
        validation_fraction: Expected share of files held back.
        num_workers: Data loader processes; 0 loads in the training process.
        seed: Chooses the files held back and the order of samples.
        cache_dir: Cache folder; None is `megacpp_nemo` in the user's cache.
        num_train_samples: Samples to lay out at least. Set the same number, enough for the
            longest run, in runs that must see the same batches in the same order.
        structure: Code-structure channels to serve beside the tokens: `core`, `all`, or
            channels joined by `+`; None for none. A model with the same channels takes them.
        fim_rate: Share of the training documents permuted for fill-in-the-middle (see `fim`);
            0 for none. Validation data stays plain, so that losses can be compared.
        fim_spm_rate: Share of the permuted ones in SPM order; the others are PSM.

    Raises:
        DataError: The sources are missing, unusable or too small, or the cache cannot be written.
    """

    def __init__(
        self,
        *,
        root: Optional[str] = None,
        exclude: Optional[List[str]] = None,
        seq_length: int = 256,
        micro_batch_size: int = 8,
        global_batch_size: int = 8,
        vocab_size: int = 4096,
        tokenizer_dir: Optional[str] = None,
        validation_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int = 1234,
        cache_dir: Optional[str] = None,
        num_train_samples: Optional[int] = None,
        structure: Optional[str] = None,
        fim_rate: float = 0.0,
        fim_spm_rate: float = 0.5,
    ) -> None:
        spec = CorpusSpec(
            root=root,
            exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude or ()),
            vocab_size=vocab_size,
            tokenizer_dir=tokenizer_dir,
            validation_fraction=validation_fraction,
            seed=seed,
            structure="+".join(check_structure(structure)) or None,
        )
        self.corpus = build_corpus(spec, cache_dir)
        train, validation = str(self.corpus.train_prefix), str(self.corpus.validation_prefix)
        self._serve(
            paths={"train": [train], "validation": [validation], "test": [validation]},
            split=None,
            tokens={name: self.corpus.tokens(name) for name in ("train", "validation")},
            tokenizer_dir=self.corpus.tokenizer_dir,
            index_mapping_dir=cache_root(cache_dir) / "sample_orders" / self.corpus.folder.name,
            num_train_samples=num_train_samples,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            seed=seed,
            structure=structure,
            fim_rate=fim_rate,
            fim_spm_rate=fim_spm_rate,
        )
        self.bytes_per_token_validation = self.corpus.bytes_per_token("validation")


class CorpusDataModule(DocumentDataModule):
    """Pre-training data from folders that `megacpp data build` made.

    The folders' own division into training and validation files is used; validation files also
    serve as test data.

    Args:
        folders: One folder, a list, or weights and folders in turn (`["30", "a", "70", "b"]`).
            All must have been encoded with the same tokenizer. Required.
        tokenizer_dir: Folder of the tokenizer that they must have been encoded with, such as a
            checkpoint's; None is their own.
        seq_length: Tokens in a row.
        micro_batch_size: Rows of one forward pass on one device.
        global_batch_size: Rows of one optimizer step over all devices.
        num_workers: Data loader processes; 0 loads in the training process.
        seed: Chooses the order of samples.
        cache_dir: Cache folder for sample orders; None is `megacpp_nemo` in the user's cache.
        num_train_samples: Samples to lay out at least, as in `CppDataModule`.
        structure: Code-structure channels to serve, as in `CppDataModule`; each folder must
            hold them.
        fim_rate: Share of the training documents permuted, as in `CppDataModule`.
        fim_spm_rate: Share of those in SPM order.

    Raises:
        DataError: No folder is set; one holds no corpus, a damaged one, one of another version,
            of another tokenizer or without a channel; or a part of the data is too small.
    """

    def __init__(
        self,
        *,
        folders: Optional[Union[List[str], str]] = None,
        tokenizer_dir: Optional[str] = None,
        seq_length: int = 256,
        micro_batch_size: int = 8,
        global_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 1234,
        cache_dir: Optional[str] = None,
        num_train_samples: Optional[int] = None,
        structure: Optional[str] = None,
        fim_rate: float = 0.0,
        fim_spm_rate: float = 0.5,
    ) -> None:
        entry, self.corpora = open_corpora(folders, check_structure(structure), tokenizer_dir)
        paths = corpus_paths(entry, self.corpora)
        tokens, prefixes = blend_tokens(paths, "", seq_length)
        self._serve(
            paths=paths,
            split=None,
            tokens=tokens,
            tokenizer_dir=self.corpora[0].tokenizer_dir,
            index_mapping_dir=cache_root(cache_dir) / "sample_orders" / fingerprint(prefixes),
            num_train_samples=num_train_samples,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            seed=seed,
            structure=structure,
            fim_rate=fim_rate,
            fim_spm_rate=fim_spm_rate,
        )
        self.bytes_per_token_validation = None
        if len(self.corpora) == 1:
            self.bytes_per_token_validation = self.corpora[0].bytes_per_token("validation")


class IndexedDataModule(DocumentDataModule):
    """Pre-training data from existing Megatron indexed files.

    Args:
        paths: Path prefixes (without `.bin` or `.idx`): one; a list; a list of weights and
            prefixes in turn (`["30", "a", "70", "b"]`); or a dictionary with `train`,
            `validation` and optionally `test`, each one of these (validation data serves as
            test data if there is none). Required.
        tokenizer_dir: Folder of the tokenizer that made the files. Required: its end-of-document
            token tells the documents in a row apart.
        split: Shares of training, validation and test data, cut out of each path in that order;
            not used when `paths` is a dictionary.
        seq_length: Tokens in a row.
        micro_batch_size: Rows of one forward pass on one device.
        global_batch_size: Rows of one optimizer step over all devices.
        num_workers: Data loader processes; 0 loads in the training process.
        seed: Chooses the order of samples.
        cache_dir: Cache folder for sample orders; None is `megacpp_nemo` in the user's cache.
        num_train_samples: Samples to lay out at least, as in `CppDataModule`.
        structure: Code-structure channels to serve, as in `CppDataModule`: files beside each
            path, `PREFIX.category.bin` and `.idx` and so on.
        fim_rate: Share of the training documents permuted, as in `CppDataModule`.
        fim_spm_rate: Share of those in SPM order.

    Raises:
        DataError: A path, a channel or the tokenizer is not set, missing or damaged, a channel is
            not aligned with its tokens, or a part of the data is too small.
    """

    def __init__(
        self,
        *,
        paths: Optional[Union[List[str], Dict[str, Any], str]] = None,
        tokenizer_dir: Optional[str] = None,
        split: str = "900,50,50",
        seq_length: int = 256,
        micro_batch_size: int = 8,
        global_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 1234,
        cache_dir: Optional[str] = None,
        num_train_samples: Optional[int] = None,
        structure: Optional[str] = None,
        fim_rate: float = 0.0,
        fim_spm_rate: float = 0.5,
    ) -> None:
        blend = normalized_paths(paths)
        tokens, prefixes = blend_tokens(blend, split, seq_length)
        self._serve(
            paths=blend,
            split=None if isinstance(blend, dict) else split,
            tokens=tokens,
            tokenizer_dir=tokenizer_dir,
            index_mapping_dir=cache_root(cache_dir) / "sample_orders" / fingerprint(prefixes),
            num_train_samples=num_train_samples,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            seed=seed,
            structure=structure,
            fim_rate=fim_rate,
            fim_spm_rate=fim_spm_rate,
        )
        self.bytes_per_token_validation = None
