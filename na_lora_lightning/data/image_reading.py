"""Reading single images: from files, bytes or memory, within limits, upright and in RGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from na_lora_lightning.errors import ImageError


@dataclass(frozen=True)
class ImageReader:
    """Reads images that come from anywhere, and refuses those that could exhaust the memory.

    Images are turned upright by their EXIF orientation and converted to RGB; what is transparent becomes white, and
    16-bit grey values keep their upper eight bits. Of an animation the first frame is taken.

    Attributes:
        folder: Where relative paths begin.
        max_pixels: The largest number of pixels, which the header of a file tells before anything is decoded.
        max_bytes: The largest size of a file or of an image in bytes.
        longest_side: Larger images are shrunk to this number of pixels on their longer side, in proportion.
    """

    folder: Path
    max_pixels: int = 50_000_000
    max_bytes: int = 100_000_000
    longest_side: int | None = None

    def read(self, value: Any, number: int = 1) -> Image.Image:
        """Decodes an image.

        Args:
            value: A path, bytes, a dictionary with ``bytes`` or ``path``, or an image of Pillow.
            number: Which image of its record it is; names an image without a path.

        Returns:
            The image, of mode RGB.

        Raises:
            ImageError: There is no such image, or it is broken or too large. The message lacks its subject,
                which the caller knows.
        """
        path = value.get("path") if isinstance(value, dict) else value
        name = repr(path) if isinstance(path, str) and path else f"number {number}"
        content = content_of(value)
        if isinstance(content, Image.Image):
            return self._decode(content, name)
        if isinstance(content, bytes):
            size, stream = len(content), io.BytesIO(content)
        else:
            reason = self.reason_to_miss(content)
            if reason is not None:
                raise ImageError(reason)
            try:
                file = self.folder / content
                size = file.stat().st_size
                stream = io.BytesIO(file.read_bytes() if size <= self.max_bytes else b"")
            except OSError as error:
                raise ImageError(
                    f"has the image {name}, which cannot be read ({error.strerror}); replace it"
                ) from error
        if size > self.max_bytes:
            raise ImageError(
                f"has the image {name} of {size:,} bytes, more than max_image_bytes={self.max_bytes}; shrink it or "
                "raise max_image_bytes"
            )
        return self._decode(stream, name)

    def reason_to_miss(self, path: str) -> str | None:
        """Says why there is no file at a path, without opening it; None if there is one."""
        if path.startswith(("http://", "https://")):
            return f"has the image {path!r}, which is on the web; download it and give its path"
        if not path or not (self.folder / path).is_file():
            return f"has the image {path!r}, which does not exist in {str(self.folder)!r}; correct its path"
        return None

    def _decode(self, content: io.BytesIO | Image.Image, name: str) -> Image.Image:
        try:
            with _pillow_limited_to(self.max_pixels):
                if isinstance(content, Image.Image):
                    return self._within_limits(content, name)
                with Image.open(content) as image:
                    return self._within_limits(image, name)
        except ImageError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(
                f"has the image {name}, which has more pixels than max_image_pixels={self.max_pixels}; shrink it or "
                "raise max_image_pixels"
            ) from error
        # Decoders meet arbitrary bytes, and no list of what they raise is complete.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "it is of no kind that Pillow knows"
            raise ImageError(f"has the image {name}, which cannot be decoded ({reason}); replace it") from error

    def _within_limits(self, image: Image.Image, name: str) -> Image.Image:
        width, height = image.size
        if width * height > self.max_pixels:
            raise ImageError(
                f"has the image {name} of {width}×{height} pixels, more than max_image_pixels={self.max_pixels}; "
                "shrink it or raise max_image_pixels"
            )
        if self.longest_side is not None and max(image.size) > self.longest_side:
            # A file is decoded at a smaller scale where its format allows that; an image in memory stays as it is.
            image = image if getattr(image, "fp", None) is not None else image.copy()
            image.thumbnail((self.longest_side, self.longest_side))
        return _as_rgb(ImageOps.exif_transpose(image))


def content_of(value: Any) -> str | bytes | Image.Image:
    """What an entry of an image column holds: a path, the bytes of a file, or an image.

    Raises:
        ImageError: It holds none of them.
    """
    content = value
    if isinstance(value, dict):
        content = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(content, (str, bytes, Image.Image)):
        return content
    kind = "null" if content is None else f"of type {type(content).__name__}"
    raise ImageError(f"has an image that is {kind}; give its path, or a dictionary with 'bytes' or 'path'")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _pillow_limited_to(pixels: int) -> Iterator[None]:
    """Has Pillow's own checks, which look inside formats that nest images, apply the same limit."""
    former = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        with warnings.catch_warnings():
            # Oddities of metadata are not the user's concern; images that are really broken raise errors.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = former
