"""Two gated blocks, and the weights of their rows recomputed with :mod:`reference` from what the blocks saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import reference
import torch
from hypothesis import assume
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions

MODULES: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class TwoBlocks(nn.Module):
    """Two gated blocks with different activations and widths, whose pre-activations are kept for the reference.

    Attributes:
        keeps: Whether they are, which is not to be while checkpointed blocks are run again.
        use_reentrant: Of the checkpoints around the blocks; None for no checkpoints.
    """

    def __init__(self, first: str, second: str, widths: tuple[int, int]) -> None:
        super().__init__()
        self.gate_0, self.up_0, self.down_0 = nn.Linear(6, widths[0]), nn.Linear(6, widths[0]), nn.Linear(widths[0], 6)
        self.gate_1, self.up_1, self.down_1 = nn.Linear(6, widths[1]), nn.Linear(6, widths[1]), nn.Linear(widths[1], 6)
        self.act_0, self.act_1 = MODULES[first](), MODULES[second]()
        self.names = (first, second)
        self.kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.keeps = True
        self.use_reentrant: bool | None = None

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for index in range(2):
            if self.training and self.use_reentrant is not None:
                x = checkpoint(self.block, x, attention_mask, index, use_reentrant=self.use_reentrant)
            else:
                x = self.block(x, attention_mask, index)
        return x

    def block(self, x: Tensor, attention_mask: Tensor | None, index: int) -> Tensor:
        gate = getattr(self, f"gate_{index}")(x)
        real = gate.reshape(-1, gate.shape[-1])
        if attention_mask is not None:
            real = real[attention_mask.reshape(-1).bool()]
        if self.training and self.keeps:
            self.kept[index].append(real.detach())
        hidden = getattr(self, f"act_{index}")(gate) * getattr(self, f"up_{index}")(x)
        return x + getattr(self, f"down_{index}")(hidden)


def two_blocks(first: str, second: str, widths: tuple[int, int], seed: int, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    blocks = TwoBlocks(first, second, widths)
    for name, parameter in blocks.named_parameters():
        # Pre-activations of a few units, so that all regimes occur.
        nn.init.normal_(parameter, std=0.1 if "down" in name else 0.9)
    model = get_peft_model(
        blocks, LoraConfig(r=3, lora_alpha=6, target_modules=["gate_0", "up_0", "gate_1"], **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


@dataclass
class Oracle:
    """Recomputes weights from kept pre-activations with :mod:`reference`, one optimizer step at a time."""

    importance: ImportanceOptions
    scale: StepScaleOptions
    names: tuple[str, str]
    history: tuple[list[list[float]], list[list[float]]] = field(default_factory=lambda: ([], []))
    previous: list[list[float] | None] = field(default_factory=lambda: [None, None])
    masks: list[list[float] | None] = field(default_factory=lambda: [None, None])
    group_history: dict[str, list[tuple[list[float], list[float]]]] = field(default_factory=dict)
    site_history: tuple[list[list[float]], list[list[float]]] = field(default_factory=lambda: ([], []))

    def average(self, series: list[list[float]], beta: float) -> list[float]:
        return [reference.corrected_average([row[i] for row in series], beta) for i in range(len(series[0]))]

    def _masks(self, step: int, tokens: list[list[list[float]]]) -> None:
        options = self.importance
        for site, name in enumerate(self.names):
            value = reference.responsiveness(options.criterion, name, tokens[site], options.signed)
            if options.criterion == "output_derivative_change":
                last, self.previous[site] = self.previous[site], value
                if last is None:
                    continue
                value = [abs(a - b) for a, b in zip(value, last, strict=True)]
            self.history[site].append(value)
        if not options.refreshes_at(step):
            return
        scores = [self.average(h, options.beta) if h else [] for h in self.history]
        if not scores[0]:
            return
        spans = [[0], [1]] if options.scope == "site" else [[0, 1]]
        for span in spans:
            joined = [value for site in span for value in scores[site]]
            kept = reference.top_k(joined, options.keep_fraction)
            ranked = sorted(joined, reverse=True)
            count = int(sum(kept))
            if count < len(ranked):
                assume(ranked[count - 1] - ranked[count] > 2e-6)
            for site in span:
                self.masks[site], kept = kept[: len(scores[site])], kept[len(scores[site]) :]

    def _groups(self, tokens: list[list[list[float]]]) -> dict[str, tuple[str, list[float]]]:
        """Values of each scale group: by activation, by site, or by channel."""
        groups: dict[str, tuple[str, list[float]]] = {}
        for site, name in enumerate(self.names):
            for channel in range(len(tokens[site][0])):
                granularity = self.scale.granularity
                key = (
                    name if granularity == "activation" else f"{site}" if granularity == "site" else f"{site}/{channel}"
                )
                groups.setdefault(key, (name, []))[1].extend(token[channel] for token in tokens[site])
        return groups

    def weights(self, step: int, tokens: list[list[list[float]]]) -> list[list[float]]:
        self._masks(step, tokens)
        options = self.scale
        for key, (name, values) in self._groups(tokens).items():
            self.group_history.setdefault(key, []).append(reference.regime_shares(name, values, options.tau))
        etas: list[list[float]] = []
        meaningful: list[bool] = []
        for site, name in enumerate(self.names):
            flat = [value for token in tokens[site] for value in token]
            self.site_history[site].append(reference.regime_shares(name, flat, options.tau)[0])
            shares = self.average(self.site_history[site], options.beta)
            assume(all(abs(share - 0.05) > 1e-5 for share in shares))
            meaningful.append(reference.is_meaningful(shares))
            row = []
            for channel in range(len(tokens[site][0])):
                granularity = options.granularity
                key = (
                    name if granularity == "activation" else f"{site}" if granularity == "site" else f"{site}/{channel}"
                )
                history = self.group_history[key]
                shares = self.average([h[0] for h in history], options.beta)
                gaps = self.average([h[1] for h in history], options.beta)
                row.append(reference.step_scale(shares, gaps, options.eta_min))
            etas.append(row)
        if options.normalize:
            etas = self._normalized(etas, meaningful)
        result = []
        for site in range(2):
            eta = etas[site] if meaningful[site] else [1.0] * len(etas[site])
            mask = self.masks[site] or [1.0] * len(eta)
            result.append([m * e for m, e in zip(mask, eta, strict=True)])
        return result

    def _normalized(self, etas: list[list[float]], meaningful: list[bool]) -> list[list[float]]:
        def spans(site: int) -> list[int]:
            if self.scale.granularity == "activation":
                return [0, 1]
            if self.scale.granularity == "site":
                return [other for other in range(2) if self.names[other] == self.names[site]]
            return [site]

        normalized = []
        for site in range(2):
            enclosing = [value for other in spans(site) if meaningful[other] for value in etas[other]]
            mean = sum(enclosing) / len(enclosing) if enclosing else 1.0
            normalized.append([value / mean for value in etas[site]])
        return normalized
