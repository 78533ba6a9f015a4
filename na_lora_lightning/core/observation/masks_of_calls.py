"""Reads from the call of a model, or of a part of it, which of its tokens are real."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.model_entry import BRANCH_MASKS, PADDING_MASKS, is_mask_of_words
from na_lora_lightning.core.model_parts import has_decoder
from na_lora_lightning.errors import DataError


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a forward call by their names."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def mask_of_branch(branch: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Reads from a call of a part of a multimodal model which of its tokens (or patches) are real.

    Args:
        branch: The part that is called.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        ``[images or sequences, tokens]`` boolean, or None where the call has no such mask and every token counts.
    """
    given = by_name(branch, args, kwargs)
    for name in BRANCH_MASKS:
        mask = given.get(name)
        if isinstance(mask, Tensor) and mask.ndim in (2, 3) and not mask.is_floating_point():
            return mask.flatten(1).bool()
    return _mask_of_padding(given)


def _mask_of_padding(given: Mapping[str, Any]) -> Tensor | None:
    padding = next((given[name] for name in PADDING_MASKS if isinstance(given.get(name), Tensor)), None)
    return ~padding if padding is not None and padding.ndim == 2 and padding.dtype == torch.bool else None


def masks_of_words(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which of a text is real that a denoiser is given beside what it denoises, by argument, ``[batch, length]``."""
    given = by_name(module, args, kwargs)
    masks = {name: value for name, value in given.items() if is_mask_of_words(name) and isinstance(value, Tensor)}
    return {name: mask.bool() for name, mask in masks.items() if mask.ndim == 2 and "timestep" in given}


def shared_mask(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The ``attention_mask`` of a call, ``[batch, length]`` boolean, which an encoder inside of it may not be given."""
    mask = by_name(module, args, kwargs).get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _mask_of_decoder(root: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """Which of a decoder's tokens are real: as its mask says, or its labels, or its inputs.

    Args:
        root: An encoder with a decoder.
        kwargs: Arguments of its call.
    """
    mask, labels = kwargs.get("decoder_attention_mask"), kwargs.get("labels")
    if mask is not None:
        return mask
    if isinstance(labels, Tensor) and labels.ndim > 1:
        # What is padded in a decoder has no label; further dimensions are codebooks.
        return (labels != -100).flatten(2).any(dim=2) if labels.ndim > 2 else labels != -100
    tokens, padding = kwargs.get("decoder_input_ids"), _padding_token(root)
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and padding is not None:
        # A decoder may begin with the token that pads; none but padding follows padding.
        real = (tokens != padding).flip(1).cumsum(1).flip(1) > 0
        real[:, 0] = True
        return real
    mask = kwargs.get("attention_mask")
    if tokens is None and kwargs.get("input_ids") is not None and isinstance(mask, Tensor) and mask.ndim == 2:
        # For classes and the like the decoder is given the encoder's tokens, shifted by one.
        return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
    return None


def _padding_token(root: nn.Module) -> int | None:
    config = getattr(root, "config", None)
    for each in (config, getattr(config, "decoder", None), getattr(config, "text_config", None)):
        token = getattr(each, "pad_token_id", None)
        if isinstance(token, int):
            return token
    return None


def token_mask_of_call(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    targets_only: bool,
    labels: Tensor | None = None,
) -> Tensor | None:
    """Reads from a call of the model which tokens count.

    Args:
        root: The model that is called.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        targets_only: Count only positions that predict a target (the next label is not −100), and so leave out
            the prompt.
        labels: Used where the call has none, ``[batch, length]``.

    Returns:
        ``[batch, length]`` boolean, or None where every token counts.

    Raises:
        DataError: The attention mask is not ``[batch, length]``, or targets are asked for and no labels are given.
    """
    kwargs = by_name(root, args, kwargs)
    of_decoder = has_decoder(root)
    mask = _mask_of_decoder(root, kwargs) if of_decoder else kwargs.get("attention_mask")
    mask = _mask_of_padding(kwargs) if mask is None else mask
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise DataError(
                f"the attention mask has shape {shape}, from which padding cannot be told; pass a mask of shape "
                "[batch, length] with 1 for real tokens."
            )
        mask = mask.bool()
    if not targets_only:
        return mask
    given = kwargs.get("labels")
    labels = labels if given is None else given
    if not isinstance(labels, Tensor):
        raise DataError(
            "exclude_prompt needs labels in the model's forward call to tell prompt from completion; pass labels to "
            "the model, or set exclude_prompt=False."
        )
    if of_decoder:
        # Its inputs are the labels, shifted by one.
        targets = labels != -100
    else:
        targets = torch.zeros_like(labels, dtype=torch.bool)
        targets[:, :-1] = labels[:, 1:] != -100
    return targets if mask is None else targets & mask
