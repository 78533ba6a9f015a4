"""``model.new_tokens`` on the command line: one line, which data, adapters and every other command follow."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from module_helpers import VOCABULARY, Fit, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from vision_helpers import tiny_vlm, write_vision_records

from na_lora_lightning.cli.main import main
from na_lora_lightning.compare.plan import ARMS, Plan
from na_lora_lightning.errors import ConfigurationError

NEW = ["<think>", "</think>"]


@pytest.fixture
def fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fit:
    monkeypatch.chdir(tmp_path)
    fit = Fit(tmp_path, capsys)
    file = write_jsonl(
        tmp_path / "t.jsonl", [{"prompt": f"{n}+1=", "completion": f"<think>{n}</think>"} for n in range(8)]
    )
    fit.options["model"]["new_tokens"] = NEW
    fit.options["data"].update(train=file, validation=file, predict=file)
    return fit


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def measured(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "validation/" in line]


def test_every_command_makes_the_same_base_again(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("--trainer.max_epochs=2") == 0
    run = next(fit.folder.glob("run/**/version_0"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["new_tokens"] == NEW
    # The tokens are not said again.
    del fit.options["model"]["new_tokens"]
    config = ["--config", fit.file("plain.yaml", fit.options)]
    capsys.readouterr()
    assert main(["validate", *config, "--adapter", str(run)]) == 0
    by_adapter = measured(capsys)
    assert main(["validate", *config, f"--model.adapter.start={run}"]) == 0
    assert measured(capsys) == by_adapter
    assert main(["validate", *config, f"--model.new_tokens={NEW}", f"--ckpt_path={fit.newest}"]) == 0
    assert measured(capsys) == by_adapter
    assert len(by_adapter) == 3
    assert main(["validate", *config, f"--ckpt_path={fit.newest}"]) == 2
    assert "was trained with new_tokens=['<think>', '</think>'] and the current model has []" in capsys.readouterr().err
    assert main(["predict", *config, "--model.evaluation.max_new_tokens=2", "--adapter", str(run)]) == 0
    answers = newest(fit.folder, "run/**/predictions.jsonl").read_text().splitlines()
    assert len(answers) == 8
    assert main(["fit", *config, "--adapter", str(run), "--trainer.max_epochs=1"]) == 0
    last = newest(fit.folder, "run/**/adapter")
    assert last.parent != run
    for made_of in (last, fit.newest):
        assert main(["merge", "--adapter", str(made_of), "--output", "merged", "--overwrite"]) == 0
        assert AutoModelForCausalLM.from_pretrained("merged").config.vocab_size == VOCABULARY + 2
        assert AutoTokenizer.from_pretrained("merged").convert_tokens_to_ids(NEW) == [VOCABULARY, VOCABULARY + 1]
    for place, more in ((last, ["--compare"]), ("merged", [])):
        monkeypatch.setattr("sys.stdin", io.StringIO("1+1=<think>\n"))
        assert main(["chat", str(place), "--max_new_tokens", "2", *more]) == 0


def test_inspection_counts_their_rows(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for tokens in ([], NEW):
        fit.options["model"]["new_tokens"] = tokens
        assert main(["inspect", "--json", "-c", fit.file("run.yaml", fit.options)]) == 0
        counts.append(json.loads(capsys.readouterr().out))
    # Two rows of sixteen in the embedding and in the head, and PEFT's copies, beside what is trained.
    without, with_tokens = (count["parameters"] for count in counts)
    assert with_tokens["trainable"] - without["trainable"] == 2 * 2 * 16
    assert with_tokens["total"] - without["total"] == 2 * 2 * 2 * 16
    assert counts[1]["memory"]["weights"] - counts[0]["memory"]["weights"] == 2 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_vl"])
def test_models_for_images_have_them_too(fit: Fit, kind: str) -> None:
    base, records = str(tiny_vlm(kind, fit.folder / kind)), write_vision_records(fit.folder / "pictures", 4)
    rows = AutoModelForImageTextToText.from_pretrained(base).get_input_embeddings().weight.shape[0]
    fit.options["model"].update(model_name_or_path=base)
    fit.options["data"] = {
        "class_path": "na_lora_lightning.data.VisionInstructionDataModule",
        "init_args": {"train": records, "predict": records, "num_workers": 0},
    }
    more = ["--gate_importance=false", "--step_scale=false"]
    assert fit("--trainer.max_steps=2", *more) == 0
    adapter = newest(fit.folder, "run/**/adapter")
    file = fit.file("run.yaml", fit.options)
    assert main(["predict", "-c", file, "--adapter", str(adapter), "--model.evaluation.max_new_tokens=2"]) == 0
    for made_of in (adapter, fit.newest):
        assert main(["merge", "--adapter", str(made_of), "--output", "merged", "--overwrite"]) == 0
        merged = AutoModelForImageTextToText.from_pretrained("merged")
        tokenizer = AutoTokenizer.from_pretrained("merged")
        assert merged.config.get_text_config().vocab_size == len(merged.get_input_embeddings().weight)
        (first,) = tokenizer.encode("<think>", add_special_tokens=False)
        assert merged.get_output_embeddings().weight.shape[0] == max(rows, first + 2)


def test_dual_encoders_have_none(fit: Fit) -> None:
    fit.options["model"] = {
        "class_path": "na_lora_lightning.DualEncoderLightningModule",
        "init_args": {"model_name_or_path": str(fit.folder / "base"), "new_tokens": NEW},
    }
    assert fit.error() == "the class given for 'model' has no option 'new_tokens'; correct or remove it."
    # Without the option the class is not asked for it.
    del fit.options["model"]["init_args"]["new_tokens"]
    assert fit.error().startswith("there are no classes to make prompts of")


def test_what_is_no_list_is_one_sentence(fit: Fit) -> None:
    remedy = "'--help' shows what it takes."
    assert fit.error("--model.new_tokens=<think>") == f"the option 'model.new_tokens' cannot be '<think>'; {remedy}"
    twice = "new_tokens has '<a>' twice; leave one of the two out."
    assert fit.error("--model.new_tokens=['<a>', '<a>']") == twice
    file = fit.file("run.yaml", {**fit.options, "model": {**fit.options["model"], "new_tokens": ["<a>", ""]}})
    assert main(["inspect", "-c", file]) == 2


def test_comparisons_keep_no_inputs_of_blocks_whose_embeddings_train() -> None:
    for options in ({"new_tokens": NEW}, {"lora": {"trainable_token_indices": [1]}}):
        base = {"model": {"model_name_or_path": "base", **options}, "data": {}}
        plan = Plan(base, {"task": {}}, {"lora": ARMS["lora"], "na_lora": {}}, (0.03,), seeds=1, last_layers=1)
        with pytest.raises(ConfigurationError, match=r"^--last-layers keeps what the last blocks are given, which"):
            plan.config(plan.cells()[0])
