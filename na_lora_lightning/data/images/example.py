"""One small input with an image, made from a processor alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from na_lora_lightning.data.images.batching import VisionCollator
from na_lora_lightning.data.images.encoding import NUMBER_OF_IMAGES, VisionRecordEncoder

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
    record = {"prompt": "What is this?", "completion": "Noise.", NUMBER_OF_IMAGES: 1}
    row = encoder(record, 0, source="the example", evaluation=False, needs_completion=True)
    return VisionCollator(encoder, evaluation=False).inputs_of([{**row, "pictures": [noise_image()]}])
