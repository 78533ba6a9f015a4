"""NA-LoRA on models for images and text, through the module, the data module and real processors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_models import VISION_KINDS, image_batch, tiny_peft_model
from module_helpers import (
    private_dataset_cache,  # noqa: F401
    quiet_trainer,
)
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import PLAIN_SCALE
from transformers import AutoModelForImageTextToText, AutoProcessor
from vision_helpers import picture, tiny_vlm_processor, vlm_folders, write_vision_records  # noqa: F401

from na_lora_lightning import GateImportanceCallback, NALoRALightningModule, StepScaleCallback
from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.cli.main import main
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.data import VisionInstructionDataModule
from na_lora_lightning.errors import DiscoveryError

KINDS = pytest.mark.parametrize("kind", VISION_KINDS)
ALL_PARTS = ["language", "vision", "projector"]
# What each part gates with.
ACTIVATIONS = {
    "llava": {"silu", "quick_gelu", "gelu"},
    "idefics3": {"silu", "gelu_tanh"},
    "qwen2_vl": {"silu", "quick_gelu", "gelu"},
}
Vlm = Callable[[str], str]


def fit(
    folder: Path, base: str, callbacks: list[Callback], lora: LoRAOptions | None = None, **options: Any
) -> NALoRALightningModule:
    """Trains on eight pictures, two records a step."""
    records = write_vision_records(folder / "data", 8)
    datamodule = VisionInstructionDataModule(base, train=records, batch_size=2, num_workers=0)
    seed_everything(0, verbose=False)
    module = NALoRALightningModule(
        base,
        lora=lora or LoRAOptions(r=2, alpha=4, parts=ALL_PARTS),  # type: ignore[arg-type]
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-2),
    )
    quiet_trainer(folder, callbacks=callbacks, **options).fit(module, datamodule)
    return module


@KINDS
def test_both_activations_are_in_tensorboard_with_values_of_their_own(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    importance = GateImportanceCallback(warmup_steps=1, refresh_every=1)
    scale = StepScaleCallback(**PLAIN_SCALE)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(tmp_path, vlm(kind), [importance, scale], logger=logger)
    assert importance.controller is not None
    assert scale.controller is not None
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = set(log.Tags()["scalars"])
    regimes = [f"regime_{name}" for name in ("suppressed", "homogeneous")]
    of_activations: dict[str, list[float]] = {}
    for activation in ACTIVATIONS[kind]:
        groups = ["responsiveness", "step_scale", "mask_churn", *regimes]
        assert {f"gates/{group}/{activation}" for group in groups} <= tags
        curves = {group: [event.value for event in log.Scalars(f"gates/{group}/{activation}")] for group in groups}
        assert all(len(curve) == 4 for curve in curves.values())
        assert 0.0 <= sum(curves[regime][-1] for regime in regimes) <= 1.0 + 1e-6
        assert 0.1 < curves["step_scale"][-1] < 1.0
        of_activations[activation] = [curves["responsiveness"][-1], curves["step_scale"][-1]]
        # Recomputed from the mechanisms' own state.
        sites = [n for n, site in enumerate(importance.controller.gates) if site.activation.name == activation]
        mechanism = importance.controller.importance
        assert mechanism is not None
        columns = [mechanism.responsiveness[mechanism.layout.site_slices[n]] for n in sites]
        expected = torch.cat(columns).mean().item()
        assert curves["responsiveness"][-1] == pytest.approx(expected, rel=1e-5)
        scales = scale.controller.step_scale.scale  # type: ignore[union-attr]
        channels = torch.tensor([float(importance.controller.gates.sites[n].channels) for n in sites])
        # A site without a meaningful partition has the scale 1, so sites of one activation may differ.
        expected = ((scales[sites] * channels).sum() / channels.sum()).item()
        assert curves["step_scale"][-1] == pytest.approx(expected, rel=1e-5)
    values = list(of_activations.values())
    assert all(len({row[column] for row in values}) == len(values) for column in range(2))
    layers = set(importance.monitor.last_of("gate_responsiveness"))  # type: ignore[union-attr]
    assert {"language_layer_00", "language_layer_01", "vision_layer_00"} <= layers
    assert ("projector" in layers) == (kind != "idefics3")


@KINDS
def test_the_language_model_alone_is_adapted_by_default(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    importance = GateImportanceCallback()
    module = fit(tmp_path, vlm(kind), [importance], LoRAOptions(r=2, alpha=4))
    assert importance.controller is not None
    assert {site.part for site in importance.controller.gates} == {"language"}
    assert not any("vis" in name for name, parameter in module.named_parameters() if parameter.requires_grad)


@KINDS
def test_the_forward_pass_is_bitwise_the_same_under_observation(kind: str) -> None:
    model, batch = tiny_peft_model(kind), image_batch(kind, [0, 1])
    plain = model(**batch)
    gates = discover_gates(model, image_batch(kind, [0, 1])).require()
    controller = GateController(model, gates)
    controller.set_importance(ImportanceOptions(warmup_steps=0))
    controller.set_step_scale(StepScaleOptions())
    controller.attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)])
    observed = model(**batch)
    controller.detach()
    assert torch.equal(plain.loss, observed.loss)
    assert torch.equal(plain.logits, observed.logits)


@KINDS
def test_image_tokens_count_and_padding_does_not(kind: str) -> None:
    processor = tiny_vlm_processor(kind)
    # A wide picture and a narrow one, and texts of different lengths.
    pictures = [picture(0, 64, 24), picture(1, 20, 24)]
    messages = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": t}]}] for t in ("a", "bcdef")]
    batch: Any = processor(
        text=[processor.apply_chat_template(message) for message in messages],
        images=[[image] for image in pictures],
        padding=True,
        return_tensors="pt",
    )
    model = tiny_peft_model(kind)
    gates = discover_gates(model, image_batch(kind, [0, 1])).require()
    controller = GateController(model, gates, ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions(warmup_steps=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller.attach([optimizer])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert controller.observer._tokens is not None
    counted = dict(zip([site.part for site in gates], controller.observer._tokens.tolist(), strict=True))
    controller.detach()
    assert int((batch["attention_mask"] == 0).sum()) > 0
    assert counted["language"] == int(batch["attention_mask"].sum())
    assert counted["vision"] == patches(kind, batch)
    if kind != "idefics3":
        # One token of the language model for each that the projector makes.
        token = processor.tokenizer.convert_tokens_to_ids({"llava": "<image>", "qwen2_vl": "<|image_pad|>"}[kind])
        assert counted["projector"] == int((batch["input_ids"] == token).sum())


def patches(kind: str, batch: dict[str, torch.Tensor]) -> int:
    """Real patches of a batch of images of patch size 8, LLaVA's class tokens included."""
    if kind == "llava":
        return batch["pixel_values"].shape[0] * (4 * 4 + 1)
    if kind == "qwen2_vl":
        return int(batch["image_grid_thw"].prod(dim=1).sum())
    real = batch["pixel_attention_mask"].flatten(0, 1).unfold(1, 8, 8).unfold(2, 8, 8)
    # The narrow picture has fewer tiles, and its tiles are not square.
    assert int(real.any(dim=(-1, -2)).sum()) < real.shape[0] * real.shape[1] * real.shape[2]
    return int(real.any(dim=(-1, -2)).sum())


@KINDS
def test_gates_that_nothing_reaches_are_named(kind: str) -> None:
    """A tower is called by itself, with an image of the size that it is for; a projector cannot be."""
    model = tiny_peft_model(kind)
    with_image = {name: value for name, value in image_batch(kind, [0, 1]).items() if name != "labels"}
    found, expected = discover_gates(model), discover_gates(model, with_image).require()
    unreached = {"llava": "multi_modal_projector", "qwen2_vl": "visual"}.get(kind)
    if unreached is None:
        assert [site.name for site in found.require()] == [site.name for site in expected]
        return
    with pytest.raises(DiscoveryError, match=rf"{unreached}.*pass\s+example_inputs .*, or take .*, or set allow_"):
        found.require()


# Without this package: an import of it fails.
WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["na_lora_lightning"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
output, arguments = sys.argv[1], sys.argv[2:]
found = []
for base, adapter, batch in zip(arguments[::3], arguments[1::3], arguments[2::3]):
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    inputs = load_file(batch)
    with torch.no_grad():
        plain = model(**inputs).logits
        found.append([plain, model.merge_and_unload()(**inputs).logits])
torch.save(found, output)
"""


def test_adapters_need_only_peft_and_merge(vlm: Vlm, tmp_path: Path) -> None:
    arguments, expected, batches = [], [], []
    for kind in VISION_KINDS:
        folder = tmp_path / kind
        module = fit(folder, vlm(kind), [GateImportanceCallback(warmup_steps=0, refresh_every=1), StepScaleCallback()])
        batch = {name: value.contiguous() for name, value in image_batch(kind, [0, 1]).items() if name != "labels"}
        with torch.no_grad():
            expected.append(module.peft_model.eval()(**batch).logits)
            untrained = AutoModelForImageTextToText.from_pretrained(vlm(kind)).eval()(**batch).logits
        assert (expected[-1] - untrained).abs().max() > 1e-2
        save_file(batch, folder / "batch.safetensors")
        batches.append(batch)
        arguments += [vlm(kind), str(folder / "adapter"), str(folder / "batch.safetensors")]
    output = str(tmp_path / "logits.pt")
    # One process for all, as its imports take longest.
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_THIS_PACKAGE, output, *arguments], check=True)
    for wanted, (plain, merged) in zip(expected, torch.load(output, weights_only=True), strict=True):
        torch.testing.assert_close(plain, wanted, rtol=0, atol=2e-6)
        torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)

    for kind, batch, wanted in zip(VISION_KINDS, batches, expected, strict=True):
        merged = tmp_path / kind / "merged"
        assert main(["merge", "--adapter", str(tmp_path / kind / "adapter"), "--output", str(merged)]) == 0
        ours = AutoModelForImageTextToText.from_pretrained(merged).eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(**batch).logits, wanted, rtol=0, atol=1e-5)
        if kind == "qwen2_vl":
            # Its part for videos, which needs torchvision, comes along.
            settings = json.loads((merged / "processor_config.json").read_text(encoding="utf-8"))
            assert settings["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
        else:
            template = AutoProcessor.from_pretrained(merged).chat_template
            assert template == AutoProcessor.from_pretrained(vlm(kind)).chat_template


def test_training_after_an_evaluation_finds_the_gates_of_the_tower(vlm: Vlm, tmp_path: Path) -> None:
    records = write_vision_records(tmp_path / "data", 4)
    datamodule = VisionInstructionDataModule(vlm("llava"), train=records, predict=records, batch_size=2, num_workers=0)
    module = NALoRALightningModule(vlm("llava"), lora=LoRAOptions(r=2, alpha=4, parts=["language", "vision"]))
    trainer = quiet_trainer(tmp_path, callbacks=[GateImportanceCallback(warmup_steps=0)])
    trainer.predict(module, datamodule)
    trainer.fit(module, datamodule)
    assert trainer.global_step == 2


@KINDS
def test_inspect_shows_every_part(kind: str, vlm: Vlm, capsys: pytest.CaptureFixture[str]) -> None:
    parts = "[language,vision,projector]"
    assert main(["inspect", vlm(kind), "--json", "--lora.parts", parts]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    model = AutoModelForImageTextToText.from_pretrained(vlm(kind))
    assert model is not None
    assert {site["activation"] for site in sites} == ACTIVATIONS[kind]
    assert {site["part"] for site in sites} == set(ALL_PARTS) - ({"projector"} if kind == "idefics3" else set())
