"""What is known about single model types: why one is refused, and where it differs from the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from zoo.tiny_models import TinyModel


class Refusal(NamedTuple):
    """A refusal that is right.

    Attributes:
        message: Part of the error's message.
        reason: Why, in one sentence without a full stop.
    """

    message: str
    reason: str


_NO_GATE = Refusal("no feed-forward gate was found", "it has no feed-forward block")
_LAYOUT = "in a layout that PEFT's LoRA cannot adapt expert by expert"

REFUSALS: dict[str, Refusal] = {
    "dbrx": Refusal(_LAYOUT, "it keeps its experts in flattened matrices, which PEFT cannot adapt one by one"),
    "falcon_mamba": _NO_GATE,
    "jetmoe": Refusal(_LAYOUT, "it applies the matrices of its experts in modules that PEFT cannot adapt one by one"),
    "mamba": _NO_GATE,
    "mamba2": _NO_GATE,
    "pp_formulanet": Refusal(
        "`get_input_embeddings` not auto", "PEFT cannot wrap it, because transformers does not find its embeddings"
    ),
}

# Names under which the language side lies, where the model's own ``get_decoder()`` is not all of it.
LANGUAGE_SIDE: dict[str, tuple[str, ...]] = {
    "mistral4": ("",),
    "pi0": ("model.dit", "model.vlm"),
    "t5gemma2": ("model.encoder", "model.decoder"),
    "udop": ("encoder", "decoder"),
}

# Types in whose gates padding cannot be told from the mask, because they see other tokens than the mask is for.
PADDING: dict[str, str] = {
    "blt": "some of its layers see patches of bytes",
    "cpmant": "it puts prompt tokens before the text",
    "git": "it puts the image before the text",
    "pi0": "its second transformer sees a state and actions",
    "prophetnet": "its layers see the predicted streams beside the text",
    "xlnet": "its layers see time before batch",
}

# Feed-forward blocks without a site, by type: a pattern of block names, and why.
WITHOUT_SITE: dict[str, dict[str, str]] = {}


def _image_states(tiny: TinyModel) -> dict[str, Any]:
    width = tiny.model.config.get_text_config().hidden_size
    return {"cross_attention_states": torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3))}


def _protein(tiny: TinyModel) -> dict[str, Any]:
    tokens = torch.randint(4, 20, (2, 6), generator=torch.Generator().manual_seed(3))
    return {"protein_input_ids": tokens, "protein_attention_mask": torch.ones_like(tokens)}


# Inputs without which some blocks of the language side would not be run.
MORE_INPUTS: dict[str, Callable[[TinyModel], dict[str, Any]]] = {
    "evolla": _protein,
    "mllama": _image_states,
}
