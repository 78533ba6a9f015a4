"""The parts of a multimodal model: its language model, its towers for images or sound, and what joins them."""

from __future__ import annotations

from typing import Literal

from torch import nn

Part = Literal["language", "vision", "projector", "other"]

_NO_IMAGES = ("audio", "speech", "vq", "generation")
_JOINING_INSIDE = ("merger", "projector", "connector")
_JOINING = ("project", "merger", "connector", "aligner", "resampler", "adapter", "qformer")


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
    """Whether a Hugging Face model has a configuration for images or sound beside that for text."""
    config = getattr(root, "config", None)
    names = ("vision_config", "audio_config", "vq_config", "vision_model_config")
    return any(getattr(config, name, None) is not None for name in names)


def branch_name(root: nn.Module, language_model: str | None, name: str) -> str | None:
    """The largest part of a multimodal model that holds a module and not the language model.

    Args:
        root: The model.
        language_model: What :func:`language_model_name` returned.
        name: Qualified name of the module.

    Returns:
        Name of the part; None for modules of the language model, and in models of one part.
    """
    if not is_multimodal(root):
        return None
    path = name.split(".")
    if language_model is None:
        # A dual encoder: each encoder is a part.
        return path[0] if len(path) > 1 else None
    common = language_model.split(".")
    if path[: len(common)] == common:
        return None
    depth = next(i for i, step in enumerate(path) if i >= len(common) or step != common[i])
    return ".".join(path[: depth + 1])


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
    # Qwen-VL keeps its own inside of the vision tower.
    if any(word in branch.rpartition(".")[2].lower() for word in _JOINING) or any(w in inside for w in _JOINING_INSIDE):
        return "projector"
    if "vis" in kind or "image" in kind or "vit" in kind:
        return "vision"
    if language_model is None:
        return "language"
    return "projector"
