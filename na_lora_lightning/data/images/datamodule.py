"""The data module for supervised fine-tuning on instructions with images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from na_lora_lightning.data.image_reading import ImageReader
from na_lora_lightning.data.images.batching import (
    SKIP_REMEDY,
    VisionCollator,
    VisionDataLoader,
    VisionRecords,
    VisionStreamLoader,
    example_of_collator,
    noise_image,
)
from na_lora_lightning.data.images.encoding import NUMBER_OF_IMAGES, VisionRecordEncoder, require_options_of
from na_lora_lightning.data.images.streaming import VisionStream
from na_lora_lightning.data.options import TextOptions, require_at_least
from na_lora_lightning.data.processors import load_processor
from na_lora_lightning.data.record_images import RecordImages, folder_of
from na_lora_lightning.data.text.formats import COLUMNS
from na_lora_lightning.data.text.mixture import Source, StoppingStrategy
from na_lora_lightning.data.text.sourced import SourcedDataModule
from na_lora_lightning.data.text.splits import LeftOutRecordsWarning, encode_split
from na_lora_lightning.data.text.tokenizer import add_tokens, choose_chat_template, require_new_tokens
from na_lora_lightning.errors import ImageError

_WARNINGS_IN_FULL = 5


class VisionInstructionDataModule(SourcedDataModule):
    """Prompts with images and completions, or conversations, for fine-tuning of a vision-language model.

    A record has ``image``, one image, or ``images``, a list; and the columns of a format of
    :class:`~na_lora_lightning.data.text.datamodule.InstructionDataModule` but ``text``. A ``content`` is a string or a
    list of parts: ``{"type": "text", "text": "..."}``, and ``{"type": "image"}`` for the next of the record's images.
    Without such parts the images come first in the first turn of the user. A record whose ``image`` or ``images`` is
    null or an empty list has text alone.

    An image is the path of a file, relative to the folder of the data; or what an image column of ``datasets`` has;
    or a dictionary with ``bytes`` or ``path``. Each of ``train``, ``validation``, ``test`` and ``predict`` is a source
    as for :class:`~na_lora_lightning.data.text.datamodule.InstructionDataModule`, or a folder of images with their
    texts in ``metadata.jsonl``, as ``datasets`` loads it.

    Files are looked for in ``setup``, and decoded in the processes that load batches: upright, in RGB, and with what is
    transparent in white. Batches have what the model's processor gives for texts and images (``input_ids``,
    ``attention_mask``, ``pixel_values``, ...), padded on the right, and ``labels``, which are -100 but on completions:
    image tokens are never targets. Batches for validation, test and prediction also have what generation needs: the
    same for the prompts alone, under names that begin with ``prompt_`` and padded on the left, and the lists of strings
    ``prompts`` and ``references``.

    The batches of an epoch depend on nothing but the data, these arguments and the epoch, and a resumed run goes on
    with the next one; see :class:`~na_lora_lightning.data.text.datamodule.InstructionDataModule`. The length by which
    records are grouped counts an image as one token.

    Args:
        processor_name_or_path: The folder or hub name of the model, whose processor is used.
        train: The training data: a source, or a list of sources, with weights or not; see
            :class:`~na_lora_lightning.data.text.datamodule.InstructionDataModule`.
        validation: The validation data, a source or a list of sources without weights, as are the next two.
        test: The test data.
        predict: The data to predict completions for.
        validation_fraction: The share of the records of each source of the training data that is kept for validation in
            place of other data, drawn at random by the seed.
        stopping_strategy: Whether an epoch of sources with weights ends where the first has no more records, or where
            all have been through, the others repeating theirs.
        streaming: Whether training data are read as they are needed; see
            :class:`~na_lora_lightning.data.text.datamodule.InstructionDataModule`. Images are decoded for the batches
            that they are in, and not looked for beforehand. Needs ``group_by_length: false`` and ``num_workers`` of at
            most 1.
        shuffle_buffer: The number of records that the next record of streamed data is drawn from; images that are in
            the data, and not in files of their own, are held with them.
        dataset_config: The configuration of hub data sets that have several.
        format: What records are; None stands for what their columns tell, which a line says.
        columns: The names that the data has for ``image``, ``images`` and the columns of its format, for example
            ``{"prompt": "question", "completion": "answer"}``.
        batch_size: The number of records in a training batch of each process.
        validation_batch_size: The number of records in other batches; None stands for ``batch_size``.
        max_length: The largest number of tokens of a record, those of its images included. A longer one is an error:
            to cut it could cut an image.
        chat_template: Another chat template than the processor's; see
            :class:`~na_lora_lightning.data.text.datamodule.InstructionDataModule`.
        use_chat_template: Whether to render records with the processor's chat template. None stands for whenever it
            has one. Without it, the text is one image token for each image, the prompt, and the completion, with
            nothing between them.
        system_prompt: A system message for records that have none; needs a chat template.
        max_image_pixels: The largest number of pixels of an image, which is read before anything is decoded.
        max_image_bytes: The largest size of an image file in bytes.
        resize_longest_side: Shrinks larger images to this number of pixels on their longer side, before the processor
            sees them.
        image_options: Options of the model's image processor, such as ``{"do_image_splitting": false}``.
        skip_broken_images: Whether records whose images are missing, broken or too large are left out, with a warning.
            A batch is then smaller by so many records, and no other record takes their place. Otherwise the first one
            is an error.
        shuffle: Whether to shuffle the training data in each epoch.
        group_by_length: Whether to form training batches of records of similar length, which saves padding.
        pad_to_multiple_of: Pads batches to a length that is a multiple of this number.
        num_workers: The number of processes that decode images and load batches; 0 does it in the training process.
        seed: The seed of the order of the training data.
        processor_revision: The branch, tag or commit of a processor from the hub.
        trust_remote_code: Whether a processor from the hub may run code of its own.
        new_tokens: Texts that are one token each, as the model has them.

    Raises:
        ConfigurationError: An argument has a value that cannot work.
    """

    COLUMNS = ("image", "images", *(name for name in COLUMNS if name != "text"))
    _train_loader = VisionDataLoader
    _evaluation_loader = VisionDataLoader
    _stream_loader = VisionStreamLoader

    def __init__(
        self,
        processor_name_or_path: str,
        train: list[str | dict[str, Any]] | str | None = None,
        validation: list[str | dict[str, Any]] | str | None = None,
        test: list[str | dict[str, Any]] | str | None = None,
        predict: list[str | dict[str, Any]] | str | None = None,
        validation_fraction: float | None = None,
        stopping_strategy: StoppingStrategy = "first_exhausted",
        streaming: bool = False,
        shuffle_buffer: int = 1_000,
        dataset_config: str | None = None,
        format: Literal["messages", "prompt_completion", "alpaca", "sharegpt"] | None = None,
        columns: dict[str, str] | None = None,
        batch_size: int = 4,
        validation_batch_size: int | None = None,
        max_length: int = 2048,
        chat_template: str | None = None,
        use_chat_template: bool | None = None,
        system_prompt: str | None = None,
        max_image_pixels: int = 50_000_000,
        max_image_bytes: int = 100_000_000,
        resize_longest_side: int | None = None,
        image_options: dict[str, Any] | None = None,
        skip_broken_images: bool = False,
        shuffle: bool = True,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 1,
        num_workers: int = 2,
        seed: int = 0,
        processor_revision: str | None = None,
        trust_remote_code: bool = False,
        new_tokens: list[str] | None = None,
    ) -> None:
        super().__init__(
            TextOptions.among(locals()),
            validation_fraction=validation_fraction,
            stopping_strategy=stopping_strategy,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
        )
        require_at_least(
            1,
            max_image_pixels=max_image_pixels,
            max_image_bytes=max_image_bytes,
            resize_longest_side=resize_longest_side,
        )
        self.save_hyperparameters(logger=False)
        self.processor_name_or_path = processor_name_or_path
        self.max_image_pixels = max_image_pixels
        self.max_image_bytes = max_image_bytes
        self.resize_longest_side = resize_longest_side
        self.image_options = dict(image_options or {})
        self.skip_broken_images = skip_broken_images
        self.processor_revision = processor_revision
        self.trust_remote_code = trust_remote_code
        self.new_tokens = require_new_tokens(new_tokens or ())
        # A sentence about each record that has been left out so far.
        self.left_out: set[str] = set()
        self._processor: Any = None
        self._training_template: str | None = None
        self._encoder: VisionRecordEncoder | None = None
        # Of each source of a split.
        self._images: dict[str, list[RecordImages]] = {}

    @property
    def processor(self) -> Any:
        """The processor, loaded on first use."""
        if self._processor is None:
            self._processor = load_processor(
                self.processor_name_or_path,
                revision=self.processor_revision,
                trust_remote_code=self.trust_remote_code,
            )
            require_options_of(self._processor, self.image_options)
            add_tokens(self._processor.tokenizer, self.new_tokens)
            if self.options.chat_template is not None:
                self._training_template = choose_chat_template(self._processor, self.options.chat_template)
                self._processor.tokenizer.chat_template = self._processor.chat_template
        return self._processor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        return tokenizer

    def teardown(self, stage: str | None = None) -> None:
        """Reports how many records were left out.

        Args:
            stage: The stage that ends.
        """
        super().teardown(stage)
        if self.left_out:
            count = len(self.left_out)
            rank_zero_info(f"{count} {'record was' if count == 1 else 'records were'} left out because of images.")

    def example_batch(self) -> dict[str, Any]:
        """Returns the model's inputs for the shortest training record with images, with noise for its images.

        Nothing is read: this is for those who need to see what passes through a model, and not what data says. Of data
        that are streamed it is one short question.

        Raises:
            ConfigurationError: The training data is not set up.
        """
        if self._stream is not None:
            return example_of_collator(self._collator("train"))
        encoded = self._prepared_split("train")
        rows = enumerate(zip(encoded["images"], encoded["tokens"], strict=True))
        index = min(rows, key=lambda row: (row[1][0] == 0, row[1][1]))[0]
        row = encoded[index]
        return self._collator("train").inputs_of([{**row, "pictures": [noise_image()] * row["images"]}])

    @override
    def _prepare(self, split: str, source: Any) -> Dataset:
        self._images[split] = []
        return super()._prepare(split, source)

    @override
    def _encoded(self, split: str, source: Source, records: Dataset, numbers: Sequence[int] | None) -> Dataset:
        images = RecordImages(records, source.path, self._reader_of(source.path), numbers)
        self._images[split].append(images)
        counts, missing = images.survey()
        if missing and not self.skip_broken_images:
            raise ImageError(next(iter(missing.values())) + SKIP_REMEDY)
        encoded = encode_split(
            records.add_column(NUMBER_OF_IMAGES, counts).remove_columns(images.columns),
            self._record_encoder(),
            source=source.path,
            split=split,
            form=source.format,
            numbers=numbers,
        )
        if not missing:
            return encoded
        if len(missing) == len(encoded):
            raise ImageError(f"{next(iter(missing.values()))}, as no record of the data has its images.")
        self.left_out.update(missing.values())
        rank_zero_warn(
            f"{len(missing)} of {len(encoded)} records of {source.path!r} are left out because their images are "
            f"missing: {next(iter(missing.values()))}.",
            category=LeftOutRecordsWarning,
        )
        return encoded.select([place for place, index in enumerate(encoded["index"]) if index not in missing])

    def _reader_of(self, path: str) -> ImageReader:
        """What reads the images of a source."""
        return ImageReader(folder_of(path), self.max_image_pixels, self.max_image_bytes, self.resize_longest_side)

    @override
    def _make_stream(self, **options: Any) -> VisionStream:
        encoder, collate = self._record_encoder(), self._collator("train")
        return VisionStream(self._sources["train"], encoder, collate, reader_of=self._reader_of, **options)

    def _record_encoder(self) -> VisionRecordEncoder:
        if self._encoder is None:
            self._encoder = VisionRecordEncoder(
                self.processor,
                max_length=self.options.max_length,
                use_chat_template=self.options.use_chat_template,
                system_prompt=self.options.system_prompt,
                training_template=self._training_template,
            )
        return self._encoder

    def _dataset(self, split: str) -> VisionRecords:
        return VisionRecords(self._prepared_split(split), self._images[split])

    def _collator(self, split: str) -> VisionCollator:
        return VisionCollator(
            self._record_encoder(),
            evaluation=split != "train",
            pad_to_multiple_of=self.options.pad_to_multiple_of,
            image_options=self.image_options,
            skip_broken_images=self.skip_broken_images,
        )

    @override
    def _worker_options(self) -> dict[str, Any]:
        return {**super()._worker_options(), "report": self._report_left_out}

    def _report_left_out(self, reasons: list[str]) -> None:
        for reason in reasons:
            if reason not in self.left_out and len(self.left_out) < _WARNINGS_IN_FULL:
                rank_zero_warn(f"{reason}; until then it is left out.", category=LeftOutRecordsWarning)
            self.left_out.add(reason)
