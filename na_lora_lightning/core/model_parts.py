"""The parts of a multimodal model: its language model, its towers for images or sound, and what joins them."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from torch import nn

Part = Literal["language", "vision", "projector", "other"]

_TOWERS = ("Vision", "Image", "Video", "ViT", "Audio", "Speech", "Protein", "Perceiver", "Resampler", "QFormer")
_NO_IMAGES = ("audio", "speech", "vq", "generation", "protein")
_JOINING_INSIDE = ("merger", "projector", "connector")
_JOINING = ("project", "merger", "connector", "aligner", "resampler", "adapter", "qformer", "perceiver")


def language_model_name(root: nn.Module) -> str | None:
    """Name of the submodule that sees the tokens of the text.

    Args:
        root: A Hugging Face model.

    Returns:
        Its qualified name; None where the model has no parts, or no decoder among them (a dual encoder).
    """
    get_decoder = getattr(root, "get_decoder", None)
    if not is_multimodal(root) or not callable(get_decoder):
        return None
    decoder = get_decoder()
    return next((name for name, module in root.named_modules() if module is decoder and name), None)


def is_multimodal(root: nn.Module) -> bool:
    """Whether a Hugging Face model has parts for images or sound beside that for text."""
    config = getattr(root, "config", None)
    names = ("vision_config", "audio_config", "vq_config", "vision_model_config")
    if any(getattr(config, name, None) is not None for name in names):
        return True
    return any(_sees_no_text(module) for module in root.modules() if module is not root)


def _sees_no_text(module: nn.Module) -> bool:
    """Told by the class's name, which is transformers' convention and the only thing that all towers share."""
    kind = type(module).__name__
    return "Text" not in kind and any(word in kind for word in _TOWERS)


def branch_name(root: nn.Module, language_model: str | None, name: str) -> str | None:
    """The largest part of a multimodal model that holds a module and not the language model.

    Args:
        root: The model.
        language_model: What :func:`language_model_name` returned.
        name: Qualified name of the module.

    Returns:
        Name of the part; None for modules that see the tokens of the text, and in models of one part.
    """
    path = name.split(".")
    text = [] if language_model is None else language_model.split(".")
    for depth in range(1, len(path)):
        part = path[:depth]
        if text[:depth] != part and _sees_no_text(root.get_submodule(".".join(part))):
            return ".".join(part)
    if language_model is None or path[: len(text)] == text or not is_multimodal(root):
        return None
    depth = next(i for i, step in enumerate(path) if i >= len(text) or step != text[i])
    return ".".join(path[: depth + 1])


def half_of(root: nn.Module, name: str) -> tuple[str, Literal["encoder", "decoder"]] | None:
    """The encoder or the decoder that holds a module, where one stands beside the other.

    Args:
        root: The model.
        name: Qualified name of the module.

    Returns:
        Name of the innermost such half, and which of the two it is; None where the module is in neither, or where
        another decoder of a Hugging Face model writes the text (those of images have both halves, too).
    """
    path = name.split(".")
    get_decoder = getattr(root, "get_decoder", None)
    writer = get_decoder() if callable(get_decoder) else None
    for depth in range(len(path) - 1, 0, -1):
        around = root.get_submodule(".".join(path[: depth - 1]))
        beside = [child for child, module in around.named_children() if any(True for _ in module.children())]
        for own, other in (("encoder", "decoder"), ("decoder", "encoder")):
            if own not in path[depth - 1] or path[depth - 1] not in beside or not any(other in c for c in beside):
                continue
            decoders = [module for child, module in around.named_children() if "decoder" in child]
            if writer is None or any(writer in set(decoder.modules()) for decoder in decoders):
                return ".".join(path[:depth]), own  # type: ignore[return-value]
    return None


def part_of(root: nn.Module, language_model: str | None, name: str) -> Part:
    """Which part of a multimodal model a module belongs to.

    Args:
        root: The model.
        language_model: What :func:`language_model_name` returned.
        name: Qualified name of the module.

    Returns:
        ``"language"`` for everything in a model of one part, and for the language model of another; ``"vision"`` for
        image encoders; ``"projector"`` for what joins the two; ``"other"`` for sound and the like.
    """
    branch = branch_name(root, language_model, name)
    if branch is None:
        return "language"
    module = root.get_submodule(branch)
    get_head = getattr(root, "get_output_embeddings", None)
    if callable(get_head) and module is get_head():
        return "language"
    kind = type(module).__name__.lower()
    if any(word in f"{kind} {branch}".lower() for word in _NO_IMAGES):
        return "other"
    inside = name[len(branch) + 1 :].lower()
    here = f"{kind} {branch.rpartition('.')[2]}".lower()
    # Qwen-VL keeps its own inside of the vision tower.
    if any(word in here for word in _JOINING) or any(word in inside for word in _JOINING_INSIDE):
        return "projector"
    if _sees_no_text(module) or "vis" in kind or "vit" in kind:
        return "vision"
    # The other part of an encoder-decoder is the encoder of the text.
    return "language" if getattr(root.config, "is_encoder_decoder", False) else "projector"


def has_decoder(module: nn.Module) -> bool:
    """Whether a module is an encoder with a decoder, whose ``attention_mask`` is the encoder's."""
    config: Any = getattr(module, "config", None)
    if any(name.startswith("decoder_") for name in inspect.signature(module.forward).parameters):
        # BLIP-2 takes such arguments for one of its language models, and may hold one that is a decoder alone.
        parts: tuple[Any, ...] = (config, getattr(config, "text_config", None))
        told = [part.is_encoder_decoder for part in parts if hasattr(part, "is_encoder_decoder")]
        return len(told) < 2 or any(told)
    # The two halves have the configuration of the whole.
    is_half = any(True for _ in module.children()) and not any("decoder" in name for name, _ in module.named_modules())
    return bool(getattr(config, "is_encoder_decoder", False)) and not is_half
