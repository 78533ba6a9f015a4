"""Tokens that the vocabulary lacks: they are read, learned, said, and in whatever is made of the adapter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from module_helpers import VOCABULARY, logits, quiet_trainer, saved_model, tied_llama, write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from na_lora_lightning import GateImportanceCallback, ScheduleOptions, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, EvaluationOptions, LoRAOptions
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter
from na_lora_lightning.cli.speaker import AnswerSettings, Speaker
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.source import BaseModelSource
from na_lora_lightning.modules.language import NALoRALightningModule

NEW = ["<think>", "</think>"]
IDS = [VOCABULARY, VOCABULARY + 1]
BASES = pytest.mark.parametrize("make", [saved_model, tied_llama], ids=["untied", "tied"])
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def data(base: str, folder: Path, **options: Any) -> InstructionDataModule:
    file = write_jsonl(folder / "records.jsonl", [{"prompt": "2+1=", "completion": "<think>2</think>3"}])
    settings: dict[str, Any] = {"train": file, "predict": file, "batch_size": 4, "new_tokens": NEW}
    return InstructionDataModule(base, **{**settings, **options})


def new_module(base: str, lr: float = 2e-2, **options: Any) -> NALoRALightningModule:
    seed_everything(0, verbose=False)
    return NALoRALightningModule(
        base,
        **{"lora": LoRAOptions(r=8, alpha=16, dropout=0.1), "new_tokens": NEW, **options},
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=0.1),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        evaluation=EvaluationOptions(max_new_tokens=8),
    )


def fitted(base: str, folder: Path, steps: int, ckpt_path: Path | None = None, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    module = new_module(base, **options)
    callbacks = [
        GateImportanceCallback(warmup_steps=0, refresh_every=1),
        StepScaleCallback(),
        ModelCheckpoint(folder / "checkpoints", save_last=True),
    ]
    trainer = quiet_trainer(folder, enable_checkpointing=True, callbacks=callbacks, max_epochs=steps)
    trainer.fit(module, data(base, folder), ckpt_path=ckpt_path)
    return module


@BASES
def test_new_tokens_are_learned_and_said(tmp_path: Path, make: Any) -> None:
    base = make(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    # Of so small a head the logits would be next to nothing.
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        weight.data *= 16
    model.save_pretrained(base)
    module = fitted(base, tmp_path, 120, lora=LoRAOptions(r=8), lr=1e-2)
    # It began at about ln 66, and ends below 0.4.
    assert float(module.trainer.callback_metrics["train/loss"]) < 1.0
    assert module.trainer.predict(module, data(base, tmp_path)) == [["<think>2</think>3"]]
    speaker = Speaker(str(tmp_path / "adapter"), None, "auto", torch.device("cpu"))
    said: list[str] = []
    speaker.answer(speaker.inputs_of([{"role": "user", "content": "2+1="}], []), AnswerSettings(8), said.append)
    assert "".join(said) == "<think>2</think>3"


@BASES
def test_a_merged_model_has_the_new_rows_and_no_others(tmp_path: Path, make: Any) -> None:
    base = make(tmp_path / "base")
    module = fitted(base, tmp_path, 3)
    expected, former = logits(module.peft_model), AutoModelForCausalLM.from_pretrained(base)
    assert expected.shape[-1] == VOCABULARY + 2
    for made_of in ("adapter", "checkpoints/last.ckpt"):
        merge_adapter(MergeOptions(tmp_path / made_of, tmp_path / "merged", overwrite=True))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
        assert merged.config.vocab_size == VOCABULARY + 2
        for part in ("get_input_embeddings", "get_output_embeddings"):
            rows, before = getattr(merged, part)().weight, getattr(former, part)().weight
            assert torch.equal(rows[:VOCABULARY], before)
            assert (rows[VOCABULARY:] - before.mean(dim=0)).abs().amax(dim=1).min() > 0.01
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert tokenizer("<think>1</think>", add_special_tokens=False)["input_ids"] == [IDS[0], 19, IDS[1]]
    # By PEFT alone, as the model card has it.
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"\nmodel.resize_token_embeddings({VOCABULARY + 2})" in card
    former.resize_token_embeddings(VOCABULARY + 2)
    plain = PeftModel.from_pretrained(former, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


@BASES
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_fit_is_bitwise_what_it_would_have_been(tmp_path: Path, make: Any) -> None:
    base = make(tmp_path / "base")
    whole = fitted(base, tmp_path / "whole", 4).state_dict()
    fitted(base, tmp_path / "parts", 2)
    module = fitted(base, tmp_path / "parts", 4, ckpt_path=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_new_rows_are_the_mean_of_the_others_and_draw_nothing(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model: Any = load_base_model(BaseModelSource(base, new_tokens=NEW), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert module.weight.shape == (VOCABULARY + 2, 16)
        assert torch.equal(module.weight[VOCABULARY:], module.weight[:VOCABULARY].mean(dim=0).expand(2, -1))
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCABULARY + 2


def test_rows_that_are_there_are_used_first(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    roomy = AutoModelForCausalLM.from_pretrained(base)
    roomy.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    roomy.save_pretrained(base)
    module = new_module(base)
    module.configure_model()
    config = module.peft_model.peft_config["default"]
    assert config.trainable_token_indices == {"model.embed_tokens": IDS, "lm_head": IDS}
    assert torch.equal(module.peft_model.get_base_model().lm_head.token_adapter.base_layer.weight, roomy.lm_head.weight)
    both = new_module(base, lora=LoRAOptions(trainable_token_indices=[5, VOCABULARY]))
    both.configure_model()
    config = both.peft_model.peft_config["default"]
    assert config.trainable_token_indices == {"model.embed_tokens": [5, *IDS], "lm_head": IDS}


@BASES
def test_an_adapter_brings_its_tokens_along(tmp_path: Path, make: Any) -> None:
    base = make(tmp_path / "base")
    module = fitted(base, tmp_path, 2)
    start = AdapterOptions(start=str(tmp_path / "adapter"))
    for given in ([], NEW):
        further = new_module(base, lora=LoRAOptions(), adapter=start, new_tokens=given)
        further.configure_model()
        assert further.source.new_tokens == tuple(NEW)
        assert torch.equal(logits(further.peft_model), logits(module.peft_model))
    for other in (["<think>"], NEW[::-1], [*NEW, "<answer>"]):
        with pytest.raises(ConfigurationError) as caught:
            new_module(base, adapter=start, new_tokens=other)
        assert str(caught.value) == (
            f"the adapter {str(tmp_path / 'adapter')!r} has the new tokens {NEW}, and model.new_tokens is {other}; "
            "leave model.new_tokens out."
        )
        again = new_module(base, new_tokens=other)
        again.configure_model()
        with pytest.raises(ConfigurationError, match=r"was trained with new_tokens=\['<think>', '</think>'\] and"):
            again.on_load_checkpoint(torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True))


def test_a_token_of_the_vocabulary_keeps_its_id_and_is_trained(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    module = new_module(base, new_tokens=["<end>", "7", "<a>"])
    module.configure_model()
    assert module.peft_model.peft_config["default"].trainable_token_indices == {
        "model.embed_tokens": [1, 25, VOCABULARY],
        "lm_head": [1, 25, VOCABULARY],
    }
    text = data(base, tmp_path, new_tokens=["<end>", "7", "<a>"])
    assert text.tokenizer.eos_token_id == 1
    assert text.tokenizer.decode([1, 25, VOCABULARY], skip_special_tokens=True) == "7<a>"


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ("<think>", "new_tokens is '<think>', and it is a list of texts; write it as ['<think>']."),
        ([1], "new_tokens is [1], and it is a list of texts; write it as ['<think>']."),
        (["<a>", ""], "new_tokens has an empty text, which no text has in it; leave it out."),
        (["<a>", "<b>", "<a>"], "new_tokens has '<a>' twice; leave one of the two out."),
    ],
)
def test_what_is_no_list_of_tokens_is_one_sentence(tmp_path: Path, tokens: Any, reason: str) -> None:
    for make in (partial(BaseModelSource, "base"), partial(InstructionDataModule, "base")):
        with pytest.raises(ConfigurationError) as caught:
            make(new_tokens=tokens)
        assert str(caught.value) == reason


def test_what_cannot_have_new_tokens_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path / "base")
    for lora, reason in (
        (
            LoRAOptions(modules_to_save=["embed_tokens"]),
            "lora.modules_to_save trains 'embed_tokens' in full, and model",
        ),
        (
            LoRAOptions(target_modules=["q_proj", "lm_head"]),
            "LoRA is to adapt 'lm_head', of which rows of tokens are trained",
        ),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            new_module(base, lora=lora).configure_model()
    with pytest.raises(ConfigurationError) as caught:
        quiet_trainer(tmp_path).fit(new_module(base), data(base, tmp_path, new_tokens=NEW[::-1]))
    assert str(caught.value) == (
        f"the tokenizer of the data reads '<think>' as the ids [{IDS[1]}], and it is the new token {IDS[0]} of the "
        f"model; give the data module new_tokens={NEW} and the model's own tokenizer."
    )
    kind = type(AutoModelForCausalLM.from_pretrained(base))
    monkeypatch.setattr(kind, "resize_token_embeddings", lambda self, *args, **options: None)
    with pytest.raises(ConfigurationError) as caught:
        new_module(base).configure_model()
    assert str(caught.value) == (
        f"the embeddings of LlamaForCausalLM cannot be resized (they keep their size), and it has no row for the token "
        f"{IDS[1]}; leave model.new_tokens out, or give a model that has rows for them."
    )


def test_a_head_with_a_bias_is_refused_which_peft_would_leave_out(tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    base = saved_model(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    sizes = {name: config[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    PhiForCausalLM(PhiConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0)).save_pretrained(base)
    with pytest.raises(
        ConfigurationError, match="PEFT leaves the bias of 'lm_head' out where it trains rows of tokens"
    ):
        new_module(base).configure_model()


def test_a_head_that_is_trained_in_full_says_them_too(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    module = fitted(base, tmp_path, 2, lora=LoRAOptions(r=2, modules_to_save=["lm_head"]))
    assert module.peft_model.peft_config["default"].trainable_token_indices == IDS
    expected = logits(module.peft_model)
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
