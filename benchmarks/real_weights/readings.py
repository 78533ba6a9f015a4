"""Readings of the paper that the package does not have, as callbacks: M1, M2, M3, M4, M6 and S1, S2, S3.

The abstract names a derivative-based temporal-importance mask for gate-related LoRA updates and an activation-specific
step scale, and says neither on what the mask acts nor what importance is. Each class is one way to read that. Per gate
channel i, over the real tokens of a step: z is the pre-activation, δ what LoRA adds to it, ρ(z) = φ(z)/z the selection.
All masks keep half of the channels of a site, from ``warmup`` steps on, and are made anew every ``every`` steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from na_lora_lightning.compare.controls import GateStepCallback
from na_lora_lightning.core.activations import ActivationValues
from na_lora_lightning.core.lora_layers import lora_a, lora_b

STATISTICS: dict[str, Callable[[ActivationValues], Tensor]] = {
    "selection_derivative": lambda values: values.selection_derivative.abs(),
    "output_derivative": lambda values: values.output_derivative.abs(),
    "selection": lambda values: values.selection,
    "pre_activation": lambda values: values.pre_activation,
    "positive": lambda values: (values.pre_activation > 0).float(),
    "homogeneity": lambda values: values.homogeneity.clamp(-2.0, 2.0),
}


class Reading(GateStepCallback):
    """Base: keeps a moving average over steps of a mean over tokens, for each channel of each gate.

    Args:
        statistic: Of :data:`STATISTICS`.
        beta: Of the moving average, which is corrected for its start.
    """

    def __init__(self, statistic: str = "output_derivative", beta: float = 0.9) -> None:
        super().__init__()
        self.statistic = STATISTICS[statistic]
        self.beta = beta

    @override
    def begin(self, trainer: Trainer) -> None:
        sites = len(self.gates)
        self.average: list[Tensor] = [torch.zeros(())] * sites
        self.inputs: list[Tensor | None] = [None] * sites
        self._sums: list[Tensor | None] = [None] * sites
        self._tokens = [0.0] * sites
        self._mask: Tensor | None = None
        for index, site in enumerate(self.gates):
            self._handles.append(site.source.watch(lambda z, index=index: self._see(index, z)))
            keep = lambda module, args, index=index: self._keep(index, args)  # noqa: E731
            self._handles.append(site.lora_layer.register_forward_pre_hook(keep))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._mask = batch["attention_mask"].bool() if "attention_mask" in batch else None

    def _keep(self, index: int, args: tuple[Any, ...]) -> None:
        self.inputs[index] = args[0].detach() if torch.is_grad_enabled() else None

    def _see(self, index: int, z: Tensor) -> None:
        if torch.is_grad_enabled() and z.requires_grad:
            self.see(index, z)

    def see(self, index: int, z: Tensor) -> None:
        """Called with the pre-activation of each forward pass of training, ``[batch, length, channels]``."""
        self.add(index, self.values(index, self.real(z.detach()).float()))

    def values(self, index: int, z: Tensor) -> Tensor:
        """The statistic, ``[tokens, channels]``."""
        return self.statistic(self.gates.sites[index].activation.evaluate(z))

    def real(self, values: Tensor) -> Tensor:
        """Those of ``[batch, length, ...]`` that are of real tokens."""
        if self._mask is None or values.shape[:2] != self._mask.shape:
            return values.flatten(0, -2)
        return values[self._mask]

    def delta(self, index: int) -> Tensor:
        """What LoRA adds to the pre-activations of the last forward pass, ``[batch, length, channels]``."""
        site = self.gates.sites[index]
        layer, x = site.lora_layer, self.inputs[index]
        assert x is not None
        matrix_a, matrix_b = lora_a(layer, "default").weight, lora_b(layer, "default").weight.detach()[site.rows]
        return layer.scaling["default"] * ((x.to(matrix_a.dtype) @ matrix_a.detach().T) @ matrix_b.T)

    def add(self, index: int, values: Tensor) -> None:
        """Adds the statistic of some tokens to the step's."""
        total = values.sum(dim=0)
        former = self._sums[index]
        self._sums[index] = total if former is None else former + total
        self._tokens[index] += len(values)

    @override
    def before_step(self) -> None:
        for index, total in enumerate(self._sums):
            if total is not None:
                mean = self.importance(index, total / max(1.0, self._tokens[index]))
                self.average[index] = self.beta * self.average[index].to(mean) + (1 - self.beta) * mean
        self._sums, self._tokens = [None] * len(self.gates), [0.0] * len(self.gates)
        self.react()

    def importance(self, index: int, mean: Tensor) -> Tensor:
        """What of a step's mean enters the moving average."""
        return mean

    def react(self) -> None:
        """Called before each step, with the averages up to date."""

    def corrected(self, index: int) -> Tensor:
        """The moving average without its bias towards its start at zero, ``[channels]``."""
        return self.average[index] / (1 - self.beta**self.steps)


class MaskReading(Reading):
    """Base: a mask by importance.

    Args:
        statistic: See :class:`Reading`; ``"random"`` draws the mask, as a control.
        keep: Fraction of the channels of a site that are kept, or ``"above_mean"``.
        warmup: Steps before the first mask.
        every: Steps between two masks.
        seed: Of the control.
    """

    def __init__(
        self,
        statistic: str = "selection_derivative",
        keep: float | str = 0.5,
        warmup: int = 6,
        every: int = 6,
        seed: int = 0,
    ) -> None:
        super().__init__("output_derivative" if statistic == "random" else statistic)
        self.is_random = statistic == "random"
        self.keep, self.warmup, self.every = keep, warmup, every
        self._generator = torch.Generator().manual_seed(seed)

    @override
    def begin(self, trainer: Trainer) -> None:
        super().begin(trainer)
        self.masks: list[Tensor | None] = [None] * len(self.gates)

    @override
    def react(self) -> None:
        if self.steps > self.warmup and (self.steps - self.warmup - 1) % self.every == 0:
            self.masks = [self._made(index) for index in range(len(self.gates))]

    def _made(self, index: int) -> Tensor:
        scores = self.corrected(index)
        if self.is_random:
            scores = torch.rand(len(scores), generator=self._generator).to(scores)
        if self.keep == "above_mean":
            return (scores >= scores.mean()).float()
        kept = scores.topk(max(1, round(float(self.keep) * len(scores)))).indices
        return torch.zeros_like(scores).index_fill_(0, kept, 1.0)

    @override
    def weights(self, index: int, moved: Tensor) -> Tensor | None:
        mask = self.masks[index]
        return None if mask is None else mask.to(moved)


class MaskedGradient(MaskReading):
    """M1: the gradient of masked rows is zero *before* Adam, whose momentum may still move them."""

    @override
    def react(self) -> None:
        super().react()
        for parameter, rows, index in self._rows:
            mask = self.masks[index]
            if mask is not None and parameter.grad is not None:
                parameter.grad[rows] *= mask.to(parameter.grad)[:, None]

    @override
    def weights(self, index: int, moved: Tensor) -> None:
        return None


class ChangeOfSelection(MaskReading):
    """M2: importance is temporal change: how far a channel's mean selection moved since the step before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"statistic": "selection", **options})

    @override
    def begin(self, trainer: Trainer) -> None:
        super().begin(trainer)
        self._former: list[Tensor | None] = [None] * len(self.gates)

    @override
    def importance(self, index: int, mean: Tensor) -> Tensor:
        former, self._former[index] = self._former[index], mean
        return torch.zeros_like(mean) if former is None else (mean - former).abs()


class DriftOfSelection(MaskReading):
    """M2, against the start: importance is mean |ρ(z) − ρ(z − δ)|, how far LoRA has moved the selection."""

    @override
    def see(self, index: int, z: Tensor) -> None:
        activation = self.gates.sites[index].activation
        now, delta = self.real(z.detach()).float(), self.real(self.delta(index)).float()
        self.add(index, (activation.evaluate(now).selection - activation.evaluate(now - delta).selection).abs())


class Sensitivity(MaskReading):
    """M3: importance is mean |∂L/∂z|, which is |φ'(z)·u·∂L/∂h| in a gated block."""

    @override
    def see(self, index: int, z: Tensor) -> None:
        z.register_hook(lambda gradient: self.add(index, self.real(gradient.detach()).float().abs()))


class ForwardMask(MaskReading):
    """M4: ΔW = diag(m)·BA in the forward pass of training too; what is masked at the end is zero in B."""

    @override
    def begin(self, trainer: Trainer) -> None:
        super().begin(trainer)
        self._hidden = [torch.zeros_like(parameter[rows]) for parameter, rows, _ in self._rows]
        self._off = [torch.zeros(len(hidden), 1, device=hidden.device, dtype=torch.bool) for hidden in self._hidden]

    @override
    def react(self) -> None:
        former = self.masks
        super().react()
        for place, (parameter, rows, index) in enumerate(self._rows):
            mask = self.masks[index]
            if mask is None:
                continue
            if mask is not former[index]:
                off = mask[:, None] == 0
                whole = torch.where(self._off[place], self._hidden[place], parameter.detach()[rows])
                self._hidden[place], self._off[place] = whole, off
                parameter.detach()[rows] = torch.where(off, torch.zeros_like(whole), whole)
            if parameter.grad is not None:
                parameter.grad[rows] *= mask.to(parameter.grad)[:, None]


class TokenGradient(Reading):
    """M6: per token and channel, ∂L/∂δ ← [|φ'(z)| > τ]·∂L/∂δ, for the gradients of A and B of the gates.

    Args:
        tau: τ.
    """

    def __init__(self, tau: float = 0.25) -> None:
        super().__init__()
        self.tau = tau

    @override
    def begin(self, trainer: Trainer) -> None:
        super().begin(trainer)
        self._gradients: dict[int, list[Tensor]] = {}

    @override
    def see(self, index: int, z: Tensor) -> None:
        x = self.inputs[index]
        responds = self.values(index, z.detach().float()) > self.tau
        z.register_hook(lambda gradient: self._collect(index, gradient * responds, x))

    def _collect(self, index: int, gradient: Tensor, x: Tensor | None) -> None:
        assert x is not None
        site = self.gates.sites[index]
        layer = site.lora_layer
        a, b = (matrix(layer, "default").weight.detach() for matrix in (lora_a, lora_b))
        scaling = layer.scaling["default"]
        kept, rows = gradient.detach().flatten(0, -2).to(a.dtype), x.flatten(0, -2).to(a.dtype)
        of_b = torch.zeros_like(b)
        of_b[site.rows] = scaling * kept.T @ (rows @ a.T)
        of_a = scaling * (kept @ b[site.rows]).T @ rows
        former = self._gradients.get(index)
        both = [of_a, of_b]
        self._gradients[index] = both if former is None else [old + new for old, new in zip(former, both, strict=True)]

    @override
    def react(self) -> None:
        for index, (of_a, of_b) in self._gradients.items():
            site = self.gates.sites[index]
            for matrix, gradient in ((lora_a, of_a), (lora_b, of_b)):
                matrix(site.lora_layer, "default").weight.grad.copy_(gradient)
        self._gradients.clear()


class RegionScale(Reading):
    """S1: a constant step scale for each region of the channel's mean z.

    Args:
        below: Where the mean z is below −``border``.
        between: Where it is between.
        above: Where it is above ``border``.
        border: Where the selection is near its ends.
    """

    def __init__(self, below: float = 0.5, between: float = 1.0, above: float = 0.5, border: float = 1.278) -> None:
        super().__init__("pre_activation")
        self.below, self.between, self.above, self.border = below, between, above, border

    @override
    def weights(self, index: int, moved: Tensor) -> Tensor:
        mean = self.corrected(index).to(moved)
        found = torch.full_like(mean, self.between)
        return found.masked_fill(mean < -self.border, self.below).masked_fill(mean > self.border, self.above)


class SignScale(Reading):
    """S2: p·γ₊ + (1 − p)·γ₋, with p the share of tokens at which the channel's z is positive.

    Args:
        positive: γ₊.
        negative: γ₋.
    """

    def __init__(self, positive: float = 1.0, negative: float = 0.5) -> None:
        super().__init__("positive")
        self.positive, self.negative = positive, negative

    @override
    def weights(self, index: int, moved: Tensor) -> Tensor:
        share = self.corrected(index).to(moved)
        return share * self.positive + (1 - share) * self.negative


class DegreeScale(Reading):
    """S3: the step over the mean degree E of the channel, between a half and twice the step."""

    def __init__(self) -> None:
        super().__init__("homogeneity")

    @override
    def weights(self, index: int, moved: Tensor) -> Tensor:
        return 1 / self.corrected(index).to(moved).clamp(0.5, 2.0)
