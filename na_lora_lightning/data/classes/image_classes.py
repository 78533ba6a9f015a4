"""Images with a class each: reading them, what their classes are called, and a few of each class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from PIL import Image

from na_lora_lightning.data.files.sources import load_records, local_path
from na_lora_lightning.data.image_reading import ImageReader
from na_lora_lightning.data.record_images import RecordImages, folder_of
from na_lora_lightning.errors import DataError, ImageError

IMAGE, LABEL = "image", "label"
_NAMES_IN_ERROR = 5

ClassNames = Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class LabelledImages:
    """The images of a split, not yet read, and their labels as the data has them.

    Attributes:
        source: The name of the data, for messages.
        images: The images.
        labels: A text or a number for each image; None where the data has no labels.
        known_labels: All labels that the data says there are, in its order; None where it does not say.
    """

    source: str
    images: RecordImages
    labels: list[Any] | None
    known_labels: list[str] | None = None

    @classmethod
    def read(
        cls, source: str, *, default_split: str, config: str | None = None, columns: Mapping[str, str] | None = None
    ) -> LabelledImages:
        """Reads a split, without opening its images.

        Args:
            source: A folder with a folder of images for each class, or whatever
                :func:`~na_lora_lightning.data.files.sources.load_records` takes, with a column of images and one of
                labels.
            default_split: The split of a data set when ``source`` names none.
            config: The configuration of a hub data set that has several.
            columns: The names that the data has for ``image`` and ``label``.

        Raises:
            DataError: There is no such data, or it has no images.
        """
        by_folder = _folder_per_class(local_path(source))
        if by_folder is not None:
            pairs = [(str(file), label) for label, files in by_folder.items() for file in files]
            records = Dataset.from_dict({IMAGE: [file for file, _ in pairs], LABEL: [label for _, label in pairs]})
            images = RecordImages(records, source, ImageReader(Path()))
            return cls(source, images, list(records[LABEL]), list(by_folder))
        records = load_records(source, default_split=default_split, config=config, columns=dict(columns or {}))
        images = RecordImages(records, source, ImageReader(folder_of(source)))
        if LABEL not in records.column_names:
            return cls(source, images, None)
        feature, labels = records.features[LABEL], list(records[LABEL])
        if not isinstance(feature, ClassLabel):
            return cls(source, images, labels)
        # The data says that a label is missing by -1.
        named = [feature.names[label] if label is not None and label >= 0 else None for label in labels]
        return cls(source, images, named, list(feature.names))

    def __len__(self) -> int:
        return len(self.images.survey()[0]) if self.labels is None else len(self.labels)

    def class_names(self, given: ClassNames | None) -> list[str]:
        """What the classes are called in prompts, in the order of their numbers.

        Args:
            given: The names, for labels that are texts which of these there are, for labels that are numbers in
                their order; or the name for each label. None takes the labels themselves.

        Raises:
            DataError: The labels are numbers without names, or missing.
        """
        if given is not None:
            return list(given.values()) if isinstance(given, Mapping) else list(given)
        if self.known_labels is not None:
            return list(self.known_labels)
        labels = [label for label in self.labels or () if label is not None]
        if not labels:
            raise DataError(
                f"the data {self.source!r} has no labels, from which the classes could be told; give class_names, or "
                "name its column of labels with the option columns."
            )
        if not all(isinstance(label, str) for label in labels):
            raise DataError(
                f"the labels of {self.source!r} are numbers, of which a prompt cannot be made; give class_names in the "
                "order of these numbers."
            )
        return sorted(set(labels))

    def class_indices(self, given: ClassNames | None, names: Sequence[str]) -> list[int]:
        """The class of each image.

        Args:
            given: As for :meth:`class_names`.
            names: All classes.

        Returns:
            Indices into ``names``.

        Raises:
            DataError: An image has a label that is none of them, or none at all.
        """
        keys = list(given) if isinstance(given, Mapping) else list(names)
        index_of: dict[Any, int] = {key: index for index, key in enumerate(keys)}
        if isinstance(given, Mapping):
            index_of |= {int(key): index for key, index in index_of.items() if key.isdecimal()}
        else:
            index_of |= {index: index for index in range(len(keys))}
        labels = self.labels if self.labels is not None else [None]
        for number, label in enumerate(labels):
            if isinstance(label, (str, int)) and label in index_of:
                continue
            if label is None:
                raise DataError(
                    f"{self.images.name_of(number)} has no label; give it one, or name the column of labels with the "
                    "option columns."
                )
            raise DataError(
                f"{self.images.name_of(number)} has the label {label!r}, which is none of the {len(keys)} classes "
                f"({_some(keys)}); correct it, or add it to class_names."
            )
        return [index_of[label] for label in labels]

    def require_files(self, indices: Sequence[int]) -> None:
        """Checks that the images at ``indices`` are there, without opening any.

        Raises:
            ImageError: One is missing; the message names the first.
        """
        counts, missing = self.images.survey()
        for index in indices:
            if index in missing:
                raise ImageError(f"{missing[index]}, or remove the record.")
            if counts[index] != 1:
                raise ImageError(
                    f"{self.images.name_of(index)} has {counts[index]} images, and a class is told from one; give it "
                    "exactly one."
                )

    def read_image(self, index: int) -> Image.Image:
        """Decodes the image of a record, in RGB.

        Raises:
            ImageError: It is broken or too large; the message names the record.
        """
        try:
            return self.images.read(index, 1)[0]
        except ImageError as error:
            raise ImageError(f"{error}, or remove the record.") from error.__cause__


def few_of_each_class(classes: Sequence[int], names: Sequence[str], shots: int, seed: int, source: str) -> list[int]:
    """Draws as many images of each class, without repetition.

    What is drawn of a class depends on the seed, the class's number and its own images alone.

    Args:
        classes: The class of each image.
        names: All classes.
        shots: Images of each class.
        seed: The seed.
        source: The name of the data, for messages.

    Returns:
        Indices into ``classes``, ascending.

    Raises:
        DataError: A class has too few images.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, own in enumerate(classes):
        members[own].append(index)
    drawn: list[int] = []
    for number, name in enumerate(names):
        images = members[number]
        if len(images) < shots:
            raise DataError(
                f"the class {name!r} has {len(images)} images in {source!r} and shots={shots} are wanted of each; "
                "lower shots, add images, or leave the class out."
            )
        generator = torch.Generator()
        generator.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
        order = torch.randperm(len(images), generator=generator)[:shots]
        drawn += [images[place] for place in order.tolist()]
    return sorted(drawn)


def _folder_per_class(folder: Path) -> dict[str, list[Path]] | None:
    """The image files of each folder inside a folder, by its name; None where there are none."""
    if not folder.is_dir():
        return None
    # Pillow fills its table of file endings on demand.
    endings = set(Image.registered_extensions())
    by_class = {
        inner.name: sorted(file for file in inner.iterdir() if file.suffix.lower() in endings)
        for inner in sorted(folder.iterdir())
        if inner.is_dir() and not inner.name.startswith(".")
    }
    return by_class if any(by_class.values()) else None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_IN_ERROR} more" if len(names) > _NAMES_IN_ERROR else ""
    return ", ".join(map(repr, names[:_NAMES_IN_ERROR])) + more
