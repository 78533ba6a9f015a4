"""The examples that run in seconds: scripts and the notebook."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from module_helpers import saved_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs an example in ``folder`` and returns the model's path."""
    model = saved_model(folder / "model")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, model])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return model


def loss_of_adapter(model: str, adapter: Path) -> tuple[float, float]:
    """Loss on one product without and with the adapter, which plain PEFT loads."""
    tokens = torch.tensor([[2 + ord(character) - 32 for character in "12 * 9 = 108"]])
    base = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        before = base(input_ids=tokens, labels=tokens).loss.item()
        after = PeftModel.from_pretrained(base, adapter)(input_ids=tokens, labels=tokens).loss.item()
    return before, after


@pytest.mark.parametrize("name", ["plain_pytorch.py", "hugging_face_trainer.py"])
def test_it_is_short(name: str) -> None:
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    ast.parse("\n".join(lines))


def test_the_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = run("plain_pytorch.py", tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"^step \d+, loss ([\d.]+)$", printed, re.MULTILINE)]
    density = [float(value) for value in re.findall(r"^  gate_mask_density/silu ([\d.]+)$", printed, re.MULTILINE)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    # 22 of 24 channels.
    assert density == [1.0, 0.9167, 0.9167, 0.9167]
    assert printed.count("selection_share/silu") == 4
    before, after = loss_of_adapter(model, tmp_path / "runs" / "plain_pytorch")
    assert after < before


def test_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = run("hugging_face_trainer.py", tmp_path, monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'loss': '([\d.]+)'", printed)]
    density = [float(value) for value in re.findall(r"'gate_mask_density/silu': '([\d.]+)'", printed)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    # 22 of 24 channels.
    assert density == [1.0, 0.9167, 0.9167, 0.9167]
    assert "selection_share/silu" in printed
    before, after = loss_of_adapter(model, tmp_path / "runs" / "hugging_face_trainer" / "checkpoint-20")
    assert after < before


NOTEBOOK = Path(__file__).parents[1] / "examples" / "gates.ipynb"


@pytest.fixture
def cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(
    cells: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in cells:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    printed = capsys.readouterr().out
    assert "names the larger digit: 100%" in printed
    assert len(re.findall(r"^layer_0\d silu 256 channels, rows slice\(0, 256, 1\)", printed, re.MULTILINE)) == 4
    assert "bitwise plain LoRA: True" in printed
    assert re.findall(r"(\d+)% of rows never moved", printed) == ["50"] * 4
    assert list(tmp_path.iterdir()) == []
