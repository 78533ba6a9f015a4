"""Where a model is called: the module whose forward always runs, how many tokens it knows, and names of masks."""

from __future__ import annotations

from typing import Any

from torch import nn

# Under these names vision towers are told which patches are padding, and text encoders which tokens; 1 is real.
BRANCH_MASKS = ("patch_attention_mask", "pixel_attention_mask", "attention_mask")
# torch's own transformers call padding true.
PADDING_MASKS = ("src_key_padding_mask", "tgt_key_padding_mask")
MASKS = (*BRANCH_MASKS, *PADDING_MASKS, "decoder_attention_mask")


def is_mask_of_words(name: str) -> bool:
    """Whether an argument of a denoiser says which of a text is real that it is given beside what it denoises."""
    return "mask" in name and name.startswith(("encoder_", "text_"))


def root_of(model: nn.Module) -> nn.Module:
    """The model whose forward is always called: inside a ``PeftModel`` its base model, else the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def entrance_of(model: nn.Module) -> nn.Module:
    """The module whose hooks see every forward pass, with the arguments of :func:`root_of`'s forward.

    AdaLoRA's tuner calls the forward method of the root, past its hooks, and so does every tuner before PEFT 0.21.
    """
    root = root_of(model)
    tuner: Any = root if root is model else model.base_model
    calls = getattr(type(tuner).forward, "__code__", None)
    # ``self.model.forward(...)`` in place of ``self.model(...)``.
    passes_hooks = tuner is not root and calls is not None and "forward" in calls.co_names
    entrance: nn.Module = tuner if passes_hooks else root
    return entrance


def vocabulary_size(root: nn.Module) -> int | None:
    """Number of tokens that a Hugging Face model's configuration names; None where it names none."""
    config = getattr(root, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text_config = get_text_config() if callable(get_text_config) else config
    size = getattr(text_config, "vocab_size", None)
    return size if isinstance(size, int) else None
