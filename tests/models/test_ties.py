"""Ties: adapters on shared weights merge to what they computed, on disk as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from module_helpers import logits, tied_llama, trained
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from zoo.tiny_models import build

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter, merge_into_base
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.source import BaseModelSource
from na_lora_lightning.models.ties import require_untiable, tied_adapted_weights, untie_adapted_weights


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def adapted(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and ("lora_" in name or "token" in name):
                parameter.normal_(std=0.3)
    return peft_model.eval()


@pytest.mark.parametrize("adapter", ["adapter", "checkpoints/last.ckpt"])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": r".*\.(embed_tokens|up_proj)|lm_head"},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
    ],
    ids=["head", "embedding", "regex", "dora", "save head", "save embedding", "parameter"],
)
def test_a_fit_on_tied_embeddings_merges_to_the_same_logits(tmp_path: Path, lora: dict[str, Any], adapter: str) -> None:
    module = trained(tied_llama(tmp_path / "base"), tmp_path, **lora)
    merge_adapter(MergeOptions(tmp_path / adapter, tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(module.peft_model), rtol=0, atol=1e-5)
    assert merged.config.tie_word_embeddings is False
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_ties_that_no_adapter_touches_stay(tmp_path: Path) -> None:
    trained(tied_llama(tmp_path / "base"), tmp_path, target_modules=["q_proj"])
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is True
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("adapter", ["adapter", "checkpoints/last.ckpt"])
def test_a_16_bit_base_merges_in_16_bits(tmp_path: Path, adapter: str) -> None:
    module = trained(tied_llama(tmp_path / "base", torch.bfloat16), tmp_path, target_modules=["lm_head"])
    merge_adapter(MergeOptions(tmp_path / adapter, tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    head: Any = module.peft_model.get_base_model().lm_head
    wanted = base.lm_head.weight + head.get_delta_weight("default").detach()
    # PEFT rounds what it adds before and after.
    torch.testing.assert_close(merged.lm_head.weight, wanted.bfloat16(), rtol=2**-7, atol=2e-3)
    assert not torch.allclose(merged.lm_head.weight, base.lm_head.weight, rtol=2**-7, atol=2e-2)


# Masked language models tie biases too, Zamba whole blocks, BART and Florence-2 more than two embeddings.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("mapping", "model_type"),
    [
        ("causal-lm", "gpt2"),
        ("causal-lm", "gemma"),
        ("causal-lm", "opt"),
        ("causal-lm", "bart"),
        ("causal-lm", "roberta"),
        ("causal-lm", "zamba"),
        ("image-text-to-text", "florence2"),
        ("image-text-to-text", "blip-2"),
        ("image-text-to-text", "gemma3"),
    ],
)
@pytest.mark.parametrize("places", ["input", "output", "both"])
def test_models_reload_as_the_adapter_was(tmp_path: Path, mapping: Any, model_type: str, places: str) -> None:
    tiny = build(mapping, model_type)
    inputs = {name: value for name, value in tiny.inputs.items() if name != "labels"}
    if "decoder_input_ids" not in inputs and "florence" in model_type:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    ends = {"input": tiny.model.get_input_embeddings(), "output": tiny.model.get_output_embeddings()}
    wanted = [end for place, end in ends.items() if places in (place, "both")]
    names = [name for name, module in tiny.model.named_modules() if any(module is end for end in wanted)]
    model = adapted(tiny.model, target_modules=names)
    with torch.no_grad():
        expected = model(**inputs).logits
        merge_into_base(model).save_pretrained(tmp_path)
        reloaded, loading = type(tiny.model).from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
        torch.testing.assert_close(reloaded.eval()(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert not loading["missing_keys"]


@pytest.mark.filterwarnings("ignore:.*trainable_token_indices")
def test_trained_tokens_stay_tied() -> None:
    model = tiny_gpt2()
    peft_model = adapted(model, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[3, 5])
    expected = logits(peft_model)
    merged: Any = merge_into_base(peft_model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert merged.config.tie_word_embeddings is True


class Shared(nn.Module):
    """Two places for one module, and a weight that is a part of another one's memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.whole = nn.Linear(4, 8)
        self.part = nn.Linear(4, 4)
        self.part.weight = nn.Parameter(self.whole.weight.detach()[:4])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(inputs), self.second(inputs), self.whole(inputs), self.part(inputs)], dim=-1)


def test_ties_are_found_by_memory_and_modules_in_two_places_are_parted() -> None:
    model = adapted(Shared(), target_modules=["first", "part"])
    prefix = "base_model.model."
    assert tied_adapted_weights(model) == {
        f"{prefix}first.base_layer.weight": f"{prefix}second.weight",
        f"{prefix}first.base_layer.bias": f"{prefix}second.bias",
        f"{prefix}part.base_layer.weight": f"{prefix}whole.weight",
    }
    inputs = torch.randn(3, 4)
    expected = model(inputs)
    assert len(untie_adapted_weights(model)) == 3
    assert torch.equal(model(inputs), expected)
    assert tied_adapted_weights(model) == {}
    torch.testing.assert_close(model.merge_and_unload()(inputs), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("names", [["lm_head"], ["shared"], ["encoder.embed_tokens"]])
def test_t5_scales_its_output_as_before(tmp_path: Path, names: list[str]) -> None:
    config = T5Config(vocab_size=32, d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=1, decoder_start_token_id=0)
    model = adapted(T5ForConditionalGeneration(config), target_modules=names)
    inputs = {name: torch.tensor([[3, 4, 5]]) for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad():
        expected = model(**inputs).logits
        require_untiable(model)
        merge_into_base(model).save_pretrained(tmp_path)
        reloaded = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(reloaded(**inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_model_that_computes_something_else_untied_is_refused() -> None:
    model = adapted(build("image-text-to-text", "udop").model, target_modules=["lm_head"])
    with pytest.raises(ConfigurationError, match="computes something else where its weights are not those of"):
        require_untiable(model)
    with pytest.raises(ConfigurationError, match="cannot be stored, as UdopForConditionalGeneration shares"):
        merge_into_base(model)


def test_it_is_refused_before_training() -> None:
    class Always(LlamaForCausalLM):
        def tie_weights(self, *arguments: Any, **options: Any) -> None:
            self.lm_head.weight = self.model.embed_tokens.weight

    model = Always(tiny_llama().config)
    model.name_or_path = "x"
    with pytest.raises(ConfigurationError, match=r"LoRA on 'lm_head.weight' could not be merged, as Always always"):
        add_lora(model, LoRAOptions(target_modules=["lm_head"]), BaseModelSource("x"))
