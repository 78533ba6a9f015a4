"""Which tokens of a forward pass count: real ones, and, to bound the cost, a spread-out sample of them.

Everything here is computed on the device without synchronising with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    """

    def __init__(
        self,
        token_mask: Tensor | None,
        sample: int | None,
        offset: int,
        fit: Callable[[Tensor, int], Tensor | None] | None = None,
        unordered: Callable[[str], None] | None = None,
    ) -> None:
        self._mask = token_mask
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

    def rows(self, values: Tensor, name: str, time_first: bool | None = False) -> Tensor:
        """The looked-at tokens of ``values``.

        Args:
            values: ``[batch, length, channels]`` or ``[tokens, channels]``.
            name: Site, for the message.
            time_first: Whether they are ``[length, batch, channels]``, or that as rows; None where their order is not
                known.

        Returns:
            ``[looked-at tokens, channels]`` in the dtype of ``values``, without a graph; a padded token is replaced
            by a real one.

        Raises:
            DataError: The padding mask cannot be matched to the shape.
        """
        if time_first and self._mask is not None:
            values = _sample_after_sample(values, len(self._mask))
        self._check(tuple(values.shape[:-1]), name, is_in_order=time_first is not None)
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

    def _check(self, leading: tuple[int, ...], name: str, is_in_order: bool = True) -> None:
        if self._mask is None or 0 in leading:
            return
        if is_in_order and leading in (tuple(self._mask.shape), (self._mask.numel(),), (len(self._mask), 1)):
            return
        if is_in_order and (leading[0] == len(self._mask) or len(leading) == 1):
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


def _sample_after_sample(values: Tensor, samples: int) -> Tensor:
    """``[samples, length, channels]`` of ``[length, samples, channels]``, or of that as rows; others as they are."""
    if values.ndim == 2 and len(values) % samples == 0:
        values = values.view(-1, samples, values.shape[-1])
    return values.transpose(0, 1) if values.ndim == 3 and values.shape[1] == samples else values
