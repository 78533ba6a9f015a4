"""What all data modules share: where data comes from, stages, and the order of batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from na_lora_lightning.data.batching import EpochSampler, ResumableDataLoader, refuse_other_plan
from na_lora_lightning.data.options import DataOptions, require_known_columns
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import processed_batches

_SPLITS_OF_STAGE: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "validation", "test", "predict"),
}
# What each split is called in a data set that does not say otherwise.
DEFAULT_SPLITS = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}


class ResumableDataModule(LightningDataModule, ABC):
    """A data module whose batches depend on the data, the arguments and the epoch alone.

    Args:
        options: Those of the constructor, which :meth:`DataOptions.among` picks from its arguments.

    Raises:
        ConfigurationError: If ``columns`` names what the data module does not read.
    """

    COLUMNS: ClassVar[tuple[str, ...]]
    _train_loader: ClassVar[type[ResumableDataLoader]] = ResumableDataLoader
    _evaluation_loader: ClassVar[type[DataLoader[dict[str, Any]]]] = DataLoader

    def __init__(self, options: DataOptions) -> None:
        super().__init__()
        require_known_columns(options.columns, self.COLUMNS)
        self.options = options
        self.sources: dict[str, Any] = {split: getattr(options, split) for split in DEFAULT_SPLITS}
        self.columns = dict(options.columns or {})
        # Lightning's tuner sets it.
        self.batch_size = options.batch_size
        self._prepared: dict[str, Any] = {}
        self._limit_val_batches: int | float | None = None
        self._plan: dict[str, Any] = {}
        self._plan_to_resume: dict[str, Any] = {}

    @abstractmethod
    def _load(self, split: str, source: Any) -> Any:
        """Downloads, converts and reads a split."""

    @abstractmethod
    def _prepare(self, split: str, source: Any) -> Any:
        """Makes of a split what is kept of it from ``setup`` on."""

    @abstractmethod
    def _sampler(self, **options: Any) -> EpochSampler:
        """What draws the order of the training data, with ``options`` and those of the subclass."""

    def _dataset(self, split: str) -> Any:
        """The records of a split as the collator takes them, in the order of the prepared ones."""
        return self._prepared_split(split)

    def _collator(self, split: str) -> Callable[[list[Any]], Any] | None:
        """What makes batches of the records of a split; None stacks tensors."""
        return None

    @override
    def prepare_data(self) -> None:
        """Downloads and converts the data once, before every process loads it."""
        for split, source in self.sources.items():
            if source is not None:
                self._load(split, source)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Prepares the data of a stage.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None stands for all data that is given.

        Raises:
            ConfigurationError: The stage needs data that was not given, or the model's tokenizer, processor or
                classes do not fit.
            DataError: The data, or a record of it, cannot be used.
        """
        # Lightning gives an enumeration whose members equal, but do not print as, their names.
        stage = getattr(stage, "value", stage)
        splits = _SPLITS_OF_STAGE[stage]
        if stage is not None and self.sources[splits[0]] is None:
            raise ConfigurationError(
                f"the data for {splits[0]!r} is not given but is needed to {stage}; set data.{splits[0]}."
            )
        if stage == "fit" and self.sources["validation"] is None and self.trainer is not None:
            # Lightning warns of a validation step without data, however it is told that there is none.
            self._limit_val_batches = self.trainer.limit_val_batches
            self.trainer.limit_val_batches = 0
        self._prepare_splits(splits)

    def _prepare_splits(self, splits: Sequence[str]) -> None:
        for split in splits:
            source = self.sources[split]
            if source is not None and split not in self._prepared:
                self._prepared[split] = self._prepare(split, source)

    @override
    def teardown(self, stage: str | None = None) -> None:
        """Lets the trainer validate again, should it be used with other data.

        Args:
            stage: The stage that ends.
        """
        if self._limit_val_batches is not None and self.trainer is not None:
            self.trainer.limit_val_batches = self._limit_val_batches
            self._limit_val_batches = None

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the training batches."""
        sampler = self._sampler(
            batch_size=self.batch_size, shuffle=self.options.shuffle, seed=self.options.seed, **self._processes()
        )
        self._keep_plan(sampler.plan)
        return self._train_loader(
            **self._loader_options("train", self.batch_size),
            sampler=sampler,
            processed_batches=None if self.trainer is None else self._processed_batches,
        )

    def _processes(self) -> dict[str, int]:
        """How many processes share the records, and which one this is, where there are several."""
        strategy = self.trainer.strategy if self.trainer is not None else None
        return getattr(strategy, "distributed_sampler_kwargs", None) or {}

    def _keep_plan(self, plan: dict[str, Any]) -> None:
        """Keeps what the order of batches depends on, which has to be that of an interrupted run."""
        if self._plan_to_resume:
            refuse_other_plan(plan, self._plan_to_resume)
        self._plan, self._plan_to_resume = plan, {}

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """Returns the validation batches, or none if no validation data was given."""
        return [] if self.sources["validation"] is None else self._make_evaluation_loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the test batches."""
        return self._make_evaluation_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the batches to predict."""
        return self._make_evaluation_loader("predict")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns what the order of the training batches depends on."""
        return {"plan": self._plan}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what the order of the training batches depended on, to be checked if training goes on."""
        self._plan_to_resume = state_dict["plan"]

    def _prepared_split(self, split: str) -> Any:
        if split not in self._prepared:
            raise ConfigurationError(f"the data for {split!r} is not set up; give data.{split} and call setup() first.")
        return self._prepared[split]

    def _make_evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        batch_size = self.options.validation_batch_size or self.batch_size
        return self._evaluation_loader(**self._loader_options(split, batch_size))

    def _loader_options(self, split: str, batch_size: int) -> dict[str, Any]:
        return {
            "dataset": self._dataset(split),
            "batch_size": batch_size,
            "collate_fn": self._collator(split),
            "persistent_workers": self.options.num_workers > 0,
            **self._worker_options(),
        }

    def _worker_options(self) -> dict[str, Any]:
        """Options of every loader."""
        return {
            "num_workers": self.options.num_workers,
            "pin_memory": torch.cuda.is_available(),
            # Otherwise each epoch would advance the global random state, which dropout depends on.
            "generator": torch.Generator().manual_seed(self.options.seed),
        }

    def _processed_batches(self) -> int:
        assert self.trainer is not None
        return processed_batches(self.trainer)
