"""Adapters that are saved, loaded again and restored, of models for text and for images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dual_encoder_helpers import make_module, saved_dual_encoder, write_shapes
from huggingface_hub import ModelCard
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from module_helpers import Batches, quiet_trainer, saved_model, some_batches
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig
from vision_helpers import END_OF_ANSWER, tiny_vlm, write_vision_records

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, EvaluationOptions, LoRAOptions, ScheduleOptions
from na_lora_lightning.checkpoints.adapter_state import write_adapter_folder
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter
from na_lora_lightning.data import VisionInstructionDataModule
from na_lora_lightning.data.classes.datamodule import LabelledImageDataModule
from na_lora_lightning.data.processors import load_processor
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.language import NALoRALightningModule

VARIANTS = {
    "plain": {},
    "patterns": {"rank_pattern": {"c_fc|gate_proj": 4}, "alpha_pattern": {"c_fc|gate_proj": 5.0}, "use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "gaussian": {"init_lora_weights": "gaussian"},
}


# Without this package: an import of it fails.
WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["na_lora_lightning"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
tokens = torch.arange(2, 12)[None]
with torch.no_grad():
    plain = model(input_ids=tokens).logits
    merged = model.merge_and_unload()(input_ids=tokens).logits
torch.save([plain, merged], output)
"""


def trained(base: str, folder: Path, callbacks: Sequence[Callback] = (), **options: Any) -> NALoRALightningModule:
    settings: dict[str, Any] = {
        "lora": LoRAOptions(r=2, alpha=4),
        "schedule": ScheduleOptions(name="constant", warmup_fraction=0.0),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    }
    seed_everything(0, verbose=False)
    module = NALoRALightningModule(base, **{**settings, **options})
    quiet_trainer(folder, callbacks=list(callbacks)).fit(module, Batches(some_batches(3)))
    return module


def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = some_batches(1, rows=3)[0]
    with torch.no_grad():
        output: Any = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits


@pytest.mark.parametrize(
    ("kind", "variant"),
    [(kind, name) for kind in ("llama", "gpt2") for name in VARIANTS if (kind, name) != ("gpt2", "olora")],
)
# PEFT advises how to convert adapters that moved base weights; the point here is that it needs no conversion.
@pytest.mark.filterwarnings("ignore:.*(PiSSA|OLoRA|pissa|olora):UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_plain_peft_loads_the_written_folder(tmp_path: Path, kind: str, variant: str) -> None:
    base = saved_model(tmp_path / "base", kind)
    module = trained(base, tmp_path, lora=LoRAOptions(r=2, alpha=4, **VARIANTS[variant]))
    expected = logits(module.peft_model)
    untrained = logits(AutoModelForCausalLM.from_pretrained(base))
    assert not torch.allclose(expected, untrained, atol=1e-4)

    folder = tmp_path / "adapter"
    assert module.written_adapter_folder == folder
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in folder.iterdir()}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_of_both_mechanisms_needs_only_peft(tmp_path: Path, kind: str) -> None:
    base = saved_model(tmp_path / "base", kind)
    mechanisms = [GateImportanceCallback(warmup_steps=0, refresh_every=1), StepScaleCallback()]
    module = trained(base, tmp_path, mechanisms)
    with torch.no_grad():
        expected = module.peft_model.eval()(input_ids=torch.arange(2, 12)[None]).logits
    arguments = [base, str(tmp_path / "adapter"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_THIS_PACKAGE, *arguments], check=True)
    plain, merged = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(plain, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_written_weights_are_bitwise_those_that_were_trained(tmp_path: Path) -> None:
    module = trained(saved_model(tmp_path / "base"), tmp_path)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained_weights = {
        name.removeprefix("model.").replace(".default", ""): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    assert set(written) == set(trained_weights)
    assert all(torch.equal(written[name], trained_weights[name]) for name in written)


def test_adapter_names_its_base_by_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    trained("base", tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # From the working directory on, for plain PEFT and for a merge where it was trained.
    assert config["base_model_name_or_path"] == "./base"
    assert base not in (tmp_path / "adapter" / "README.md").read_text()
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 4, "CAUSAL_LM")


def test_adapter_is_written_when_asked(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    trained(base, tmp_path, adapter=AdapterOptions(write="never", folder=str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()

    class Stop(ModelCheckpoint):
        """Looks at the folder right after the first checkpoint."""

        seen = False

        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            self.seen = (tmp_path / "each" / "adapter_model.safetensors").is_file()
            trainer.should_stop = True

    saver = Stop(tmp_path / "checkpoints", every_n_train_steps=1)
    module = NALoRALightningModule(base, adapter=AdapterOptions(write="checkpoint", folder=str(tmp_path / "each")))
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=[saver], min_steps=1)
    trainer.fit(module, Batches(some_batches(3)))
    assert saver.seen


def test_an_older_adapter_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    module = trained(saved_model(tmp_path / "base"), tmp_path)
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B.default.weight"):
            parameter.data.fill_(1.0)
    write_adapter_folder(module.peft_model, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(bool((tensor == 1).all()) for name, tensor in written.items() if "lora_B" in name)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not an adapter folder, so it is not overwritten"):
        write_adapter_folder(module.peft_model, other)
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]


def require_no_place(folder: Path, place: Path) -> None:
    assert [file.name for file in folder.iterdir() if str(place) in file.read_bytes().decode("latin-1")] == []


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_5_vl"])
def test_a_model_for_images_and_text(tmp_path: Path, kind: str) -> None:
    base = tiny_vlm(kind, tmp_path / "base")
    data = VisionInstructionDataModule(
        str(base), train=write_vision_records(tmp_path / "data", 2), batch_size=2, num_workers=0
    )
    module = NALoRALightningModule(
        str(base), lora=LoRAOptions(r=2, alpha=4), evaluation=EvaluationOptions(max_new_tokens=4)
    )
    quiet_trainer(tmp_path).fit(module, data)
    adapter, end = tmp_path / "adapter", END_OF_ANSWER[kind].strip()
    require_no_place(adapter, tmp_path)
    if not kind.startswith("qwen"):
        # Without its part for videos, which needs what is not installed here, it is loaded beside a model alone.
        processor = load_processor(str(adapter), revision=None, trust_remote_code=False)
        assert type(processor).__name__ == type(data.processor).__name__
        assert processor.chat_template == data.processor.chat_template
    assert module.end_token_ids == [data.tokenizer.convert_tokens_to_ids(end)]
    own = GenerationConfig.from_pretrained(base).eos_token_id
    expected = own if own == module.end_token_ids[0] else [own, *module.end_token_ids]
    card = ModelCard.load(adapter / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "AutoModelForImageTextToText" in card.text

    merge_adapter(MergeOptions(adapter, tmp_path / "merged"))
    for folder in (adapter, tmp_path / "merged"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == expected
        settings, before = (json.loads((place / "processor_config.json").read_text()) for place in (folder, base))
        # Its part for videos too.
        assert settings.get("video_processor") == before.get("video_processor")
        assert settings["image_processor"] == before["image_processor"]
    merged = load_processor(str(tmp_path / "merged"), revision=None, trust_remote_code=False)
    assert merged.chat_template == data.processor.chat_template


def test_a_dual_encoder(tmp_path: Path) -> None:
    base = saved_dual_encoder(tmp_path / "base")
    data = LabelledImageDataModule(base, train=write_shapes(tmp_path / "train", 2), batch_size=2, num_workers=0)
    module = make_module(base, adapter=AdapterOptions(folder=str(tmp_path / "adapter")))
    quiet_trainer(tmp_path).fit(module, data)
    adapter = tmp_path / "adapter"
    require_no_place(adapter, tmp_path)
    assert not (adapter / "generation_config.json").exists()
    assert type(load_processor(str(adapter), revision=None, trust_remote_code=False)).__name__ == "CLIPProcessor"
    card = ModelCard.load(adapter / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert f"Classes: {', '.join(f'`{name}`' for name in module.class_names or [])}." in card.text
    merge_adapter(MergeOptions(adapter, tmp_path / "merged"))
    load_processor(str(tmp_path / "merged"), revision=None, trust_remote_code=False)
