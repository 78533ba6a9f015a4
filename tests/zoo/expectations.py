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
        nothing_to_find: Whether the type has no feed-forward block of linear layers alone.
    """

    message: str
    reason: str
    nothing_to_find: bool = False


_NONE = "no feed-forward gate was found"
_NO_GATE = Refusal(_NONE, "it has no feed-forward block", nothing_to_find=True)
_CONVOLUTIONS = Refusal(_NONE, "its layers are convolutions", nothing_to_find=True)
_BETWEEN = Refusal(
    _NONE, "in its feed-forward blocks a convolution between the two linear layers mixes tokens", nothing_to_find=True
)
_NO_EMBEDDINGS = Refusal(
    "`get_input_embeddings` not auto", "PEFT cannot wrap it, because transformers does not find its embeddings"
)
_LAYOUT = "in a layout that PEFT's LoRA cannot adapt expert by expert"

REFUSALS: dict[str, Refusal] = {
    "dbrx": Refusal(_LAYOUT, "it keeps its experts in flattened matrices, which PEFT cannot adapt one by one"),
    "falcon_mamba": _NO_GATE,
    "granite_speech5_ctc": _NO_EMBEDDINGS,
    "ibert": Refusal(_NONE, "its layers quantise themselves and are no linear layers", nothing_to_find=True),
    "jetmoe": Refusal(_LAYOUT, "it applies the matrices of its experts in modules that PEFT cannot adapt one by one"),
    "mamba": _NO_GATE,
    "mamba2": _NO_GATE,
    "pp_formulanet": _NO_EMBEDDINGS,
    "pvt_v2": _BETWEEN,
    "segformer": _BETWEEN,
    "squeezebert": Refusal(_NONE, "its layers are grouped convolutions", nothing_to_find=True),
    **dict.fromkeys(
        (
            *("bit", "efficientnet", "hgnet_v2", "mobilenet_v1", "mobilenet_v2", "mobilevitv2", "poolformer"),
            *("pp_lcnet", "regnet", "resnet", "swiftformer", "textnet"),
        ),
        _CONVOLUTIONS,
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
    "funnel": "its later blocks see pooled tokens",
    "git": "it puts the image before the text",
    "pegasus_x": "its encoder sees global tokens beside the text",
    "moonshine": "it counts the frames of one recording alone",
    "moonshine_streaming": "its convolutions make a mask of their own, of more frames than it says",
    "Lumina2Transformer2DModel": "some of its layers see the text",
    "PixArtTransformer2DModel": "a layer of it sees the text alone",
    "perceiver": "its layers see latents",
    "pi0": "its second transformer sees a state and actions",
}

# Types in which what stands in padded places reaches real tokens, so that the mask itself says which are real.
MIXES_PADDING: dict[str, str] = {
    "convbert": "its convolutions",
    "hubert": "the norm over time of its feature extractor",
    "mobilebert": "its embeddings of three tokens at a time",
    "speech_to_text": "its convolutions",
    "whisper": "its attention to silence",
    "nystromformer": "its landmarks, which are means over all tokens",
    "prophetnet": "its predicted streams, which come behind the text",
    **dict.fromkeys(
        (
            *("sew", "sew-d", "speech-encoder-decoder", "speecht5", "unispeech", "unispeech-sat", "wav2vec2"),
            *("wav2vec2-conformer", "wavlm"),
        ),
        "the norm over time of its feature extractor",
    ),
    "yoso": "its hashed attention",
}

# Modules that a training step does not call, by type: a regular expression for their names, and when they are called.
NOT_CALLED: dict[str, tuple[str, str]] = {
    "esm": (r"esm\.contact_head.*", "for contacts"),
    "luke": (r".*entity.*", "for entities"),
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
