"""Self-gated activations: value φ, selection weight ρ, their derivatives, and local effective homogeneity E.

A self-gated activation is φ(z) = z·ρ(z), where ρ is its *selection weight*. Its local effective homogeneity
(degree in Euler's sense) is E(z) = z·φ'(z)/φ(z) = 1 + z·ρ'(z)/ρ(z): E = 1 where a small change of z acts as
under a linear map, and E far from 1 where it moves the selection.

SiLU, QuickGELU and the tanh form of GELU share one shape, ρ(z) = sigmoid(a(z)), for which ρ' = ρ(1−ρ)·a' and
E = 1 + z·a'·(1−ρ), which stays accurate where ρ itself underflows. Any other element-wise function is differentiated
by autograd (:class:`ElementwiseActivation`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


class ActivationValues:
    """Values of one activation at given pre-activations, each computed at most once.

    Attributes:
        pre_activation: z, any shape, floating point.
    """

    def __init__(self, activation: Activation, pre_activation: Tensor) -> None:
        self._activation = activation
        self.pre_activation = pre_activation

    @cached_property
    def selection(self) -> Tensor:
        """ρ(z), the shape of z."""
        return self._activation.selection(self.pre_activation)

    @cached_property
    def rejection(self) -> Tensor:
        """1 − ρ(z), the shape of z, without cancellation for large z where the activation can say it so."""
        return self._activation.rejection(self.pre_activation, self.selection)

    @cached_property
    def output(self) -> Tensor:
        """φ(z) = z·ρ(z), the shape of z."""
        return self._activation.output(self.pre_activation, self.selection)

    @cached_property
    def selection_derivative(self) -> Tensor:
        """ρ'(z), the shape of z."""
        return self._activation.selection_derivative(self.pre_activation, self)

    @cached_property
    def output_derivative(self) -> Tensor:
        """φ'(z) = ρ(z) + z·ρ'(z), the shape of z."""
        return self._activation.output_derivative(self.pre_activation, self)

    @cached_property
    def homogeneity_gap(self) -> Tensor:
        """E(z) − 1, the shape of z; 0 by convention where φ vanishes together with its derivative."""
        return self._activation.homogeneity_gap(self.pre_activation, self)

    @cached_property
    def rounded_gap(self) -> Tensor:
        """E(z) − 1 to the rounding of E, the shape of z; anything where φ underflows, where it weighs nothing."""
        return self._activation.rounded_gap(self.pre_activation, self)

    @property
    def homogeneity(self) -> Tensor:
        """E(z), the shape of z."""
        return 1.0 + self.homogeneity_gap


class Activation(ABC):
    """An element-wise activation, described by its selection weight.

    Attributes:
        name: Name used in tables and logs; equal names mean equal functions.
        self_gated: Whether φ(z) = z·ρ(z) with a non-negative, non-decreasing ρ; otherwise only φ' has a meaning.
    """

    name: str
    self_gated: bool = True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def evaluate(self, pre_activation: Tensor) -> ActivationValues:
        """Returns lazily computed values at ``pre_activation`` (any shape, float32 or float64)."""
        return ActivationValues(self, pre_activation)

    @abstractmethod
    def selection(self, z: Tensor) -> Tensor:
        """ρ(z)."""

    @abstractmethod
    def selection_derivative(self, z: Tensor, values: ActivationValues) -> Tensor:
        """ρ'(z)."""

    @abstractmethod
    def homogeneity_gap(self, z: Tensor, values: ActivationValues) -> Tensor:
        """E(z) − 1."""

    def rounded_gap(self, z: Tensor, values: ActivationValues) -> Tensor:
        """E(z) − 1."""
        return values.homogeneity_gap

    def output(self, z: Tensor, selection: Tensor) -> Tensor:
        """φ(z), given ρ(z)."""
        return z * selection

    def rejection(self, z: Tensor, selection: Tensor) -> Tensor:
        """1 − ρ(z), given ρ(z)."""
        return 1.0 - selection

    def output_derivative(self, z: Tensor, values: ActivationValues) -> Tensor:
        """φ'(z) = ρ(z) + z·ρ'(z)."""
        return torch.addcmul(values.selection, z, values.selection_derivative)

    @cached_property
    def has_constant_selection(self) -> bool:
        """Whether ρ' vanishes almost everywhere (ReLU, LeakyReLU), so that |ρ'| ranks nothing."""
        return bool(self.evaluate(grid()).selection_derivative.abs().max() < 1e-6)

    @cached_property
    def has_constant_homogeneity(self) -> bool:
        """Whether E is constant on the support of φ (ReLU, ReLU², identity): no partition is meaningful."""
        values = self.evaluate(grid())
        supported = values.homogeneity[values.output.abs() > 1e-9]
        return bool(supported.max() - supported.min() < 1e-3) if supported.numel() else True


def grid(points: int = 4000, limit: float = 12.0) -> Tensor:
    """Float64 points in [−limit, limit] that avoid 0, where ρ = φ/z is not defined by division."""
    return torch.linspace(-limit, limit, points, dtype=torch.float64)


class SigmoidGated(Activation):
    """φ(z) = z·sigmoid(a(z)) with a(z) = slope·(z + cubic·z³).

    ½(1 + tanh v) = sigmoid(2v), so that the tanh form of GELU is one with slope 2·√(2/π) and cubic 0.044715.
    """

    def __init__(self, name: str, slope: float, cubic: float = 0.0) -> None:
        self.name = name
        self.slope = slope
        self.cubic = cubic

    def _logit(self, z: Tensor) -> Tensor:
        if self.cubic:
            return self.slope * (z + self.cubic * z**3)
        return z if self.slope == 1.0 else self.slope * z

    def _times_logit_derivative(self, factor: Tensor, z: Tensor) -> Tensor:
        if self.cubic:
            return factor * (self.slope + 3.0 * self.slope * self.cubic * z * z)
        return factor if self.slope == 1.0 else self.slope * factor

    def selection(self, z: Tensor) -> Tensor:
        """ρ(z) = sigmoid(a(z))."""
        return torch.sigmoid(self._logit(z))

    def rejection(self, z: Tensor, selection: Tensor) -> Tensor:
        """1 − ρ(z) = sigmoid(−a(z)), which does not cancel for large z."""
        return torch.sigmoid(-self._logit(z))

    def selection_derivative(self, z: Tensor, values: ActivationValues) -> Tensor:
        """ρ'(z) = ρ·(1−ρ)·a'(z)."""
        return self._times_logit_derivative(values.selection * values.rejection, z)

    def homogeneity_gap(self, z: Tensor, values: ActivationValues) -> Tensor:
        """E(z) − 1 = z·a'(z)·(1−ρ)."""
        return self._times_logit_derivative(z * values.rejection, z)

    def rounded_gap(self, z: Tensor, values: ActivationValues) -> Tensor:
        """E(z) − 1 = a'(z)·(z − φ)."""
        return self._times_logit_derivative(z - values.output, z)

    def output_derivative(self, z: Tensor, values: ActivationValues) -> Tensor:
        """φ'(z) = ρ·E."""
        return torch.addcmul(values.selection, values.selection, values.rounded_gap)


class GaussianGated(Activation):
    """GELU in its exact form: φ(z) = z·Φ(z), with Φ the standard normal distribution function."""

    name = "gelu"

    @staticmethod
    def _density(z: Tensor) -> Tensor:
        return torch.exp(-0.5 * z * z) * (1.0 / math.sqrt(2.0 * math.pi))

    def selection(self, z: Tensor) -> Tensor:
        """ρ(z) = Φ(z) = ½·erfc(−z/√2), which keeps its relative accuracy in the lower tail."""
        return 0.5 * torch.erfc(z * -math.sqrt(0.5))

    def selection_derivative(self, z: Tensor, values: ActivationValues) -> Tensor:
        """ρ'(z), the standard normal density."""
        return self._density(z)

    def homogeneity_gap(self, z: Tensor, values: ActivationValues) -> Tensor:
        """E(z) − 1 = z·pdf(z)/Φ(z) = z·√(2/π)/erfcx(−z/√2), which neither underflows nor cancels in the tails."""
        return z * _SQRT_2_OVER_PI / torch.special.erfcx(z * -math.sqrt(0.5))

    def rounded_gap(self, z: Tensor, values: ActivationValues) -> Tensor:
        """E(z) − 1 = z·pdf(z)/Φ(z); a CPU takes ten times as long for erfcx."""
        return (z * values.selection_derivative).div_(values.selection.clamp(min=torch.finfo(z.dtype).tiny))


class RectifiedPower(Activation):
    """φ(z) = max(z, 0)^power: ReLU (power 1, ρ = 1[z>0]) and ReLU² (power 2, ρ = max(z, 0))."""

    def __init__(self, name: str, power: int) -> None:
        self.name = name
        self.power = power

    def selection(self, z: Tensor) -> Tensor:
        """ρ(z) = max(z, 0)^(power−1), and 1[z>0] for power 1."""
        return (z > 0).to(z.dtype) if self.power == 1 else z.clamp(min=0.0) ** (self.power - 1)

    def selection_derivative(self, z: Tensor, values: ActivationValues) -> Tensor:
        """ρ'(z), 0 at the kink."""
        if self.power == 1:
            return torch.zeros_like(z)
        return (self.power - 1) * z.clamp(min=0.0) ** (self.power - 2) * (z > 0)

    def homogeneity_gap(self, z: Tensor, values: ActivationValues) -> Tensor:
        """E(z) − 1 = power − 1 on the support, 0 by convention off it."""
        return (self.power - 1.0) * (z > 0).to(z.dtype)


class ElementwiseActivation(Activation):
    """Any element-wise function, with φ' from autograd, ρ = φ/z, ρ' = (φ' − ρ)/z and E = z·φ'/φ.

    Args:
        name: Of the activation.
        function: The element-wise φ, differentiable, any shape to the same shape.
        self_gated: As in :class:`Activation`; found numerically when None.
    """

    def __init__(self, name: str, function: Callable[[Tensor], Tensor], self_gated: bool | None = None) -> None:
        self.name = name
        self._function = function
        self.self_gated = self._looks_self_gated() if self_gated is None else self_gated

    def _looks_self_gated(self) -> bool:
        """φ(0) = 0 and φ(z)/z non-negative, non-decreasing and not constant."""
        z = grid().to(torch.float32)
        with torch.no_grad():
            at_zero = self._function(torch.zeros(1))
            ratio = self._function(z) / z
        rises = bool((ratio.diff() >= -1e-4).all()) and bool(ratio[-1] - ratio[0] > 1e-3)
        return bool(at_zero.abs().max() < 1e-6) and bool((ratio >= -1e-6).all()) and rises

    def _value_and_derivative(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = z.detach().clone().requires_grad_(True)
            value = self._function(leaf)
            (derivative,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), derivative.detach()

    @torch.no_grad()
    def output(self, z: Tensor, selection: Tensor) -> Tensor:
        """φ(z)."""
        return self._function(z)

    def selection(self, z: Tensor) -> Tensor:
        """ρ(z) = φ(z)/z, continued by φ'(0) at zero."""
        value, derivative = self._value_and_derivative(z)
        near_zero = z.abs() < 1e-4
        return torch.where(near_zero, derivative, value / torch.where(near_zero, 1.0, z))

    def output_derivative(self, z: Tensor, values: ActivationValues) -> Tensor:
        """φ'(z) by autograd."""
        return self._value_and_derivative(z)[1]

    def selection_derivative(self, z: Tensor, values: ActivationValues) -> Tensor:
        """ρ'(z) = (φ'(z) − ρ(z))/z; near zero, where that cancels, at the nearest point where it does not."""
        step = 1e-2 if z.dtype != torch.float64 else 1e-4
        moved = torch.where(z.abs() < step, torch.where(z < 0, -step, step).to(z.dtype), z)
        value, derivative = self._value_and_derivative(moved)
        return (derivative - value / moved) / moved

    def homogeneity_gap(self, z: Tensor, values: ActivationValues) -> Tensor:
        """E(z) − 1 = z·φ'(z)/φ(z) − 1, 0 by convention where φ = 0."""
        value, derivative = self._value_and_derivative(z)
        silent = value == 0
        return torch.where(silent, 0.0, z * derivative / torch.where(silent, 1.0, value) - 1.0)


SILU = SigmoidGated("silu", slope=1.0)
GELU = GaussianGated()
GELU_TANH = SigmoidGated("gelu_tanh", slope=2.0 * _SQRT_2_OVER_PI, cubic=0.044715)
QUICK_GELU = SigmoidGated("quick_gelu", slope=1.702)
RELU = RectifiedPower("relu", power=1)
RELU_SQUARED = RectifiedPower("relu_squared", power=2)

KNOWN_ACTIVATIONS: tuple[Activation, ...] = (SILU, GELU, GELU_TANH, QUICK_GELU, RELU, RELU_SQUARED)
