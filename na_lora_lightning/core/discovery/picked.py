"""Layers whose rows were picked by a router from what a module around them was given."""

from __future__ import annotations

from torch import Tensor, nn

from na_lora_lightning.core.discovery.blocks import ancestors
from na_lora_lightning.core.discovery.trace import LinearCall
from na_lora_lightning.core.gathered import given_features, places

# What autograd calls picking.
_PICKING = ("Index", "Gather", "Take", "MaskedSelect")


def origin_of(call: LinearCall) -> nn.Module | None:
    """The module that was given the tokens of which a layer's input was picked; None where nothing was picked."""
    rows = call.source.reshape(-1, call.source.shape[-1])
    if not _is_picked(call.source):
        return None
    for around in reversed(call.within):
        given = given_features(around.args, around.kwargs, rows.shape[-1])
        if given is None:
            continue
        tokens = given.reshape(-1, rows.shape[-1])
        # Inside an expert all are given the same rows, and an expert may be given all tokens.
        comes_before = len(tokens) != len(rows) or _is_picked(call.source, given)
        if comes_before and places(rows, tokens) is not None:
            return around.module
    return None


def _is_picked(rows: Tensor, among: Tensor | None = None) -> bool:
    """Whether rows were picked: among those of another tensor, or anywhere."""
    met = ancestors(rows.grad_fn, stop_at=() if among is None else (among.grad_fn,))
    return any(name.startswith(_PICKING) for name in met.passed) and (among is None or bool(met.stops))
