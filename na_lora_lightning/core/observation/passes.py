"""Which forward pass of training is under way, and which tokens of it count at each gate.

A pass begins where the model is called, or a part of it that is told of padding itself: its text model, an encoder, a
tower. Where training calls something deeper, every token counts if nothing in the model is ever told of padding;
otherwise padding could not be told, and the call is refused.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.compilation import outside_of_graphs
from na_lora_lightning.core.gathered import places, tokens_given
from na_lora_lightning.core.model_entry import MASKS
from na_lora_lightning.core.observation.mask_fitting import MaskFitter
from na_lora_lightning.core.observation.masks_of_calls import (
    mask_of_branch,
    masks_of_words,
    shared_mask,
    token_mask_of_call,
)
from na_lora_lightning.core.observation.tokens import TokenSelection
from na_lora_lightning.core.pre_activations import Handle
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import DataError, DiscoveryError

_TEXT = ("input_ids", "inputs_embeds")


class ForwardPasses:
    """Hooks that say which tokens count.

    Args:
        root: The model whose call carries the padding mask.
        sites: Gate sites inside it.
        max_tokens: Tokens looked at per site and forward pass at most, or None for all.
        exclude_prompt: Leave out positions that predict no target.
        entrance: The module around it whose hooks see the call, where its own do not.

    Attributes:
        labels: Labels of the coming forward passes, ``[batch, length]``, for models that are called without them.
        selection: Tokens of the recorded forward pass under way, or None outside of one.
        forward_passes: Recorded forward passes so far.
        enabled: Whether forward passes with gradients are recorded; False while they are not of training.
        before_pass: Called when a recorded forward pass begins.
    """

    def __init__(
        self,
        root: nn.Module,
        sites: Sequence[GateSite],
        max_tokens: int | None,
        exclude_prompt: bool,
        entrance: nn.Module | None,
    ) -> None:
        self.labels: Tensor | None = None
        self.selection: TokenSelection | None = None
        self.forward_passes = 0
        self.enabled = True
        self.before_pass: Callable[[], None] | None = None
        self._root = root
        self._entrance = root if entrance is None else entrance
        self._sites = list(sites)
        self._max_tokens = max_tokens
        self._exclude_prompt = exclude_prompt
        self._fit = MaskFitter(root)
        self._branches = list(dict.fromkeys(site.branch for site in sites if site.branch is not None))
        # AdaLoRA's tuner calls the forward of the root past its hooks, and people call the root past the tuner.
        self._entrances = list(dict.fromkeys([self._entrance, root, *self._parts_for_text(), *self._branches]))
        self._outermost: nn.Module | None = None
        self._sharing = {site.branch for site in sites if site.shares_mask}
        self._shared_mask: Tensor | None = None
        self._warned_of_order = False
        self._of_branches: dict[nn.Module, TokenSelection] = {}
        # What modules around experts were given, and which of it each expert was.
        self._given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._picked: dict[int, TokenSelection | None] = {}
        # Selections of sites whose layers are called by themselves.
        self._alone: dict[int, TokenSelection] = {}

    def _parts_for_text(self) -> list[nn.Module]:
        """Modules around gates that are given tokens, such as the model below an output head."""
        names = [site.lora_layer_name for site in self._sites]
        return [
            module
            for name, module in self._root.named_modules()
            if name and any(each.startswith(f"{name}.") for each in names) and _takes(module, _TEXT)
        ]

    def hook(self) -> list[Handle | torch.utils.hooks.RemovableHandle]:
        """Registers the hooks."""
        begin, end = outside_of_graphs(self._begin), outside_of_graphs(self._end)
        handles: list[Handle | torch.utils.hooks.RemovableHandle] = []
        for entrance in self._entrances:
            handles.append(entrance.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(entrance.register_forward_hook(end, always_call=True))
        begin_branch = outside_of_graphs(self._begin_branch)
        for branch in self._branches:
            handles.append(branch.register_forward_pre_hook(begin_branch, with_kwargs=True))
        keep_given = outside_of_graphs(self._keep_given)
        for around in dict.fromkeys(site.picked_from for site in self._sites if site.picked_from is not None):
            handles.append(around.register_forward_pre_hook(keep_given, with_kwargs=True))
        for index, site in enumerate(self._sites):
            if site.experts is None:
                alone = outside_of_graphs(self._make_lone_call(index, site))
                handles.append(site.lora_layer.register_forward_pre_hook(alone))
        return handles

    def unobserved(self, closure: Callable[[], Any]) -> Any:
        """Calls a closure whose forward passes are not recorded."""
        enabled, self.enabled = self.enabled, False
        try:
            return closure()
        finally:
            self.enabled = enabled

    def forget_pass(self) -> None:
        """Forgets the forward pass under way."""
        self.selection = self._outermost = self._shared_mask = None
        self._of_branches.clear()
        self._alone.clear()
        self._given.clear()
        self._picked.clear()

    def selection_of(self, index: int) -> TokenSelection | None:
        """Which tokens count at a site in the recorded forward pass under way; None outside of one."""
        branch = self._sites[index].branch
        if self.selection is None:
            return self._alone.get(index)
        if index in self._picked:
            return self._picked[index]
        return self.selection if branch is None else self._of_branches.get(branch)

    def _pass_begins(self) -> None:
        """Called in each recorded forward pass before its first gate."""

    def _pass_ends(self) -> None:
        """Called after its last gate."""

    def _is_trained(self) -> bool:
        # Evaluation runs without gradients, and a checkpointed model is run again inside the backward pass.
        return self.enabled and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self._entrances:
            # A copy of the model that was made in training has its hooks.
            self.selection = None
            return
        if self._outermost is not None and module is not self._entrance:
            return
        self.forget_pass()
        if not self._is_trained():
            return
        if self.before_pass is not None:
            self.before_pass()
        mask = None
        if module not in self._branches:
            mask = token_mask_of_call(module, args, kwargs, self._exclude_prompt, self.labels)
            self._shared_mask = shared_mask(module, args, kwargs)
        if mask is None:
            self._require_words_without_padding(masks_of_words(module, args, kwargs))
        self.selection = self._select(mask)
        self._outermost = module
        self.forward_passes += 1
        self._pass_begins()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self._outermost:
            self._pass_ends()
            self.selection = self._outermost = None
            self._given.clear()
            self._picked.clear()

    def _keep_given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.selection is not None:
            self._given[module] = args, kwargs

    def _pick(self, index: int, rows: Tensor) -> None:
        """Says which tokens an expert's layer is given, ``[..., features]``."""
        site, rows = self._sites[index], rows.detach().reshape(-1, rows.shape[-1])
        self._picked.pop(index, None)
        selection = self.selection_of(index)
        if selection is None or site.picked_from not in self._given:
            return
        if not len(rows):
            self._picked[index] = None
            return
        given = tokens_given(*self._given[site.picked_from], rows.shape[-1])
        real = None if given is None else selection.real(len(given), site.name)
        if given is None or real is None:
            return
        place = places(rows, given)
        if place is None:
            raise DataError(
                f"the gate {site.name!r} sees tokens that are not those which {type(site.picked_from).__name__} was "
                "given, so padding would enter the statistics; train with unpadded batches (no attention_mask), or "
                "exclude this layer from the LoRA targets."
            )
        self._picked[index] = self._select(real.to(place.device)[place][:, None])

    def _begin_branch(self, branch: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.selection is not None:
            mask = mask_of_branch(branch, args, kwargs)
            if mask is None and branch in self._sharing:
                mask = self._shared_mask
            self._of_branches[branch] = self._select(mask)

    def _require_words_without_padding(self, masks: dict[str, Tensor]) -> None:
        site = next((site for site in self._sites if site.sees_words), None)
        padded = next((name for name, mask in masks.items() if site is not None and not bool(mask.all())), None)
        if site is not None and padded is not None:
            raise DataError(
                f"the gate {site.name!r} sees words of the text that the model is given, some of which are padding by "
                f"{padded}, which would enter the statistics; exclude this layer from the LoRA targets, or train on "
                "texts without padding."
            )

    def _select(self, mask: Tensor | None) -> TokenSelection:
        return TokenSelection(mask, self._max_tokens, self.forward_passes, self._fit, self._warn_of_order)

    def _warn_of_order(self, name: str) -> None:
        """Says with the first batch what a later one would end the training for."""
        if not self._warned_of_order:
            self._warned_of_order = True
            warnings.warn(
                f"the gate {name!r} sees the tokens in an order that the padding mask does not tell, so a batch with "
                "padding will be refused; train with unpadded batches, or exclude this layer from the LoRA targets.",
                stacklevel=2,
            )

    def _make_lone_call(self, index: int, site: GateSite) -> Callable[..., None]:
        """A pre-hook for a LoRA layer that is called though no module that is told of padding was called around it."""

        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            self._alone.pop(index, None)
            if layer is site.lora_layer and site.picked_from is not None and self.selection is not None:
                self._pick(index, args[0])
            if layer is not site.lora_layer or self._is_known(index) or not self._is_trained():
                return
            told = [each for each in (site.branch or self._root,) if _takes(each, MASKS)]
            if told or site.calls is not None:
                raise DiscoveryError(self._refusal(site))
            if self.selection is not None:
                assert site.branch is not None
                self._of_branches[site.branch] = self._select(None)
                return
            if self.before_pass is not None:
                self.before_pass()
            self._alone[index] = self._select(None)
            self.forward_passes += 1

        return hook

    def _is_known(self, index: int) -> bool:
        return index in self._picked or self.selection_of(index) is not None

    def _refusal(self, site: GateSite) -> str:
        around = site.branch or self._root
        names = {module: name for name, module in self._root.named_modules()}
        where = f" ({names[around]})" if names.get(around) else ""
        return (
            f"{_called(set(self._root.modules()))} reached the gate {site.name!r} without a call of "
            f"{type(around).__name__}{where}, which alone is told of padding, so padded tokens would enter the "
            f"statistics; call {type(around).__name__} itself, with its attention mask, or, where the call is not of "
            "training, do it under torch.no_grad()."
        )


def _takes(module: nn.Module, arguments: Sequence[str]) -> bool:
    return any(name in inspect.signature(module.forward).parameters for name in arguments)


def _called(modules: set[nn.Module]) -> str:
    """The outermost method of a model under way, in words."""
    found = "a call"
    frame = sys._getframe()
    while frame is not None:
        owner, method = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(owner, nn.Module) and owner in modules and not method.startswith("_"):
            found = f"{type(owner).__name__}.{method}"
        frame = frame.f_back  # type: ignore[assignment]
    return found
