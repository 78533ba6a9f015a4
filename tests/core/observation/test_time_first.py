"""Layers that see ``[length, batch, channels]``: their tokens are told apart also in a batch as large as it is long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import FSMTConfig, FSMTForConditionalGeneration, XLNetConfig, XLNetLMHeadModel

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import DataError

PAD = 1


def real(*lengths: int) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def tokens(mask: Tensor) -> Tensor:
    return torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(5)).masked_fill(~mask, PAD)


def observed(model: nn.Module, batch: dict[str, Any], example: Any = None) -> dict[str, tuple[list[float], Tensor]]:
    """For each LoRA layer what one training step says of its channels, and what it put out."""
    controller = GateController(model, discover_gates(model, example).require(), ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions(criterion="output_derivative", warmup_steps=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller.attach([optimizer])
    seen: dict[str, Tensor] = {}
    for site in controller.gates:

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = site.lora_layer_name) -> None:
            seen[name] = output.detach().double()

        site.lora_layer.register_forward_hook(keep)
    output = model(**batch)
    (output if isinstance(output, Tensor) else output["logits"]).sum().backward()
    optimizer.step()
    controller.detach()
    importance = controller.importance.importance.split([site.channels for site in controller.gates])  # type: ignore[union-attr]
    return {
        site.lora_layer_name: (found.tolist(), seen[site.lora_layer_name])
        for site, found in zip(controller.gates, importance, strict=True)
    }


def fsmt() -> nn.Module:
    torch.manual_seed(0)
    model = FSMTForConditionalGeneration(
        FSMTConfig(
            langs=["en", "de"],
            src_vocab_size=64,
            tgt_vocab_size=64,
            d_model=16,
            encoder_ffn_dim=10,
            decoder_ffn_dim=12,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=32,
            activation_function="gelu",
            # In transformers 5.0 the decoder sees its last token alone otherwise.
            use_cache=False,
        )
    )
    return get_peft_model(model, LoraConfig(r=2, target_modules=["fc1"]))


def xlnet() -> nn.Module:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=12, ff_activation="gelu", dropout=0.0)
    return get_peft_model(XLNetLMHeadModel(config), LoraConfig(r=2, target_modules=["layer_1"]))


class TimeFirst(nn.Module):
    """Somebody's own, told of padding as torch's own layers are; in ``batch_first`` like most models of today."""

    def __init__(self, batch_first: bool = False, as_rows: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 8)
        self.batch_first, self.as_rows = batch_first, as_rows

    def forward(self, sound: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        hidden = sound if self.batch_first else sound.transpose(0, 1)
        hidden = hidden.flatten(0, 1) if self.as_rows else hidden
        return self.down(functional.silu(self.up(hidden)))


def own(batch_first: bool = False, as_rows: bool = False) -> nn.Module:
    return get_peft_model(TimeFirst(batch_first, as_rows), LoraConfig(r=2, target_modules=["up"]))


def sounds(mask: Tensor) -> dict[str, Any]:
    sound = torch.randn(*mask.shape, 4, generator=torch.Generator().manual_seed(0))
    return {"sound": sound, "src_key_padding_mask": ~mask}


LENGTHS = [(5, 3, 1, 4, 2), (7, 4)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("make", [fsmt, xlnet])
def test_tokens_of_layers_that_see_time_first_are_those_of_the_reference(
    make: Callable[[], nn.Module], lengths: tuple[int, ...]
) -> None:
    source, target = real(*lengths), real(*reversed(lengths))
    batch = {"input_ids": tokens(source), "attention_mask": source.long()}
    if make is fsmt:
        batch["decoder_input_ids"] = tokens(target)
    found = observed(make(), batch)
    assert len(found) == (2 if make is fsmt else 1)
    for name, (importance, z) in found.items():
        mask = target if "decoder" in name else source
        rows = z.transpose(0, 1)[mask].tolist()
        assert importance == pytest.approx(reference.responsiveness("output_derivative", "gelu", rows), abs=2e-6), name


@pytest.mark.parametrize("as_rows", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("example", [*LENGTHS, (4,)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_which_axis_is_time_is_read_off_inputs_that_are_square_too(
    lengths: tuple[int, ...], example: tuple[int, ...], batch_first: bool, as_rows: bool
) -> None:
    mask = real(*lengths)
    ((importance, z),) = observed(own(batch_first, as_rows), sounds(mask), sounds(real(*example))).values()
    z = z.view(*(mask.shape if batch_first else mask.T.shape), -1)
    rows = (z if batch_first else z.transpose(0, 1))[mask].tolist()
    assert importance == pytest.approx(reference.responsiveness("output_derivative", "silu", rows), abs=2e-6)


def test_layers_that_see_time_first_and_padding_of_other_tokens_are_refused() -> None:
    batch = sounds(real(7, 4))
    with pytest.raises(DataError, match=r"mask of shape \(2, 6\) cannot be matched to the gate 'silu'.*\(2, 7\)"):
        observed(own(), {**batch, "src_key_padding_mask": ~real(6, 4)}, batch)


@pytest.mark.parametrize(("batch", "as_rows"), [(2, False), (3, False), (2, True), (1, True)])
def test_an_order_that_is_not_known_is_told_with_the_first_batch_and_refused_with_padding(
    batch: int, as_rows: bool
) -> None:
    """Windows of three tokens that stand one after another, as many as there are samples, or as rows."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 8)

        def forward(self, sound: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            windows = sound.unflatten(1, (3, -1)).transpose(1, 2).flatten(0, 1)
            return self.down(functional.silu(self.up(windows.flatten(0, 1) if as_rows else windows)))

    model: Any = get_peft_model(Windows(), LoraConfig(r=2, target_modules=["up"]))  # type: ignore[arg-type]
    sound = torch.randn(3, 6, 4)
    example, mask = {"sound": sound[:batch]}, torch.ones(3, 6, dtype=torch.long)
    with pytest.warns(UserWarning, match=r"'silu' sees the tokens in an order .* a batch with padding will be") as told:
        ((importance, z),) = observed(model, {"sound": sound, "attention_mask": mask}, example).values()
    assert len(told) == 1
    rows = z.reshape(-1, 12).tolist()
    assert importance == pytest.approx(reference.responsiveness("output_derivative", "silu", rows), abs=2e-6)
    with pytest.raises(DataError, match=r"mask of shape \(3, 6\) cannot be matched to the gate 'silu'"):
        observed(model, {"sound": sound, "attention_mask": real(6, 4, 6).long()}, example)
