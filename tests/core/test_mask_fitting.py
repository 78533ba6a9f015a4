"""Padding masks of recordings for gates that see fewer tokens: as many as the model itself calls real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetForCTC,
    SeamlessM4TConfig,
    SeamlessM4TForSpeechToText,
    SEWConfig,
    SEWForCTC,
)

from na_lora_lightning.core.observation.mask_fitting import MaskFitter

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
