"""What the command line prints: help without markup, one sentence for each common mistake, no traceback into a pipe."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
import yaml
from module_helpers import saved_model, tiny_tokenizer, write_records
from transformers import MambaConfig, MambaForCausalLM

import na_lora_lightning
from na_lora_lightning.cli.arguments import plain
from na_lora_lightning.cli.main import main, unread_output_is_dropped


def pipe_without_reader() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("options", [[], ["--json"], ["--lora.target_modules", "[q_porj]"], ["--help"], ["--nope"]])
def test_inspect_into_a_closed_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str, options: list[str]
) -> None:
    base = saved_model(tmp_path)
    with pipe_without_reader() as closed:
        monkeypatch.setattr(sys, stream, closed)
        failed = "[q_porj]" in options or "--nope" in options
        assert main(["inspect", base, *options]) == (2 if failed else 0)
        assert getattr(sys, stream) is closed
        monkeypatch.undo()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nothing"]])
def test_help_into_closed_pipes(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    with pipe_without_reader() as out, pipe_without_reader() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert main(arguments) == (2 if arguments in ([], ["nothing"]) else 0)
        monkeypatch.undo()


def test_work_goes_on_when_the_reader_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    done = []
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with unread_output_is_dropped():
            print("first", flush=True)
            assert os.read(reader, 100) == b"first\n"
            os.close(reader)
            for line in range(3):
                print("x" * 100_000, flush=True)
                done.append(line)
        monkeypatch.undo()
    assert done == [0, 1, 2]


def test_a_process_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--version"]) == 0
    monkeypatch.undo()


MARKUP = re.compile(r"`|:(class|func|meth|attr|mod|ref|paramref):|~na_lora|c_R|d_ff")


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that no text is broken where a pattern would look for it.
    monkeypatch.setenv("COLUMNS", "10000")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "merge", "inspect"])
def test_no_markup_and_no_undefined_symbol(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 10
    assert [line for line in printed.splitlines() if MARKUP.search(line)] == []


def test_options_of_a_class_have_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--data", "na_lora_lightning.data.VisionInstructionDataModule", "--help"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if MARKUP.search(line)] == []


@pytest.mark.parametrize("command", ["fit", "test"])
def test_own_groups_come_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    groups = [match[1] for line in lines if (match := re.fullmatch(r"\S.* \(([a-z_.]+)\):", line))]
    assert groups == [
        *("model", "model.lora", "model.schedule", "model.loss", "model.evaluation", "model.adapter"),
        *("model.quantization", "data"),
        *("gate_importance", "gate_importance.variant", "gate_importance.observer", "gate_importance.view"),
        *("step_scale", "step_scale.observer", "step_scale.view", "fit_summary", "checkpoint", command, "trainer"),
    ]
    # One line of usage instead of a hundred and fifty.
    assert lines[0] == f"usage: na-lora {command} [--config FILE] [--OPTION VALUE ...]"
    assert lines[1] == ""


def test_a_switch_stands_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    printed = capsys.readouterr().out
    start, end = printed.index(" (step_scale):"), printed.index(" (step_scale.observer):")
    assert "--step_scale.enabled" in printed[start:end]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":class:`~a.b.Name` and :func:`a.b.f`", "Name and f"),
        (":paramref:`~lightning.pytorch.trainer.trainer.Trainer.callbacks`.", "callbacks."),
        (":ref:`the manual <manual>`", "the manual"),
        ('``"targets"`` of ``a`` or `b`', '"targets" of a or b'),
        ("`Notes <https://x.org/a_b>`_.", "Notes (https://x.org/a_b)."),
        ("no `` pair, no_markup", "no `` pair, no_markup"),
        (None, None),
    ],
)
def test_plain_text_of_markup(text: str | None, expected: str | None) -> None:
    assert plain(text) == expected


def model_without_gates(folder: Path) -> str:
    """Mamba: its SiLUs follow convolutions and gate a recurrence, and there is no feed-forward block."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=8, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=2)
    MambaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def jsonl(folder: Path, *records: dict[str, str]) -> str:
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


GOOD = {"prompt": "ab", "completion": "c"}


@pytest.mark.parametrize(
    ("make_arguments", "parts"),
    [
        pytest.param(
            lambda folder: ["--model.model_name_or_path", str(folder / "nowhere")],
            ["nowhere", "does not exist", "give the folder of a model"],
            id="unknown model folder",
        ),
        pytest.param(
            lambda folder: [
                "--model.model_name_or_path",
                model_without_gates(folder / "mamba"),
                "--model.lora.target_modules",
                "[in_proj, x_proj]",
            ],
            ["no feed-forward gate was found", "train this model without the NA-LoRA callbacks"],
            id="model without gates",
        ),
        pytest.param(
            lambda folder: ["--model.lora.target_modules", "[q_proj, up_proj]"],
            ["none of the model's 2 gates has LoRA", "model.layers.0.mlp.act_fn", "add 'gate_proj'"],
            id="LoRA on no gate",
        ),
        pytest.param(
            lambda folder: ["--gate_importance.keep_fraction", "0"],
            ["keep_fraction is 0", "above 0 and at most 1"],
            id="keep fraction 0",
        ),
        pytest.param(
            lambda folder: ["--gate_importance.keep_fraction", "2"],
            ["keep_fraction is 2", "above 0 and at most 1"],
            id="keep fraction 2",
        ),
        pytest.param(lambda folder: ["--data.train", jsonl(folder)], ["bad.jsonl"], id="empty data set"),
        pytest.param(
            lambda folder: ["--data.train", jsonl(folder, GOOD, {"prompt": "ab"})],
            ["bad.jsonl", "2", "completion"],
            id="record without a completion",
        ),
        pytest.param(
            lambda folder: ["--data.train", jsonl(folder, GOOD, {"prompt": "a" * 60, "completion": "b"})],
            ["bad.jsonl", "2", "max_length"],
            id="completion lost to truncation",
        ),
        pytest.param(
            lambda folder: ["--gate_importance.keep_fractoin", "0.5"],
            ["no option 'gate_importance.keep_fractoin'", "did you mean 'gate_importance.keep_fraction'?"],
            id="misspelt key",
        ),
    ],
)
def test_a_mistake_is_one_sentence_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_arguments: Any, parts: list[str]
) -> None:
    records = write_records(tmp_path / "records.jsonl")
    options = {
        "model": {"model_name_or_path": saved_model(tmp_path / "base"), "lora": {"r": 2, "alpha": 4}},
        "data": {"train": records, "validation": records, "max_length": 40},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options))
    arguments = make_arguments(tmp_path)
    capsys.readouterr()
    assert main(["fit", "--config", str(config), *arguments]) == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    (error,) = [line for line in captured.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in error
    assert not list(tmp_path.glob("run/**/adapter"))
    assert not list(tmp_path.glob("run/**/*.ckpt"))


def test_errors_and_warnings_start_in_lower_case() -> None:
    """They follow ``error:`` or the name of a warning; names of packages and classes keep their capital."""
    begins: list[str] = []
    for file in Path(na_lora_lightning.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            text = call.args[0].values[0] if isinstance(call.args[0], ast.JoinedStr) else call.args[0]
            named = ast.unparse(call.func).rpartition(".")[2]
            if named.endswith(("Error", "warn")) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                begins.append(text.value.split(" ")[0])
    assert len(begins) > 200
    assert {word for word in begins if word[:1].isupper()} <= {
        "LoRA",
        "PEFT",
        "TRL",
        "LearningRateFinder",
        "ReduceLROnPlateau",
    }
