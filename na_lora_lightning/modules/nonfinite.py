"""NaN and infinity in training: where they begin, and steps that are left out because of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from na_lora_lightning.core.sharding import Shards
from na_lora_lightning.errors import NonFiniteError

OnNonFinite = Literal["stop", "skip"]

# So many are not an accident of the data, and nothing is learned meanwhile.
_MOST_SKIPPED_IN_A_ROW = 20


class NonFiniteStepWarning(UserWarning):
    """An optimizer step was left out, as its loss or gradient is NaN or infinite."""


class SkippedStep(Exception):  # noqa: N818
    """Thrown out of an optimizer's closure, so that the optimizer does nothing."""


class StepGuard:
    """Decides what becomes of optimizer steps whose loss or gradient is not finite.

    Attributes:
        skips: Whether the step under way is going to be left out.
        skipped_in_a_row: Steps left out since the last one that was taken.
    """

    def __init__(self) -> None:
        self.skips = False
        self.skipped_in_a_row = 0

    def leave_out(self, reason: str) -> str:
        """Marks the step under way; returns a warning.

        Raises:
            NonFiniteError: Too many steps in a row were left out.
        """
        if not self.skips:
            self.skips = True
            self.skipped_in_a_row += 1
        if self.skipped_in_a_row > _MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{_MOST_SKIPPED_IN_A_ROW} optimizer steps in a row were left out, and {reason}; lower the learning "
                "rate, or look at the data and the precision."
            )
        return f"an optimizer step is left out, as {reason}."

    def finish(self) -> None:
        """Ends a step.

        Raises:
            SkippedStep: It is to be left out.
        """
        if self.skips:
            self.skips = False
            raise SkippedStep
        self.skipped_in_a_row = 0


def loss_error(where: str, value: float, origin: str) -> NonFiniteError:
    """The error of a loss that is not finite.

    Args:
        where: Which batch of which step.
        value: The loss.
        origin: What :func:`nonfinite_origin` said.
    """
    return NonFiniteError(
        f"the loss of {where} is {value}, and {origin}; resume from the last checkpoint with a lower learning rate or "
        "another precision, look at this batch, or set model.loss.on_nonfinite to 'skip'."
    )


def has_finite_gradients(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether every gradient is finite; waits for the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return bool(torch.nn.utils.get_total_norm(gradients).isfinite()) if gradients else True


def require_finite(state: Mapping[str, Tensor], step: int) -> None:
    """Checks weights before they are saved; waits for the device.

    Raises:
        NonFiniteError: One is not finite; names the first.
    """
    name = _first_nonfinite(state.items())
    if name is not None:
        raise NonFiniteError(
            f"the weights {name!r} are not finite after optimizer step {step}, so they are not saved; resume from the "
            "last checkpoint with a lower learning rate or another precision."
        )


@torch.no_grad()
def nonfinite_origin(model: nn.Module, run: Callable[[], Any]) -> str:
    """Says where NaN or infinity begins, in a forward pass of its own.

    Args:
        model: The model.
        run: Calls it.

    Returns:
        A clause that names a weight, or the first module that makes a value that is not finite from finite ones.
    """
    if Shards(model):
        # A pass of its own needs all processes, and the others go on.
        return "where it begins is not looked for in a sharded model"
    name = _first_nonfinite(model.named_parameters())
    if name is not None:
        return f"the weights {name!r} are not finite since an earlier step"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Attention masks are −∞ on purpose.
            given = [value for key, value in kwargs.items() if "mask" not in key]
            if not found and _is_finite((args, given)) and not _is_finite(output):
                found.append(f"it begins in {name!r} ({type(module).__name__}), whose input is finite")

        return hook

    # Inner modules return first, so that the first to be found is the innermost.
    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the activations of every layer are finite"


def _first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((name for name, tensor in tensors if not _is_finite(tensor)), None)


def _is_finite(value: Any) -> bool:
    """Whether every floating-point tensor in nested values is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.detach().isfinite().all())
    if isinstance(value, Mapping):
        return all(_is_finite(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_finite(inner) for inner in value)
    return True
