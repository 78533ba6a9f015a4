"""Tells by its values which activation a module computes."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from na_lora_lightning.core.activations import KNOWN_ACTIVATIONS, Activation, ElementwiseActivation, grid

# Enough elements that even one in a thousand shows.
_DRAWS = 1 << 15


def is_elementwise(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``function`` maps each element by itself: same shape, and the same on a part as on the whole.

    Straight lines, the identity among them (and so dropout in evaluation mode), are not counted as activations.
    """
    z = grid(64).to(torch.float32)
    try:
        with torch.no_grad():
            # Clones, because the function may work in place.
            whole, part, row = function(z.clone()), function(z[::3].clone()), function(z.clone().view(8, 8))
    except Exception:  # A module that cannot take a plain vector is not an element-wise activation.
        return False
    if not (isinstance(whole, Tensor) and whole.shape == z.shape and isinstance(part, Tensor)):
        return False
    same = torch.allclose(whole[::3], part, atol=1e-6) and torch.allclose(whole.view(8, 8), row, atol=1e-6)
    # Evenly spaced points show a straight line by equal differences.
    steps = whole.diff()
    return same and not torch.allclose(steps, steps[:1].expand_as(steps), rtol=1e-3, atol=1e-5)


def is_random(module: nn.Module) -> bool:
    """Whether a module that works element by element draws random numbers, in evaluation or in training mode.

    Call it where the random state is kept.

    Args:
        module: The module, whose mode is as it was afterwards.
    """
    z = grid(_DRAWS).to(torch.float32)
    training = module.training
    try:
        for mode in (False, True):
            module.train(mode)
            answers = []
            for seed in range(2):
                torch.manual_seed(seed)
                with torch.no_grad():
                    answers.append(module(z.clone()))
            if not torch.equal(*answers):
                return True
        return False
    finally:
        module.train(training)


def activation_of(module: nn.Module) -> Activation | None:
    """Identifies the activation that ``module`` computes, by its values rather than by its class name.

    Args:
        module: A module without children. It is evaluated on a small CPU grid (a copy is moved if it holds
            parameters elsewhere).

    Returns:
        One of the closed forms where the values agree to 1e-5, an :class:`ElementwiseActivation` for any other
        element-wise module, or None where the module is not element-wise, or is the identity.
    """
    learnable = any(True for _ in module.parameters())
    if learnable:
        # Parameters live on the model's device and change in training: never self-gated by assumption.
        if not is_elementwise(module):
            return None
        return ElementwiseActivation(name_of(module), module.forward, self_gated=False)
    if not is_elementwise(module):
        return None
    z = grid(512).to(torch.float32)
    with torch.no_grad():
        values = module(z.clone())
    for known in KNOWN_ACTIVATIONS:
        if torch.allclose(known.evaluate(z).output, values, atol=1e-5, rtol=1e-5):
            return known
    # Not the module itself, whose hooks would call back here.
    return ElementwiseActivation(name_of(module), module.forward)


def name_of(module: nn.Module) -> str:
    """A name for what a module computes, from that of its class."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(module).__name__).lower()
    return re.sub(r"_?activation$", "", name) or name
