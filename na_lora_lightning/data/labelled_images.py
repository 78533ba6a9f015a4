"""The data module for image classification, with few-shot sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from na_lora_lightning.data.augmentation import CropAndFlip, input_side
from na_lora_lightning.data.base import require_at_least
from na_lora_lightning.data.batching import EpochSampler, ResumableDataLoader
from na_lora_lightning.data.image_classes import IMAGE, LABEL, LabelledImages, few_of_each_class
from na_lora_lightning.data.processors import load_processor
from na_lora_lightning.errors import ConfigurationError

_SPLITS_OF_STAGE = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",)}
_SPLITS_OF_STAGE["predict"] = ("predict",)
_DEFAULT_SPLITS = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}
_FEWEST_CLASSES = 2


class ClassifiedImages(Dataset[dict[str, Tensor]]):
    """Decodes and prepares images one by one, in whatever process asks for them.

    Args:
        data: The images.
        indices: Which of them.
        classes: The class of each of these; None leaves classes out.
        image_processor: That of the model.
        augmentation: What is done to images first.
    """

    def __init__(
        self,
        data: LabelledImages,
        indices: Sequence[int],
        classes: Sequence[int] | None,
        image_processor: Any,
        augmentation: CropAndFlip | None = None,
    ) -> None:
        self.data = data
        self.indices = list(indices)
        self.classes = None if classes is None else list(classes)
        self.image_processor = image_processor
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        """Prepares an image, asked for by its place, or by epoch and place."""
        epoch, place = key if isinstance(key, tuple) else (0, key)
        image = self.data.read_image(self.indices[place])
        if self.augmentation is not None:
            image = self.augmentation(image, epoch, place)
        prepared = self.image_processor(images=image, return_tensors="pt")
        item = {name: value[0] for name, value in prepared.items() if isinstance(value, Tensor)}
        if self.classes is not None:
            item[LABEL] = torch.tensor(self.classes[place])
        return item


class _EpochAndIndexSampler(EpochSampler):
    """Yields the epoch with each index, as augmentation differs from epoch to epoch."""

    @override
    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        for index in super().__iter__():
            yield self.epoch, index


class LabelledImageDataModule(LightningDataModule):
    """Images with a class each, for :class:`~na_lora_lightning.dual_encoder.DualEncoderLightningModule`.

    Each of ``train``, ``validation``, ``test`` and ``predict`` is one of

    * a folder with a folder of images for each class, which is called like the class,
    * a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file with the columns ``image`` (a path, from the file's folder
      on) and ``label`` (a text or a number),
    * a folder written by ``datasets.Dataset.save_to_disk``, or the name of a data set on the Hugging Face hub, with
      these columns, of which ``image`` may hold images.

    Batches have what the model's image processor makes of images (``pixel_values``, ``[batch, 3, height, width]``
    float32, for SigLIP 2 patches with ``pixel_attention_mask`` and ``spatial_shapes``) and ``label``, ``[batch]``
    int64, an index into :attr:`class_names`. Images are decoded when they are needed, in the workers. The batches of
    an epoch depend on the data, these arguments and the epoch alone; a resumed run goes on with the next batch.

    Args:
        processor_name_or_path: The folder or hub name of the model, whose image processor is used.
        train: The training data, which also says which classes there are.
        validation: The validation data.
        test: The test data.
        predict: The images to classify; they need no labels.
        dataset_config: The configuration of hub data sets that have several.
        columns: The names that the data has for ``image`` and ``label``.
        class_names: What the classes are called in prompts: those of the labels that are to be used, or, where labels
            are numbers, a name for each; or a mapping from labels to names. None takes the labels themselves.
        shots: Training images of each class, drawn with ``seed``; None takes all.
        augmentation: Whether training images are cropped at random and mirrored, as few-shot protocols do it.
        batch_size: The number of images in a training batch of each process.
        validation_batch_size: The number of images in other batches; None stands for ``batch_size``.
        shuffle: Whether to shuffle the training data in each epoch.
        num_workers: The number of processes that decode images.
        seed: The seed of the shots, of the order of the training data and of augmentation.
        processor_revision: The branch, tag or commit of a processor from the hub.
        trust_remote_code: Whether a processor from the hub may run code of its own.

    Raises:
        ConfigurationError: An argument has a value that cannot work.
    """

    COLUMNS = (IMAGE, LABEL)

    def __init__(
        self,
        processor_name_or_path: str,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        dataset_config: str | None = None,
        columns: dict[str, str] | None = None,
        class_names: list[str] | dict[str, str] | None = None,
        shots: int | None = None,
        augmentation: bool = False,
        batch_size: int = 32,
        validation_batch_size: int | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        processor_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, shots=1 if shots is None else shots)
        require_at_least(1, validation_batch_size=1 if validation_batch_size is None else validation_batch_size)
        require_at_least(0, num_workers=num_workers, seed=seed)
        unknown = sorted(set(columns or {}) - set(self.COLUMNS))
        if unknown:
            raise ConfigurationError(f"columns has the unknown key {unknown[0]!r}; use 'image' and 'label'.")
        self.save_hyperparameters(logger=False)
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.seed = seed
        self._given_names = class_names
        self._class_names: list[str] | None = None
        self._datasets: dict[str, ClassifiedImages] = {}
        self._read: dict[str, LabelledImages] = {}
        self._image_processor: Any = None
        self._limit_val_batches: int | float | None = None
        self._plan: dict[str, Any] = {}
        self._plan_to_resume: dict[str, Any] = {}

    @property
    def class_names(self) -> list[str] | None:
        """What the classes are called, by their numbers; None before :meth:`setup`, and for images to predict alone."""
        return self._class_names

    @property
    def image_processor(self) -> Any:
        """The image processor of the model, loaded on first use."""
        if self._image_processor is None:
            options = self.hparams
            self._image_processor = load_processor(
                options["processor_name_or_path"],
                revision=options["processor_revision"],
                trust_remote_code=options["trust_remote_code"],
            ).image_processor
        return self._image_processor

    @override
    def prepare_data(self) -> None:
        """Downloads and converts the data once, before every process loads it."""
        for split in self.sources:
            self._data(split)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Prepares the data of a stage.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None stands for all data that is given.

        Raises:
            ConfigurationError: The stage needs data that was not given, or there are fewer than two classes.
            DataError: The data, or a record of it, cannot be used.
        """
        # Lightning gives an enumeration whose members equal, but do not print as, their names.
        stage = getattr(stage, "value", stage)
        splits = tuple(self.sources) if stage is None else _SPLITS_OF_STAGE[stage]
        if stage is not None and self.sources[splits[0]] is None:
            raise ConfigurationError(
                f"The data for {splits[0]!r} is not given but is needed to {stage}; set data.{splits[0]}."
            )
        if stage == "fit" and self.sources["validation"] is None and self.trainer is not None:
            # Lightning warns of a validation step without data, however it is told that there is none.
            self._limit_val_batches = self.trainer.limit_val_batches
            self.trainer.limit_val_batches = 0
        self._name_classes(splits)
        for split in splits:
            if split not in self._datasets and self.sources[split] is not None:
                self._datasets[split] = self._dataset(split)

    @override
    def teardown(self, stage: str | None = None) -> None:
        """Lets the trainer validate again, should it be used with other data."""
        if self._limit_val_batches is not None and self.trainer is not None:
            self.trainer.limit_val_batches = self._limit_val_batches
            self._limit_val_batches = None

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        """Returns the training batches."""
        dataset = self._dataset_of("train")
        strategy = self.trainer.strategy if self.trainer is not None else None
        sampler = _EpochAndIndexSampler(
            [1] * len(dataset),
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            group_by_length=False,
            seed=self.seed,
            **(getattr(strategy, "distributed_sampler_kwargs", None) or {}),
        )
        if self._plan_to_resume:
            sampler.refuse_other_plan(self._plan_to_resume)
        self._plan, self._plan_to_resume = sampler.plan, {}
        return ResumableDataLoader(
            **self._loader_options(dataset, self.batch_size),
            sampler=sampler,
            processed_batches=None if self.trainer is None else self._processed_batches,
        )

    @override
    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """Returns the validation batches, or none if no validation data was given."""
        return [] if self.sources["validation"] is None else self._evaluation_loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the test batches."""
        return self._evaluation_loader("test")

    @override
    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the batches to predict."""
        return self._evaluation_loader("predict")

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns what the order of the training batches depends on."""
        return {"plan": self._plan}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what the order of the training batches depended on, to be checked if training goes on."""
        self._plan_to_resume = state_dict["plan"]

    def _data(self, split: str) -> LabelledImages | None:
        source = self.sources[split]
        if source is not None and split not in self._read:
            self._read[split] = LabelledImages.read(
                source,
                default_split=_DEFAULT_SPLITS[split],
                config=self.hparams["dataset_config"],
                columns=self.hparams["columns"],
            )
        return self._read.get(split)

    def _name_classes(self, splits: Sequence[str]) -> None:
        """The training data says which classes there are; without it the first data that a stage has."""
        data = next(data for split in ("train", *splits) if (data := self._data(split)) is not None)
        unlabelled = splits == ("predict",) and data.labels is None and self._given_names is None
        if self._class_names is not None or unlabelled:
            return
        names = data.class_names(self._given_names)
        if len(set(names)) != len(names) or len(names) < _FEWEST_CLASSES:
            raise ConfigurationError(
                f"The classes of {data.source!r} are {names}, and there must be at least two of different names; "
                "correct class_names or the data."
            )
        self._class_names = names

    def _dataset(self, split: str) -> ClassifiedImages:
        data = self._data(split)
        assert data is not None
        names = self._class_names
        classes = None if split == "predict" or names is None else data.class_indices(self._given_names, names)
        indices: Sequence[int] = range(len(data))
        shots = self.hparams["shots"]
        if split == "train" and shots is not None and classes is not None and names is not None:
            indices = few_of_each_class(classes, names, shots, self.seed, data.source)
            classes = [classes[index] for index in indices]
        data.require_files(indices)
        augmentation = None
        if split == "train" and self.hparams["augmentation"]:
            augmentation = CropAndFlip(input_side(self.image_processor), self.seed)
        return ClassifiedImages(data, indices, classes, self.image_processor, augmentation)

    def _dataset_of(self, split: str) -> ClassifiedImages:
        if split not in self._datasets:
            raise ConfigurationError(f"The data for {split!r} is not set up; give data.{split} and call setup() first.")
        return self._datasets[split]

    def _evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        batch_size = self.validation_batch_size or self.batch_size
        return DataLoader(**self._loader_options(self._dataset_of(split), batch_size))

    def _loader_options(self, dataset: ClassifiedImages, batch_size: int) -> dict[str, Any]:
        return {
            "dataset": dataset,
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # Otherwise each epoch would advance the global random state, which dropout depends on.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _processed_batches(self) -> int:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed
