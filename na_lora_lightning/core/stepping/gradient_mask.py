"""The mask on the gradient of ``lora_A``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.compilation import outside_of_graphs
from na_lora_lightning.core.lora_layers import lora_a, lora_b
from na_lora_lightning.core.sites import GateSite


class GradientMask:
    """Masks the gradient that reaches ``lora_A``, and no other gradient.

    ∂L/∂A = (Bᵀ·∂L/∂δ)·xᵀ becomes (Bᵀ·(m ⊙ ∂L/∂δ))·xᵀ with the weights m in force at the start of the step. The
    gradient of B, and the one that flows on to earlier layers, stay what they are.

    Args:
        sites: Gate sites.
        layout: Flat layout of their channels.

    Attributes:
        weights: m per channel of all sites, or None while nothing is masked.
    """

    def __init__(self, sites: Sequence[GateSite], layout: Layout) -> None:
        self.weights: Tensor | None = None
        self._sites = list(zip(sites, layout.site_slices, strict=True))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Registers the hooks."""
        for site, channels in self._sites:
            for adapter in site.adapters:
                self._attach_adapter(site, adapter, channels)

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _attach_adapter(self, site: GateSite, adapter: str, channels: slice) -> None:
        matrix_a, matrix_b = lora_a(site.lora_layer, adapter), lora_b(site.lora_layer, adapter)
        weight_a, weight_b = matrix_a.weight, matrix_b.weight
        assert isinstance(weight_a, Tensor)
        assert isinstance(weight_b, Tensor)
        inputs: list[Tensor] = []
        corrections: list[Tensor] = []

        def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[:] = [] if self.weights is None else [args[0].detach()]

        def prepare_correction(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
            if self.weights is None or not inputs:
                return
            gradient = grad_output[0].detach()
            dropped = torch.zeros(gradient.shape[-1], device=gradient.device, dtype=gradient.dtype)
            dropped[site.rows.to(gradient.device)] = 1.0 - self.weights[channels].to(gradient)
            through_b = (gradient * dropped) @ weight_b.detach().to(gradient.dtype)
            corrections[:] = [through_b.flatten(0, -2).T @ inputs.pop().to(gradient.dtype).flatten(0, -2)]

        def correct(gradient: Tensor) -> Tensor:
            return gradient - corrections.pop().to(gradient.dtype) if corrections else gradient

        self._handles += [
            matrix_a.register_forward_pre_hook(outside_of_graphs(keep_input)),
            matrix_b.register_full_backward_hook(prepare_correction),
            weight_a.register_hook(correct),
        ]
