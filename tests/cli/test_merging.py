from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from module_helpers import logits, saved_model, trained
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from na_lora_lightning.cli.main import main
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter
from na_lora_lightning.errors import ConfigurationError


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["lora", "dora", "pissa"]
)
@pytest.mark.parametrize("adapter", ["adapter", "checkpoints/last.ckpt"])
def test_merged_model_gives_the_same_logits(tmp_path: Path, kind: str, lora: dict[str, Any], adapter: str) -> None:
    base = saved_model(tmp_path / "base", kind)
    module = trained(base, tmp_path, **lora)
    assert main(["merge", "--adapter", str(tmp_path / adapter), "--output", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), logits(module.peft_model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("1+2")["input_ids"] == AutoTokenizer.from_pretrained(base)("1+2")["input_ids"]


def test_merged_dtype_is_the_bases_unless_given(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    trained(base, tmp_path)
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "same"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype="auto").dtype == torch.bfloat16
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "float32", dtype="float32"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype="auto").dtype == torch.float32


def test_a_moved_base_is_given_by_name(tmp_path: Path) -> None:
    module = trained(saved_model(tmp_path / "base"), tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match="does not exist"):
        merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "moved")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(module.peft_model), rtol=0, atol=1e-5)


def test_output_is_not_overwritten_unasked(tmp_path: Path) -> None:
    trained(saved_model(tmp_path / "base"), tmp_path)
    output = tmp_path / "merged"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not empty"):
        merge_adapter(MergeOptions(tmp_path / "adapter", output))
    assert [file.name for file in output.iterdir()] == ["thesis.txt"]
    merge_adapter(MergeOptions(tmp_path / "adapter", output, overwrite=True))
    assert (output / "model.safetensors").is_file()
    with pytest.raises(ConfigurationError, match="is a file"):
        merge_adapter(MergeOptions(tmp_path / "adapter", output / "thesis.txt"))


def test_an_adapter_for_other_layers_is_refused(tmp_path: Path) -> None:
    trained(saved_model(tmp_path / "base"), tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path / "base", num_hidden_layers=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "shallow")
    with pytest.raises(ConfigurationError, match="is in one and not in the other"):
        merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "shallow")))


@pytest.mark.skipif(Version(version("transformers")) < Version("5.1"), reason="5.0 makes an empty tokenizer if none is")
def test_a_base_without_tokenizer_merges_with_that_of_the_adapter(tmp_path: Path) -> None:
    trained(saved_model(tmp_path / "base"), tmp_path)
    for file in (tmp_path / "base").glob("tokenizer*"):
        file.unlink()
    merge_adapter(MergeOptions(tmp_path / "adapter", tmp_path / "merged"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("1+2")["input_ids"] == [19, 13, 20]
    with pytest.warns(UserWarning, match="has no tokenizer"):
        merge_adapter(MergeOptions(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "from checkpoint"))
    assert (tmp_path / "from checkpoint" / "model.safetensors").is_file()


def one_line_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["merge", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(saved_model(tmp_path / "base"), tmp_path)
    other = saved_model(tmp_path / "other", "gpt2")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    capsys.readouterr()
    output = tmp_path / "merged"
    assert "--adapter, --output" in one_line_error(capsys)
    assert "holds no adapter" in one_line_error(capsys, "--adapter", tmp_path / "missing", "--output", output)
    assert "does not fit" in one_line_error(
        capsys, "--adapter", tmp_path / "adapter", "--output", output, "--base", other
    )
    assert "is not a checkpoint of this package" in one_line_error(
        capsys, "--adapter", tmp_path / "text.ckpt", "--output", output
    )
    assert "'llama' and the current one is 'gpt2'" in one_line_error(
        capsys, "--adapter", tmp_path / "checkpoints" / "last.ckpt", "--output", output, "--base", other
    )
    assert not output.exists()
