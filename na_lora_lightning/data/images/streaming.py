"""Training data with images that are read, tokenised and decoded as they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from typing_extensions import override

from na_lora_lightning.data.image_reading import ImageReader
from na_lora_lightning.data.images.encoding import NUMBER_OF_IMAGES
from na_lora_lightning.data.record_images import IMAGE_COLUMNS, images_of, name_of_record, read_images
from na_lora_lightning.data.text.mixture import Source
from na_lora_lightning.data.text.streaming import Item, RecordStream
from na_lora_lightning.errors import DataError, ImageError


class VisionStream(RecordStream):
    """The batches of an epoch of records with images.

    Args:
        *arguments: As of :class:`~na_lora_lightning.data.text.streaming.RecordStream`.
        reader_of: What reads the images of a source, by its name.
        **keywords: As of the same.

    Raises:
        DataError: A source cannot be read, or its first record has no column of images.
    """

    def __init__(self, *arguments: Any, reader_of: Callable[[str], ImageReader], **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._image_readers = [reader_of(source.path) for source in self.sources]

    @override
    def _first_of(self, record: dict[str, Any], source: Source) -> dict[str, Any]:
        if not record.keys() & {*IMAGE_COLUMNS}:
            raise DataError(
                f"the first record of {source.path!r} has no 'image' or 'images' (it has {', '.join(map(repr, record))}"
                "); name one so with the option columns, or write null there if that record has none."
            )
        return _without_images(record)

    @override
    def _encoded(self, item: Item) -> dict[str, Any]:
        """An encoded record with ``name`` and ``pictures``, or with the ``error`` that its images raise."""
        record, source = item["record"], self.sources[item["source"]]
        values = images_of(record)
        row = super()._encoded({**item, "record": _without_images(record) | {NUMBER_OF_IMAGES: len(values)}})
        row["name"] = name_of_record(item["number"], source.path)
        try:
            row["pictures"] = read_images(values[: row["images"]], self._image_readers[item["source"]], row["name"])
        except ImageError as error:
            # As of VisionRecords: the collator says what becomes of it.
            row["error"] = error
        return row


def _without_images(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in IMAGE_COLUMNS}
