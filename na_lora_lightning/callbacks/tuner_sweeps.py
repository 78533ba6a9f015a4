"""Sweeps of Lightning's tuner: the learning-rate finder and the batch-size finder.

While they try rates or sizes they take every other callback out of the trainer, so that the callbacks of a method are
not called and the rate of plain training is found. Here the method is put around the sweep from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer

# What the finders' own hooks call, of either package; subclasses that sweep at other moments call them as well.
_SWEEPS = ("lr_find", "scale_batch_size")

Sweep = Callable[[Trainer, LightningModule], None]


class _FollowedSweep:
    """Stands in for a finder's method."""

    def __init__(self, sweep: Sweep, around: Callable[[Sweep, Trainer, LightningModule], None]) -> None:
        self._sweep = sweep
        self._around = around

    def __call__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._around(self._sweep, trainer, pl_module)


def follow_sweeps(trainer: Trainer, around: Callable[[Sweep, Trainer, LightningModule], None]) -> None:
    """Has every finder among the trainer's callbacks sweep inside of ``around(sweep, trainer, pl_module)``, once."""
    for callback, name, sweep in _sweeps(trainer.callbacks):  # type: ignore[attr-defined]
        if not isinstance(sweep, _FollowedSweep):
            setattr(callback, name, _FollowedSweep(sweep, around))


def leave_sweeps(callbacks: list[Any]) -> None:
    """Gives the finders among the callbacks their own methods back."""
    for callback, name, sweep in _sweeps(callbacks):
        if isinstance(sweep, _FollowedSweep):
            delattr(callback, name)


@contextmanager
def batches_shown(pl_module: LightningModule, show: Callable[[Any], None]) -> Iterator[None]:
    """Calls ``show(batch)`` before each training batch, by a hook of the module's, which sweeps leave in place."""
    hook = pl_module.on_train_batch_start

    def on_train_batch_start(batch: Any, batch_idx: int) -> int | None:
        show(batch)
        return hook(batch, batch_idx)

    pl_module.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pl_module.on_train_batch_start


def _sweeps(callbacks: list[Any]) -> list[tuple[Any, str, Any]]:
    return [
        (callback, name, getattr(callback, name))
        for callback in callbacks
        for name in _SWEEPS
        if callable(getattr(callback, name, None))
    ]
