"""Puts LoRA on all linear layers and stacked experts of the language side of a tiny model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from zoo.expectations import LANGUAGE_SIDE, NOT_CALLED
from zoo.tiny_models import TinyModel

from na_lora_lightning.core.experts import expert_owners, stacked_parameters
from na_lora_lightning.core.model_parts import Part
from na_lora_lightning.models.targets import LoRATargets, lora_targets

# Parts of a path that lead away from the language side, wherever they stand.
FOREIGN = (
    "vision|visual|image|img_|video|audio|speech|vqmodel|protein_encoder|qformer|projector|connector|aligner|merger|"
    "resampler|patch_embed"
)

# Mappings whose models are adapted as a whole, as are those for speech that are given sound.
WHOLE = ("text-encoding", "image-classification", "diffusers")
PARTS: tuple[Part, ...] = ("language",)


@dataclass(frozen=True)
class LanguageSide:
    """Which modules are on the language side: all of a causal language model but its towers for images and sound.

    Attributes:
        prefixes: Names of modules that hold it.
        foreign: Whether towers within them are left out.
        not_called: A regular expression for modules that a training step does not call.
    """

    prefixes: tuple[str, ...]
    foreign: bool = True
    not_called: str = ""

    @property
    def others(self) -> str:
        """A regular expression that matches the names of all other modules."""
        left_out = [rf".*(?:{FOREIGN}).*"] if self.foreign else []
        if "" not in self.prefixes:
            left_out.append(rf"(?!(?:{'|'.join(map(re.escape, self.prefixes))})(?:\.|$)).*")
        return "|".join([*left_out, *([self.not_called] if self.not_called else [])]) or "(?!)"

    def __contains__(self, name: object) -> bool:
        return re.fullmatch(self.others, str(name)) is None


def language_side(tiny: TinyModel) -> LanguageSide:
    """The part of a model that is adapted: its language side, or all of it where there is no text."""
    not_called = NOT_CALLED.get(tiny.model_type, ("", ""))[0]
    if tiny.mapping in WHOLE or (tiny.mapping == "speech" and "input_ids" not in tiny.inputs):
        return LanguageSide(("",), foreign=False, not_called=not_called)
    halves = tiny.mapping in ("seq2seq", "speech") and tiny.model.config.is_encoder_decoder
    if tiny.mapping in ("causal-lm", "masked-lm") or halves:
        return LanguageSide(("",), not_called=not_called)
    if tiny.model_type in LANGUAGE_SIDE:
        return LanguageSide(LANGUAGE_SIDE[tiny.model_type])
    decoder = tiny.model.get_decoder()
    return LanguageSide((next(name for name, module in tiny.model.named_modules() if module is decoder),))


def with_lora(tiny: TinyModel, side: LanguageSide, seed: int = 1) -> PeftModel:
    """Wraps the model and gives every ``lora_B`` random values, so that the adapter does something."""
    model = tiny.model
    if tiny.mapping == "diffusers":
        targets = LoRATargets([name for name, module in model.named_modules() if type(module) is nn.Linear], None, None)
    elif all(name in side for name, _ in model.named_modules()):
        targets = lora_targets(model, "all-linear", "all-experts", parts=get_args(Part))
    else:
        owners = [(name, owner) for name, owner, _ in expert_owners(model) if name in side]
        experts = [f"{name}.{parameter}" for name, owner in owners for parameter in stacked_parameters(owner)]
        targets = lora_targets(model, "all-linear", experts, side.others, parts=PARTS)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets.target_modules,
        target_parameters=targets.target_parameters,
        exclude_modules=targets.exclude_modules,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return wrapped
