"""Statistics of models with several parts: each part by its own tokens, against the slow reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import with_lora
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BigBirdConfig,
    BigBirdForMaskedLM,
    CLIPConfig,
    CLIPModel,
    LEDConfig,
    LEDForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import DataError, DiscoveryError

PAD, START = 1, 2
BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 10,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": START,
}
T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 12,
    "num_layers": 1,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
WHISPER: dict[str, Any] = {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}


def real(*lengths: int, longest: int = 0) -> Tensor:
    return torch.arange(max(*lengths, longest))[None] < torch.tensor(lengths)[:, None]


def tokens(mask: Tensor, padding: int = PAD) -> Tensor:
    drawn = torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(5))
    return drawn.masked_fill(~mask, padding)


def text(
    source: tuple[int, ...], target: tuple[int, ...], padding: int = PAD
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A batch with labels, and which tokens of each half are real."""
    encoder, decoder = real(*source), real(*target)
    batch = {
        "input_ids": tokens(encoder, padding),
        "attention_mask": encoder.long(),
        "labels": tokens(decoder).masked_fill(~decoder, -100),
    }
    return batch, {"encoder": encoder, "decoder": decoder}


def bart(kind: type = BartForConditionalGeneration, config: type = BartConfig, **options: Any) -> Callable[[], Any]:
    return lambda: kind(config(**{**BART, **options}))


def speech(frames: tuple[int, ...], with_mask: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    batch, masks = text((3, 3), (5, 2))
    batch = {"input_features": torch.randn(2, 8, 40), "labels": batch["labels"]}
    if not with_mask:
        return batch, {"encoder": real(20, 20), "decoder": masks["decoder"]}
    batch["attention_mask"] = real(*frames, longest=40).long()
    after = [(length - 1) // 2 + 1 for length in frames]
    return batch, {"encoder": real(*after, longest=20), "decoder": masks["decoder"]}


def decoder_inputs(
    source: tuple[int, ...], target: tuple[int, ...], padding: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """No labels: the loss is somebody's own. T5's decoder begins with the token that pads."""
    batch, masks = text(source, target, padding)
    del batch["labels"]
    inputs = tokens(masks["decoder"], padding)
    inputs[:, 0] = padding
    return {**batch, "decoder_input_ids": inputs}, masks


def with_decoder_mask(source: tuple[int, ...], target: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    batch, masks = decoder_inputs(source, target, PAD)
    return {**batch, "decoder_attention_mask": masks["decoder"].long()}, masks


def classes() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The decoder sees the encoder's tokens, shifted by one."""
    encoder = real(6, 4)
    inputs = tokens(encoder)
    inputs[torch.arange(2), torch.tensor([5, 3])] = 2
    batch = {"input_ids": inputs, "attention_mask": encoder.long(), "labels": torch.tensor([0, 2])}
    return batch, {"encoder": encoder, "decoder": real(6, 5)}


def clip() -> CLIPModel:
    text_config = {**SMALL, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    return CLIPModel(
        CLIPConfig(
            text_config=text_config, vision_config={**SMALL, "image_size": 16, "patch_size": 8}, projection_dim=8
        )
    )


SMALL = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def images() -> tuple[dict[str, Any], dict[str, Tensor]]:
    mask = real(7, 4)
    batch = {"input_ids": tokens(mask), "attention_mask": mask.long(), "pixel_values": torch.randn(2, 3, 16, 16)}
    return {**batch, "return_loss": True}, {"text_model": mask, "vision_model": real(5, 5)}


class FeedForward(nn.Module):
    """As in diffusers' transformer blocks: a list, and a gate that is a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Module(), nn.Dropout(0.1), nn.Linear(12, width)])
        self.net[0].proj = nn.Linear(width, 24)

    def forward(self, hidden: Tensor) -> Tensor:
        projection: Any = self.net[0].proj
        hidden, gate = projection(hidden).chunk(2, dim=-1)
        return self.net[2](self.net[1](hidden * functional.gelu(gate)))


class UNet(nn.Module):
    """Transformer blocks at two resolutions, and the embedding of time that both see."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 8))
        self.enter, self.down = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 2, stride=2)
        self.blocks = nn.ModuleList([FeedForward(8), FeedForward(8)])

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        hidden = self.enter(sample) + self.time_embedding(time)[:, :, None, None]
        for block in self.blocks:
            hidden = self.down(hidden)
            flat = hidden.flatten(2).transpose(1, 2)
            hidden = (flat + block(flat)).transpose(1, 2).unflatten(2, hidden.shape[2:])
        return hidden


def noise() -> tuple[dict[str, Any], dict[str, Tensor]]:
    batch = {"sample": torch.randn(2, 3, 8, 8), "time": torch.randn(2, 4)}
    ones = torch.ones(2, 1).bool()
    return batch, {"time_embedding": ones, "blocks.0": ones.expand(2, 16), "blocks.1": ones.expand(2, 4)}


def windows() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LED fills sequences up to whole windows."""
    batch, masks = text((6, 3), (5, 2))
    return batch, {"encoder": functional.pad(masks["encoder"], (0, 2)), "decoder": masks["decoder"]}


def streams() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Each of two further streams predicts a token for each of the text."""
    batch, masks = text((7, 3), (5, 2))
    return batch, {"encoder": masks["encoder"], "decoder": masks["decoder"].repeat(1, 3)}


def blocks() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model fills sequences up to a multiple of its block size."""
    mask = real(15, 11)
    batch = {"input_ids": tokens(mask), "attention_mask": mask.long(), "labels": tokens(mask)}
    return batch, {"bert": functional.pad(mask, (0, 1))}


def frames() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Two convolutions of stride 2."""
    batch, masks = text((3, 3), (5, 2))
    mask = real(16, 9)
    batch = {"input_features": torch.randn(2, 16, 8), "attention_mask": mask.long(), "labels": batch["labels"]}
    return batch, {"encoder": real(4, 3), "decoder": masks["decoder"]}


def recordings() -> tuple[dict[str, Any], dict[str, Tensor]]:
    mask = real(400, 210)
    after = [((length - 10) // 5 + 1 - 4) // 4 + 1 for length in (400, 210)]
    return {"input_values": torch.randn(2, 400), "attention_mask": mask.long()}, {"wav2vec2": real(*after)}


LED = {"attention_window": 4, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}
PROPHETNET: dict[str, Any] = {
    **{name: BART[name] for name in ("vocab_size", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings")},
    **{name: BART[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")},
    "hidden_size": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "ngram": 2,
    "num_buckets": 4,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "relative_max_distance": 8,
}
BIG_BIRD: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BIG_BIRD |= {"intermediate_size": 12, "block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 32}
SPEECH = {"input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 8, "num_conv_layers": 2}
SPEECH |= {"max_source_positions": 32, "max_target_positions": 32}
WAV2VEC2: dict[str, Any] = {
    **SMALL,
    "vocab_size": 32,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
}
WAV2VEC2 |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
WAV2VEC2 |= {"num_feat_extract_layers": 2, "feat_extract_norm": "group", "layerdrop": 0.0}

Case = tuple[Callable[[], Any], Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]]
CASES: dict[str, Case] = {
    "bart, lengths that differ": (bart(), lambda: text((7, 3), (5, 2))),
    "bart, lengths that are equal by chance": (bart(), lambda: text((6, 3), (4, 6))),
    "bart, decoder inputs": (bart(), lambda: decoder_inputs((6, 3), (4, 6), PAD)),
    "bart, decoder mask": (bart(), lambda: with_decoder_mask((6, 3), (4, 6))),
    "bart, classes": (bart(BartForSequenceClassification, num_labels=3), classes),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5)), lambda: text((7, 3), (5, 2), 0)),
    "t5, equal": (lambda: T5ForConditionalGeneration(T5Config(**T5)), lambda: text((6, 3), (4, 6), 0)),
    "t5, decoder inputs": (
        lambda: T5ForConditionalGeneration(T5Config(**T5, feed_forward_proj="gated-gelu")),
        lambda: decoder_inputs((6, 3), (4, 6), 0),
    ),
    "whisper": (bart(WhisperForConditionalGeneration, WhisperConfig, **WHISPER), lambda: speech((40, 23), True)),
    "whisper, no mask": (
        bart(WhisperForConditionalGeneration, WhisperConfig, **WHISPER),
        lambda: speech((40, 23), False),
    ),
    "clip": (clip, images),
    "unet": (UNet, noise),
    "marian": (bart(MarianMTModel, MarianConfig, decoder_vocab_size=64), lambda: text((6, 3), (4, 6))),
    "pegasus": (bart(PegasusForConditionalGeneration, PegasusConfig), lambda: text((6, 3), (4, 6))),
    "mbart": (bart(MBartForConditionalGeneration, MBartConfig), lambda: text((6, 3), (4, 6))),
    "led": (bart(LEDForConditionalGeneration, LEDConfig, **LED), windows),
    "speech to text": (bart(Speech2TextForConditionalGeneration, Speech2TextConfig, **SPEECH), frames),
    "prophetnet": (lambda: ProphetNetForConditionalGeneration(ProphetNetConfig(**PROPHETNET)), streams),
    "big bird": (lambda: BigBirdForMaskedLM(BigBirdConfig(**BIG_BIRD)), blocks),
    "wav2vec2": (lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**WAV2VEC2)), recordings),
}
# Layers whose outputs are the pre-activations.
GATES = ("fc1", "intermediate", "intermediate.dense", "wi", "wi_0", "net.0.proj", "intermediate_dense")


def observed(model: nn.Module, batch: dict[str, Any], example: Any = None) -> tuple[GateController, dict[str, Tensor]]:
    """One training step with the rate zero, and what the layers before the gates put out in it."""
    controller = GateController(
        model, discover_gates(model, example).require(allow_unmasked_gates=True), ObserverOptions(max_tokens=None)
    )
    controller.set_importance(ImportanceOptions(criterion="output_derivative", warmup_steps=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller.attach([optimizer])
    seen: dict[str, Tensor] = {}
    for site in controller.gates:

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = site.lora_layer_name) -> None:
            seen[name] = output.detach()

        site.lora_layer.register_forward_hook(keep)
    output = model(**batch)
    loss = (
        output if isinstance(output, Tensor) else output["loss"] if output.get("loss") is not None else output["logits"]
    )
    loss.sum().backward()
    optimizer.step()
    controller.detach()
    return controller, seen


@pytest.mark.parametrize("name", CASES)
def test_step_statistics_are_those_of_the_reference(name: str) -> None:
    torch.manual_seed(0)
    make, data = CASES[name]
    base = make()
    batch, masks = data()
    layers = ["time_embedding.0"] if name == "unet" else []
    layers += [
        n
        for n, m in base.named_modules()
        if isinstance(m, nn.Linear) and n.endswith(tuple(f".{gate}" for gate in GATES))
    ]
    model = with_lora(base, layers, task_type=None)
    example = {k: v for k, v in batch.items() if k not in ("labels", "return_loss")} if name == "unet" else None
    controller, seen = observed(model, batch, example)
    importance = controller.importance.importance.split([site.channels for site in controller.gates])  # type: ignore[union-attr]
    assert {site.lora_layer_name for site in controller.gates} == set(layers)
    for site, found in zip(controller.gates, importance, strict=True):
        part = next(part for part in masks if part in site.lora_layer_name)
        z = seen[site.lora_layer_name][..., site.rows].double()
        rows = z.reshape(-1, site.channels)[masks[part].reshape(-1)].tolist()
        expected = reference.responsiveness("output_derivative", site.activation.name, rows)
        assert found.tolist() == pytest.approx(expected, abs=2e-6), site.name


def test_a_recording_of_unknown_frames_is_refused() -> None:
    """Where nothing says how tokens follow from what the mask is for, nothing is guessed."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.up, self.down = nn.Conv1d(4, 8, 3, 2, 1), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, sound: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.down(functional.silu(self.up(self.convolution(sound).transpose(1, 2))))

    model = get_peft_model(Frames(), LoraConfig(r=2, target_modules=["up"]))
    batch = {"sound": torch.randn(2, 4, 10), "attention_mask": real(10, 6).long()}
    with pytest.raises(DataError, match=r"mask of shape \(2, 10\) cannot be matched to the gate 'silu'"):
        observed(model, batch, {"sound": batch["sound"]})


def test_without_padding_the_order_of_tokens_does_not_matter() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 8)

        def forward(self, sound: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.down(functional.silu(self.up(sound.transpose(0, 1))))

    model = get_peft_model(TimeFirst(), LoraConfig(r=2, target_modules=["up"]))
    sound = torch.randn(2, 10, 4)
    controller, seen = observed(model, {"sound": sound, "attention_mask": real(10, 10).long()}, {"sound": sound})
    expected = reference.responsiveness("output_derivative", "silu", seen["up"].reshape(-1, 12).double().tolist())
    assert controller.importance.importance.tolist() == pytest.approx(expected, abs=2e-6)  # type: ignore[union-attr]


def test_prompts_of_a_decoder_are_left_out_by_its_labels() -> None:
    """Its labels are not shifted against its tokens, as those of a decoder alone are."""
    batch, _ = text((6, 3), (4, 6))
    batch["labels"][:, :2] = -100
    model = with_lora(bart()(), ["fc1"], task_type=None)
    gates = discover_gates(model).require()
    controller = GateController(model, gates, ObserverOptions(max_tokens=None, exclude_prompt=True))
    controller.set_importance(ImportanceOptions(warmup_steps=0))
    controller.attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)])
    model(**batch)
    assert controller.observer._tokens.tolist() == [9.0, 6.0]  # type: ignore[union-attr]
    controller.detach()


class OwnTransformer(nn.Module):
    """torch's own encoder and decoder, which call padding true."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 12, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor, source_padding: Tensor, target_padding: Tensor) -> Tensor:
        return self.transformer(
            self.embed(source),
            self.embed(target),
            src_key_padding_mask=source_padding,
            tgt_key_padding_mask=target_padding,
        )


def test_torchs_own_transformer() -> None:
    model = get_peft_model(OwnTransformer(), LoraConfig(r=2, target_modules=["linear1"]))
    source, target = real(6, 3), real(4, 6)
    batch = {"source": tokens(source), "target": tokens(target), "source_padding": ~source, "target_padding": ~target}
    controller, seen = observed(model, batch, batch)
    assert [site.activation.name for site in controller.gates] == ["relu", "relu"]
    importance = controller.importance.importance.split(12)  # type: ignore[union-attr]
    for site, found, mask in zip(controller.gates, importance, (source, target), strict=True):
        rows = seen[site.lora_layer_name].double().reshape(-1, 12)[mask.reshape(-1)].tolist()
        assert found.tolist() == pytest.approx(reference.responsiveness("output_derivative", "relu", rows), abs=2e-6)


# ---- calls that do not go through the model's own forward ----


def lengths_seen(model: nn.Module, call: Callable[[Any], Any], example: Any = None) -> list[float]:
    """Tokens that each site counted in a call of training."""
    controller = GateController(
        model, discover_gates(model, example).require(allow_unmasked_gates=True), ObserverOptions(max_tokens=None)
    )
    controller.set_importance(ImportanceOptions(warmup_steps=0))
    controller.attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)])
    try:
        call(model)
        return controller.observer._tokens.tolist()  # type: ignore[union-attr]
    finally:
        controller.detach()


def test_a_method_of_a_dual_encoder_is_recorded() -> None:
    batch, _ = images()
    model = with_lora(clip(), ["fc1"], task_type=None)
    text_alone = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    pixels = batch["pixel_values"]
    assert lengths_seen(model, lambda m: m.get_image_features(pixel_values=pixels)) == [0.0, 10.0]
    assert lengths_seen(model, lambda m: m.get_text_features(**text_alone)) == [11.0, 0.0]
    assert lengths_seen(model, lambda m: m.get_base_model().vision_model(pixel_values=pixels)) == [0.0, 10.0]

    def both(m: Any) -> None:
        m.get_image_features(pixel_values=pixels)
        m.get_text_features(**text_alone)

    assert lengths_seen(model, both) == [11.0, 10.0]
    # The layers of a tower, without the tower, which is never told of padding.
    inner = torch.randn(2, 5, 16)
    called = lambda m: m.get_base_model().vision_model.encoder.layers[0].mlp(inner)  # noqa: E731
    assert lengths_seen(model, called) == [0.0, 10.0]


def test_the_halves_of_an_encoder_decoder_are_recorded() -> None:
    batch, masks = text((6, 3), (4, 6))
    model = with_lora(bart()(), ["fc1"], task_type=None)
    whole = {name: value for name, value in batch.items() if name != "labels"}

    def halves(m: Any) -> None:
        inner = m.base_model.model.model
        memory = inner.encoder(**whole).last_hidden_state
        inner.decoder(
            input_ids=tokens(masks["decoder"]),
            attention_mask=masks["decoder"].long(),
            encoder_hidden_states=memory,
            encoder_attention_mask=whole["attention_mask"],
        )

    assert lengths_seen(model, halves) == [9.0, 10.0]
    decoder_ids = tokens(masks["decoder"])
    assert lengths_seen(model, lambda m: m.base_model.model.model(**whole, decoder_input_ids=decoder_ids)) == [
        9.0,
        10.0,
    ]


@pytest.mark.parametrize("make", [lambda m: m, lambda m: m.get_base_model(), lambda m: m.base_model.model.model])
def test_the_model_below_the_head_is_recorded(make_peft_model: Callable[..., Any], make: Callable[[Any], Any]) -> None:
    model = make_peft_model()
    if not hasattr(model.get_base_model(), "model"):
        model.get_base_model().model = model.get_base_model().transformer
    mask = real(6, 3)
    batch = {"input_ids": tokens(mask), "attention_mask": mask.long()}
    assert lengths_seen(model, lambda m: make(m)(**batch)) == [9.0, 9.0]


def test_layers_that_cannot_be_told_of_padding_are_refused_by_name(make_peft_model: Callable[..., Any]) -> None:
    model = make_peft_model()
    base: Any = model.get_base_model()
    block = base.model.layers[0] if hasattr(base, "model") else base.transformer.h[0]

    def encode(m: Any) -> None:
        block.mlp(torch.randn(2, 6, 16))

    kind, root = type(block.mlp).__name__, type(base).__name__
    with pytest.raises(
        DiscoveryError, match=rf"^{kind}\.forward reached the gate .* without a call of {root}, .*; call"
    ):
        lengths_seen(model, encode)
    with torch.no_grad():
        assert lengths_seen(model, encode) == [0.0, 0.0]


class Encoder(nn.Module):
    """A network of vectors with a method of its own, which is never told of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)

    def encode(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def test_a_method_of_ones_own_is_recorded_where_nothing_is_padded() -> None:
    model = get_peft_model(Encoder(), LoraConfig(r=2, target_modules=["up"]))
    x = torch.randn(4, 3, 8)
    assert lengths_seen(model, lambda m: m.encode(x), {"x": x}) == [12.0]
    assert lengths_seen(model, lambda m: m(x), {"x": x}) == [12.0]
    with torch.no_grad():
        assert lengths_seen(model, lambda m: m.encode(x), {"x": x}) == [0.0]
