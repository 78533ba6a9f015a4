"""Tiny models shared by the tests; nothing here needs a hub, a GPU, or more than milliseconds."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

# More threads make operations this small slower, and much slower on a busy machine.
torch.set_num_threads(1)

# Put on tests of stacked experts with LoRA.
needs_stacked_experts = pytest.mark.skipif(
    Version(version("peft")) < Version("0.19"),
    reason="PEFT 0.18 takes stacked experts the other way round, and their gates are refused",
)
needs_transformers_5 = pytest.mark.skipif(
    Version(version("transformers")) < Version("5"), reason="the command line needs transformers 5"
)

VOCABULARY = 64
HIDDEN = 16
GATE_CHANNELS = 24
LAYERS = 2

# Configurations of the same size, whatever the family.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": GATE_CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

LLAMA_TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_fc", "mlp.c_proj"]

# The plain reading of the method, for tests of a mechanism whose numbers depend on it: the package's defaults differ.
PLAIN_IMPORTANCE: dict[str, Any] = {"keep_fraction": 0.5, "criterion": "selection_derivative"}
PLAIN_SCALE: dict[str, Any] = {"granularity": "activation", "normalize": False, "matrix_a_factor": 1.0}


def tiny_llama(seed: int = 0, layers: int = LAYERS, activation: str = "silu") -> LlamaForCausalLM:
    """A two-layer Llama with 24 SiLU gate channels a layer."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": layers, "hidden_act": activation}))


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A two-layer GPT-2 with 64 tanh-GELU channels a layer in ``Conv1D`` layers, without dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return GPT2LMHeadModel(config)


def tiny_mixtral(seed: int = 0) -> MixtralForCausalLM:
    """A two-layer Mixtral with 4 experts of 24 SiLU gate channels a layer, two for each token."""
    torch.manual_seed(seed)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3)
    return MixtralForCausalLM(config)


def with_lora(model: nn.Module, targets: list[str] | str, seed: int = 1, **options: object) -> PeftModel:
    """Wraps ``model`` with rank-4 LoRA and gives B a non-zero start, so that the adapter does something."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    settings.update(options)
    settings.setdefault("fan_in_fan_out", isinstance(model, GPT2LMHeadModel))
    peft_model = get_peft_model(model, LoraConfig(**settings))  # type: ignore[arg-type]
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model.train()


def random_batch(seed: int, batch: int = 3, length: int = 7, padded: bool = True) -> dict[str, torch.Tensor]:
    """Token ids with right padding of random length; labels are -100 on the padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    if padded:
        lengths = torch.randint(2, length + 1, (batch,), generator=generator)
        mask = (torch.arange(length)[None] < lengths[:, None]).long()
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def enable_checkpointing(model: PeftModel, use_reentrant: bool = False) -> None:
    """Turns gradient checkpointing on, under the name that this transformers version has for it."""
    base = model.get_base_model()
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    enable = getattr(base, f"{name}_checkpointing_enable")
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": use_reentrant}})
    base.enable_input_require_grads()


# Image processors that need no torchvision: transformers' plain ones in 5.0, and later those that end in Pil.
def _pillow(name: str) -> Any:
    return getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")


CLIPImageProcessorPil = _pillow("CLIP")
Gemma3ImageProcessorPil = _pillow("Gemma3")
Idefics3ImageProcessorPil = _pillow("Idefics3")
Qwen2VLImageProcessorPil = _pillow("Qwen2VL")
SiglipImageProcessorPil = _pillow("Siglip")
Siglip2ImageProcessorPil = _pillow("Siglip2")
