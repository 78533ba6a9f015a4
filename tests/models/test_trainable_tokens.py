"""Embeddings of chosen tokens: those rows alone are trained, saved, read again and merged."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from module_helpers import Batches, logits, quiet_trainer, saved_model, some_batches, tied_llama, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter
from na_lora_lightning.cli.speaker import Speaker
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.language import NALoRALightningModule

TOKENS = [5, 3]


def trained(base: str, folder: Path, **lora: Any) -> NALoRALightningModule:
    seed_everything(0, verbose=False)
    module = NALoRALightningModule(
        base,
        lora=LoRAOptions(r=2, alpha=4, trainable_token_indices=TOKENS, **lora),
        optimizer=partial(torch.optim.AdamW, lr=5e-2, weight_decay=0.1),
    )
    callbacks = [
        GateImportanceCallback(warmup_steps=0, refresh_every=1),
        StepScaleCallback(),
        ModelCheckpoint(folder / "checkpoints", save_last=True),
    ]
    quiet_trainer(folder, enable_checkpointing=True, callbacks=callbacks).fit(module, Batches(some_batches(3)))
    return module


@pytest.mark.parametrize("make", [saved_model, tied_llama, partial(saved_model, kind="gpt2")])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_embeddings_of_chosen_tokens_are_trained_saved_and_merged(tmp_path: Path, make: Any) -> None:
    base = make(tmp_path / "base")
    module = trained(base, tmp_path)
    expected = logits(module.peft_model)
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    changed = (merged.get_input_embeddings().weight != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == sorted(TOKENS)
    # By PEFT, from the checkpoint, and as the start of another fit.
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    merge_adapter(MergeOptions(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "other"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-5)
    further = NALoRALightningModule(base, adapter=AdapterOptions(start=str(tmp_path / "adapter")))
    further.configure_model()
    torch.testing.assert_close(logits(further.peft_model), expected, rtol=0, atol=1e-5)
    assert further.lora.trainable_token_indices == sorted(TOKENS)


def test_tokens_that_were_added_are_trained_read_and_merged(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "first")
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    # Before model.new_tokens, or with other tools.
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "base")
    new = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert new == [len(tokenizer) - 2, len(tokenizer) - 1]
    records = [{"prompt": f"{n}+1=", "completion": f"<think>{n}</think>{n + 1}"} for n in range(6)]
    module = NALoRALightningModule(
        str(tmp_path / "base"),
        lora=LoRAOptions(r=2, alpha=4, trainable_token_indices=new),
        optimizer=partial(torch.optim.AdamW, lr=5e-2),
    )
    data = InstructionDataModule(str(tmp_path / "base"), train=write_jsonl(tmp_path / "r.jsonl", records), batch_size=3)
    quiet_trainer(tmp_path).fit(module, data)
    assert {*new} <= {*next(iter(data.train_dataloader()))["labels"].flatten().tolist()}
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(module.peft_model), rtol=0, atol=1e-5)
    changed = (merged.get_input_embeddings().weight != model.get_input_embeddings().weight).any(dim=1)
    assert changed.nonzero().flatten().tolist() == new
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("<think>", add_special_tokens=False) == new[:1]
    assert (
        Speaker(str(tmp_path / "adapter"), None, "auto", torch.device("cpu")).tokenizer.encode("</think>")[-1] == new[1]
    )


def test_tokens_that_a_model_lacks_are_refused(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    count = AutoModelForCausalLM.from_pretrained(base).config.vocab_size
    for index in (count, -1):
        module = NALoRALightningModule(base, lora=LoRAOptions(trainable_token_indices=[1, index]))
        with pytest.raises(ConfigurationError, match=f"names {index}, and the model has .* 0 to {count - 1}; leave"):
            module.configure_model()
    both = LoRAOptions(trainable_token_indices=[1], modules_to_save=["embed_tokens"])
    with pytest.raises(ConfigurationError, match="trains 'embed_tokens' in full, and lora"):
        NALoRALightningModule(base, lora=both).configure_model()
