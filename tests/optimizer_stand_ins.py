"""Optimizers of packages that the tests do without, as far as the method sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class Lion(Optimizer):
    """Signs of an interpolated momentum: no second moment, every entry moves by lr."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.sub_(torch.lerp(parameter.grad, momentum, 0.9).sign(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 0.01)
        return loss


class Averaging(torch.optim.SGD):
    """Keeps averaged weights beside the parameters, as a schedule-free optimizer does, where nobody knows."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class ScheduleFree(torch.optim.SGD):
    """SGD by Defazio et al.: the parameter is y in training and x in evaluation, z is in the state."""

    averaged = 0
    in_training = True

    @torch.no_grad()
    def _extrapolate(self, weight: float) -> None:
        for parameter in self.param_groups[0]["params"]:
            if "z" in self.state[parameter]:
                parameter.lerp_(self.state[parameter]["z"], weight)

    def train(self) -> None:
        if not self.in_training:
            self._extrapolate(0.1)
        self.in_training = True

    def eval(self) -> None:
        if self.in_training:
            self._extrapolate(1 - 1 / 0.9)
        self.in_training = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.averaged += 1
        weight, lr = 1 / self.averaged, self.param_groups[0]["lr"]
        for parameter in self.param_groups[0]["params"]:
            z = self.state[parameter].setdefault("z", parameter.clone())
            gradient = parameter.grad + 0.1 * parameter
            parameter.lerp_(z, weight)
            parameter.add_(gradient, alpha=lr * (0.9 * (1 - weight) - 1))
            z.sub_(gradient, alpha=lr)
        return loss
