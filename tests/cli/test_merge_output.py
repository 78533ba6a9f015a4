"""Where merged models are written, and adapters of other makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from module_helpers import logits, saved_model, tied_llama
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from na_lora_lightning.cli.main import main
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter
from na_lora_lightning.cli.merge_output import written_whole
from na_lora_lightning.errors import CheckpointError, ConfigurationError


def an_adapter(base: str, folder: Path, config: PeftConfig | None = None) -> PeftModel:
    """Writes an adapter that plain PEFT made, with random weights."""
    torch.manual_seed(0)
    if config is None:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("run/adapter", "adapter"),
        ("run/../run/adapter/.", "adapter"),
        ("link", "adapter"),
        ("run", "adapter"),
        ("run/adapter/merged", "adapter"),
        ("base", "base model"),
        ("base/merged", "base model"),
        (".", "adapter"),
    ],
)
def test_a_merge_never_writes_where_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, what: str
) -> None:
    an_adapter(saved_model(tmp_path / "base"), tmp_path / "run" / "adapter")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "adapter")
    before = contents(tmp_path)
    arguments = ["merge", "--adapter", str(tmp_path / "run" / "adapter"), "--output", f"{tmp_path}/{output}"]
    assert main([*arguments, "--overwrite"]) == 2
    assert f"is the place of the {what}" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", ["checkpoints", "."])
def test_nor_where_the_checkpoint_is(tmp_path: Path, output: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(b"")
    with pytest.raises(ConfigurationError, match="is the place of the adapter"):
        merge_adapter(MergeOptions(checkpoint, tmp_path / output, overwrite=True))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("other", "holds an adapter; give another"),
        ("file/merged", "cannot be written, as .*file' is a file or not writable"),
        ("file", "is a file; give a folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_anything_is_loaded(
    tmp_path: Path, output: str, message: str
) -> None:
    for adapter in ("other", "adapter"):
        (tmp_path / adapter).mkdir()
        (tmp_path / adapter / "adapter_config.json").write_text("{}")
        (tmp_path / adapter / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=message):
        merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / output, overwrite=True))


@pytest.mark.parametrize("exists", [False, True])
def test_a_merge_that_fails_leaves_no_model(tmp_path: Path, exists: bool) -> None:
    output = tmp_path / "merged"
    if exists:
        output.mkdir()
        (output / "config.json").write_text("former")

    def fail() -> None:
        with written_whole(output) as folder:
            (folder / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"could not be written .*No space left"):
        fail()
    assert contents(tmp_path) == ({"merged/config.json": b"former"} if exists else {})


def test_a_folder_that_is_replaced_is_no_model_until_all_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "notes.txt"):
        (output / name).write_text("former")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    def write() -> None:
        with written_whole(output) as folder:
            (folder / "config.json").write_text("new")
            (folder / "model-00001-of-00001.safetensors").write_text("new")

    monkeypatch.setattr(shutil, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert contents(output) == {"notes.txt": b"former"}
    monkeypatch.undo()
    write()
    assert sorted(contents(tmp_path)) == [
        f"merged/{name}" for name in ("config.json", "model-00001-of-00001.safetensors", "notes.txt")
    ]


def test_a_quantised_base_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved_model(tmp_path / "base")
    an_adapter(base, tmp_path / "adapter")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 2
    assert f"error: the base model {base!r} is quantised (bitsandbytes)" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


OTHERS: dict[str, Any] = {
    "rslora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], use_rslora=True, bias="all"),
    "dora": lambda: peft.LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "patterns": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3}, alpha_pattern={"q_proj": 5}
    ),
    "embeddings": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "saved": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "tokens": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 4]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj", "k_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_makes_merge(tmp_path: Path, kind: str) -> None:
    base = saved_model(tmp_path / "base")
    config = OTHERS[kind]()
    config.task_type = "CAUSAL_LM"
    model = an_adapter(base, tmp_path / "adapter", config)
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-4)


def test_what_cannot_be_merged_is_one_sentence(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    an_adapter(base, tmp_path / "adapter", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigurationError, match="of the kind PROMPT_TUNING, which adds to the inputs"):
        merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_peft_merges_by_halves_is_one_sentence(tmp_path: Path) -> None:
    base = tied_llama(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], trainable_token_indices=[1])
    an_adapter(base, tmp_path / "adapter", config)
    with pytest.raises(ConfigurationError, match=r"PEFT cannot merge this adapter \(LORA: 'lm_head.* has two of its"):
        merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))


def test_a_sharded_base_merges(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    tiny_llama().save_pretrained(base, max_shard_size="10KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    model = an_adapter(base, tmp_path / "adapter")
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_whose_base_is_gone_says_how_to_give_it(tmp_path: Path) -> None:
    an_adapter(saved_model(tmp_path / "base"), tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match=r"cannot be had .*does not exist.*; give it with --base"):
        merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))


def test_weights_are_written_in_files_of_a_size(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    an_adapter(base, tmp_path / "adapter")
    merge = ["merge", "--adapter", str(tmp_path / "adapter"), "--output"]
    assert main([*merge, str(tmp_path / "one")]) == 0
    assert main([*merge, str(tmp_path / "many"), "--max_shard_size", "10KB"]) == 0
    files = list((tmp_path / "many").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 12_000 for file in files)
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(one[name].equal(many[name]) for name in one)


def test_a_merged_model_is_pushed_whole_or_one_sentence_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved_model(tmp_path / "base")
    an_adapter(base, tmp_path / "adapter")
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append((options["repo_id"], {"files": sorted(contents(Path(options["folder_path"])))}))
            if len(calls) > 2:
                raise ConnectionError("no way")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    merge = ["merge", "--adapter", str(tmp_path / "adapter"), "--push_to", "me/mine", "--output"]
    assert main([*merge, str(tmp_path / "merged"), "--private"]) == 0
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(calls[1][1]["files"])
    assert main([*merge, str(tmp_path / "again")]) == 2
    error = capsys.readouterr().err
    assert f"error: the merged model is in '{tmp_path}/again' and could not be pushed to 'me/mine' (no way)" in error
    for option, value in (("--max_shard_size", "5"), ("--push_to", "a/b/c")):
        assert main([*merge, str(tmp_path / "third"), option, value]) == 2
        assert f"error: {option} is {value!r}" in capsys.readouterr().err
