"""Gates of models whose base layers are quantised, where the libraries for it are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import random_batch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions


def quantisation(name: str) -> Any:
    import transformers

    if name == "torchao":
        library = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(library.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=torch.float32
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "torchao"])
def test_rows_of_a_quantised_model_are_found_and_masked(name: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation(name), dtype=torch.float32, device_map="cpu"
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)  # type: ignore[arg-type]
    gates = discover_gates(model).require()
    assert [(site.channels, site.row_slice) for site in gates] == [(128, slice(0, 128, 1))] * 2
    controller = GateController(model, gates)
    importance = controller.set_importance(ImportanceOptions(keep_fraction=0.5, warmup_steps=0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    controller.attach([optimizer])
    (rows,) = gates.sites[0].parameters()
    before = rows.parameter.detach().clone()
    model(**random_batch(0)).loss.backward()
    optimizer.step()
    moved = (rows.parameter != before).any(dim=1)
    assert torch.equal(moved, importance.weights[:128] > 0)
    assert int(moved.sum()) == 64
