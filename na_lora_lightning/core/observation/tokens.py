"""Which tokens of a forward pass count: real ones, and, to bound the cost, a spread-out sample of them.

Everything here is computed on the device without synchronising with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.model_entry import BRANCH_MASKS, PADDING_MASKS
from na_lora_lightning.core.model_parts import has_decoder
from na_lora_lightning.errors import DataError


class TokenSelection:
    """Token weights of one forward pass, matched to pre-activations by shape.

    Args:
        token_mask: ``[batch, length]``, true for tokens that count, or None where every token does.
        sample: Tokens looked at per site and forward pass at most, or None for all.
        offset: Shifts the sample from one forward pass to the next.
        fit: Makes a mask for another number of tokens, or None where it cannot.
        unordered: Called with the name of a site that sees all tokens in an order that the mask does not tell, which
            does not matter while none of them is padding.
        beside: Which tokens of a text are real that a denoiser is given beside what it denoises, ``[batch, length]``,
            or None where it is given none.
    """

    def __init__(
        self,
        token_mask: Tensor | None,
        sample: int | None,
        offset: int,
        fit: Callable[[Tensor, int], Tensor | None] | None = None,
        unordered: Callable[[str], None] | None = None,
        beside: Tensor | None = None,
    ) -> None:
        self._mask = token_mask
        self._beside = beside
        self._fit = fit
        self._unordered = unordered
        self._fitted: dict[int, Tensor | None] = {}
        self._sample = sample
        self._offset = offset
        self._chosen: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor]] = {}

    def _choose(self, tokens: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Positions to look at in ``range(tokens)``, None for all, and how many real tokens each stands for."""
        key = (tokens, device)
        if key not in self._chosen:
            positions = None
            if self._sample is not None and tokens > self._sample:
                spread = torch.arange(self._sample, device=device) * tokens // self._sample
                positions = (spread + self._offset) % tokens
            # Those that are looked at stand for all of their pass, so that long passes of a step weigh more than short.
            if self._mask is None or not tokens:
                looked_at = tokens if positions is None else positions.numel()
                weights = torch.full((looked_at,), tokens / max(looked_at, 1), device=device)
            else:
                mask = self._mask_of(tokens)
                assert mask is not None, "it was checked before"
                real = mask.reshape(-1).to(device, torch.float32)
                is_sample = positions is not None
                positions = torch.arange(tokens, device=device) if positions is None else positions
                weights = real.index_select(0, positions)
                if is_sample:
                    weights = weights * (real.sum() / weights.sum().clamp(min=1.0))
                # Padding may hold anything, NaN included, which a weight of zero would not silence: look at some
                # real token in its place.
                positions = torch.where(weights > 0, positions, real.argmax())
            self._chosen[key] = (positions, weights)
        return self._chosen[key]

    def _mask_of(self, tokens: int) -> Tensor | None:
        """The mask of ``tokens`` in all; None where it cannot be told."""
        assert self._mask is not None
        if tokens == self._mask.numel():
            return self._mask
        if tokens == len(self._mask):
            # One pooled token stands for a whole sequence.
            return self._mask.any(dim=1)
        if self._fit is None or tokens % len(self._mask):
            return None
        if tokens not in self._fitted:
            self._fitted[tokens] = self._fit(self._mask, tokens // len(self._mask))
        return self._fitted[tokens]

    def real(self, tokens: int, name: str) -> Tensor | None:
        """Which of ``tokens`` in all are real, ``[tokens]`` boolean; None where all are.

        Raises:
            DataError: The padding mask cannot be matched to them.
        """
        if self._mask is None:
            return None
        self._check((tokens,), name)
        mask = self._mask_of(tokens)
        assert mask is not None, "it was checked before"
        return mask.reshape(-1)

    def rows(self, values: Tensor, name: str, time_first: bool = False) -> Tensor:
        """The looked-at tokens of ``values``.

        Args:
            values: ``[batch, length, channels]`` or ``[tokens, channels]``.
            name: Site, for the message.
            time_first: Whether they are ``[length, batch, channels]``.

        Returns:
            ``[looked-at tokens, channels]`` in the dtype of ``values``, without a graph; a padded token is replaced
            by a real one.

        Raises:
            DataError: The padding mask cannot be matched to the shape.
        """
        if time_first and self._mask is not None and values.ndim == 3 and values.shape[1] == len(self._mask):
            values = values.transpose(0, 1)
        self._check(tuple(values.shape[:-1]), name)
        flat = values.detach().reshape(-1, values.shape[-1])
        positions, _ = self._choose(flat.shape[0], flat.device)
        return flat if positions is None else flat.index_select(0, positions)

    def weights(self, values: Tensor) -> Tensor:
        """How much each looked-at token counts, ``[looked-at tokens]``, float32.

        0 where it is padding; otherwise 1, or as many real tokens as it stands for where a sample is looked at.
        """
        return self._choose(values.numel() // values.shape[-1], values.device)[1]

    def chosen(self, tokens: int, device: torch.device, name: str) -> tuple[Tensor, Tensor]:
        """Positions of the looked-at tokens among ``tokens`` in a row, and their weights.

        Args:
            tokens: Tokens of the forward pass.
            device: Where the result is wanted.
            name: Site, for the message.

        Returns:
            Positions ``[looked-at tokens]`` int64, and their :meth:`weights`.

        Raises:
            DataError: The padding mask is for another number of tokens.
        """
        self._check((tokens,), name)
        positions, weights = self._choose(tokens, device)
        return (torch.arange(tokens, device=device) if positions is None else positions), weights

    def _check(self, leading: tuple[int, ...], name: str) -> None:
        if self._beside is not None and leading == tuple(self._beside.shape) and not bool(self._beside.all()):
            raise DataError(
                f"the gate {name!r} sees as many tokens as encoder_attention_mask is for, {leading}, and some of them "
                "are padding, which would enter the statistics; exclude this layer from the LoRA targets, or train on "
                "texts without padding."
            )
        if (
            self._mask is None
            or 0 in leading
            or leading in (tuple(self._mask.shape), (self._mask.numel(),), (len(self._mask), 1))
        ):
            return
        if leading[0] == len(self._mask) or len(leading) == 1:
            tokens = torch.Size(leading).numel()
            if tokens not in (len(self._mask), self._mask.numel()) and self._mask_of(tokens) is not None:
                return
        if torch.Size(leading).numel() == self._mask.numel() and bool(self._mask.all()):
            # Without padding it does not matter in which order a layer sees the tokens.
            if self._unordered is not None:
                self._unordered(name)
            return
        raise DataError(
            f"the padding mask of shape {tuple(self._mask.shape)} cannot be matched to the gate {name!r}, "
            f"which sees tokens of shape {leading}, so padding would enter the statistics; exclude this layer from the "
            "LoRA targets, or, where an attention mask alone tells of padding, train with unpadded batches without one."
        )


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


def mask_beside(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The ``encoder_attention_mask`` of a call of a denoiser, ``[batch, length]`` boolean: which of a text is real."""
    given = by_name(module, args, kwargs)
    mask = given.get("encoder_attention_mask")
    denoises = "timestep" in given and isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point()
    return mask.bool() if denoises else None  # type: ignore[union-attr]


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
