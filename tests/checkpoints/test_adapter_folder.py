"""An adapter folder has all that is needed to use it, and no absolute path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from module_helpers import CHAT_TEMPLATE, Batches, byte_tokenizer, quiet_trainer, saved_model, some_batches, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, ScheduleOptions
from na_lora_lightning.checkpoints.adapter_folder import exchange, find_base, hub_name, portable_base
from na_lora_lightning.checkpoints.adapter_state import write_adapter_folder
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.fit_summary import FitSummaryCallback
from na_lora_lightning.modules.language import NALoRALightningModule


def make_module(base: str, **adapter: Any) -> NALoRALightningModule:
    seed_everything(3, verbose=False)
    return NALoRALightningModule(
        base,
        lora=LoRAOptions(r=2, alpha=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-2),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        adapter=AdapterOptions(**adapter),
    )


def chat_base(folder: Path) -> str:
    """A model whose tokenizer has a chat template, and 260 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    model.generation_config = GenerationConfig(eos_token_id=5)
    model.save_pretrained(folder)
    # With settings that transformers reads and does not write.
    settings = GenerationConfig(temperature=0.6, do_sample=False, eos_token_id=5)
    settings.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_folder_is_complete_and_names_no_place(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "models" / "tiny")
    records = [{"prompt": "a", "completion": f"{number}"} for number in range(4)]
    source = write_jsonl(tmp_path / "my `data` | x.jsonl", records)
    data = InstructionDataModule(base, train=source, validation=source, batch_size=2, system_prompt="Say ```no```.")
    summary = FitSummaryCallback()
    callbacks = [GateImportanceCallback(warmup_steps=0, keep_fraction=0.5), StepScaleCallback(), summary]
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=-1, max_epochs=2, callbacks=callbacks)
    module = make_module(base, folder=str(tmp_path / "out" / "adapter"))
    trainer.fit(module, data)

    folder = tmp_path / "out" / "adapter"
    names = {file.name for file in folder.iterdir()}
    expected = {"adapter_config.json", "adapter_model.safetensors", "README.md", "generation_config.json"}
    assert expected | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} == names
    for file in folder.iterdir():
        assert str(tmp_path) not in file.read_bytes().decode("latin-1")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [5, tokenizer.eos_token_id]
    # Plain PEFT.
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    loaded.generation_config = GenerationConfig.from_pretrained(folder)
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, module.peft_model.eval()(input_ids=ids).logits)

    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "peft"
    assert card.data.base_model is None
    assert card.data.pipeline_tag == "text-generation"
    assert {"lora", "na-lora"} <= set(card.data.tags or [])
    assert "weights are those of step 4, the last" in card.text
    assert "| train | `` my `data` \\| x.jsonl `` | 4 | " in card.text
    assert "| metric | before (step 0) | after (step 4) |" in card.text
    assert f"| loss | {summary.metrics_before['loss']:.4g} | {summary.metrics_after['loss']:.4g} |" in card.text
    settings = json.loads(card.text.partition("````json\n")[2].partition("\n````")[0])
    assert settings["lora"]["r"] == 2
    assert settings["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert settings["optimizer"]["init_args"]["lr"] == 5e-2
    assert settings["schedule"]["name"] == "constant"
    assert settings["mechanisms"]["GateImportanceCallback"]["keep_fraction"] == 0.5
    assert "StepScaleCallback" in settings["mechanisms"]
    assert (settings["steps"], settings["seed"]) == (4, 3)
    assert settings["data"]["system_prompt"] == "Say ```no```."
    assert settings["data"]["batch_size"] == 2

    # The base is found where it was trained, and the tokenizer is the adapter's.
    tokenizer.chat_template = "{{ 'changed' }}"
    tokenizer.save_pretrained(folder)
    merge_adapter(MergeOptions(folder, tmp_path / "merged"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ 'changed' }}"
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [5, tokenizer.eos_token_id]


def test_how_the_card_says_to_load_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    quiet_trainer(tmp_path).fit(make_module("base", folder="adapter"), Batches(some_batches(2)))
    assert base not in Path("adapter/README.md").read_text()
    code = Path("adapter/README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert names["reader"]("1+2")["input_ids"] == [19, 13, 20]
    assert names["model"].generation_config.eos_token_id == 1


def test_the_name_of_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path = tmp_path.resolve()

    def name(base: str, folder: str = "runs/adapter", revision: str | None = None) -> tuple[Any, Any]:
        return tuple(portable_base(base, revision, tmp_path / folder).values())  # type: ignore[return-value]

    assert name("org/model", revision="v1") == ("org/model", "v1")
    assert name("gpt2") == ("gpt2", None)
    assert name("") == (None, None)
    assert name(f"{tmp_path}/models/a") == ("./models/a", None)
    assert name(f"{tmp_path}/.cache/a") == (".cache/a", None)
    assert name(str(tmp_path.parent / "a")) == ("../../../a", None)
    assert name("/elsewhere/models/a") == ("./a", None)
    cached = "/home/x/.cache/huggingface/hub/models--org--model--b/snapshots/0123abcd"
    assert hub_name(cached) == "org/model/b"
    assert hub_name(cached.replace("--b/", "/")) == "org/model"
    assert name(cached.replace("--b/", "/")) == ("org/model", "0123abcd")
    assert (hub_name("gpt2"), hub_name("/models/a"), hub_name("./a"), hub_name("")) == ("gpt2", None, None, None)


def test_a_base_is_found_from_several_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path / "deep" / "models" / "tiny")
    adapter = tmp_path / "deep" / "runs" / "adapter"
    adapter.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_base("./deep/models/tiny", adapter) == base
    assert find_base("../../models/tiny", adapter) == base
    monkeypatch.chdir(tmp_path / "deep")
    assert find_base("./models/tiny", adapter) == base
    monkeypatch.chdir("/")
    assert find_base("./models/tiny", adapter) == base
    assert find_base("./other", adapter) == "./other"
    assert find_base("models/tiny", adapter) == "models/tiny"


def test_an_adapter_whose_base_is_gone_says_so(tmp_path: Path) -> None:
    quiet_trainer(tmp_path).fit(make_module(saved_model(tmp_path / "base")), Batches(some_batches(1)))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigurationError, match=r"names cannot be had .*'\.\./base' does not exist.*; give .*--base"):
        merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))


def test_folders_change_places(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if exchange(tmp_path / "old", tmp_path / "new"):
        assert (tmp_path / "old" / "file").read_text() == "new"
        assert (tmp_path / "new" / "file").read_text() == "old"
    assert not exchange(tmp_path / "old", tmp_path / "missing")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_adapter_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr("na_lora_lightning.checkpoints.adapter_state.exchange", lambda first, second: False)
    module = make_module(saved_model(tmp_path / "base"))
    module.configure_model()
    folder = tmp_path / "adapter"
    write_adapter_folder(module.peft_model, folder, card="first")
    (folder / "notes.txt").write_text("mine")
    for name, parameter in module.named_parameters():
        if name.endswith("lora_B.default.weight"):
            parameter.data.fill_(1.0)
    write_adapter_folder(module.peft_model, folder, card="second", reader=byte_tokenizer())
    assert (folder / "README.md").read_text() == "second"
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "chat_template.jinja").is_file()
    written = load_file(folder / "adapter_model.safetensors")
    assert all(bool((tensor == 1).all()) for name, tensor in written.items() if "lora_B" in name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ---- which step is written ----


def best_trainer(folder: Path, **options: Any) -> Any:
    """A fit whose best checkpoint is an early one."""
    saver = ModelCheckpoint(folder / "checkpoints", monitor="validation/loss", mode="max", save_top_k=1)
    return quiet_trainer(folder, enable_checkpointing=True, callbacks=[saver, *options.pop("callbacks", [])], **options)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_the_best_checkpoint_is_written(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    data = Batches(some_batches(2), some_batches(2, seed=50))
    summary = FitSummaryCallback()
    trainer = best_trainer(tmp_path, max_epochs=6, callbacks=[summary], num_sanity_val_steps=-1)
    module = make_module(base, write="best")
    trainer.fit(module, data)
    saver = trainer.checkpoint_callback
    checkpoint = torch.load(saver.best_model_path, weights_only=True)
    step = checkpoint["global_step"]
    # Otherwise it would be the last as well.
    assert 0 < step < trainer.global_step == 12
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, tensor in written.items():
        saved = checkpoint["state_dict"]["model." + name.replace(".weight", ".default.weight")]
        assert torch.equal(tensor, saved)
    assert module.written_adapter is not None
    assert module.written_adapter.weights == f"step {step}, the best validation/loss ({saver.best_model_score:.4g})"
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert f"| metric | before (step 0) | best (step {step}) | after (step 12) |" in text
    assert f"| {saver.best_model_score:.4g} | {summary.metrics_after['loss']:.4g} |" in text

    # Where nothing is left to train, the best is still known.
    last = tmp_path / "end.ckpt"
    trainer.save_checkpoint(last)
    shutil.rmtree(tmp_path / "adapter")
    again = make_module(base, write="best")
    trainer = best_trainer(tmp_path, max_epochs=6, callbacks=[FitSummaryCallback()])
    trainer.fit(again, data, ckpt_path=last)
    assert again.written_adapter == module.written_adapter
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key:UserWarning")
def test_the_best_needs_a_metric(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    data = Batches(some_batches(1))
    module = make_module(base, write="best")
    for callbacks in ([], [ModelCheckpoint(tmp_path)], [ModelCheckpoint(tmp_path, monitor="step", mode="max")]):
        trainer = quiet_trainer(tmp_path, enable_checkpointing=bool(callbacks), callbacks=list(callbacks))
        with pytest.raises(ConfigurationError, match=r"^adapter.write is 'best', and no checkpoint callback .*; add"):
            trainer.fit(module, data)
    assert module.model is None
    with pytest.warns(UserWarning, match="was never measured, so that no checkpoint is the best"):
        best_trainer(tmp_path).fit(make_module(base, write="best"), data)
    assert "those of step 1, the last" in (tmp_path / "adapter" / "README.md").read_text()


def test_former_words_of_what_is_written() -> None:
    assert AdapterOptions("fit_end") == AdapterOptions("last") == AdapterOptions()
    assert AdapterOptions("checkpoint").write == "each"
    with pytest.raises(ConfigurationError, match=r"adapter.write='never ever' is unknown; use 'last', 'best', 'each'"):
        AdapterOptions("never ever")  # type: ignore[arg-type]
