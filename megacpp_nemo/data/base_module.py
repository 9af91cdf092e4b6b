"""What all data modules share: how many samples are asked for, and from which files.

NeMo's `PreTrainingDataModule` does the serving; this class replaces its `build`, whose
assertions and sample counts do not hold up when a run is extended or its data is small.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import numpy as np
import torch
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule

from megacpp_nemo.contract.errors import DataError
from megacpp_nemo.data import cache
from megacpp_nemo.data.blend import Blend, prefixes
from megacpp_nemo.data.channels import check_channels
from megacpp_nemo.data.checks import (
    check_batch_sizes,
    check_enough_tokens,
    check_fim,
    check_structure,
    load_tokenizer,
)
from megacpp_nemo.data.dataset import DocumentDataset, DocumentDatasetConfig
from megacpp_nemo.data.fim import Fim, Sentinels

logger = logging.getLogger(__name__)


class DocumentDataModule(PreTrainingDataModule):
    """A pre-training data module over `DocumentDataset`.

    Subclasses call `_serve` in their constructor.
    """

    bytes_per_token_validation: float | None
    """Bytes of source text per validation token, or None where it is not known."""

    def __init_subclass__(cls) -> None:
        # NeMo wraps a class's constructor at its first use to capture the arguments, and marks
        # the class; a subclass inherits the mark and would never be wrapped.
        cls.__wrapped_init__ = False
        super().__init_subclass__()

    def io_init(self, **kwargs: Any) -> fdl.Config[Any]:
        """Keep the arguments captured first: this class's, not those it gives to its parents."""
        captured: fdl.Config[Any] | None = self.__dict__.get("__io__")
        return super().io_init(**kwargs) if captured is None else captured

    def _serve(
        self,
        *,
        paths: Blend,
        tokens: Mapping[str, int],
        tokenizer_dir: str | Path | None,
        index_mapping_dir: Path,
        num_train_samples: int | None,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int,
        structure: str | None,
        fim_rate: float,
        fim_spm_rate: float,
        **upstream: Any,
    ) -> None:
        """Check the arguments, which the subclasses document, and construct the parent.

        `paths` is in NeMo's form; `tokens` counts those of `train` and `validation`; `upstream`
        goes to NeMo's data module as it is.
        """
        check_fim(fim_rate, fim_spm_rate)
        channels = check_structure(structure)
        check_batch_sizes(seq_length, micro_batch_size, global_batch_size, num_workers)
        check_enough_tokens(tokens, seq_length, micro_batch_size, global_batch_size)
        tokenizer = load_tokenizer(tokenizer_dir)
        fim = None
        if fim_rate > 0:
            fim = Fim(rate=fim_rate, spm_rate=fim_spm_rate, sentinels=Sentinels.of(tokenizer))
        # Here rather than when the rows are built: there the other ranks wait for rank 0.
        for prefix in _all_prefixes(paths) if channels else ():
            check_channels(prefix, channels)
        super().__init__(
            paths=paths,
            tokenizer=tokenizer,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_train_samples=num_train_samples,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            index_mapping_dir=str(index_mapping_dir),
            dataset_cls=DocumentDataset,
            **upstream,
        )
        # The parent insists on masks without Transformer Engine. Attention here is causal and
        # needs none, and a [seq, seq] mask for each row is by far the largest part of a batch.
        self.create_attention_mask = False
        self._tokens = dict(tokens)
        self._channels, self._fim = channels, fim

    @property
    def gpt_dataset_config(self) -> DocumentDatasetConfig:
        """The parent's settings of a dataset, with the channels and fill-in-the-middle."""
        return DocumentDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            tokenizer=self.tokenizer,
            path_to_cache=self.index_mapping_dir,
            reset_position_ids=self.reset_position_ids,
            create_attention_mask=self.create_attention_mask,
            reset_attention_mask=self.reset_attention_mask,
            eod_mask_loss=self.eod_mask_loss,
            num_dataset_builder_threads=self.num_dataset_builder_threads,
            channels=self._channels,
            fim=self._fim,
            **self.build_kwargs,
        )

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int | float,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Build the three datasets.

        Training asks for `num_train_samples` or for what the steps need, whichever is more.
        Megatron shuffles all the passes over the data that a request needs as one, so a request
        for more samples changes the order of every one of them. With the same
        `num_train_samples` a run that is later extended sees exactly the batches that a longer
        run would have seen, and resuming stays bitwise.

        Validation restarts from its first sample every time it runs, so it asks for one run's
        samples, and the loss does not depend on the length of training either.

        Raises:
            DataError: `max_steps` is not positive, or the data cannot give the samples.
        """
        train = self._train_samples(trainer_max_steps)
        sizes = [
            train,
            self._validation_samples(trainer_limit_val_batches),
            int(trainer_limit_test_batches * self.global_batch_size),
        ]
        self._train_ds, self._validation_ds, self._test_ds = self._build_datasets(sizes)
        if len(self._train_ds) < train:
            raise DataError(
                "The training data ends before the run does",
                given=f"{len(self._train_ds):,} samples for {train:,}",
                allowed="several paths repeat as often as needed only when each has a weight",
                hint="give weights, as in data.paths=['1','a','1','b'], or train for fewer steps",
            )

    def _train_samples(self, max_steps: int) -> int:
        if max_steps <= 0:
            raise DataError(
                "The number of training steps decides how many samples to prepare",
                given=f"trainer.max_steps={max_steps}",
                allowed="a positive number of steps",
                hint="set trainer.max_steps",
            )
        needed = int(max_steps) * self.global_batch_size
        floor = int(self.num_train_samples or 0)
        if 0 < floor < needed:
            logger.warning(
                "this run needs %d samples, more than num_train_samples=%d: the sample order is "
                "not that of a shorter run",
                needed,
                floor,
            )
        return max(needed, floor)

    def _validation_samples(self, limit: int | float) -> int | None:
        """Return the samples of one validation run; None is one whole pass, as for NeMo."""
        if isinstance(limit, int) or limit == 0.0 or limit > 1.0:
            return int(limit * self.global_batch_size)
        if self._validation_weights() is not None:
            raise DataError(
                "A share of weighted validation data is not defined",
                given=f"trainer.limit_val_batches={limit}",
                allowed="a whole number of batches when validation paths have weights",
                hint="set trainer.limit_val_batches=10, or give validation paths without weights",
            )
        one_pass = (self._tokens["validation"] - 1) // self.seq_length
        return None if one_pass >= self.global_batch_size else self.global_batch_size

    def _validation_weights(self) -> list[float] | None:
        per_split = self.build_kwargs.get("blend_per_split")
        weights: list[float] | None = (per_split[1] if per_split else self.build_kwargs["blend"])[1]
        return weights

    def _build_datasets(self, sizes: list[int | None]) -> Any:
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )

        builder = BlendedMegatronDatasetBuilder(
            self.dataset_cls, sizes, is_built_on_rank=lambda: True, config=self.gpt_dataset_config
        )
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return builder.build()
        # Rank 0 writes the sample orders and the others wait for it at barriers, so it alone
        # keeps other runs away. A file cut short by a killed run would be taken for complete.
        folder = Path(self.index_mapping_dir)
        with (
            cache.disk_errors(folder.parent, needed_bytes=None),
            cache.locked(folder.parent, folder.name),
        ):
            discard_damaged_orders(folder)
            return builder.build()


def _all_prefixes(paths: Blend) -> list[str]:
    entries = paths.values() if isinstance(paths, dict) else [paths]
    return sorted({prefix for entry in entries for prefix in prefixes(entry)})


def discard_damaged_orders(folder: Path) -> None:
    """Remove cached sample orders that cannot be mapped, so that Megatron builds them again."""
    for path in folder.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            logger.warning("removing a damaged sample order %s: %s", path, error)
            path.unlink(missing_ok=True)
