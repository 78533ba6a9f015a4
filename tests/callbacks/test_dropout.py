"""Watching alone is bitwise plain LoRA where a model has dropout, in Lightning and in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning_models import assert_equal_states, lora_state, make_trainer
from tiny_models import with_lora
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.plain_pytorch import nonlinearity_aware

P = 0.2
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
HALVES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 32,
}
VISION = {**SIZES, "image_size": 16, "patch_size": 8, "hidden_dropout_prob": P, "attention_probs_dropout_prob": P}


def hugging_face(auto: Any, kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: auto.from_config(AutoConfig.for_model(kind, **options))


class Own(nn.Module):
    """Dropout between two linear layers, which is no gate, and in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.first, self.between, self.second = nn.Linear(16, 16), nn.Dropout(P), nn.Linear(16, 16)
        self.up, self.act, self.inside, self.down = nn.Linear(16, 24), nn.SiLU(), nn.Dropout(P), nn.Linear(24, 16)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.second(self.between(self.first(self.embed(input_ids))))
        return {"logits": hidden + self.down(self.inside(self.act(self.up(hidden))))}


def clip() -> nn.Module:
    text = {**SIZES, "attention_dropout": P}
    vision = {**SIZES, "image_size": 16, "patch_size": 8, "attention_dropout": P}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


TOKENS = torch.arange(3, 17).view(2, 7)
TEXT = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}
PIXELS = torch.arange(2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)
CAUSAL, MASKED, HALF = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, Tensor]]] = {
    "llama": (hugging_face(CAUSAL, "llama", **SIZES, attention_dropout=P), ["gate_proj", "q_proj"], TEXT),
    "gpt_neox": (hugging_face(CAUSAL, "gpt_neox", **SIZES, hidden_dropout=P), ["dense_h_to_4h"], TEXT),
    "gpt2": (
        hugging_face(CAUSAL, "gpt2", vocab_size=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=P, embd_pdrop=P),
        ["c_fc"],
        TEXT,
    ),
    "opt": (
        hugging_face(CAUSAL, "opt", **SIZES, ffn_dim=24, word_embed_proj_dim=16, activation_function="gelu", dropout=P),
        ["fc1", "q_proj"],
        TEXT,
    ),
    "bert": (hugging_face(MASKED, "bert", **SIZES, hidden_dropout_prob=P), ["intermediate.dense"], TEXT),
    "bart": (hugging_face(HALF, "bart", **HALVES, dropout=P, activation_dropout=P), ["fc1", "v_proj"], TEXT),
    "t5": (
        hugging_face(
            *(HALF, "t5"),
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=P,
            decoder_start_token_id=0,
        ),
        ["wi_0"],
        TEXT,
    ),
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(**VISION)),
        ["intermediate.dense", "fc1"],
        {"pixel_values": PIXELS, "labels": torch.tensor([0, 1])},
    ),
    "clip": (
        clip,
        ["fc1", "q_proj"],
        {**{n: v for n, v in TEXT.items() if n != "labels"}, "pixel_values": PIXELS, "return_loss": torch.tensor(True)},
    ),
    "own": (Own, ["up", "first"], {"input_ids": TOKENS}),
}


class Project(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        make, targets, _ = ARCHITECTURES[name]
        torch.manual_seed(0)
        self.network = with_lora(make(), targets, task_type=None, lora_dropout=P, fan_in_fan_out=name == "gpt2")
        # What nothing can be known of.
        self.example_inputs = {"input_ids": TOKENS} if name == "own" else None

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        output = self.network(**batch)
        loss: Any = output.get("loss")
        return output["logits"].square().mean() if loss is None else loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.network.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_watching_is_bitwise_plain_lora_with_dropout_in_lightning(tmp_path: Path, name: str) -> None:
    def fitted(*callbacks: Callback) -> dict[str, Tensor]:
        module = Project(name)
        assert any(isinstance(m, nn.Dropout) and m.p == P and m.training for m in module.modules())
        data = DataLoader([ARCHITECTURES[name][2]] * 2, batch_size=None)
        torch.manual_seed(7)
        make_trainer(tmp_path, callbacks=list(callbacks), max_epochs=1).fit(module, data)
        return lora_state(module)

    watching = [GateImportanceCallback(1.0, warmup_steps=0), StepScaleCallback(eta_min=1.0, matrix_a_factor=1.0)]
    assert_equal_states(fitted(), fitted(*watching))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_watching_is_bitwise_plain_lora_with_dropout_in_a_plain_loop(name: str) -> None:
    def train(project: Project, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            project.loss(ARCHITECTURES[name][2]).backward()
            optimizer.step()
            optimizer.zero_grad()

    states = []
    for watched in (False, True):
        project = Project(name)
        optimizer = project.configure_optimizers()
        torch.manual_seed(7)
        if not watched:
            train(project, optimizer)
        else:
            with nonlinearity_aware(
                project.network,
                optimizer,
                importance=ImportanceOptions(keep_fraction=1.0, warmup_steps=0),
                step_scale=StepScaleOptions(eta_min=1.0, matrix_a_factor=1.0),
                example_inputs=project.example_inputs,
            ) as controller:
                train(project, optimizer)
            assert controller.steps == 2
        states.append(lora_state(project))
    assert_equal_states(*states)
