"""Fits a padding mask to gates that see another number of tokens than the mask is for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# What transformers calls the method that says how many frames its convolutions make of a recording.
_LENGTHS = ("_get_feat_extract_output_lengths", "_get_subsampled_output_lengths")
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
        methods = (getattr(module, name, None) for module in root.modules() for name in _LENGTHS)
        self._lengths: Callable[..., Any] | None = next((method for method in methods if callable(method)), None)
        self._streams = sum(_integers(getattr(config, _STREAMS, None)))
        self._multiples = [value for name in _MULTIPLES for value in _integers(getattr(config, name, None))]

    def __call__(self, mask: Tensor, tokens: int) -> Tensor | None:
        """The mask of a sequence of ``tokens``.

        Args:
            mask: ``[batch, length]`` boolean, true for what is real.
            tokens: Tokens of each sequence where a gate is, another number than ``length``.

        Returns:
            ``[batch, tokens]`` boolean; None where it is not known which of them are real.
        """
        length = mask.shape[1]
        for attempt in self._frames(length, tokens):
            real = attempt(mask.sum(dim=1))
            return torch.arange(tokens, device=mask.device)[None] < real.to(mask.device)[:, None]
        if tokens == length * (1 + self._streams):
            return mask.repeat(1, 1 + self._streams)
        if any(tokens == -(-length // multiple) * multiple for multiple in self._multiples):
            return nn.functional.pad(mask, (0, tokens - length))
        return None

    def _frames(self, length: int, tokens: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """The model's own count of frames, where it makes ``tokens`` of ``length``."""
        method = self._lengths
        if method is None:
            return
        choices = ({}, {"add_adapter": False}) if "add_adapter" in inspect.signature(method).parameters else ({},)
        for options in choices:
            if int(method(torch.tensor([length]), **options)[0]) == tokens:
                yield lambda lengths, options=options: method(lengths, **options)  # type: ignore[misc]


def _integers(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, int) and each > 1]
