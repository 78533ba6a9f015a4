"""The masked and scaled update, applied after the optimizer has computed its own::

    B_i  ←  B_i_before + m_i · η · (B_i_after − B_i_before)

It acts on the update and not on the gradient, because Adam-like optimizers cancel any constant rescaling of
gradients, keep moving zero-gradient rows through momentum, and decay weights whatever the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from na_lora_lightning.core.lora_layers import lora_b
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.core.statistics import Layout


def blend_rows(before: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """Moves each row the fraction ``weight`` of its way from ``before`` to ``after``.

    Args:
        before: Rows before the optimizer's step, ``[rows, ...]``.
        after: Rows after it, the same shape and dtype.
        weight: ``[rows]`` float32, non-negative; may exceed 1.

    Returns:
        The blended rows in their dtype; bitwise ``before`` where the weight is 0 and ``after`` where it is 1, also
        for values that are not finite.
    """
    weight = weight.view(-1, *(1,) * (before.ndim - 1))
    if before.dtype in (torch.float32, torch.float64):
        moved = torch.lerp(before, after, weight.to(before.dtype))
    else:
        moved = torch.lerp(before.float(), after.float(), weight).to(before.dtype)
    return torch.where(weight == 1.0, after, torch.where(weight == 0.0, before, moved))


class RowUpdate:
    """Remembers the gate rows before an optimizer's step and corrects them after it.

    Args:
        sites: Gate sites whose LoRA rows are trained.
        layout: Flat layout of their channels.
    """

    def __init__(self, sites: Sequence[GateSite], layout: Layout) -> None:
        self._targets: list[tuple[Tensor, Tensor, slice | Tensor, slice]] = []
        for site, channels in zip(sites, layout.slices, strict=True):
            rows = site.row_slice
            index = rows if rows is not None else site.rows.to(layout.site_of_column.device)
            for entry in site.parameters():
                before = torch.empty_like(entry.parameter[index])
                self._targets.append((entry.parameter, before, index, channels))

    @torch.no_grad()
    def remember(self) -> None:
        """Copies the rows; called before the optimizer's step."""
        for parameter, before, index, _ in self._targets:
            before.copy_(parameter[index])

    @torch.no_grad()
    def correct(self, weights: Tensor) -> None:
        """Blends the rows.

        Args:
            weights: m·η per channel of all sites, ``[channels]`` float32.
        """
        for parameter, before, index, channels in self._targets:
            parameter[index] = blend_rows(before, parameter[index], weights[channels].to(parameter.device))


class GradientMask:
    """Masks the gradient that reaches ``lora_A`` through ``lora_B``, and leaves the gradient of B as it is.

    The gradient with respect to the input of ``lora_B`` is (∂L/∂δ)·B; it is replaced by (m ⊙ ∂L/∂δ)·B with the
    weights m in force at the start of the step. The forward pass is not changed.

    Args:
        sites: Gate sites.
        layout: Flat layout of their channels.
    """

    def __init__(self, sites: Sequence[GateSite], layout: Layout) -> None:
        self.weights: Tensor | None = None
        self._sites = list(zip(sites, layout.slices, strict=True))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Registers the hooks."""
        for site, channels in self._sites:
            for adapter in site.adapters:
                hook = self._make_hook(site, channels)
                self._handles.append(lora_b(site.lora_layer, adapter).register_full_backward_hook(hook))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _make_hook(self, site: GateSite, channels: slice):  # type: ignore[no-untyped-def]
        def hook(module, grad_input, grad_output):  # type: ignore[no-untyped-def]
            if self.weights is None or grad_output[0] is None or grad_input[0] is None:
                return None
            gradient = grad_output[0]
            row_weight = torch.ones(gradient.shape[-1], device=gradient.device, dtype=gradient.dtype)
            row_weight[site.rows.to(gradient.device)] = self.weights[channels].to(row_weight)
            return ((gradient * row_weight) @ module.weight.to(gradient.dtype), *grad_input[1:])

        return hook
