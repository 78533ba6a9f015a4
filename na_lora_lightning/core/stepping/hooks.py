"""Hooks on an optimizer that are called once for each of its steps, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from na_lora_lightning.errors import ConfigurationError

# Optimizers whose steps are corrected: none may be corrected twice.
_corrected: WeakSet[Optimizer] = WeakSet()


class StepHooks:
    """Tells the calls of hooks that belong to one step apart.

    Torch hooks the method ``step`` of each class. Where a subclass calls that of its base class in its own, hooks are
    called twice before and twice after one step, and an error in between leaves calls out.

    Args:
        before: Called with the optimizer when a step begins.
        after: Called with the optimizer when it is done.
        after_more: Called with the optimizer after what a subclass does once its base class has stepped.
        look_away: Calls a closure whose forward passes are not recorded, and returns what it returns.
    """

    def __init__(
        self,
        before: Callable[[Optimizer], None],
        after: Callable[[Optimizer], None],
        after_more: Callable[[Optimizer], None],
        look_away: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self._before = before
        self._after = after
        self._after_more = after_more
        self._look_away = look_away
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []
        self._is_open = self._is_taken = False

    def __bool__(self) -> bool:
        return bool(self._handles)

    def attach(self, optimizer: Optimizer) -> None:
        """Registers the hooks.

        Raises:
            ConfigurationError: The optimizer's steps are corrected already.
        """
        if optimizer in _corrected:
            raise ConfigurationError(
                f"the steps of this {type(optimizer).__name__} are corrected by NA-LoRA already, and would be twice; "
                "keep one callback or one `with` block for both mechanisms, or detach() the earlier controller."
            )
        _corrected.add(optimizer)
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self.step_begins),
            optimizer.register_step_post_hook(self.step_ends),
        ]

    def detach(self) -> None:
        """Removes them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._optimizer is not None:
            _corrected.discard(self._optimizer)
        self._optimizer = None

    def forget(self) -> None:
        """Forgets a step that failed."""
        self._is_open = self._is_taken = False

    def step_begins(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook before; returns other arguments where there is a closure."""
        begins, self._is_open, self._is_taken = not self._is_open, True, False
        if begins:
            self._before(optimizer)
        return _only_first_evaluation(args, kwargs, self._look_away)

    def step_ends(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook after."""
        was_taken, self._is_open, self._is_taken = self._is_taken, False, True
        (self._after_more if was_taken else self._after)(optimizer)


def _only_first_evaluation(
    args: tuple[Any, ...], kwargs: dict[str, Any], look_away: Callable[[Callable[[], Any]], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of a step in which all evaluations of the closure but the first are not looked at.

    The first evaluation is at the weights from which the step starts. Those after it are of the same tokens at weights
    that are tried out (LBFGS), and would count these tokens again.

    Args:
        args: Positional arguments of ``step``, the optimizer among them.
        kwargs: Keyword arguments of ``step``.
        look_away: Calls a closure unobserved and returns what it returns.

    Returns:
        The arguments to use instead; None where there is no closure.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None
    evaluated = False

    def observed_once() -> Any:
        nonlocal evaluated
        if evaluated:
            return look_away(closure)
        evaluated = True
        return closure()

    if "closure" in kwargs:
        return args, {**kwargs, "closure": observed_once}
    return (args[0], observed_once, *args[2:]), kwargs
