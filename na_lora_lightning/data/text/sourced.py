"""Reading one or several sources for each split: beforehand, or while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from typing_extensions import override

from na_lora_lightning.data.base import DEFAULT_SPLITS
from na_lora_lightning.data.files.sources import load_records
from na_lora_lightning.data.options import TextOptions, require_at_least
from na_lora_lightning.data.text.extent import Limits
from na_lora_lightning.data.text.mixture import Source, StoppingStrategy, mix, read_sources, share_for
from na_lora_lightning.data.text.splits import encode_split
from na_lora_lightning.data.text.streaming import RecordStream, StreamLoader
from na_lora_lightning.data.text.supervised import SupervisedDataModule
from na_lora_lightning.errors import ConfigurationError


class SourcedDataModule(SupervisedDataModule):
    """A data module for records of one or several sources, of which training data can be streamed.

    Args:
        options: Those of the constructor.
        validation_fraction: The share of the training data that is kept for validation.
        stopping_strategy: When an epoch of sources with weights ends.
        streaming: Whether training data are read as they are needed.
        shuffle_buffer: The number of records that the next one of a stream is drawn from.
        num_proc: The number of processes that tokenise the records.

    Raises:
        ConfigurationError: An argument has a value that cannot work, or two contradict each other.
    """

    _stream_loader: type[StreamLoader] = StreamLoader

    def __init__(
        self,
        options: TextOptions,
        *,
        validation_fraction: float | None,
        stopping_strategy: StoppingStrategy,
        streaming: bool = False,
        shuffle_buffer: int = 1,
        num_proc: int | None = None,
    ) -> None:
        require_at_least(1, num_proc=num_proc, shuffle_buffer=shuffle_buffer)
        if validation_fraction is not None and not 0 < validation_fraction < 1:
            raise ConfigurationError(
                f"validation_fraction={validation_fraction} is no share; set it to more than 0 and less than 1."
            )
        if validation_fraction is not None and options.validation is not None:
            raise ConfigurationError(
                "validation_fraction is for want of data.validation, which is given; leave one out."
            )
        if stopping_strategy not in ("first_exhausted", "all_exhausted"):
            raise ConfigurationError(
                f"stopping_strategy={stopping_strategy!r} is unknown; set it to 'first_exhausted' or 'all_exhausted'."
            )
        if streaming:
            _require_streamable(
                options,
                group_by_length=options.group_by_length or None,
                validation_fraction=validation_fraction,
                num_proc=num_proc,
            )
        super().__init__(options)
        self.validation_fraction = validation_fraction
        self.stopping_strategy: StoppingStrategy = stopping_strategy
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.num_proc = num_proc
        self._sources = {
            split: read_sources(value, split, options, self.COLUMNS)
            for split, value in self.sources.items()
            if value is not None
        }
        if validation_fraction is not None and "train" in self._sources:
            self.sources["validation"] = self.sources["train"]
            self._sources["validation"] = [replace(source, weight=None) for source in self._sources["train"]]
        self._parts: dict[str, list[tuple[str, Dataset]]] = {}
        self._stream: RecordStream | None = None
        self._lengths_to_resume: dict[int, int] = {}

    @override
    def _load(self, split: str, source: Any) -> list[Dataset]:
        if self.streaming and split == "train":
            return []
        is_kept = split == "validation" and self.validation_fraction is not None
        default = DEFAULT_SPLITS["train" if is_kept else split]
        return [
            load_records(each.path, default_split=default, config=each.dataset_config, columns=each.columns)
            for each in self._sources[split]
        ]

    def _prepare(self, split: str, source: Any) -> Dataset:
        parts = []
        for each, records in zip(self._sources[split], self._load(split, source), strict=True):
            numbers = None
            if self.validation_fraction is not None and split in ("train", "validation"):
                numbers = share_for(split, len(records), self.validation_fraction, self.options.seed, each.path)
                records = records.select(numbers)
            parts.append((each.path, self._encoded(split, each, records, numbers)))
        self._parts[split] = parts
        return mix(
            [encoded for _, encoded in parts],
            self._sources[split],
            seed=self.options.seed,
            shuffle=self.options.shuffle,
            stopping_strategy=self.stopping_strategy,
        )

    def _encoded(self, split: str, source: Source, records: Dataset, numbers: Sequence[int] | None) -> Dataset:
        """Encodes what is taken of a source; ``numbers`` are the places that the records have in it, None for all."""
        return encode_split(
            records,
            self._record_encoder(),
            source=source.path,
            split=split,
            form=source.format,
            numbers=numbers,
            num_proc=self.num_proc,
        )

    @override
    def _parts_of(self, split: str) -> list[tuple[str, Dataset]]:
        return self._parts[split]

    @override
    def _prepare_splits(self, splits: Sequence[str]) -> None:
        super()._prepare_splits([split for split in splits if not (self.streaming and split == "train")])
        if self.streaming and "train" in splits and "train" in self._sources and self._stream is None:
            self._stream = self._make_stream(
                buffer=self.shuffle_buffer if self.options.shuffle else 1,
                seed=self.options.seed,
                stopping_strategy=self.stopping_strategy,
            )

    def _make_stream(self, **options: Any) -> RecordStream:
        """The batches of training data that are read as they are needed."""
        return RecordStream(self._sources["train"], self._record_encoder(), self._collator("train"), **options)

    @override
    def require_model_takes(self, limits: Limits, max_new_tokens: int) -> None:
        super().require_model_takes(limits, max_new_tokens)
        if self._stream is not None:
            self._stream.require_model_takes(limits)

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the training batches."""
        if self._stream is None:
            return super().train_dataloader()
        self._stream.share(self.batch_size, **self._processes())
        self._keep_plan(self._stream.plan)
        self._stream.lengths.update(self._lengths_to_resume)
        return self._stream_loader(
            self._stream,
            processed_batches=None if self.trainer is None else self._processed_batches,
            **self._worker_options(),
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns what the order of the training batches depends on, and how many finished epochs of a stream had."""
        return super().state_dict() | ({} if self._stream is None else {"lengths": dict(self._stream.lengths)})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what the order of the training batches depended on, to be checked if training goes on."""
        super().load_state_dict(state_dict)
        self._lengths_to_resume = state_dict.get("lengths", {})


def _require_streamable(options: TextOptions, **needing_all: Any) -> None:
    """Refuses options for which all training data have to be known beforehand.

    Raises:
        ConfigurationError: One is.
    """
    for name, value in needing_all.items():
        if value is not None:
            raise ConfigurationError(
                f"{name}={value} needs all training data beforehand, which streaming does without; set {name} to "
                f"{'false' if value is True else 'null'}, or streaming to false."
            )
    if options.num_workers > 1:
        raise ConfigurationError(
            f"num_workers={options.num_workers} would have each process read all of a stream; set it to 0 or 1."
        )
