"""The augmentation of few-shot protocols for images: a random crop, mirrored or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

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
