"""What users read, copy and run: links of the documents, shipped configurations, examples and the notebook."""

from __future__ import annotations

import ast
import json
import logging
import re
import runpy
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from module_helpers import (
    private_dataset_cache,  # noqa: F401
    saved_model,
    write_records,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM
from vision_helpers import vlm_folders, write_vision_records  # noqa: F401

from na_lora_lightning.cli.main import main
from na_lora_lightning.history import read_history

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks/study", "examples/vlm_digits")),
    ROOT / "benchmarks" / "study" / "hypotheses.md",
]
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "code", _FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The names that GitHub and the site give to headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+\s+(.*?)\s*$", text, re.MULTILINE)
    return {slug(heading) for heading in headings}


def slug(heading: str) -> str:
    kept = "".join(c for c in heading.lower() if c in "-_ " or unicodedata.category(c)[0] in "LN")
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for match in _LINK.finditer(prose(page)):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not match["text"] or not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(match[0])
    assert dead == []


def test_the_readme_is_short_and_begins_with_what_matters() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:32])
    for part in ("does *not* beat plain LoRA", "pip install", "GateImportanceCallback()", "docs/figures/gates.png"):
        assert part in first_screen


def test_on_a_package_index_the_readme_names_files_instead_of_linking_them() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    hook = project.partition("[tool.hatch.metadata.hooks.fancy-pypi-readme]")[2].partition("\n\n[")[0]
    rules = re.findall(r"pattern = '(.*)', replacement = (?:'(.*)'|\"\")", hook)
    assert len(rules) == 4
    text = readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    # Nor is there a link that ends on another line than it begins.
    assert "](" in readme
    assert "](" not in text
    assert "![" not in text
    named = re.findall(r"(?:\[|`)`?((?:docs|examples|benchmarks)/[\w/]+\.\w+|[A-Z]+\.md)`", text)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_page_of_the_documentation_is_in_its_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {line for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in block.split()}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_the_reference_has_every_public_name() -> None:
    import na_lora_lightning

    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    public = set(na_lora_lightning.__all__) - {"__version__"}
    assert {name for name in public if not re.search(rf"\b{name}\b", reference)} == set()


def test_the_map_of_the_code_names_what_there_is() -> None:
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.py|/))`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    package = ROOT / "na_lora_lightning"
    places = (ROOT, package, package / "core", package / "data")
    assert len(named) > 30
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_the_tests_that_documents_name_exist() -> None:
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"`(test_\w+)`", pages))
    assert len(named) > 50
    assert named - defined == set()
    # Where a name is long, its start is given.
    starts = set(re.findall(r"`(test_\w+)…`", pages))
    assert {start for start in starts if not any(name.startswith(start) for name in defined)} == set()


pytestmark = [
    # The machine of the tests may have one processor.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # Lightning's estimate of sizes, which knows few precisions.
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
]

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# Of the model that a configuration for images names, the tiny one of the same class.
OF_IMAGES = {"smolvlm_256m": "idefics3", "qwen2_5_vl_3b": "qwen2_5_vl"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_trains_a_tiny_model(
    config: Path,
    vlm: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind := OF_IMAGES.get(config.stem):
        base, records = vlm(kind), write_vision_records(tmp_path, 8)
        # The tiny processor has sizes of its own.
        options = ["--data.image_options", "null", "--data.num_workers", "0", "--trainer.accumulate_grad_batches", "1"]
    else:
        base, records = saved_model(tmp_path / "base"), write_records(tmp_path / "records.jsonl")
        # The tiny tokenizer has no chat template to put a system prompt in.
        options = ["--data.system_prompt", "null"]
    arguments = ["fit", "--config", str(config), "--model.model_name_or_path", base, *options]
    arguments += ["--data.train", records, "--data.validation", records]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    arguments += ["--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"]
    arguments += ["--gate_importance.warmup_steps", "1", "--trainer.enable_progress_bar", "false"]
    assert main(arguments) == 0
    (run,) = (tmp_path / "runs" / config.stem).glob("version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["model_name_or_path"] == base
    # Gemma's is the plain reading of the method, and the others are the defaults.
    assert saved["gate_importance"]["keep_fraction"] == (0.5 if config.stem == "gemma3_270m" else 0.9)
    written = yaml.safe_load(config.read_text())
    written["gate_importance"]["warmup_steps"] = 1
    for mechanism in ("gate_importance", "step_scale"):
        assert written[mechanism].items() <= saved[mechanism].items()
    assert list(run.glob("checkpoints/*.ckpt"))
    assert list((tmp_path / "runs").glob("**/adapter_model.safetensors"))
    assert "Adapter" in capsys.readouterr().out
    if kind:
        # Each part of the model is watched.
        history = read_history(run)
        assert history is not None
        assert {"language_layer_01", "vision_layer_01"} <= {site["label"] for site in history.start["sites"]}


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
    churn = [float(value) for value in re.findall(r"^  gates/mask_churn ([\d.]+)$", printed, re.MULTILINE)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    # The first mask holds 2 of 24 channels.
    assert churn[:2] == [0.0, 0.0833]
    assert len(churn) == printed.count("gates/selection_share") == 4
    before, after = loss_of_adapter(model, tmp_path / "runs" / "plain_pytorch")
    assert after < before


def test_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = run("hugging_face_trainer.py", tmp_path, monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)
    printed = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"'loss': '([\d.]+)'", printed)]
    churn = [float(value) for value in re.findall(r"'gates/mask_churn': '([\d.]+)'", printed)]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    # The first mask holds 2 of 24 channels.
    assert churn[:2] == [0.0, 0.08333]
    assert "gates/selection_share" in printed
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
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    for cell in cells:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    # It quietens loggers, of which later tests read.
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    printed = capsys.readouterr().out
    assert "names the larger digit: 100%" in printed
    assert len(re.findall(r"^layer_0\d silu 256 channels, rows slice\(0, 256, 1\)", printed, re.MULTILINE)) == 4
    assert "bitwise plain LoRA: True" in printed
    assert re.findall(r"(\d+)% of rows never moved", printed) == ["50"] * 4
    assert list(tmp_path.iterdir()) == []
