"""Parts of multimodal models, and which tokens count in each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, with_lora
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from zoo.tiny_models import build

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.model_parts import branch_name, is_multimodal, language_model_name, part_of
from na_lora_lightning.core.observation.masks_of_calls import mask_of_branch, token_mask_of_call
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import DiscoveryError
from na_lora_lightning.models.targets import lora_targets

PATCHES, IMAGE_TOKEN = 16, 60


def parts(model: nn.Module) -> dict[str, set[str | None]]:
    """Branches of the linear layers of each part."""
    language_model = language_model_name(model)
    found: dict[str, set[str | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found.setdefault(part_of(model, language_model, name), set()).add(branch_name(model, language_model, name))
    return found


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llava", {"vision": {"model.vision_tower"}, "projector": {"model.multi_modal_projector"}}),
        ("idefics3", {"vision": {"model.vision_model"}, "projector": {"model.connector"}}),
        ("smolvlm", {"vision": {"model.vision_model"}, "projector": {"model.connector"}}),
        ("qwen2_vl", {"vision": {"model.visual"}, "projector": {"model.visual"}}),
        ("qwen2_5_vl", {"vision": {"model.visual"}, "projector": {"model.visual"}}),
        ("gemma3", {"vision": {"model.vision_tower"}}),
        ("aya_vision", {"vision": {"model.vision_tower"}, "projector": {"model.multi_modal_projector"}}),
        (
            "dots3_note",
            {"vision": {"model.vision_tower"}, "projector": {"model.vision_tower"}, "other": {"model.audio_tower"}},
        ),
        ("git", {"vision": {"git.image_encoder"}}),
    ],
)
def test_parts_of_models_for_images_and_text(model_type: str, expected: dict[str, set[str]]) -> None:
    found = parts(build("image-text-to-text", model_type).model)
    language = found.pop("language")
    assert None in language
    assert language <= {None, "lm_head", "output"}
    if model_type == "git":
        found.pop("projector", None)
    assert found == expected


def test_a_language_model_has_one_part() -> None:
    model = tiny_llama()
    assert not is_multimodal(model)
    assert language_model_name(model) is None
    assert parts(model) == {"language": {None}}


def test_only_the_named_parts_get_lora() -> None:
    model = build("image-text-to-text", "llava").model
    for wanted, left_out in (
        (("language",), r"(?:model\.multi_modal_projector|model\.vision_tower)(?:\..*)?"),
        (("language", "vision"), r"(?:model\.multi_modal_projector)(?:\..*)?"),
        (("language", "vision", "projector"), None),
    ):
        assert lora_targets(model, parts=wanted).exclude_modules == left_out  # type: ignore[arg-type]
    both = lora_targets(model, exclude_modules=["o_proj"], parts=("language",)).exclude_modules
    assert both == r"(?:(?:.*\.)?(?:o_proj))|(?:model\.multi_modal_projector|model\.vision_tower)(?:\..*)?"


def tiny_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=PATCHES)
    return LlavaForConditionalGeneration(config)


def image_batch() -> dict[str, Any]:
    """Two records of an image and some text, the second shorter by two tokens."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(2, 50, (2, 6), generator=generator)
    tokens = torch.cat([torch.full((2, PATCHES), IMAGE_TOKEN), text], dim=1)
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    labels = tokens.masked_fill((mask == 0) | (tokens == IMAGE_TOKEN), -100)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def test_image_tokens_count_and_padding_does_not_and_patches_are_counted_apart() -> None:
    model = with_lora(tiny_llava(), "all-linear")
    batch = image_batch()
    gates = discover_gates(model, {name: value for name, value in batch.items() if name != "labels"}).require()
    names = [(site.activation.name, None if site.branch is None else type(site.branch).__name__) for site in gates]
    # The tower's last layer is not used: LLaVA takes the output of the one before.
    assert names == [("quick_gelu", "CLIPVisionModel")] * (len(names) - 3) + [
        ("gelu", "LlavaMultiModalProjector"),
        ("silu", None),
        ("silu", None),
    ]
    controller = GateController(model, gates, ObserverOptions(max_tokens=None))
    importance = controller.set_importance(ImportanceOptions(warmup_steps=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller.attach([optimizer])
    model(**batch)
    tokens = dict(zip([site.name for site in gates], controller.observer._tokens.tolist(), strict=True))  # type: ignore[union-attr]
    assert set(tokens.values()) == {2.0 * (PATCHES + 1), 2.0 * PATCHES, float(batch["attention_mask"].sum())}
    assert tokens["model.multi_modal_projector.act"] == 2.0 * PATCHES
    assert importance.layout.total == sum(site.channels for site in gates)
    controller.detach()


class Tower(nn.Module):
    def forward(self, hidden_states: torch.Tensor, patch_attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return hidden_states


def test_masks_of_branches() -> None:
    tower, hidden = Tower(), torch.randn(2, 6, 4)
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]]).bool()
    assert mask_of_branch(tower, (hidden,), {}) is None
    for args, kwargs in (((hidden, mask), {}), ((hidden,), {"patch_attention_mask": mask})):
        found = mask_of_branch(tower, args, kwargs)
        assert found is not None
        assert torch.equal(found, mask.flatten(1))
    # What is added to attention scores is no list of tokens.
    assert mask_of_branch(tower, (hidden,), {"attention_mask": torch.zeros(2, 1, 6, 6)}) is None


def test_the_mask_of_an_encoder_decoder_is_the_decoders() -> None:
    root = nn.Identity()
    root.config = type("Config", (), {"is_encoder_decoder": True})()  # type: ignore[assignment]
    encoder, labels = torch.ones(2, 5), torch.tensor([[3, 4, -100], [5, -100, -100]])
    found = token_mask_of_call(root, (), {"attention_mask": encoder, "labels": labels}, targets_only=False)
    assert found is not None
    assert found.tolist() == [[True, True, False], [True, False, False]]
    assert token_mask_of_call(root, (), {"attention_mask": encoder}, targets_only=False) is None


def test_a_part_without_any_lora_is_no_error_and_a_part_with_some_is() -> None:
    inputs = {name: value for name, value in image_batch().items() if name != "labels"}
    gates = discover_gates(with_lora(tiny_llava(), r".*language_model.*(gate|up|down)_proj"), inputs).require()
    assert {site.branch for site in gates} == {None}
    excused = [entry for entry in gates.left_out if "has no LoRA" in entry.reason]
    assert {entry.reason.split("(")[1].split(")")[0] for entry in excused} == {
        "model.vision_tower",
        "model.multi_modal_projector",
    }
    partly = with_lora(tiny_llava(), r".*(gate_proj|q_proj)")
    with pytest.raises(DiscoveryError, match=r"2 of 4 gates have no LoRA \(model\.vision_tower"):
        discover_gates(partly, inputs).require()
