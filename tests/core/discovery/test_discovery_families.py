"""Discovery on a dozen model families, each row checked by perturbing it, not by discovery's own reasoning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import random_batch
from transformers import AutoConfig, AutoModelForCausalLM

from na_lora_lightning.core.discovery.gates import discover_gates

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("model_type", "options", "activation", "kind", "layer"),
    [
        ("phi3", {}, "silu", "gated", "gate_up_proj"),
        ("glm", {}, "silu", "gated", "gate_up_proj"),
        ("gemma2", {}, "gelu_tanh", "gated", "gate_proj"),
        ("gemma3_text", {}, "gelu_tanh", "gated", "gate_proj"),
        ("qwen3", {}, "silu", "gated", "gate_proj"),
        ("mistral", {}, "silu", "gated", "gate_proj"),
        ("gpt_neox", {}, "gelu", "plain", "dense_h_to_4h"),
        ("phi", {}, "gelu_tanh", "plain", "fc1"),
        ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}, "relu", "plain", "fc1"),
        ("nemotron", {}, "relu_squared", "plain", "up_proj"),
        ("bloom", {"n_layer": 2, "n_head": 2}, "gelu_tanh", "plain", "dense_h_to_4h"),
        ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}, "gelu", "plain", "up_proj"),
    ],
)
def test_every_row_makes_exactly_its_channel(
    model_type: str, options: dict[str, Any], activation: str, kind: str, layer: str
) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **options}))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    gates = discover_gates(model).require()
    assert len(gates) == 2
    batch = random_batch(0, padded=False)
    del batch["labels"]

    def pre_activations() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        hooks = [site.source.watch(lambda z: seen.append(z.clone())) for site in gates]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        return seen

    for index, site in enumerate(gates):
        assert (site.activation.name, site.kind, site.lora_layer_name.rsplit(".", 1)[-1]) == (activation, kind, layer)
        (rows,) = site.parameters()
        before = pre_activations()[index]
        assert before.shape[-1] == site.channels
        for channel in range(site.channels):
            with torch.no_grad():
                rows.parameter[site.rows[channel]] += 1.0
            change = (pre_activations()[index] - before).abs().flatten(0, -2).amax(dim=0)
            with torch.no_grad():
                rows.parameter[site.rows[channel]] -= 1.0
            assert torch.nonzero(change > 1e-3 * change.max()).flatten().tolist() == [channel]
