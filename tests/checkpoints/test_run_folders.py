"""Whole runs under every logger, each in a folder of its own; and which paths lead to the same place."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from faults.runs import SETTINGS, Remains, Setting, Workplace, differences, fit, last_run, remains
from faults.traps import TRAPS
from safetensors.torch import load_file

from na_lora_lightning.checkpoints.run_folders import is_within, same_path
from na_lora_lightning.checkpoints.run_record import read_record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a fit is killed in a forked process")

SETTING = Setting("short", SETTINGS[1].options[:1])
CSV = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir={root}"]
LOGGERS = {
    "CSV": CSV,
    "none": ["--trainer.logger=false"],
    "W&B": ["--trainer.logger=stand_ins.OfflineWandb", "--trainer.logger.save_dir={root}"],
    "MLflow": ["--trainer.logger=stand_ins.OfflineMLFlow", "--trainer.logger.save_dir={root}"],
    "MLflow on a server": [
        "--trainer.logger=stand_ins.OfflineMLFlow",
        "--trainer.logger.save_dir={root}",
        "--trainer.logger.tracking_uri=sqlite://",
    ],
    "one's own": ["--trainer.logger=stand_ins.Fleeting", "--trainer.logger.save_dir={root}"],
    "several": [
        "--trainer.logger+=stand_ins.OfflineWandb",
        "--trainer.logger.save_dir={root}",
        "--trainer.logger+=lightning.pytorch.loggers.TensorBoardLogger",
        "--trainer.logger.save_dir={root}/tb",
        "--trainer.logger+=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir={root}/csv",
    ],
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def whole(workplace: Workplace) -> Remains:
    root = workplace.folder / "whole"
    assert fit(workplace.arguments(root, SETTING), workplace.folder / "log")[0] == 0
    return remains(root)


def arguments(workplace: Workplace, root: Path, logger: str, *more: str) -> list[str]:
    options = [option.format(root=root) for option in LOGGERS[logger]]
    return [*workplace.arguments(root, SETTING), *options, *more]


def error_of(log: Path) -> str:
    text = log.read_text()
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("logger", LOGGERS)
def test_a_run_goes_on_in_its_own_folder(workplace: Workplace, whole: Remains, tmp_path: Path, logger: str) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    command = arguments(workplace, root, logger, "--ckpt_path=last")
    # Killed, resumed, and killed at once.
    for place, number in (("a training step begins", 5), ("a checkpoint is loaded", 1)):
        status, _ = fit(command, log, trap=lambda place=place, number=number: TRAPS[place][0](number))
        assert status == -signal.SIGKILL, log.read_text()
    folder = last_run(root)
    assert len(list(folder.rglob("*.ckpt"))) == 2
    assert fit(command, log)[0] == 0, log.read_text()
    # There is no other one, with other curves either.
    assert last_run(root) == folder
    for kind in ("tb", "csv"):
        assert not (root / kind / "lightning_logs" / "version_1").exists()
    found = remains(root)
    assert found.adapter.keys() == whole.adapter.keys()
    found.curves, found.shown = whole.curves, whole.shown
    assert differences(whole, found) == []
    assert sorted(path.name for path in folder.iterdir() if path.name[0] != "." and path.suffix != ".csv") == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "history.jsonl",
        *(["hparams.yaml"] if logger == "CSV" else []),
        "pictures",
    ]
    assert not list(root.rglob("*.lock"))


@pytest.mark.parametrize("logger", LOGGERS)
def test_two_runs_have_two_folders(workplace: Workplace, tmp_path: Path, logger: str) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    for rank in (1, 2):
        command = arguments(workplace, root, logger, f"--model.lora.r={rank}", "--trainer.max_steps=1")
        assert fit(command, log)[0] == 0, log.read_text()
    ranks = {}
    for adapter in root.rglob("adapter_model.safetensors"):
        run = adapter.parent.parent
        ranks[run] = next(min(weight.shape) for weight in load_file(adapter).values())
        assert f"r: {ranks[run]}\n" in (run / "config.yaml").read_text()
        assert len(list((run / "checkpoints").glob("*.ckpt"))) == 1
        assert read_record(run).state == "ended"  # type: ignore[union-attr]
    assert sorted(ranks.values()) == [1, 2]
    assert not (root / "adapter").exists()
    assert not (root / "config.yaml").exists()


def test_two_predictions_have_two_files(workplace: Workplace, tmp_path: Path) -> None:
    # The version that one gives is one folder, for all of them.
    options = [option.format(root=tmp_path) for option in CSV] + ["--trainer.logger.version=mine"]
    records = f"--data.predict={workplace.folder / 'records.jsonl'}"
    command = ["predict", *workplace.arguments(tmp_path, Setting("plain", ()), *options)[1:], records]
    for _ in range(2):
        assert fit(command, tmp_path / "log")[0] == 0, (tmp_path / "log").read_text()
    folder = tmp_path / "lightning_logs" / "mine"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert names == ["config.2.yaml", "config.yaml", "hparams.yaml", "predictions.2.jsonl", "predictions.jsonl"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``base`` with a file, a link ``link`` to it, and the working directory beside both."""
    (tmp_path / "base" / "deep").mkdir(parents=True)
    (tmp_path / "base" / "file").write_text("")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "spelling",
    ["base", "./base", "base/", "base/deep/..", "link", "link/deep/../", "~/base", "{root}/base", "{root}/link"],
)
def test_spellings_of_a_folder(folder: Path, spelling: str) -> None:
    path = spelling.format(root=folder)
    assert same_path(path, "base")
    assert same_path("base", path)
    assert is_within(path, "base")
    assert is_within("base/deep", path)
    assert is_within("base/to/come", path)
    assert not is_within(path, "base/deep")


def test_what_does_not_exist_yet(folder: Path) -> None:
    (folder / "ahead").symlink_to("base/to/come")
    assert same_path("ahead", "link/to/come")
    assert same_path("new/x/..", "new")
    assert is_within("link/to/come/file", "ahead")
    assert not same_path("new", "newer")
    assert not is_within("newer", "new")
    assert not is_within("bases", "base")


def test_other_names_of_a_file(folder: Path) -> None:
    os.link("base/file", "twin")
    assert same_path("twin", "base/file")
    assert not same_path("loop", "base")
    assert same_path("loop", "./loop")


def test_a_parent_holds_everything_below(folder: Path) -> None:
    assert is_within("base/deep", ".")
    assert is_within("link", folder)
    assert is_within(folder, "/")
    assert not is_within(folder, "base")
