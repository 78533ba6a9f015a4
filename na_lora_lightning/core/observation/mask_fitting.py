"""Fits a padding mask to gates that see another number of tokens than the mask is for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# What transformers calls the methods that say how many frames its convolutions make of recordings of some lengths, or
# of those that a mask says.
_LENGTHS = (
    "_get_feat_extract_output_lengths",
    "_get_subsampled_output_lengths",
    "_get_subsampling_output_length",
    "_compute_sub_sample_lengths_from_attention_mask",
)
# Models whose convolutions make a mask of their own, of more frames than the method says.
_OTHERWISE = ("MoonshineStreaming",)
# Settings of models that fill sequences up to a multiple of something.
_MULTIPLES = ("attention_window", "block_size")
# Those of models whose decoder sees streams that predict the next tokens, one after another behind the text.
_STREAMS = "ngram"


class MaskFitter:
    """Fits masks in a model of which it is known how its tokens follow from what the mask is for.

    Args:
        root: The model.
    """

    def __init__(self, root: nn.Module) -> None:
        config = getattr(root, "config", None)
        modules = [module for module in root.modules() if not type(module).__name__.startswith(_OTHERWISE)]
        methods = [getattr(module, name) for module in modules for name in _LENGTHS if hasattr(module, name)]
        # The same method of several modules would say the same.
        alike = {getattr(method, "__func__", method): method for method in reversed(methods)}
        self._methods: list[Callable[..., Any]] = list(reversed(alike.values()))
        self._streams = sum(_integers(getattr(config, _STREAMS, None)))
        self._multiples = [value for name in _MULTIPLES for value in _integers(getattr(config, name, None))]
        self._squeezes = [1, *_integers(getattr(config, "squeeze_factor", None))]

    def __call__(self, mask: Tensor, tokens: int) -> Tensor | None:
        """The mask of a sequence of ``tokens``.

        Args:
            mask: ``[batch, length]`` boolean, true for what is real.
            tokens: Tokens of each sequence where a gate is, another number than ``length``.

        Returns:
            ``[batch, tokens]`` boolean; None where it is not known which of them are real.
        """
        length = mask.shape[1]
        for count in self._counts():
            whole, real = count(torch.ones_like(mask)), count(mask)
            for squeeze in self._squeezes:
                if whole is not None and real is not None and int(whole[0]) // squeeze == tokens:
                    # A token that is squeezed out of several frames is real where one of these is.
                    return torch.arange(0, tokens * squeeze, squeeze, device=mask.device)[None] < real[:, None]
        if tokens == length * (1 + self._streams):
            return mask.repeat(1, 1 + self._streams)
        if any(tokens == -(-length // multiple) * multiple for multiple in self._multiples):
            return nn.functional.pad(mask, (0, tokens - length))
        return None

    def _counts(self) -> Iterator[Callable[[Tensor], Tensor | None]]:
        """The model's own counts of frames, by a mask ``[batch, length]``."""
        for method in self._methods:
            names = inspect.signature(method).parameters
            for options in ({}, {"add_adapter": False}) if "add_adapter" in names else ({},):
                yield partial(_count, method, options, "attention_mask" in names)


def _count(method: Callable[..., Any], options: dict[str, Any], by_mask: bool, mask: Tensor) -> Tensor | None:
    try:
        lengths = method(mask if by_mask else mask.sum(dim=1), **options)
    except (TypeError, ValueError, RuntimeError):
        # Some count the frames of one recording alone.
        return None
    fits = isinstance(lengths, Tensor) and lengths.shape == (len(mask),)
    return lengths.to(mask.device) if fits else None


def _integers(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, int) and each > 1]
