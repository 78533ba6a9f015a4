"""Notices that gradients were thrown away without an optimizer step, so that their statistics go with them.

A ``GradScaler`` that finds an overflow does not call ``optimizer.step``, and no hook tells of it. What every loop then
does is to clear the gradients. So the statistics of a forward pass live exactly as long as its gradients: where the
gradient of a LoRA row starts from nothing although an earlier backward pass left one and no step was taken, that step
was skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from na_lora_lightning.core.sharding import local_part
from na_lora_lightning.errors import UpdateError

# A GradScaler halves its scale each time, and has come from 2^65 down to 2^-34 by then.
_MOST_SKIPPED_IN_A_ROW = 100


class Aside:
    """Sums that may still have to be thrown away, kept apart from those that come after them."""

    def __init__(self) -> None:
        self._kept: list[Tensor] | None = None

    def take(self, sums: Sequence[Tensor]) -> None:
        """Moves ``sums`` here and leaves zeros."""
        if self._kept is None:
            self._kept = [value.clone() for value in sums]
        else:
            for kept, value in zip(self._kept, sums, strict=True):
                kept += value
        for value in sums:
            value.zero_()

    def give_back(self, sums: Sequence[Tensor]) -> None:
        """Adds what is here to ``sums``, in their order in :meth:`take`."""
        if self._kept is not None:
            for kept, value in zip(self._kept, sums, strict=True):
                value += kept
        self._kept = None

    def drop(self) -> None:
        """Throws away what is here."""
        self._kept = None


class GradientWatch:
    """Hooks on parameters that tell when gradients of earlier backward passes were thrown away.

    Args:
        parameters: Trained parameters, any of which may be without a gradient in a pass.
        dropped: Called in the next backward pass after it happened.

    Attributes:
        backward_passes: Whether there was any backward pass since :meth:`attach`.
    """

    def __init__(self, parameters: Sequence[Tensor], dropped: Callable[[], None]) -> None:
        self._parameters = list(parameters)
        self._places = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        self._dropped = dropped
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Each parameter's gradient and its version after it was last accumulated; until the next step at most.
        self._left: dict[int, tuple[Tensor, int]] = {}
        self._has_new = False
        self._undecided = False
        self._dropped_in_a_row = 0
        self.backward_passes = False

    def attach(self) -> None:
        """Registers the hooks."""
        self.backward_passes = False
        for index, parameter in enumerate(self._parameters):
            self._handles += [
                parameter.register_hook(partial(self._before_accumulation, index)),
                parameter.register_post_accumulate_grad_hook(partial(self._after_accumulation, index)),
            ]

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def forget(self) -> None:
        """Forgets the gradients so far: they were used in a step, or are known to be thrown away."""
        self._left.clear()
        self._has_new = self._undecided = False

    def is_reached(self, parameter: Tensor) -> bool:
        """Whether a backward pass reached a parameter since the last step; where none is seen at all, it may have."""
        return not self.backward_passes or self._places[id(parameter)] in self._left

    def is_moved(self, parameter: Tensor) -> bool:
        """The same, by something else than zeros; synchronises."""
        if not self.backward_passes:
            # Its layer may have been skipped, or the gradient set by no backward pass.
            return parameter.grad is not None and bool(local_part(parameter.grad).any())
        left = self._left.get(self._places[id(parameter)])
        return left is not None and bool(local_part(left[0]).any())

    def stepped(self) -> None:
        """The optimizer used the gradients."""
        self._dropped_in_a_row = 0
        self.forget()

    def begin_pass(self) -> bool:
        """Called when a forward pass begins.

        Returns:
            Whether a backward pass came since the last one, so that it is open if the statistics until now will count.

        Raises:
            UpdateError: Gradients are thrown away time and again.
        """
        if self._dropped_in_a_row > _MOST_SKIPPED_IN_A_ROW:
            raise UpdateError(
                f"the gradients of {self._dropped_in_a_row} backward passes in a row were cleared without a step of "
                "the optimizer that was given to NA-LoRA, so another one trains the model, or none; give NA-LoRA the "
                "optimizer that steps, after it was made for the last time."
            )
        has_new, self._has_new = self._has_new, False
        self._undecided |= has_new
        return has_new

    def _before_accumulation(self, index: int, gradient: Tensor) -> None:
        if self._undecided and index in self._left:
            self._decide(self._is_gone(index))

    def _after_accumulation(self, index: int, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self._undecided and index in self._left:
            # FSDP2 sets the gradients of sharded parameters itself, and calls no hook before that.
            self._decide(gradient is not self._left[index][0])
        self._left[index] = (gradient, gradient._version)
        self._has_new = self.backward_passes = True

    def _decide(self, gone: bool) -> None:
        self._undecided = False
        if gone:
            self._left.clear()
            self._dropped_in_a_row += 1
            self._dropped()

    def _is_gone(self, index: int) -> bool:
        gradient = self._parameters[index].grad
        if gradient is None:
            return True
        left, version = self._left[index]
        # Looking at values waits for the device, so only where something was done to them: zero_grad, or clipping.
        return (gradient is not left or gradient._version != version) and not bool(gradient.any())
