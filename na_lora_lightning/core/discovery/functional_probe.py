"""Identifies a gate that a model computes by function calls instead of an activation module.

The code between the layer that makes the pre-activation and the one that takes the gated result is called on
chosen values and judged by its answers: which output features make which channel, in which of them the answer is
not linear, and which known activation, behind a clamp perhaps, gives these answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from na_lora_lightning.core.activations import KNOWN_ACTIVATIONS, Activation, SigmoidGated
from na_lora_lightning.core.channels import ChannelSlice
from na_lora_lightning.core.discovery.row_probe import correspondence

# Values of a pre-activation at which the answer is looked at, far ones to find a clamp.
_LIMIT, _FAR, _POINTS = 12.0, 1e4, 96
_CLEAR_OF_CLAMPS = 2.0
_TOLERANCE = 1e-4
_LEAST_SLOPE = 0.01

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FunctionalGate:
    """What was identified.

    Attributes:
        channels: Which output features are the pre-activation, and how it is clamped.
        activation: The activation; None where it has no known form.
        is_self_gated: Whether it is of the form z·ρ(z).
        kind: ``"gated"`` where the same layer also makes the other branch, else ``"plain"``.
        width: Number of output features of the layer.
    """

    channels: ChannelSlice
    activation: Activation | None
    is_self_gated: bool
    kind: Literal["gated", "plain"]
    width: int

    def function_of(self, answer: Answer) -> Callable[[Tensor], Tensor]:
        """The activation as a function of pre-activations of any shape, up to a constant factor.

        Args:
            answer: The code that was identified, for outputs ``[rows, width]``.
        """
        features = self.channels.features

        def function(z: Tensor) -> Tensor:
            flat = z.reshape(-1)
            rows = -(-flat.numel() // features.numel())
            padded = torch.nn.functional.pad(flat, (0, rows * features.numel() - flat.numel()))
            output = torch.ones(rows, self.width, dtype=z.dtype, device=z.device)
            output = output.index_copy(1, features.to(z.device), padded.view(rows, -1))
            return answer(output).reshape(-1)[: flat.numel()].view(z.shape)

        return function


def identify(answer: Answer, like: Tensor) -> FunctionalGate | None:
    """Identifies the gate in a piece of code.

    Args:
        answer: Maps what a layer puts out, shaped as ``like``, to the gated result ``[..., channels]``,
            differentiably.
        like: An output of the layer, ``[..., features]``.

    Returns:
        The gate; None where the code does not work channel by channel, or is linear in what the layer puts out.
    """
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(like.shape, generator=generator) * 0.3 + 0.5).to(like.device, torch.float32)
    features = _features_of_channels(answer, start)
    if features is None:
        return None
    gate, other = features
    z = torch.linspace(-_LIMIT, _LIMIT, _POINTS, dtype=torch.float64)
    special = torch.tensor([-_FAR, _FAR, -1.0, 1.0, 0.0], dtype=torch.float64)
    answers = _answer_at(answer, start, gate, torch.cat([z, special]))
    near, far, (minus, plus, zero) = answers[:_POINTS], answers[_POINTS : _POINTS + 2], answers[-3:].tolist()
    slope = near.diff()
    if bool((slope - slope.mean()).abs().max() < _TOLERANCE * slope.abs().max()):
        return None
    activation, lowest, highest = _fit(z, near, far, minus, plus) or (None, None, None)
    ratio = near / z
    # A clamp of large values only ever lowers the ratio, so it is looked at where there is none.
    rising = bool((ratio[z <= _CLEAR_OF_CLAMPS].diff() * ratio[-1].sign() >= -_TOLERANCE * ratio.abs().max()).all())
    is_self_gated = activation is not None or (abs(zero) < _TOLERANCE and rising)
    kind: Literal["gated", "plain"] = "plain" if other is None else "gated"
    return FunctionalGate(ChannelSlice(gate, lowest, highest), activation, is_self_gated, kind, like.shape[-1])


@torch.no_grad()
def is_linear_in(answer: Answer, like: Tensor) -> bool:
    """Whether a piece of code is a linear map, up to a constant, of what a layer puts out.

    Args:
        answer: As :func:`identify` takes it.
        like: An output of the layer, ``[..., features]``.
    """
    generator = torch.Generator().manual_seed(0)
    start, step = (torch.randn(like.shape, generator=generator).to(like.device, torch.float32) for _ in range(2))
    first, second, third = (answer(start + factor * step) for factor in (-1.0, 0.0, 1.0))
    bend = (first + third - 2 * second).abs().max()
    return bool(bend <= _TOLERANCE * torch.stack([first, second, third]).abs().max())


def keeps_tokens_apart(answer: Answer, like: Tensor) -> bool:
    """Whether what a piece of code makes of a token depends on that token alone.

    Args:
        answer: As :func:`identify` takes it.
        like: An output of the layer, ``[..., features]``.
    """
    generator = torch.Generator().manual_seed(0)
    start, other = (torch.randn(like.shape, generator=generator) for _ in range(2))
    # Whatever looks back or around sees the first token of the first sample.
    other.flatten(0, -2)[1:] = start.flatten(0, -2)[1:]
    first, second = (answer(values.to(like.device)) for values in (start, other))
    change = (first - second).flatten(0, -2).abs().amax(dim=-1)
    return int((change > _TOLERANCE * first.abs().max()).sum()) <= 1


def _features_of_channels(answer: Answer, start: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Features of the gate channels, and of the other branch where the same layer makes it."""
    with torch.enable_grad():
        leaf = start.movedim(-1, 0).clone().requires_grad_(True)
        result = answer(leaf.movedim(0, -1))
        channels = result.shape[-1]
        found = correspondence(result, leaf) if result.requires_grad else None
    if found is None:
        return None
    first = found.one_to_one(channels)
    if first is not None:
        return first, None
    order = found.channels.argsort(stable=True)
    if not torch.equal(found.channels[order], torch.arange(channels).repeat_interleave(2)):
        return None
    pairs = found.rows[order].view(channels, 2)
    # The answer is bent at zero in the gate and, even where it is capped, not in the other branch.
    bent = torch.stack([_bend(answer, start, pairs[:, column]) for column in range(2)], dim=1)
    if bool((bent.min(dim=1).values > 0.1 * bent.max(dim=1).values).any()):
        return None
    gate = bent.argmax(dim=1, keepdim=True)
    return pairs.gather(1, gate)[:, 0], pairs.gather(1, 1 - gate)[:, 0]


@torch.no_grad()
def _bend(answer: Answer, start: Tensor, features: Tensor) -> Tensor:
    """Largest |h(1) + h(−1) − 2·h(0)| of each channel, the values in the brackets being those of ``features``."""
    total: Tensor | float = 0.0
    for value, factor in ((1.0, 1.0), (-1.0, 1.0), (0.0, -2.0)):
        moved = start.clone()
        moved[..., features.to(start.device)] = value
        total = total + factor * answer(moved)
    assert isinstance(total, Tensor)
    return total.abs().flatten(0, -2).amax(dim=0).cpu()


def _answer_at(answer: Answer, start: Tensor, gate: Tensor, z: Tensor) -> Tensor:
    """The answer, up to a constant factor, where every pre-activation channel takes the values ``z`` in turn."""
    per_call = start[..., 0].numel() * gate.numel()
    answers = []
    for part in z.split(per_call):
        padded = torch.cat([part, part[-1:].expand(per_call - part.numel())]).to(start)
        output = torch.ones_like(start)
        output[..., gate.to(start.device)] = padded.view(*start.shape[:-1], -1)
        with torch.no_grad():
            answers.append(answer(output).flatten()[: part.numel()].double().cpu())
    return torch.cat(answers)


def _fit(
    z: Tensor, near: Tensor, far: Tensor, minus: float, plus: float
) -> tuple[Activation, float | None, float | None] | None:
    """The known activation, and its clamp, that gives the answers up to a constant factor.

    Args:
        z: Pre-activations, ``[points]`` float64.
        near: The answers there.
        far: The answers at −10⁴ and 10⁴.
        minus: The answer at −1.
        plus: The answer at 1.
    """
    candidates: list[Activation] = list(KNOWN_ACTIVATIONS)
    if minus * plus < 0:
        # For z·sigmoid(k·z) the two answers are in the ratio −exp(k).
        slope = round(float(torch.log(torch.tensor(-plus / minus))), 4)
        # With a slope of zero it is a linear map.
        if slope > _LEAST_SLOPE:
            candidates.append(SigmoidGated(f"sigmoid_gated_{slope:g}", slope))
    for activation in candidates:
        found = _clamp_of(activation, z, near, far)
        if found is not None:
            return activation, *found
    return None


def _clamp_of(
    activation: Activation, z: Tensor, near: Tensor, at_far: Tensor
) -> tuple[float | None, float | None] | None:
    """Lower and upper clamp with which the activation gives the answers; None where it does not."""
    value = activation.evaluate(z).output
    clear = z.abs() <= _CLEAR_OF_CLAMPS
    if float(value[clear].abs().max()) == 0.0:
        return None
    factor = float((near[clear] * value[clear]).sum() / value[clear].square().sum())
    if factor == 0.0 or not bool(((near / factor - value)[clear].abs() < _TOLERANCE).all()):
        return None
    at_far = at_far / factor
    expected = activation.evaluate(torch.tensor([-_FAR, _FAR], dtype=torch.float64)).output
    lowest = highest = None
    if not torch.isclose(at_far[0], expected[0], rtol=1e-3, atol=_TOLERANCE):
        lowest = -_inverse(activation, at_far[0], -1.0)
    if not torch.isclose(at_far[1], expected[1], rtol=1e-3):
        highest = _inverse(activation, at_far[1], 1.0)
    fitted = activation.evaluate(z if lowest is None and highest is None else z.clamp(lowest, highest)).output
    if not bool(((near / factor - fitted).abs() < _TOLERANCE * fitted.abs().clamp(min=1.0)).all()):
        return None
    return lowest, highest


def _inverse(activation: Activation, value: Tensor, sign: float) -> float:
    """|z| of the given sign at which the activation takes a value, beyond where clamps are looked for."""
    low, high = 1.0, _FAR
    at_low = float(activation.evaluate(torch.tensor([sign * low], dtype=torch.float64)).output) - float(value)
    for _ in range(80):
        middle = 0.5 * (low + high)
        at_middle = float(activation.evaluate(torch.tensor([sign * middle], dtype=torch.float64)).output) - float(value)
        low, high = (middle, high) if at_middle * at_low > 0 else (low, middle)
    return round(0.5 * (low + high), 6)
