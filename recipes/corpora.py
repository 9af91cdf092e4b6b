"""Data parts that fit any recipe, by what they are.

    nemo llm pretrain --factory nam56r_tiny data="cpp_folder(root=/src/project)"
    nemo llm pretrain --factory nam56r_tiny data="corpus_folders(folders=/data/corpus)"
    nemo llm pretrain --factory nam56r data="indexed_files(paths=/data/cpp,tokenizer_dir=/data/tok)"

Such a part says where the rows come from; how long they are, and how many make a batch, stays
the recipe's (`use_data`). Every other argument of a data module is an override, such as
`data.num_workers=2`.
"""

# NeMo-Run reads these annotations to parse its command line: it resolves neither annotations
# kept as text nor `X | Y`.
# ruff: noqa: UP045

import inspect
from typing import Any, Optional

import lightning.pytorch as pl
import nemo_run as run

from megacpp_nemo.contract import DataError
from megacpp_nemo.data.module import CorpusDataModule, CppDataModule, IndexedDataModule

RECIPE_ARGUMENTS = (
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "seed",
    "num_train_samples",
    "structure",  # the channels that the model has
    "tokenizer_dir",  # of a fine-tuning recipe, whose weights belong to it
)


@run.cli.factory(target=pl.LightningDataModule)
def cpp_headers(tokenizer_dir: Optional[str] = None) -> run.Config:
    """Real C++ that is already here: the headers that ship with torch.

    Args:
        tokenizer_dir: Tokenizer to encode with; one is trained on the headers if not given.
    """
    return _config(CppDataModule, tokenizer_dir=tokenizer_dir)


@run.cli.factory(target=pl.LightningDataModule)
def cpp_folder(root: Optional[str] = None, tokenizer_dir: Optional[str] = None) -> run.Config:
    """Any folder of C++ sources.

    Args:
        root: The folder.
        tokenizer_dir: Tokenizer to encode with; one is trained on the folder if not given.

    Raises:
        DataError: If no folder is given.
    """
    if not root:
        raise DataError(
            "No folder of C++ sources was given",
            given=f"root={root!r}",
            allowed="a folder; cpp_headers needs none",
            hint='data="cpp_folder(root=/src/project)"',
        )
    return _config(CppDataModule, root=root, tokenizer_dir=tokenizer_dir)


@run.cli.factory(target=pl.LightningDataModule)
def corpus_folders(folders: Any = None) -> run.Config:
    """Corpora with structure channels, as `megacpp data build` makes them.

    The folders are needed before the data is built; they may be given later, as an override.

    Args:
        folders: One folder, a list of them, or weights and folders in turn.
    """
    return _config(CorpusDataModule, folders=folders)


@run.cli.factory(target=pl.LightningDataModule)
def indexed_files(paths: Any = None, tokenizer_dir: Optional[str] = None) -> run.Config:
    """Existing Megatron indexed files and their tokenizer.

    Both are needed before the data is built; each may be given later, as an override.

    Args:
        paths: Path prefix, or any other form that `IndexedDataModule` takes.
        tokenizer_dir: Folder of the tokenizer that made the files.
    """
    return _config(IndexedDataModule, paths=paths, tokenizer_dir=tokenizer_dir)


def use_data(recipe: run.Partial, data: run.Config) -> None:
    """Make `data` the data of a NeMo recipe, with the recipe's row length, batches and seed.

    Arguments that `data` sets itself are kept.
    """
    keep_recipe_arguments(recipe.data, data)
    recipe.data = data


def keep_recipe_arguments(before: Any, data: Any) -> None:
    """Give `data` what the recipe decided on `before`, where it does not say otherwise."""
    takes = inspect.signature(data.__fn_or_cls__).parameters
    for name in RECIPE_ARGUMENTS:
        if name in takes and name in before.__arguments__ and name not in data.__arguments__:
            setattr(data, name, getattr(before, name))


def _config(module: type, **arguments: Any) -> run.Config:
    """Return the configuration of a data module, arguments that are None left unset."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return run.Config(module, **given)
