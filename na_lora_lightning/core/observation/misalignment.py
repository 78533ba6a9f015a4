"""Selection misalignment: how much the adapter moved the selection, measured in the training forward pass itself.

With g the frozen pre-activation, δ the adapter's part and g' = g + δ, what δ changes splits exactly into::

    φ(g') − φ(g) = ρ(g)·δ  +  (ρ(g') − ρ(g))·g'
                   feature    selection

The misalignment of a site is mean |ρ(g') − ρ(g)|; its share is ‖selection ⊙ u‖ / (‖feature ⊙ u‖ + ‖selection ⊙ u‖).
The other branch u is read off the input h = φ(g') ⊙ u of the output layer, so no second pass is needed.

"Frozen" means the base layer as it trains. PiSSA, OLoRA, LoftQ and CorDA take what they put into the adapter out of the
base layer's weight: there δ is not zero at the start and counts as moved selection what the pretrained layer had, so
that a curve begins above zero and its change is what training did. With LoRA's usual start, B = 0, both mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.compilation import outside_of_graphs, single_precision
from na_lora_lightning.core.lora_layers import adds_output_of_b, is_on_parameter, lora_b, observing, scaling
from na_lora_lightning.core.observation.observer import GateObserver
from na_lora_lightning.core.observation.tokens import TokenSelection
from na_lora_lightning.core.sites import GateSite

_MOVED, _FEATURE, _SELECTION, _COUNT = range(4)


def selection_terms(site: GateSite, moved: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits what the adapter changes at a site.

    Args:
        site: The gate site, whose activation is used.
        moved: g', ``[tokens, channels]`` float32.
        delta: δ, the same shape.

    Returns:
        |ρ(g') − ρ(g)|, the feature term and the selection term, each ``[tokens, channels]``.
    """
    before = site.activation.evaluate(moved - delta).selection
    change = site.activation.evaluate(moved).selection - before
    return change.abs(), before * delta, change * moved


class MisalignmentMeter:
    """Measures selection misalignment on the steps for which it is switched on.

    Args:
        observer: The observer, whose token selection and padding mask are used.

    Attributes:
        enabled: Whether the current step is measured.
    """

    def __init__(self, observer: GateObserver) -> None:
        self._observer = observer
        self._sites: Sequence[GateSite] = observer.sites
        self._delta: dict[int, Tensor] = {}
        self._base: dict[int, Tensor] = {}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.enabled = False
        self.sums = torch.zeros(4, len(self._sites), device=observer.device)
        observer.listen(self._on_pre_activation)

    def attach(self) -> None:
        """Registers the hooks on ``lora_B`` (DoRA: on the base layer) and on the output layers."""
        for index, site in enumerate(self._sites):
            if is_on_parameter(site.lora_layer):
                # PEFT adds the adapter to the parameter, so δ is nowhere to be seen.
                continue
            if all(adds_output_of_b(site.lora_layer, adapter) for adapter in site.adapters):
                for adapter in site.adapters:
                    keeper = self._make_keeper(self._delta, index, site, adapter)
                    self._handles.append(lora_b(site.lora_layer, adapter).register_forward_hook(keeper))
            else:
                # DoRA, say, rescales the frozen part as well: δ is what differs from the base layer's output.
                base: nn.Module = site.lora_layer.base_layer  # type: ignore[assignment]
                keeper = self._make_keeper(self._base, index, site, None)
                self._handles.append(base.register_forward_hook(keeper))
            if site.kind == "gated" and site.output_layer is not None:
                self._handles.append(
                    site.output_layer.register_forward_pre_hook(outside_of_graphs(self._make_output_hook(index)))
                )

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()

    def _clear(self) -> None:
        self._delta.clear()
        self._base.clear()
        self._moved.clear()

    def reset(self) -> None:
        """Forgets what was measured."""
        self.sums.zero_()
        self._clear()

    def finish_step(self, reduce: Callable[[Tensor], None] | None) -> tuple[Tensor, Tensor] | None:
        """Hands over the measurement of the step.

        Args:
            reduce: Adds a tensor over all processes in place, or None.

        Returns:
            Mean |Δρ| and squared norms, as (misalignment ``[sites]``, ``[2, sites]`` squared norms of the feature
            and of the selection term), or None where the step was not measured. NaN at sites that were not, because
            they saw no token or PEFT adds their adapter to a parameter.
        """
        if not self.enabled:
            return None
        if reduce is not None:
            reduce(self.sums)
        sums = self.sums.clone()
        self.reset()
        measured = sums[_COUNT] > 0
        return torch.where(measured, sums[_MOVED] / sums[_COUNT].clamp(min=1.0), torch.nan), sums[
            [_FEATURE, _SELECTION]
        ]

    def _selection(self, index: int) -> TokenSelection | None:
        return self._observer.selection_of(index) if self.enabled else None

    def _make_keeper(
        self, store: dict[int, Tensor], index: int, site: GateSite, adapter: str | None
    ) -> Callable[..., None]:
        """A hook that keeps the looked-at part of a layer's output, summed over adapters, each times its scaling."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            selection = self._selection(index)
            if selection is None:
                return
            rows = site.row_slice
            kept = output[..., rows] if rows is not None else output[..., site.rows.to(output.device)]
            factor = 1.0 if adapter is None else scaling(site.lora_layer, adapter)
            with single_precision(kept.device):
                # A product, and so a copy: AdaLoRA adds to the base layer's output in place.
                part = selection.rows(kept, site.name, site.time_first).float() * factor
            store[index] = store[index] + part if index in store else part

        return observing(outside_of_graphs(hook), lambda: self.enabled)

    def _on_pre_activation(self, index: int, site: GateSite, looked_at: Tensor, weight: Tensor) -> None:
        if self._selection(index) is None:
            return
        # A copy, because an activation may work in place.
        looked_at = looked_at.to(torch.float32, copy=True)
        if index in self._base:
            self._delta[index] = looked_at - self._base.pop(index)
        if index not in self._delta:
            return
        if site.kind == "gated" and site.output_layer is not None:
            self._moved[index] = (looked_at, weight)
        else:
            self._add(index, site, looked_at, weight, other_branch=None)

    def _make_output_hook(self, index: int) -> Callable[..., None]:
        site = self._sites[index]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            selection = self._selection(index)
            if index not in self._moved or selection is None:
                return
            moved, weight = self._moved.pop(index)
            with torch.no_grad(), single_precision(args[0].device):
                hidden = selection.rows(args[0], site.name, site.time_first).float()
                output = site.activation.evaluate(moved).output
                silent = output == 0
                other = torch.where(silent, 0.0, hidden / torch.where(silent, 1.0, output))
                self._add(index, site, moved, weight, other)

        return hook

    @torch.no_grad()
    def _add(self, index: int, site: GateSite, moved: Tensor, weight: Tensor, other_branch: Tensor | None) -> None:
        change, feature, selected = selection_terms(site, moved, self._delta.pop(index))
        if other_branch is not None:
            feature, selected = feature * other_branch, selected * other_branch
        totals = [weight @ part.sum(dim=1) for part in (change, feature.square(), selected.square())]
        self.sums[:, index] += torch.stack([*totals, weight.sum() * moved.shape[-1]]).to(self.sums.device)


def share_of_selection(squared_norms: Tensor) -> Tensor:
    """‖selection ⊙ u‖ / (‖feature ⊙ u‖ + ‖selection ⊙ u‖).

    Args:
        squared_norms: ``[2, ...]``, of the feature and of the selection term.

    Returns:
        ``[...]`` in [0, 1]; 0 where the adapter changes nothing.
    """
    norms = squared_norms.sqrt()
    total = norms.sum(dim=0)
    return torch.where(total > 0, norms[1] / total.clamp(min=1e-30), torch.zeros_like(total))
