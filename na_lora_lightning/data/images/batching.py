"""Batches with images: decoding in the loading processes, the processor's own batching, labels, and one example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from na_lora_lightning.data.batching import ResumableDataLoader
from na_lora_lightning.data.images.encoding import NUMBER_OF_IMAGES, VisionRecordEncoder
from na_lora_lightning.data.record_images import RecordImages
from na_lora_lightning.data.text.mixture import PART
from na_lora_lightning.data.text.streaming import StreamLoader
from na_lora_lightning.errors import DataError, ImageError
from na_lora_lightning.labels import IGNORED_LABEL

Row = dict[str, Any]

SKIP_REMEDY = ", or set skip_broken_images to true to leave such records out."


class VisionRecords(TorchDataset[Row]):
    """Encoded records with their images, which are decoded when a record is asked for.

    Args:
        encoded: The encoded records.
        images: The images of each source, by the ``index`` of the records.
    """

    def __init__(self, encoded: Dataset, images: Sequence[RecordImages]) -> None:
        self.encoded = encoded
        self.images = images

    def __len__(self) -> int:
        """The number of records."""
        return len(self.encoded)

    def __getitem__(self, position: int) -> Row:
        """Returns an encoded record with ``name`` and ``pictures``, or with the ``error`` that its images raise."""
        row = dict(self.encoded[position])
        images = self.images[row.pop(PART, 0)]
        row["name"] = images.name_of(row["index"])
        try:
            row["pictures"] = images.read(row["index"], row["images"])
        except ImageError as error:
            # An exception that leaves a loading process arrives as a traceback; see VisionDataLoader.
            row["error"] = error
        return row


class LoadedBatch(NamedTuple):
    """What a loading process makes of the records of a batch.

    Attributes:
        batch: The batch.
        left_out: A sentence about each record that was left out of it, without its end.
        error: What is wrong with a record, if it is not to be left out.
    """

    batch: dict[str, Any]
    left_out: list[str]
    error: DataError | None


class VisionCollator:
    """Has the processor make a batch of records, and adds the labels.

    Every batch has what the processor gives, padded on the right, and ``labels``. For evaluation it also has
    ``prompts``, ``references``, and each tensor again under a name that begins with ``prompt_``: of tensors with a
    number for each token the part of the prompts, padded on the left, and the images as they are.

    Records that cannot be used because of their images are left out of the batch if that is wanted. If none remains,
    the batch has one token, which is not a target.

    Args:
        encoder: What encoded the records; has the processor.
        evaluation: Whether to add what generation needs.
        pad_to_multiple_of: Rounds the padded length up to a multiple of this number.
        image_options: Options of the image processor.
        skip_broken_images: Whether to leave out records whose images cannot be used.
    """

    def __init__(
        self,
        encoder: VisionRecordEncoder,
        *,
        evaluation: bool,
        pad_to_multiple_of: int = 1,
        image_options: dict[str, Any] | None = None,
        skip_broken_images: bool = False,
    ) -> None:
        self.encoder = encoder
        self.evaluation = evaluation
        self.pad_to_multiple_of = pad_to_multiple_of
        self.image_options = dict(image_options or {})
        self.skip_broken_images = skip_broken_images

    def __call__(self, rows: Sequence[Row]) -> LoadedBatch:
        """Builds the batch of ``rows``."""
        try:
            usable, errors = _separate(rows)
            try:
                inputs = self.inputs_of(usable) if usable else {}
            # Processors raise whatever they like about images that they cannot take.
            except Exception as error:
                usable, refused = self._separate_refused(usable, error)
                errors += refused
                inputs = self.inputs_of(usable) if usable else {}
            if errors and not self.skip_broken_images:
                raise ImageError(f"{errors[0]}{SKIP_REMEDY}") from errors[0].__cause__
            batch = self._finish(usable, inputs) if usable else self._empty()
        except DataError as error:
            return LoadedBatch({}, [], error)
        return LoadedBatch(batch, [str(error) for error in errors], None)

    def inputs_of(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Returns what the processor makes of the texts and images of ``rows``, padded on the right."""
        return self._call([row["text"] for row in rows], [row["pictures"] for row in rows])

    def _separate_refused(self, rows: list[Row], error: Exception) -> tuple[list[Row], list[ImageError]]:
        """Finds those of the records that the processor refuses."""
        kind = type(self.encoder.processor).__name__
        usable, refused = [], []
        for row in rows:
            try:
                self.inputs_of([row])
                usable.append(row)
            except Exception as reason:
                refusal = ImageError(f"{row['name']} is refused by {kind} ({_first_line(reason)}); replace its images")
                refusal.__cause__ = reason
                refused.append(refusal)
        if not refused:
            raise DataError(
                f"{rows[0]['name']} and those beside it cannot be put in one batch by {kind} ({_first_line(error)}); "
                "set batch_size to 1, or give images of one size."
            ) from error
        return usable, refused

    def _call(self, texts: list[str], images: list[list[Any]]) -> dict[str, Tensor]:
        options: dict[str, Any] = {"padding": True, "padding_side": "right"}
        options["add_special_tokens"] = self.encoder.add_special_tokens
        if self.pad_to_multiple_of > 1:
            options["pad_to_multiple_of"] = self.pad_to_multiple_of
        made = self.encoder.processor(
            text=texts,
            images=images if any(images) else None,
            text_kwargs=options,
            images_kwargs=self.image_options,
            return_tensors="pt",
        )
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _finish(self, rows: list[Row], inputs: dict[str, Tensor]) -> dict[str, Any]:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        labels = torch.full_like(inputs["input_ids"], IGNORED_LABEL)
        prompt_lengths = []
        for position, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if length > self.encoder.max_length:
                raise DataError(
                    f"{row['name']} has {length} tokens with its images, more than max_length="
                    f"{self.encoder.max_length}; raise max_length, or shrink its images with resize_longest_side or "
                    "image_options."
                )
            ids = inputs["input_ids"][position]
            answers = self._answers_of(row, ids[:length].tolist())
            for start, end in answers:
                labels[position, start:end] = ids[start:end]
            prompt_lengths.append(answers[-1][0] if answers else length)
        batch: dict[str, Any] = {**inputs, "labels": labels}
        return {**batch, **self._prompts(rows, inputs, prompt_lengths)} if self.evaluation else batch

    def _answers_of(self, row: Row, ids: list[int]) -> list[tuple[int, int]]:
        def encode(text: str, images: int) -> list[int]:
            alone = self._call([text], [row["pictures"][:images]])
            return alone["input_ids"][0][alone["attention_mask"][0] == 1].tolist()

        try:
            return self.encoder.locate_answers(row, ids, encode)
        except DataError as error:
            raise DataError(f"{row['name']} {error}") from error.__cause__

    def _prompts(self, rows: list[Row], inputs: dict[str, Tensor], lengths: list[int]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name, values in inputs.items():
            if values.shape != inputs["input_ids"].shape or values.is_floating_point():
                # Images are the same for a prompt and for what follows it.
                batch[f"prompt_{name}"] = values
                continue
            padding = self.encoder.tokenizer.pad_token_id if name == "input_ids" else 0
            parts = [value[:length] for value, length in zip(values, lengths, strict=True)]
            batch[f"prompt_{name}"] = pad_sequence(parts, batch_first=True, padding_value=padding, padding_side="left")
        batch["prompts"] = [row["prompt"] for row in rows]
        batch["references"] = [row["reference"] for row in rows]
        return batch

    def _empty(self) -> dict[str, Any]:
        inputs = self._call([str(self.encoder.tokenizer.eos_token)], [[]])
        batch: dict[str, Any] = {**inputs, "labels": torch.full_like(inputs["input_ids"], IGNORED_LABEL)}
        if self.evaluation:
            batch.update({f"prompt_{name}": value[:0] for name, value in inputs.items()}, prompts=[], references=[])
        return batch


class _OpensBatches(DataLoader[Any]):
    """A loader of batches with images, before the one that makes them.

    Loading processes hand over what is wrong with a record as a value, and it is raised here: so the message is one
    sentence and not the traceback of another process.

    Args:
        *arguments: The arguments of the loader.
        report: Is told of the records that were left out of a batch.
        **keywords: The keyword arguments of the loader.
    """

    def __init__(self, *arguments: Any, report: Callable[[list[str]], None] | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._report = report

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Iterates over as many batches as an epoch has.

        Raises:
            DataError: A record cannot be used.
        """
        batches: Any = super().__iter__()
        for loaded in batches:
            if loaded.error is not None:
                # Ends the loading processes; whoever holds the traceback would keep them.
                batches.close()
                self._iterator = None
                raise loaded.error
            if loaded.left_out and self._report is not None:
                self._report(loaded.left_out)
            yield loaded.batch


class VisionDataLoader(_OpensBatches, ResumableDataLoader):
    """A resumable loader of batches with images."""


class VisionStreamLoader(_OpensBatches, StreamLoader):
    """The same of data that are read as they are needed."""


def _separate(rows: Sequence[Row]) -> tuple[list[Row], list[ImageError]]:
    usable = [row for row in rows if "error" not in row]
    return usable, [row["error"] for row in rows if "error" in row]


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".")


_SIDE = 64
_LENGTH = 1_000_000


def noise_image() -> Image.Image:
    """A small picture of noise, the same at each call."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8))


def example_of_processor(processor: Any) -> dict[str, Tensor]:
    """Has a processor make one short question about a picture of noise.

    Args:
        processor: What :func:`~na_lora_lightning.data.processors.load_processor` returned.

    Returns:
        The model's inputs, ``input_ids`` and ``attention_mask`` ``[1, length]`` int64 among them.

    Raises:
        ConfigurationError: The processor lacks what instruction data needs.
    """
    encoder = VisionRecordEncoder(processor, max_length=_LENGTH, use_chat_template=None, system_prompt=None)
    return example_of_collator(VisionCollator(encoder, evaluation=False))


def example_of_collator(collator: VisionCollator) -> dict[str, Tensor]:
    """The same, with the options of a collator."""
    record = {"prompt": "What is this?", "completion": "Noise.", NUMBER_OF_IMAGES: 1}
    row = collator.encoder(record, 0, source="the example", evaluation=False, needs_completion=True)
    return collator.inputs_of([{**row, "pictures": [noise_image()]}])
