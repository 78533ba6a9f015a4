"""No run writes over another run's files, whatever their folder is called; a dry run writes nothing."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from faults.runs import Setting, Workplace, fit, last_run
from faults.traps import TRAPS
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from module_helpers import Batches, quiet_trainer, saved_model, some_batches

from na_lora_lightning.arguments import AdapterOptions, LoRAOptions
from na_lora_lightning.checkpoints.run_record import hold_adapter, hold_folder, read_record
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules import adapter as adapter_module
from na_lora_lightning.modules.language import NALoRALightningModule

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a fit runs in a forked process")

SHORT = Setting("short", ("--trainer.max_steps=1", "--model.evaluation.generate=false"))
CSV = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("conflicts"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``a`` with a link ``link`` to it; the working directory."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "log"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def error_of(log: Path) -> str:
    text = log.read_text()
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("error: ")][-1]


def no_step() -> None:
    TRAPS["a training step begins"][0](1)


@pytest.mark.parametrize("spelling", ["{root}/a/x", "a/x", "link/x", "a/../link/./x", "./a//x/"])
@pytest.mark.parametrize("option", ["--checkpoint.dirpath", "--model.adapter.folder"])
def test_folders_of_another_run_are_refused(workplace: Workplace, root: Path, option: str, spelling: str) -> None:
    log = root / "log"
    first, second = (
        workplace.arguments(root / name, SHORT, f"{option}={path}")
        for name, path in (("one", root / "a" / "x"), ("two", spelling.format(root=root)))
    )
    assert fit(first, log)[0] == 0, log.read_text()
    before = files(root / "a")
    assert len(before) >= 2
    assert fit(second, log, trap=no_step)[0] == 2, log.read_text()
    if option == "--checkpoint.dirpath":
        # Lightning follows links.
        shown = str(root / "a" / "x")
        expected = (
            f"error: the folder {shown!r} holds another run, which this one would write over; go on with that one "
            "(--ckpt_path last), or give this one a folder of its own by the dirpath of its checkpoints."
        )
    else:
        shown = str(Path(spelling.format(root=root)))
        expected = (
            f"error: the folder {shown!r} holds the adapter of another run, which this one would replace; set "
            "adapter.folder to another, remove that one, or go on with its run (--ckpt_path last)."
        )
    assert error_of(log) == expected
    assert files(root / "a") == before
    # The run whose they are goes on, however they are spelled, and another may begin where they were.
    assert fit([*first[:-1], second[-1], "--trainer.max_steps=2", "--ckpt_path=last"], log)[0] == 0, log.read_text()
    assert files(root / "a") != before


@pytest.mark.parametrize(
    "logger", ["lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"]
)
def test_a_version_that_is_given_is_one_run(workplace: Workplace, root: Path, logger: str) -> None:
    options = [f"--trainer.logger={logger}", "--trainer.logger.save_dir=a", "--trainer.logger.version=mine"]
    command, log = workplace.arguments(root, SHORT, *options), root / "log"
    assert fit(command, log)[0] == 0, log.read_text()
    before = files(root)
    assert fit(command, log, trap=no_step)[0] == 2, log.read_text()
    assert error_of(log) == (
        "error: the folder 'a/lightning_logs/mine' holds another run, which this one would write over; go on with that "
        "one (--ckpt_path last), or give this one a folder of its own by the logger's version, or "
        "trainer.default_root_dir."
    )
    after = files(root)
    assert {name: after[name] for name in before} == before
    # Its own checkpoint, by its path, and by 'last'.
    (path,) = root.rglob("*.ckpt")
    for steps, checkpoint in ((2, path), (3, "last")):
        more = [f"--ckpt_path={checkpoint}", f"--trainer.max_steps={steps}"]
        assert fit([*command, *more], log)[0] == 0, log.read_text()
    assert len(list(root.rglob("adapter_model.safetensors"))) == 1
    # An evaluation there leaves the run's configuration and curves.
    config, curves = (root / "a/lightning_logs/mine" / name for name in ("config.yaml", "metrics.csv"))
    kept = config.read_bytes(), curves.read_bytes() if curves.exists() else b""
    assert fit(["validate", *command[1:], "--ckpt_path=last"], log)[0] == 0, log.read_text()
    assert config.read_bytes() == kept[0]
    assert config.with_name("config.2.yaml").is_file()
    assert not kept[1] or set(kept[1].split()[1:]) - set(curves.read_bytes().split()) == set()


def test_an_adapter_takes_the_place_of_nothing_else(workplace: Workplace, root: Path) -> None:
    (root / "a" / "thesis.tex").write_text("years")
    (root / "file").write_text("")
    for folder in ("link", "file", str(workplace.folder / "base")):
        command = workplace.arguments(root / "run", SHORT, f"--model.adapter.folder={folder}")
        assert fit(command, root / "log", trap=no_step)[0] == 2
        assert error_of(root / "log") == (
            f"error: {folder!r} exists and is not an adapter folder, so it is not overwritten; set adapter.folder to "
            "another name."
        )


def test_two_processes_at_the_same_moment(workplace: Workplace, root: Path) -> None:
    log = root / "log"
    adapter = workplace.arguments(root / "one", SHORT, "--model.adapter.folder=a/x")
    hold = hold_adapter(Path("link/x"))
    assert fit(adapter, log, trap=no_step)[0] == 2, log.read_text()
    rest = "is in use by another fit that runs now; wait until it ends, or give this one another."
    assert error_of(log) == f"error: the adapter folder 'a/x' {rest}"
    hold.release()
    assert list((root / "a").iterdir()) == []
    dirpath = workplace.arguments(root / "one", SHORT, "--checkpoint.dirpath=a/x")
    hold = hold_folder(root / "a" / "x")
    assert fit(dirpath, log, trap=no_step)[0] == 2, log.read_text()
    assert error_of(log) == f"error: the folder {str(root / 'a' / 'x')!r} {rest}"
    hold.release()
    # A run that goes on twice at once.
    last = workplace.arguments(root / "two", SHORT, "--ckpt_path=last")
    assert fit(last, log, trap=no_step)[0] == -signal.SIGKILL
    hold = hold_folder(last_run(root / "two"))
    assert fit(last, log, trap=no_step)[0] == 2, log.read_text()
    assert error_of(log) == f"error: the folder {str(last_run(root / 'two'))!r} {rest}"
    hold.release()
    assert fit(last, log)[0] == 0, log.read_text()
    assert not list(root.rglob("*lock*"))


def test_a_fit_that_fails_at_once_hides_no_run(workplace: Workplace, root: Path) -> None:
    command, log = workplace.arguments(root / "run", SHORT), root / "log"
    assert fit(command, log)[0] == 0, log.read_text()
    assert fit([*command, "--data.train=missing.jsonl"], log)[0] == 2
    assert fit([*command, "--ckpt_path=last", "--trainer.max_steps=2"], log)[0] == 0
    # An error of the fit itself, before its first step.
    assert fit([*command, "--model.adapter.folder=link/..", "--checkpoint.dirpath=b"], log)[0] == 2
    assert "exists and is not an adapter folder" in error_of(log)
    assert read_record(root / "b") is None or read_record(root / "b").state == "untrained"  # type: ignore[union-attr]
    assert fit([*command, "--ckpt_path=last", "--trainer.max_steps=3"], log)[0] == 0
    assert last_run(root / "run").name == "version_0"


def test_a_monitored_loss_in_the_name_is_gone_on_with(workplace: Workplace, root: Path) -> None:
    options = [
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.filename={epoch}-{validation/loss:.3f}",
        "--trainer.callbacks.monitor=validation/loss",
        "--trainer.callbacks.save_top_k=-1",
    ]
    setting = Setting("monitored", ("--model.evaluation.generate=false",))
    command, log = workplace.arguments(root / "run", setting, *options, "--ckpt_path=last"), root / "log"
    assert fit(command, log, trap=lambda: TRAPS["a training step begins"][0](13))[0] == -signal.SIGKILL
    (path,) = (root / "run").rglob("*.ckpt")
    assert path.parent.name == "epoch=0-validation"
    # The second epoch is all that is left.
    assert fit(command, log, trap=lambda: TRAPS["a training step begins"][0](10))[0] == 0, log.read_text()
    assert last_run(root / "run").name == "version_0"


# ---- dry runs ----


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("steps", ["true", "3"])
def test_a_dry_run_writes_nothing(workplace: Workplace, root: Path, command: str, steps: str) -> None:
    records, log = workplace.folder / "records.jsonl", root / "log"
    data = [] if command == "fit" else [f"--data.test={records}", f"--data.predict={records}"]
    options = ["--model.adapter.folder=a/adapter", "--model.adapter.write=each", "--checkpoint.dirpath=a/ckpt"]
    if command == "fit":
        assert fit(workplace.arguments(root / "run", SHORT, *options), log)[0] == 0, log.read_text()
    else:
        options = []
    before, folders = files(root), sorted(root.rglob("*"))
    for more in (options, [], ["--trainer.logger=false"], [CSV, "--trainer.logger.save_dir=csv"]):
        arguments = [
            *workplace.arguments(root / "run", Setting("dry", ()), *data, *more),
            f"--trainer.fast_dev_run={steps}",
        ]
        assert fit([command, *arguments[1:]], log)[0] == 0, log.read_text()
    assert files(root) == before
    assert [path for path in sorted(root.rglob("*")) if path != log] == [path for path in folders if path != log]


@pytest.mark.parametrize("write", ["last", "each"])
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*TqdmExperimentalWarning")
def test_sweeps_of_finders_write_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    written: list[int] = []
    original = adapter_module.write_adapter_folder

    def write_folder(*arguments: Any, **options: Any) -> Any:
        written.append(trainer.global_step)
        return original(*arguments, **options)

    monkeypatch.setattr(adapter_module, "write_adapter_folder", write_folder)
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)
    module = NALoRALightningModule(
        saved_model(tmp_path / "base"), lora=LoRAOptions(r=2), adapter=AdapterOptions(write=write)
    )
    module.lr, module.batch_size = 1e-3, 2
    data = Batches(some_batches(4), some_batches(1))
    finders = [LearningRateFinder(num_training_steps=3), BatchSizeFinder(steps_per_trial=1, max_trials=1)]
    trainer = quiet_trainer(tmp_path / "run", callbacks=finders)
    trainer.fit(module, data)
    assert written == [4]


# ---- in Python ----


def test_a_second_fit_in_python_replaces_no_adapter(tmp_path: Path) -> None:
    base, data = saved_model(tmp_path / "base"), Batches(some_batches(2), some_batches(1))

    def module() -> NALoRALightningModule:
        return NALoRALightningModule(base, lora=LoRAOptions(r=2))

    first = module()
    trainer = quiet_trainer(tmp_path / "run")
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    before = files(tmp_path / "run")
    with pytest.raises(
        ConfigurationError, match=r"run/adapter' holds the adapter of another run, which this one would"
    ):
        quiet_trainer(tmp_path / "run").fit(module(), data)
    assert files(tmp_path / "run") == before
    # The module that wrote it trains on, and so does a checkpoint of it.
    quiet_trainer(tmp_path / "run").fit(first, data)
    quiet_trainer(tmp_path / "run", max_epochs=2).fit(module(), data, ckpt_path=tmp_path / "a.ckpt")
    assert files(tmp_path / "run") != before
