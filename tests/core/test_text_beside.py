"""A denoiser is given a text with padding of its own: gates that see it are refused, and those of the image are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery import discover_gates
from na_lora_lightning.core.mechanisms.importance import ImportanceOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import DataError


class Denoiser(nn.Module):
    """As PixArt: the text is projected, and the image sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.text_up, self.text_down = nn.Linear(4, 12), nn.Linear(12, 4)
        self.image_up, self.image_down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        text = self.text_down(functional.silu(self.text_up(encoder_hidden_states)))
        scores = hidden_states @ text.transpose(1, 2)
        if encoder_attention_mask is not None:
            scores = scores.masked_fill(encoder_attention_mask[:, None] == 0, -1e9)
        seen = hidden_states + scores.softmax(dim=-1) @ text + timestep[:, None, None]
        return self.image_down(functional.silu(self.image_up(seen)))


def counted(layers: list[str], *words: int) -> list[float]:
    """Tokens that each site counts, by how many words of each text are real."""
    model = get_peft_model(Denoiser(), LoraConfig(r=2, target_modules=layers))
    batch: dict[str, Any] = {
        "hidden_states": torch.randn(2, 6, 4),
        "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": torch.randn(2, 5, 4),
        "encoder_attention_mask": (torch.arange(5)[None] < torch.tensor(words)[:, None]).long(),
    }
    gates = discover_gates(model, batch).require(allow_unmasked_gates=True)
    controller = GateController(model, gates, ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions(warmup_steps=0))
    controller.attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)])
    try:
        model(**batch)
        return controller.observer._tokens.tolist()  # type: ignore[union-attr]
    finally:
        controller.detach()


def test_padded_words_are_not_counted() -> None:
    message = r"the gate .* sees as many tokens as encoder_attention_mask is for, \(2, 5\), .* are padding"
    for layers in (["text_up"], ["text_up", "image_up"]):
        with pytest.raises(DataError, match=message):
            counted(layers, 5, 3)


def test_places_of_the_image_and_words_without_padding_are() -> None:
    assert counted(["image_up"], 5, 3) == [12.0]
    assert counted(["text_up", "image_up"], 5, 5) == [10.0, 12.0]
