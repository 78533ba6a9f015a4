"""Activations against the float64 reference, and the values that the definitions give by hand."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN

from na_lora_lightning.core.activations import (
    GELU,
    GELU_TANH,
    KNOWN_ACTIVATIONS,
    QUICK_GELU,
    RELU,
    RELU_SQUARED,
    SILU,
    Activation,
    ElementwiseActivation,
)
from na_lora_lightning.core.discovery.activation_modules import activation_of, is_elementwise

NAMES = [activation.name for activation in KNOWN_ACTIVATIONS]
SMOOTH = [SILU, GELU, GELU_TANH, QUICK_GELU]


@lru_cache(maxsize=64)
def regime_boundaries(activation: Activation, tau: float, limit: float = 40.0) -> dict[str, tuple[float, ...]]:
    """Finds where the coarse homogeneity partition of an activation changes, from E itself.

    Args:
        activation: A self-gated activation.
        tau: Half-width of the homogeneous regime, |E − 1| ≤ tau; positive.
        limit: Roots are searched in [−limit, limit].

    Returns:
        ``{"zero": roots of E = 0, "lower": roots of E = 1 − tau, "upper": roots of E = 1 + tau}``, each
        ascending, accurate to 1e-9. Below the root of E = 0 a channel is suppressed.
    """

    def homogeneity(point: float | Tensor) -> Tensor:
        z = torch.as_tensor(point, dtype=torch.float64)
        return activation.evaluate(z.reshape(-1)).homogeneity

    def roots(level: float) -> tuple[float, ...]:
        z = torch.linspace(-limit, limit, 16001, dtype=torch.float64) + 1e-7
        gap = homogeneity(z) - level
        crossings = torch.nonzero(torch.sign(gap[:-1]) * torch.sign(gap[1:]) < 0).flatten().tolist()
        found = []
        for index in crossings:
            low, high = float(z[index]), float(z[index + 1])
            low_sign = float(gap[index])
            for _ in range(60):
                middle = 0.5 * (low + high)
                value = float(homogeneity(middle)) - level
                if value * low_sign > 0:
                    low = middle
                else:
                    high = middle
            found.append(0.5 * (low + high))
        return tuple(found)

    if activation.has_constant_homogeneity:
        return {"zero": (), "lower": (), "upper": ()}
    return {"zero": roots(0.0), "lower": roots(1.0 - tau), "upper": roots(1.0 + tau)}


@pytest.mark.parametrize("activation", KNOWN_ACTIVATIONS, ids=NAMES)
@given(z=st.floats(-30, 30, allow_subnormal=False))
def test_values_equal_the_reference_in_float64(activation: Activation, z: float) -> None:
    values = activation.evaluate(torch.tensor([z], dtype=torch.float64))
    name = activation.name
    assert values.selection.item() == pytest.approx(reference.selection(name, z), rel=1e-9, abs=1e-12)
    assert values.output.item() == pytest.approx(reference.output(name, z), rel=1e-9, abs=1e-12)
    expected = reference.selection_derivative(name, z)
    assert values.selection_derivative.item() == pytest.approx(expected, rel=1e-7, abs=1e-12)
    assert values.output_derivative.item() == pytest.approx(reference.output_derivative(name, z), rel=1e-7, abs=1e-12)
    if reference.selection(name, z) > 1e-8:
        assert values.homogeneity.item() == pytest.approx(reference.homogeneity(name, z), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("activation", SMOOTH, ids=[a.name for a in SMOOTH])
def test_what_is_summed_up_is_right_to_the_rounding_of_its_parts(activation: Activation) -> None:
    z = torch.cat([torch.linspace(-40, 40, 8001), torch.tensor([-1e4, 1e4])])
    values, exact = activation.evaluate(z), activation.evaluate(z.double())
    assert values.rounded_gap.isfinite().all()
    # E is a sum of 1 and of z times what is rounded.
    bound = 4 * torch.finfo(torch.float32).eps * (1.0 + z.abs() ** (4 if activation in (GELU, GELU_TANH) else 2))
    seen = exact.output.abs() > 1e-30
    assert ((values.rounded_gap - exact.homogeneity_gap).abs() <= bound)[seen].all()
    assert ((values.output * values.rounded_gap - exact.output * exact.homogeneity_gap)[~seen].abs() < 1e-25).all()
    assert ((values.output_derivative - exact.output_derivative).abs() <= bound).all()


@pytest.mark.parametrize("activation", SMOOTH, ids=[a.name for a in SMOOTH])
def test_closed_forms_equal_autograd(activation: Activation) -> None:
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64, requires_grad=True)
    output = activation.output(z, activation.selection(z))
    (derivative,) = torch.autograd.grad(output.sum(), z)
    values = activation.evaluate(z.detach())
    assert torch.allclose(values.output_derivative, derivative, atol=1e-12)
    # E = z·φ'/φ wherever φ neither vanishes nor cancels.
    away = (z.detach().abs() > 0.01) & (z.detach() > -5)
    quotient = (z * derivative / output).detach()
    assert torch.allclose(values.homogeneity[away], quotient[away], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("activation", "root", "peak", "peak_at"),
    [(SILU, -1.278, 1.278, 1.278), (GELU, -0.752, 1.294, 0.840), (QUICK_GELU, -0.751, 1.278, 0.751)],
)
def test_homogeneity_has_its_known_root_and_peak(
    activation: Activation, root: float, peak: float, peak_at: float
) -> None:
    assert regime_boundaries(activation, 0.1)["zero"] == pytest.approx((root,), abs=1e-3)
    z = torch.linspace(-5, 5, 200001, dtype=torch.float64)
    homogeneity = activation.evaluate(z).homogeneity
    assert homogeneity.max().item() == pytest.approx(peak, abs=1e-3)
    assert z[homogeneity.argmax()].item() == pytest.approx(peak_at, abs=2e-3)


@pytest.mark.parametrize(
    ("activation", "lowest", "lowest_at", "highest"),
    [(SILU, -0.0998, -2.40, 1.0998), (GELU, -0.129, -1.41, 1.129), (QUICK_GELU, -0.0998, -1.41, 1.0998)],
)
def test_output_derivative_has_its_known_range(
    activation: Activation, lowest: float, lowest_at: float, highest: float
) -> None:
    z = torch.linspace(-8, 8, 160001, dtype=torch.float64)
    derivative = activation.evaluate(z).output_derivative
    assert derivative.min().item() == pytest.approx(lowest, abs=5e-4)
    assert z[derivative.argmin()].item() == pytest.approx(lowest_at, abs=1e-2)
    assert derivative.max().item() == pytest.approx(highest, abs=5e-4)


@pytest.mark.parametrize("activation", SMOOTH, ids=[a.name for a in SMOOTH])
@pytest.mark.parametrize("tau", [0.05, 0.1, 0.2])
def test_regime_boundaries_part_the_line_as_homogeneity_does(activation: Activation, tau: float) -> None:
    bounds = regime_boundaries(activation, tau)
    for level, roots in ((0.0, bounds["zero"]), (1 - tau, bounds["lower"]), (1 + tau, bounds["upper"])):
        for root in roots:
            at_root = activation.evaluate(torch.tensor([root], dtype=torch.float64)).homogeneity
            assert at_root.item() == pytest.approx(level, abs=1e-8)
    assert len(bounds["zero"]) == 1
    assert len(bounds["lower"]) == 1
    assert len(bounds["upper"]) == 2


def test_homogeneity_stays_finite_and_linear_in_the_far_negative_tail() -> None:
    z = torch.tensor([-5.0, -20.0, -80.0])
    assert torch.allclose(SILU.evaluate(z).homogeneity, 1 + z, atol=0.05)
    # Φ underflows in float32 below −14; by Mills' ratio E → −z² there.
    assert torch.allclose(GELU.evaluate(z[1:]).homogeneity, -(z[1:] ** 2), rtol=0.01)


def test_constant_selection_and_homogeneity_are_recognised() -> None:
    assert RELU.has_constant_selection
    assert not RELU_SQUARED.has_constant_selection
    assert RELU.has_constant_homogeneity
    assert RELU_SQUARED.has_constant_homogeneity
    assert regime_boundaries(RELU_SQUARED, 0.1) == {"zero": (), "lower": (), "upper": ()}
    for activation in SMOOTH:
        assert not activation.has_constant_selection
        assert not activation.has_constant_homogeneity


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.SiLU(), SILU),
        (nn.SiLU(inplace=True), SILU),
        (nn.GELU(), GELU),
        (nn.GELU(approximate="tanh"), GELU_TANH),
        (nn.ReLU(), RELU),
        (ACT2FN["gelu"], GELU),
        (ACT2FN["gelu_new"], GELU_TANH),
        (ACT2FN["gelu_fast"], GELU_TANH),
        (ACT2FN["gelu_pytorch_tanh"], GELU_TANH),
        (ACT2FN["quick_gelu"], QUICK_GELU),
        (ACT2FN["relu2"], RELU_SQUARED),
    ],
)
def test_modules_are_identified_by_their_values(module: nn.Module, expected: Activation) -> None:
    assert activation_of(module) is expected


def test_other_modules_go_through_autograd_or_are_no_activations() -> None:
    mish = activation_of(nn.Mish())
    assert isinstance(mish, ElementwiseActivation)
    assert mish.self_gated
    for module in (nn.Tanh(), nn.Sigmoid(), nn.ReLU6(), ACT2FN["gelu_10"]):
        activation = activation_of(module)
        assert isinstance(activation, ElementwiseActivation)
    assert not ElementwiseActivation("tanh", torch.tanh).self_gated
    for module in (nn.LayerNorm(64, elementwise_affine=False), nn.Softmax(-1), nn.Identity(), nn.Dropout().eval()):
        assert activation_of(module) is None
    assert not is_elementwise(nn.Linear(64, 64))


def test_autograd_activation_equals_the_closed_form() -> None:
    generic = ElementwiseActivation("silu_again", nn.functional.silu)
    z = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    exact, found = SILU.evaluate(z), generic.evaluate(z)
    assert generic.self_gated
    assert torch.allclose(found.output, exact.output, atol=1e-12)
    assert torch.allclose(found.selection, exact.selection, atol=1e-6)
    assert torch.allclose(found.output_derivative, exact.output_derivative, atol=1e-12)
    assert torch.allclose(found.selection_derivative, exact.selection_derivative, atol=1e-4)
    assert torch.allclose(found.homogeneity, exact.homogeneity, atol=1e-6)


def test_learnable_activation_is_not_self_gated() -> None:
    class Learnable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(1.5))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z * torch.sigmoid(self.slope * z)

    activation = activation_of(Learnable())
    assert activation is not None
    assert not activation.self_gated
    slope = activation.evaluate(torch.zeros(1)).output_derivative.item()
    assert math.isclose(slope, 0.5, abs_tol=1e-6)
