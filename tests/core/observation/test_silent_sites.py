"""Gates that see no token, or fewer than the model: refused, left alone, or given a padding mask that fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetForCTC,
    SeamlessM4TConfig,
    SeamlessM4TForSpeechToText,
    SEWConfig,
    SEWForCTC,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from na_lora_lightning import nonlinearity_aware
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.observation.mask_fitting import MaskFitter
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import DiscoveryError

WIDTH, INNER, BETA = 6, 10, 0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.SiLU(), nn.Linear(INNER, WIDTH)
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return x + self.down(self.act(self.up(x)))
        # As kernels do that read the weights of the layers, LoRA's among them.
        up: Any = self.up
        z = x @ (up.base_layer.weight + up.lora_B["default"].weight @ up.lora_A["default"].weight).T
        return x + self.down(nn.functional.silu(z))


class Network(nn.Module):
    """Blocks of which some are left out of a forward pass, or are called with no token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.skipped: set[int] = set()
        self.empty: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index in self.empty:
                x = torch.cat([x, block(x[:0])])
            elif index not in self.skipped:
                x = block(x)
        return x


@contextmanager
def training() -> Iterator[tuple[Network, GateController, torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model: Any = get_peft_model(Network(), LoraConfig(r=2, target_modules=["up", "down"]))  # type: ignore[arg-type]
    controller = GateController(
        model, discover_gates(model, {"x": torch.randn(2, 3, WIDTH)}).require(), ObserverOptions(None)
    )
    controller.set_importance(ImportanceOptions(beta=BETA, warmup_steps=1, refresh_every=1, keep_fraction=0.5))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    controller.attach([optimizer])
    yield model.base_model.model, controller, optimizer
    controller.detach()


def backward(model: Network) -> None:
    model(torch.randn(2, 3, WIDTH)).square().sum().backward()


def test_a_skipped_block_keeps_its_averages_and_the_others_go_on() -> None:
    plan: list[set[int]] = [{1}, {0, 2}, set(), {1, 2}, {0, 1, 2}, set(), {2}]
    with training() as (model, controller, optimizer):
        importance = controller.importance
        assert importance is not None
        averages, counts = torch.zeros(3, INNER), [0, 0, 0]
        rows = [site.parameters()[0].parameter for site in controller.gates]
        for skipped in plan:
            model.skipped = skipped
            before = [parameter.detach().clone() for parameter in rows]
            if len(skipped) < 3:
                backward(model)
            optimizer.step()
            optimizer.zero_grad()
            means = importance.responsiveness.view(3, INNER)
            for index in {0, 1, 2} - skipped:
                averages[index] = BETA * averages[index] + (1 - BETA) * means[index]
                counts[index] += 1
            for index in range(3):
                expected = averages[index] / (1 - BETA ** max(counts[index], 1))
                torch.testing.assert_close(importance.importance.view(3, INNER)[index], expected)
                held = importance.weights.view(3, INNER)[index] == 0
                if index in skipped:
                    assert torch.equal(rows[index], before[index])
                elif importance.is_active:
                    assert int(held.sum()) == INNER // 2
                    moved = (rows[index] != before[index]).any(dim=1)
                    assert not bool((moved & held).any())
                    assert bool(moved[~held].all())
        assert counts == [5, 4, 3]


@pytest.mark.parametrize("how", ["skipped", "empty"])
def test_what_is_checked_are_the_rows_of_steps_that_are_taken(how: str) -> None:
    """The gradients of a step that was thrown away, as a GradScaler does, say nothing of the next."""
    with training() as (model, _, optimizer):
        backward(model)
        optimizer.zero_grad()
        setattr(model, how, {1})
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        setattr(model, how, set())
        model.blocks[1].fused = True
        backward(model)
        with pytest.raises(DiscoveryError, match=r"blocks\.1\.act saw no token in the first step that trains"):
            optimizer.step()


def test_a_first_step_that_skips_all_gates_trains_none_and_is_no_error() -> None:
    """Other layers are trained in it, so that the optimizer steps; what a fused block hides is refused in the next."""
    with training() as (model, controller, optimizer):
        model.skipped = {0, 1, 2}
        optimizer.step()
        assert controller.steps == 1
        model.skipped = set()
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        assert bool((controller.importance.importance > 0).all())  # type: ignore[union-attr]
    with training() as (model, _, optimizer):
        model.blocks[1].fused = True
        model(torch.randn(2, 3, WIDTH)).sum()
        for parameter in model.parameters():
            # As a backward pass does that calls no hook.
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(DiscoveryError, match=r"blocks\.1\.act saw no token in the first step that trains"):
            optimizer.step()


def speech() -> nn.Module:
    few: Any = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    few |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=32, layerdrop=0.5, **sizes, **few))


def translation() -> nn.Module:
    halves: Any = {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    halves |= {"encoder_layerdrop": 0.2, "decoder_layerdrop": 0.2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = M2M100Config(vocab_size=32, d_model=16, activation_function="gelu", **halves)
    return M2M100ForConditionalGeneration(config)


@pytest.mark.parametrize(("make", "layers"), [(speech, "intermediate_dense"), (translation, "fc1")])
def test_layer_drop_trains_and_is_bitwise_plain_lora_where_all_rows_are_kept(make: Any, layers: str) -> None:
    skipped = []

    def train(keep_fraction: float | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(make(), LoraConfig(r=2, target_modules=[layers])).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        options = ImportanceOptions(warmup_steps=1, keep_fraction=keep_fraction or 1.0)
        context = nonlinearity_aware(model, optimizer, importance=options, step_scale=None)
        with context if keep_fraction else torch.enable_grad():
            for step in range(5):
                draw = torch.Generator().manual_seed(step)
                text = torch.randint(4, 32, (2, 5), generator=draw)
                inputs = {"input_ids": text} if layers == "fc1" else {"input_values": text.float().repeat(1, 40)}
                model(**inputs, labels=text[:, :2].contiguous()).loss.backward()
                skipped.append(sum(p.grad is None for p in model.parameters() if p.requires_grad))
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach() for p in model.parameters() if p.requires_grad]

    plain, all_kept, half_kept = train(None), train(1.0), train(0.5)
    assert min(skipped) < max(skipped)
    assert all(torch.equal(a, b) for a, b in zip(plain, all_kept, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, half_kept, strict=True))


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def real_tokens(model: nn.Module, mask: Tensor, tokens: int) -> list[int] | None:
    fitted = MaskFitter(model)(mask, tokens)
    if fitted is None:
        return None
    lengths = fitted.sum(dim=1)
    assert torch.equal(fitted, torch.arange(tokens)[None] < lengths[:, None])
    return lengths.tolist()


def parakeet() -> nn.Module:
    config = ParakeetEncoderConfig(**SMALL, num_mel_bins=8, subsampling_conv_channels=8)
    return ParakeetForCTC(ParakeetCTCConfig(vocab_size=32, encoder_config=config.to_dict()))


def test_parakeet_halves_its_frames_three_times() -> None:
    model = parakeet()
    mask = mask_of(48, 32, 9)
    own = model.encoder._get_output_attention_mask(mask.long())  # type: ignore[operator, union-attr]
    assert real_tokens(model, mask, 6) == own.sum(dim=1).tolist() == [6, 4, 2]
    assert real_tokens(model, mask, 7) is None


def test_sew_squeezes_two_frames_into_one() -> None:
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4)}
    model = SEWForCTC(SEWConfig(**SMALL, **convolutions, vocab_size=32, squeeze_factor=2))
    # 19, 11 and 6 frames, pooled as SEW pools its mask.
    mask = mask_of(390, 230, 130)
    frames = model._get_feature_vector_attention_mask(19, mask.long())
    pooled = nn.functional.max_pool1d(frames.float(), 2)
    assert real_tokens(model, mask, 9) == pooled.sum(dim=1).tolist()
    assert real_tokens(model, mask, 19) == frames.sum(dim=1).tolist()


def test_the_adapter_of_seamless_counts_by_a_mask() -> None:
    config = SeamlessM4TConfig(
        **SMALL,
        vocab_size=64,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=12,
        speech_encoder_layers=1,
        speech_encoder_attention_heads=2,
        speech_encoder_intermediate_size=12,
        feature_projection_input_dim=8,
    )
    model = SeamlessM4TForSpeechToText(config)
    mask = mask_of(48, 32)
    own = model._compute_sub_sample_lengths_from_attention_mask(mask.long())
    assert real_tokens(model, mask, int(own[0])) == own.tolist() == [7, 5]


def test_a_count_of_one_recording_alone_is_not_used() -> None:
    """Moonshine's takes no batch."""
    small = {name: value for name, value in SMALL.items() if not name.startswith("num_")}
    config = MoonshineConfig(
        **small,
        vocab_size=64,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        encoder_num_key_value_heads=2,
        decoder_num_key_value_heads=2,
        pad_token_id=0,
    )
    model = MoonshineForConditionalGeneration(config)
    tokens = model._get_feat_extract_output_lengths(torch.tensor([4000]))
    assert real_tokens(model, mask_of(4000, 3000), tokens) is None


@pytest.mark.parametrize(("tokens", "expected"), [(12, [7, 4]), (8, [7, 4]), (9, None)])
def test_sequences_are_filled_up_to_whole_windows(tokens: int, expected: list[int] | None) -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"attention_window": [4, 6]})()

    assert real_tokens(Windows(), mask_of(7, 4), tokens) == expected
