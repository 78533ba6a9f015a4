"""Models of other libraries: denoisers of diffusers against the slow reference, and bases that are quantised."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import random_batch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from zoo.diffusion import build

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import DataError

pytest.importorskip("diffusers", reason="on the oldest versions there is no diffusers")

# It deprecates what it uses itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed:FutureWarning")
BLOCK = "attentions.0.transformer_blocks.0.ff.net.0.proj"
# What makes each gate of the UNet, and its rows: the samples, or the places of pictures of 8 or 4 by themselves.
UNET = {
    "time_embedding.linear_1": 2,
    "time_embedding.linear_2": 2,
    f"down_blocks.0.{BLOCK}": 2 * 64,
    f"mid_block.{BLOCK}": 2 * 16,
    f"up_blocks.1.{BLOCK}": 2 * 64,
    f"up_blocks.1.{BLOCK.replace('attentions.0', 'attentions.1')}": 2 * 64,
}


def observed(name: str) -> dict[str, tuple[Any, list[float], Tensor]]:
    """By LoRA layer: its site, what one training step says of its channels, and what it put out, ``[rows, out]``."""
    base, inputs = build(name)
    linear = [layer for layer, module in base.named_modules() if isinstance(module, nn.Linear)]
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=linear, init_lora_weights=False))
    gates = discover_gates(model, inputs).require()
    controller = GateController(model, gates, ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions(criterion="output_derivative", warmup_steps=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller.attach([optimizer])
    seen: dict[str, Tensor] = {}
    for site in gates:

        def keep(_: nn.Module, __: Any, output: Tensor, layer: str = site.lora_layer_name) -> None:
            seen[layer] = output.detach().double().flatten(0, -2)

        site.lora_layer.register_forward_hook(keep)
    model(**inputs)[0].square().sum().backward()
    optimizer.step()
    controller.detach()
    importance = controller.importance.importance.split([site.channels for site in gates])  # type: ignore[union-attr]
    return {
        site.lora_layer_name: (site, found.tolist(), seen[site.lora_layer_name])
        for site, found in zip(gates, importance, strict=True)
    }


def as_in_the_reference(site: Any, importance: list[float], z: Tensor) -> None:
    expected = reference.responsiveness("output_derivative", site.activation.name, z[:, site.rows].tolist())
    assert importance == pytest.approx(expected, abs=2e-6), site.name


def test_a_unet() -> None:
    found = observed("UNet2DConditionModel")
    assert {layer: len(z) for layer, (_, _, z) in found.items()} == UNET
    for site, importance, z in found.values():
        as_in_the_reference(site, importance, z)


@pytest.mark.parametrize(
    ("function", "activation", "kind"),
    [("geglu", "gelu", "gated"), ("gelu-approximate", "gelu_tanh", "plain"), ("swiglu", "silu", "gated")],
)
def test_blocks_of_a_transformer(function: str, activation: str, kind: str) -> None:
    found = observed(f"Transformer2DModel ({function})")
    assert [(site.activation.name, site.kind) for site, _, _ in found.values()] == [(activation, kind)] * 2
    for site, importance, z in found.values():
        assert len(z) == 2 * 64
        as_in_the_reference(site, importance, z)


def test_both_streams_of_a_double_block_and_the_single_block_of_flux() -> None:
    found = observed("FluxTransformer2DModel")
    rows = {layer: len(z) for layer, (_, _, z) in found.items() if "transformer_blocks" in layer}
    assert rows == {
        "transformer_blocks.0.ff.net.0.proj": 2 * 16,
        "transformer_blocks.0.ff_context.net.0.proj": 2 * 7,
        "single_transformer_blocks.0.proj_mlp": 2 * 23,
    }
    for site, importance, z in found.values():
        as_in_the_reference(site, importance, z)


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


class Joint(nn.Module):
    """One sequence of words and image: as long as both, or as Lumina 2 packs the real words before the image."""

    def __init__(self, packs: bool) -> None:
        super().__init__()
        self.packs, self.up, self.down = packs, nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Tensor:
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if self.packs and encoder_hidden_states_mask is not None:
            both = both.new_zeros(len(both), int(encoder_hidden_states_mask.sum(1).max()) + 6, 4)
            for row, words in enumerate(encoder_hidden_states_mask.sum(1).tolist()):
                text = encoder_hidden_states[row, :words]
                both[row, : words + 6] = torch.cat([text, hidden_states[row]])
        return self.down(functional.silu(self.up(both + timestep[:, None, None])))


def counted(layers: list[str], *words: int, base: nn.Module | None = None) -> list[float]:
    """Tokens that each site counts, by how many words of each text are real."""
    base = Denoiser() if base is None else base
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=layers))  # type: ignore[arg-type]
    mask = "encoder_attention_mask" if isinstance(base, Denoiser) else "encoder_hidden_states_mask"
    batch: dict[str, Any] = {
        "hidden_states": torch.randn(2, 6, 4),
        "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": torch.randn(2, 5, 4),
        mask: (torch.arange(5)[None] < torch.tensor(words)[:, None]).long(),
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
    message = "the gate .* sees words of the text .* some of which are padding by encoder_attention_mask, "
    for layers in (["text_up"], ["text_up", "image_up"]):
        with pytest.raises(DataError, match=message):
            counted(layers, 5, 3)


def test_places_of_the_image_and_words_without_padding_are() -> None:
    assert counted(["image_up"], 5, 3) == [12.0]
    assert counted(["text_up", "image_up"], 5, 5) == [10.0, 12.0]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("words", [(5, 3), (4, 3)])
def test_padded_words_in_one_sequence_with_an_image_are_refused(packs: bool, words: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"the gate 'silu' sees words .* padding by encoder_hidden_states_mask, "):
        counted(["up"], *words, base=Joint(packs))
    assert counted(["up"], 5, 5, base=Joint(packs)) == [22.0]


def test_joint_layers_of_lumina_2_are_refused_where_words_are_padded_and_those_of_the_image_are_not() -> None:
    for layers, refused in (
        (r"layers\..*feed_forward.linear.*", True),
        (r"noise_refiner\..*feed_forward.linear.*", False),
    ):
        base, inputs = build("Lumina2Transformer2DModel")
        model = get_peft_model(base, LoraConfig(r=2, target_modules=layers))  # type: ignore[arg-type]
        gates = discover_gates(model, inputs).require(allow_unmasked_gates=True)
        controller = GateController(model, gates, ObserverOptions(max_tokens=None))
        controller.set_importance(ImportanceOptions(warmup_steps=0))
        controller.attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)])
        with pytest.raises(DataError, match="padding by encoder_attention_mask") if refused else nullcontext():
            model(**inputs)
        if not refused:
            assert controller.observer._tokens.tolist() == [2 * 16.0]  # type: ignore[union-attr]
        controller.detach()


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
