"""Networks of images: norms over all places, attention that sees one place, and convolutions between linear layers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

from na_lora_lightning.core.discovery import discover_gates
from na_lora_lightning.core.experts import expert_owners


class Block(nn.Module):
    """Two linear layers with an activation, and something between that or them."""

    def __init__(self, before: nn.Module | None = None, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)
        self.before, self.behind = before or nn.Identity(), behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.behind(self.act(self.before(self.up(x)))))


class Attention(nn.Module):
    """As LeViT's: an activation behind the attention."""

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = hidden.chunk(3, dim=-1)
        mixed = (query @ key.transpose(1, 2)).softmax(dim=-1) @ value
        return torch.cat([mixed, mixed, mixed], dim=-1)


class ResponseNorm(nn.Module):
    """As ConvNeXt V2's: each channel by its size over all places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12)), nn.Parameter(torch.zeros(12))

    def forward(self, hidden: Tensor) -> Tensor:
        size = hidden.norm(dim=1, keepdim=True)
        return self.weight * hidden * size / size.mean(dim=-1, keepdim=True) + self.bias + hidden


class Convolution(nn.Module):
    """Over places, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=12)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(hidden.transpose(1, 2)).transpose(1, 2)


class Pooled(Convolution):
    """As at the end of a stage: fewer places."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)[:, ::2]


class Sorted(nn.Module):
    """Mixes places with parameters that are no norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(12, 12))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.cumsum(dim=1) @ self.mix


def with_lora(model: nn.Module) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["up"]))


@pytest.mark.parametrize("places", [1, 6])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    ("block", "found"),
    [
        (lambda: Block(), True),
        (lambda: Block(behind=ResponseNorm()), True),
        (lambda: Block(behind=nn.LayerNorm(12)), True),
        (lambda: Block(before=Attention()), False),
        (lambda: Block(behind=Attention()), False),
        (lambda: Block(before=Convolution()), False),
        (lambda: Block(behind=Convolution()), False),
        (lambda: Block(behind=Pooled()), False),
    ],
    ids=["plain", "response norm", "layer norm", "attention", "attention behind", "convolution", "behind", "pooled"],
)
def test_what_mixes_places_is_no_gate_however_few_there_are(
    block: type[Block], found: bool, samples: int, places: int
) -> None:
    torch.manual_seed(0)
    gates = discover_gates(with_lora(block()), {"x": torch.randn(samples, places, 4)})
    assert [site.lora_layer_name for site in gates] == (["up"] if found else [])
    if not found:
        (reason,) = (entry for entry in gates.left_out if entry.name == "act")
        assert reason.reason == "between up and down tokens are mixed"
        assert not reason.not_supported


def test_only_what_has_a_number_for_each_channel_is_a_norm() -> None:
    torch.manual_seed(0)
    gates = discover_gates(with_lora(Block(behind=Sorted())), {"x": torch.randn(2, 6, 4)})
    assert len(gates) == 0
    assert "tokens are mixed" in gates.left_out[0].reason


def test_convnext_v2_by_its_rows() -> None:
    torch.manual_seed(0)
    config = ConvNextV2Config(hidden_sizes=[8, 12], depths=[1, 1], image_size=32, num_stages=2)
    base = ConvNextV2ForImageClassification(config)
    for name, parameter in base.named_parameters():
        if ".grn." in name:
            nn.init.normal_(parameter)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["pwconv1"]))
    gates = discover_gates(model).require()
    assert [(site.channels, site.activation.name, site.kind) for site in gates] == [
        (32, "gelu", "plain"),
        (48, "gelu", "plain"),
    ]
    assert all(torch.equal(site.rows, torch.arange(site.channels)) for site in gates)


def test_scales_of_layers_are_no_experts() -> None:
    """SwiftFormer's blocks hold two of them, ``[channels, 1, 1]``, beside a module without parameters."""

    class Scales(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
            self.act = nn.GELU()

    assert [name for name, _, _ in expert_owners(nn.ModuleDict({"scales": Scales(8, 1, 1)}))] == []
    assert [name for name, _, _ in expert_owners(nn.ModuleDict({"experts": Scales(4, 8, 6)}))] == ["experts"]
