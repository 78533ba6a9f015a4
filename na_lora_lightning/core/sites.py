"""What discovery finds: gate sites, their LoRA rows, and what was left out and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from na_lora_lightning.core.activations import Activation
from na_lora_lightning.core.channels import as_slice
from na_lora_lightning.core.experts import Experts
from na_lora_lightning.core.lora_layers import LoRARows, active_adapters, lora_rows, trained_a
from na_lora_lightning.core.model_parts import Part
from na_lora_lightning.core.pre_activations import PreActivationSource
from na_lora_lightning.errors import DiscoveryError

_NAMES_IN_ERROR = 4

FoundBy = Literal["probe", "storage", "position"]


@dataclass(eq=False)
class GateSite:
    """One place where an activation gates channels, with the LoRA rows that make its pre-activation.

    Attributes:
        name: Qualified name of the activation module, from the root model.
        kind: ``"gated"`` for h = φ(g) ⊙ u, ``"plain"`` for h = φ(g).
        activation: The activation φ.
        source: Where the pre-activation g', ``[..., channels]``, is read.
        lora_layer_name: Qualified name of the LoRA layer that makes g'.
        lora_layer: That PEFT layer.
        rows: Row of ``lora_B`` for each channel, ``[channels]``, int64.
        calls: Which calls of the activation module in a forward pass belong to this site, where several layers share
            the module; None stands for all.
        output_layer_name: Linear layer that consumes h, where one was seen.
        output_layer: That module, used by the diagnostics alone.
        found_by: ``"probe"`` (vector-Jacobian product), ``"storage"`` (shared memory) or ``"position"`` (as many
            outputs as channels, where each channel also depends a little on the others).
        experts: The stacked experts behind the site, which then stands for one network per expert; None for one.
        part: The part of a multimodal model that the site is in; None in a model of one part.
        branch: The module of that part where it sees other tokens than the text's (a vision tower, a projector, the
            encoder before a decoder); None where it sees those of the model's ``attention_mask``, or of its decoder.
        shares_mask: Whether the tokens of the branch are those of the model's ``attention_mask`` where the branch is
            called without a mask of its own.
        picked_from: The module that was given the tokens of which the site sees those that were picked for it, where
            it is in one expert of several.
        time_first: Whether the pre-activation is ``[length, batch, channels]``, or that as rows; None where its tokens
            are known to stand in another order than that, and than sample after sample.
        sees_words: Whether it may see words of a text that a denoiser is given, and not only what is denoised.
    """

    name: str
    kind: Literal["gated", "plain"]
    activation: Activation
    source: PreActivationSource
    lora_layer_name: str
    lora_layer: nn.Module
    rows: Tensor
    calls: frozenset[int] | None = None
    output_layer_name: str | None = None
    output_layer: nn.Module | None = None
    found_by: FoundBy = "probe"
    experts: Experts | None = None
    part: Part | None = None
    branch: nn.Module | None = None
    shares_mask: bool = False
    picked_from: nn.Module | None = None
    time_first: bool | None = False
    sees_words: bool = False

    @property
    def channels(self) -> int:
        """Number of gate channels of a network."""
        return int(self.rows.numel())

    @property
    def networks(self) -> int:
        """Number of feed-forward networks that the site stands for: its experts, or one."""
        return 1 if self.experts is None else self.experts.count

    @property
    def layer(self) -> int | None:
        """Index of the block that holds the site: the first number in the name of its LoRA layer."""
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.lora_layer_name)
        return int(match.group(1)) if match else None

    @property
    def label(self) -> str:
        """Short name for logs: ``layer_03``, ``vision_layer_03``, ``projector``, or the full name."""
        if self.layer is None or self.part == "projector":
            return self.part or self.name.replace(".", "_")
        return f"layer_{self.layer:02d}" if self.part is None else f"{self.part}_layer_{self.layer:02d}"

    @property
    def row_slice(self) -> slice | None:
        """The rows as a slice where they are evenly spaced and ascending, else None."""
        return as_slice(self.rows)

    @property
    def adapters(self) -> list[str]:
        """Names of the active adapters of the LoRA layer."""
        return active_adapters(self.lora_layer)

    def parameters(self) -> list[LoRARows]:
        """Parameters of the active adapters that have one row per output of the LoRA layer."""
        return lora_rows(self.lora_layer, self.lora_layer_name)

    def matrices_a(self) -> list[LoRARows]:
        """Trained matrices A of the active adapters, whose rows all channels of the LoRA layer share."""
        return trained_a(self.lora_layer, self.lora_layer_name)


@dataclass(frozen=True)
class LeftOut:
    """An activation that is not adapted.

    Attributes:
        name: Qualified name of the activation module.
        activation: Name of the activation.
        reason: Why it was left out.
        gate_without_lora: Whether it is a feed-forward gate whose producing layer has no LoRA.
        not_supported: Whether it has LoRA that would train unmasked, because its gates cannot be mapped yet.
        may_be_gate: Whether it has LoRA that trains unmasked, and it could not be told whether it is a gate.
        producers: Names of the linear layers, or of the stacked parameters, that make its pre-activation.
        target: Whether PEFT is to be told the ``"modules"`` or the ``"parameters"`` among them.
        remedy: What helps beside taking the layers out of the LoRA targets.
    """

    name: str
    activation: str
    reason: str
    gate_without_lora: bool = False
    not_supported: bool = False
    may_be_gate: bool = False
    producers: tuple[str, ...] = ()
    target: Literal["modules", "parameters"] = "modules"
    remedy: str | None = None


@dataclass
class GateMap:
    """All gate sites of a model, in the order of the forward pass."""

    sites: list[GateSite] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def __iter__(self) -> Iterator[GateSite]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def labels(self) -> list[str]:
        """One label per site for logs: ``layer_03`` where that is unique, else the full name."""
        short = [site.label for site in self.sites]
        return [
            label if short.count(label) == 1 else site.name.replace(".", "_")
            for label, site in zip(short, self.sites, strict=True)
        ]

    @property
    def channels(self) -> int:
        """Total number of gate channels."""
        return sum(site.channels * site.networks for site in self.sites)

    def require(self, allow_unmasked_gates: bool = False) -> GateMap:
        """Checks that there is something to adapt, and that no gate was missed by the LoRA targets.

        Args:
            allow_unmasked_gates: Accept that some gates are left as they are: those without LoRA, and those whose
                LoRA rows cannot be mapped, which then train as plain LoRA does.

        Returns:
            This map.

        Raises:
            DiscoveryError: No gate was found, no gate has LoRA, or some are left out and that is not allowed.
        """
        unmapped = [entry for entry in self.left_out if entry.not_supported]
        if unmapped and (not self.sites or not allow_unmasked_gates):
            remedies = [unmapped[0].remedy, "take these layers out of the LoRA targets"]
            if self.sites:
                remedies.append("set allow_unmasked_gates=True to train those as plain LoRA does")
            raise DiscoveryError(
                f"the gates of {len(unmapped)} layers with LoRA cannot be masked ({_some(e.name for e in unmapped)}): "
                f"{unmapped[0].reason}; {', or '.join(remedy for remedy in remedies if remedy)}."
            )
        bare = [entry for entry in self.left_out if entry.gate_without_lora]
        if not self.sites and bare:
            by_target: dict[str, set[str]] = {}
            for entry in bare:
                by_target.setdefault(entry.target, set()).update(map(_target_name, entry.producers))
            remedy = " and ".join(
                f"add {' or '.join(map(repr, sorted(names)))} to the LoRA target {target}"
                for target, names in sorted(by_target.items())
            )
            raise DiscoveryError(
                f"none of the model's {len(bare)} gates has LoRA ({_some(entry.name for entry in bare)}), so there is "
                f"nothing to adapt by their responsiveness; {remedy}, or train without the NA-LoRA callbacks."
            )
        if not self.sites:
            seen = f" (left out: {_some(f'{e.name}: {e.reason}' for e in self.left_out)})" if self.left_out else ""
            raise DiscoveryError(
                f"no feed-forward gate was found in the model{seen}; NA-LoRA needs an activation between a LoRA layer "
                "and a linear layer, so train this model without the NA-LoRA callbacks."
            )
        if bare and not allow_unmasked_gates:
            layers = _some(sorted({repr(_target_name(producer)) for entry in bare for producer in entry.producers}))
            raise DiscoveryError(
                f"{len(bare)} of {len(bare) + len(self.sites)} gates have no LoRA ({_some(e.name for e in bare)}); "
                f"extend the LoRA targets to the layers before them ({layers}), or set allow_unmasked_gates=True to "
                "leave those gates as they are."
            )
        return self


def _target_name(name: str) -> str:
    """How the LoRA targets name a layer; PEFT puts one that it trains in full below ``modules_to_save``."""
    *path, last = name.split(".")
    return path[-2] if len(path) > 1 and path[-1] == "modules_to_save" else last


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMES_IN_ERROR} more" if len(names) > _NAMES_IN_ERROR else ""
    return ", ".join(names[:_NAMES_IN_ERROR]) + more
