"""Image processors that need no torchvision: transformers' plain ones in 5.0, and later those that end in ``Pil``."""

from __future__ import annotations

from typing import Any

import transformers


def _pillow(name: str) -> Any:
    return getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")


CLIPImageProcessorPil = _pillow("CLIP")
Gemma3ImageProcessorPil = _pillow("Gemma3")
Idefics3ImageProcessorPil = _pillow("Idefics3")
Qwen2VLImageProcessorPil = _pillow("Qwen2VL")
SiglipImageProcessorPil = _pillow("Siglip")
Siglip2ImageProcessorPil = _pillow("Siglip2")
