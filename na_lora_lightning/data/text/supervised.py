"""What the data modules for instructions share: options of texts, and batches of records of similar length."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from na_lora_lightning.data.base import DEFAULT_SPLITS, ResumableDataModule
from na_lora_lightning.data.batching import EpochSampler
from na_lora_lightning.data.files.sources import load_records
from na_lora_lightning.data.options import TextOptions
from na_lora_lightning.data.text.encoding import RecordEncoder
from na_lora_lightning.data.text.extent import Limits, require_bound, require_ids, require_positions
from na_lora_lightning.data.text.splits import SplitSummary
from na_lora_lightning.errors import DataError


class SupervisedDataModule(ResumableDataModule):
    """A data module for supervised fine-tuning on texts, which are encoded beforehand."""

    options: TextOptions

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model, loaded on first use."""

    @abstractmethod
    def _prepare(self, split: str, source: Any) -> Dataset:
        """Encodes a split; the column ``tokens`` has the number of tokens of each record."""

    @abstractmethod
    def _collator(self, split: str) -> Callable[[list[Any]], Any]:
        """What makes batches of the records of a split."""

    @abstractmethod
    def _record_encoder(self) -> RecordEncoder:
        """What encodes the records."""

    @property
    def end_token_ids(self) -> list[int]:
        """The tokens at which an answer is at its end: those at the ends of targets of the data that is set up."""
        found: dict[int, None] = {}
        for encoded in self._prepared.values():
            ends = encoded.with_format("arrow")["end_ids"][:]
            found.update(dict.fromkeys(pc.unique(pc.list_flatten(ends)).to_pylist()))
        # Data to predict answers for has none, or lacks some sort of answer.
        with suppress(DataError):
            found.update(dict.fromkeys(self._record_encoder().end_token_ids()))
        return list(found)

    def describe(self) -> dict[str, SplitSummary]:
        """Returns the size of each split that has been set up; an image counts as one token."""
        return {split: SplitSummary.of(encoded) for split, encoded in self._prepared.items()}

    def require_model_takes(self, limits: Limits, max_new_tokens: int) -> None:
        """Checks that a model has the tokens of the splits that are set up, and positions for all of them.

        Args:
            limits: Of the model.
            max_new_tokens: The number of tokens that are generated after prompts; 0 if none are.

        Raises:
            ConfigurationError: An option asks for more than the model has.
            DataError: A record does.
        """
        for split in self._prepared:
            for source, encoded in self._parts_of(split):
                require_ids(encoded, source, self.tokenizer, limits)
                if "input_ids" not in encoded.column_names:
                    # How many tokens an image takes shows when it is read.
                    require_bound(self.options.max_length, limits)
                    continue
                require_positions(
                    encoded,
                    source,
                    limits,
                    pad_to_multiple_of=self.options.pad_to_multiple_of,
                    max_new_tokens=0 if split == "train" else max_new_tokens,
                )

    def _parts_of(self, split: str) -> list[tuple[str, Dataset]]:
        """The prepared records of each source of a split, and its name."""
        return [(str(self.sources[split]), self._prepared[split])]

    @override
    def _load(self, split: str, source: Any) -> Any:
        return load_records(
            source, default_split=DEFAULT_SPLITS[split], config=self.options.dataset_config, columns=self.columns
        )

    @override
    def _sampler(self, **options: Any) -> EpochSampler:
        lengths = list(self._prepared_split("train")["tokens"])
        return EpochSampler(lengths, group_by_length=self.options.group_by_length, **options)
