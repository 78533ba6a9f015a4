"""The data module for image classification, with few-shot sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from na_lora_lightning.data.base import DEFAULT_SPLITS, ResumableDataModule
from na_lora_lightning.data.batching import EpochSampler
from na_lora_lightning.data.classes.image_classes import IMAGE, LABEL, LabelledImages, few_of_each_class
from na_lora_lightning.data.options import DataOptions, require_at_least
from na_lora_lightning.data.processors import load_processor
from na_lora_lightning.errors import ConfigurationError

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


class LabelledImageDataModule(ResumableDataModule):
    """Images with a class each, for :class:`~na_lora_lightning.modules.dual_encoder.DualEncoderLightningModule`.

    Each of ``train``, ``validation``, ``test`` and ``predict`` is one of

    * a folder with a folder of images for each class, which is called like the class,
    * a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file with the columns ``image`` (a path, from the
      file's folder on) and ``label`` (a text or a number),
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
        super().__init__(DataOptions.among(locals()))
        require_at_least(1, shots=shots)
        self.save_hyperparameters(logger=False)
        self._given_names = class_names
        self._class_names: list[str] | None = None
        self._read: dict[str, LabelledImages] = {}
        self._image_processor: Any = None

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
    def _load(self, split: str, source: str) -> LabelledImages:
        if split not in self._read:
            self._read[split] = LabelledImages.read(
                source, default_split=DEFAULT_SPLITS[split], config=self.options.dataset_config, columns=self.columns
            )
        return self._read[split]

    @override
    def _prepare_splits(self, splits: Sequence[str]) -> None:
        self._name_classes(splits)
        super()._prepare_splits(splits)

    def _name_classes(self, splits: Sequence[str]) -> None:
        """The training data says which classes there are; without it the first data that a stage has."""
        sources = ((split, self.sources[split]) for split in ("train", *splits))
        data = next((self._load(split, source) for split, source in sources if source is not None), None)
        if data is None:
            return
        unlabelled = splits == ("predict",) and data.labels is None and self._given_names is None
        if self._class_names is not None or unlabelled:
            return
        names = data.class_names(self._given_names)
        if len(set(names)) != len(names) or len(names) < _FEWEST_CLASSES:
            raise ConfigurationError(
                f"the classes of {data.source!r} are {names}, and there must be at least two of different names; "
                "correct class_names or the data."
            )
        self._class_names = names

    @override
    def _prepare(self, split: str, source: str) -> ClassifiedImages:
        data = self._load(split, source)
        names = self._class_names
        classes = None if split == "predict" or names is None else data.class_indices(self._given_names, names)
        indices: Sequence[int] = range(len(data))
        shots = self.hparams["shots"]
        if split == "train" and shots is not None and classes is not None and names is not None:
            indices = few_of_each_class(classes, names, shots, self.options.seed, data.source)
            classes = [classes[index] for index in indices]
        data.require_files(indices)
        augmentation = None
        if split == "train" and self.hparams["augmentation"]:
            augmentation = CropAndFlip(input_side(self.image_processor), self.options.seed)
        return ClassifiedImages(data, indices, classes, self.image_processor, augmentation)

    @override
    def _sampler(self, **options: Any) -> EpochSampler:
        return _EpochAndIndexSampler([1] * len(self._dataset("train")), group_by_length=False, **options)


_AREAS = (0.08, 1.0)
_LOG_ASPECT_RATIOS = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


@dataclass(frozen=True)
class CropAndFlip:
    """Crops 8 to 100 % of an image's area, stretches that to a square, and mirrors every second one.

    What is done to an image is a function of the seed, the epoch and the image's number, so it does not depend on
    worker processes or on an interruption.

    Attributes:
        side: Pixels of the square on a side.
        seed: The seed.
    """

    side: int
    seed: int

    def __call__(self, image: Image.Image, epoch: int, index: int) -> Image.Image:
        """Augments an image.

        Args:
            image: The image.
            epoch: The epoch, from 0.
            index: The number of the image.

        Returns:
            A new image of ``side`` by ``side`` pixels.
        """
        random = np.random.default_rng((self.seed, epoch, index))
        box = _random_box(image.size, random)
        cropped = image.resize((self.side, self.side), Image.Resampling.BICUBIC, box=box)
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else cropped


def input_side(image_processor: Any) -> int:
    """Pixels on a side of a square image that an image processor leaves as large as it is.

    Args:
        image_processor: That of a dual encoder.
    """
    for name in ("crop_size", "size"):
        size = dict(getattr(image_processor, name, None) or {})
        side = size.get("height") or size.get("shortest_edge")
        if side is not None:
            return int(side)
    # Of any aspect ratio: as many patches as it takes.
    return int(image_processor.patch_size) * math.isqrt(int(image_processor.max_num_patches))


def _random_box(size: tuple[int, int], random: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of a crop: of random area and aspect ratio, at a random place."""
    width, height = size
    for _ in range(_ATTEMPTS):
        area = width * height * random.uniform(*_AREAS)
        ratio = math.exp(random.uniform(*_LOG_ASPECT_RATIOS))
        own_width, own_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if own_width <= width and own_height <= height:
            left, upper = random.uniform(0, width - own_width), random.uniform(0, height - own_height)
            return left, upper, left + own_width, upper + own_height
    # An image so long that hardly a crop fits: its middle.
    side = min(width, height)
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side
