"""What differs between optimizers: wrappers around them, how they skip, and weights that they keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from na_lora_lightning.core.lora_layers import LoRARows
from na_lora_lightning.errors import UpdateError

# Packages whose wrappers do nothing to the weights after the optimizer inside has stepped.
_PLAIN_WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
_SCHEDULE_FREE = "schedulefree"
_SCHEDULE_FREE_WEIGHTS = ("x", "y", "z")


def stepping_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` moves the parameters, inside of wrappers such as accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    return stepping_optimizer(inner) if isinstance(inner, Optimizer) else optimizer


def require_reachable(optimizer: Any) -> None:
    """Checks that what an optimizer does to a parameter can be undone when its step ends.

    Args:
        optimizer: As it was given, wrappers included.

    Raises:
        UpdateError: It has no hooks, or moves parameters at another moment as well.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        if not _is_of(optimizer, *_PLAIN_WRAPPERS):
            raise UpdateError(
                f"{type(optimizer).__name__} wraps {type(inner).__name__} and may move weights after it has stepped, "
                f"masked rows among them; train with {type(inner).__name__} alone."
            )
        require_reachable(inner)
        return
    name = type(optimizer).__name__
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise UpdateError(
            f"{name} is not a torch.optim.Optimizer with hooks on its steps, so the update of a gate's rows cannot be "
            "reached; train with a subclass that calls super().__init__()."
        )
    swaps = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    if swaps and not _is_of(optimizer, _SCHEDULE_FREE):
        raise UpdateError(
            f"{name} has train() and eval(), between which it exchanges the weights, and where it keeps the others is "
            "not known, so a masked row could move in them; use the optimizers of the package schedulefree, or one "
            "that keeps no weights."
        )


def weights_in_state(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the tensors in an optimizer's state that are weights, and move with its parameters.

    Schedule-free optimizers keep the sequence z beside the parameter, which is x or y by turns, linear in the other
    two. Where z follows the mask as the parameter does, so does the third.
    """
    return _SCHEDULE_FREE_WEIGHTS if _is_of(optimizer, _SCHEDULE_FREE) else ()


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the step under way moves nothing, after an overflow.

    A fused optimizer is called by a ``GradScaler`` in any case and told of the overflow; others are not called then.
    """
    overflow = getattr(optimizer, "found_inf", None)
    return isinstance(overflow, Tensor) and bool(overflow)


def _is_of(optimizer: Any, *packages: str) -> bool:
    """Whether a class of the optimizer comes from one of the packages."""
    return any(kind.__module__.partition(".")[0] in packages for kind in type(optimizer).__mro__)


def optimizer_of_rows(rows: Iterable[LoRARows], optimizers: Iterable[Optimizer]) -> Optimizer:
    """Finds the optimizer that holds every parameter of LoRA rows.

    Raises:
        UpdateError: None does, some rows are in none, they are spread over several optimizers, or the optimizer
            moves parameters at other moments than its step.
    """
    outermost = {id(stepping_optimizer(optimizer)): optimizer for optimizer in optimizers}
    optimizers = [stepping_optimizer(optimizer) for optimizer in outermost.values()]
    holders: dict[int, Optimizer] = {}
    missing: list[str] = []
    owner_of = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for entry in rows:
        owner = owner_of.get(id(entry.parameter))
        if owner is None:
            missing.append(entry.name)
        else:
            holders[id(owner)] = owner
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UpdateError(
            f"no optimizer holds {', '.join(missing[:3])}{more}, so the update of these gates cannot be masked; "
            "give the optimizer all trainable LoRA parameters, and use a strategy that keeps the model's own "
            "parameters (not DeepSpeed)."
        )
    if len(holders) > 1:
        raise UpdateError(
            f"the gates' LoRA rows are spread over {len(holders)} optimizers, whose steps have no common moment "
            "for one mask; put all LoRA parameters into one optimizer (parameter groups are fine)."
        )
    (found,) = holders.values()
    require_reachable(outermost[id(found)])
    return found
