"""Lightning's private names: there in the version at hand, missing in one sentence, and read in one module alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

import na_lora_lightning
from na_lora_lightning import lightning_internals as internals
from na_lora_lightning.checkpoints.csv_curves import ContinuedWriter
from na_lora_lightning.errors import ConfigurationError


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def quiet(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_progress_and_trainer_of_a_fit_and_of_its_checkpoint(tmp_path: Path) -> None:
    module, data = Line(), DataLoader(torch.ones(6, 2), batch_size=2)
    assert internals.attached_trainer(module) is None
    trainer = quiet(tmp_path, max_steps=5, max_epochs=4, enable_checkpointing=False)
    trainer.fit(module, data)
    assert internals.attached_trainer(module) is trainer
    assert (internals.processed_batches(trainer), internals.logged_step(trainer)) == (5, 5)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    epochs, batches = internals.progress_of_fit(torch.load(tmp_path / "it.ckpt", weights_only=True))
    assert (epochs["ready"], batches) == (2, 2)


def test_strategies_are_asked() -> None:
    asked = [internals.averages_between_processes(each) for each in (SingleDeviceStrategy("cpu"), DDPStrategy())]
    assert asked == [False, False]
    averaging = DDPStrategy()
    averaging._model_averager = object()  # type: ignore[assignment]
    assert internals.averages_between_processes(averaging)
    for saves in (False, True):
        strategy = ModelParallelStrategy(save_distributed_checkpoint=saves)
        assert internals.saves_distributed_checkpoint(strategy) is saves


def test_versions_and_writers_of_loggers(tmp_path: Path) -> None:
    for kind in (CSVLogger, TensorBoardLogger):
        logger = kind(tmp_path)
        assert internals.version_of(logger) is None
        assert internals.set_version(logger, 7)
        assert (internals.version_of(logger), Path(logger.log_dir).name) == (7, "version_7")
    logger = CSVLogger(tmp_path)
    writer = ContinuedWriter(logger.log_dir)
    internals.give_csv_writer(logger, lambda: writer)
    internals.give_csv_writer(logger, lambda: pytest.fail("it has one"))
    assert logger.experiment is writer


def test_the_command_line_finds_what_it_overrides() -> None:
    internals.require_cli(LightningCLI)
    internals.require_csv_writer()
    cli = object.__new__(LightningCLI)
    cli._subcommand_parsers = {"fit": "parser"}  # type: ignore[dict-item]
    assert internals.parsers_of_commands(cli) == {"fit": "parser"}


MISSING: dict[str, tuple[type, str, Callable[[Path], Any]]] = {
    "Trainer._logger_connector.should_update_logs": (Trainer, "", lambda folder: internals.is_step_to_log(_bare())),
    "LightningCLI._parse_ckpt_path": (LightningCLI, "_parse_ckpt_path", lambda _: internals.require_cli(LightningCLI)),
    "ExperimentWriter._check_log_dir_exists": (
        ExperimentWriter.__mro__[1],
        "_check_log_dir_exists",
        lambda folder: ContinuedWriter(str(folder / "new")),
    ),
    "CSVLogger._version": (CSVLogger, "", lambda folder: internals.set_version(object.__new__(CSVLogger), 1)),
    "ModelParallelStrategy._save_distributed_checkpoint": (
        ModelParallelStrategy,
        "",
        lambda _: internals.saves_distributed_checkpoint(object.__new__(ModelParallelStrategy)),
    ),
}


def _bare() -> Trainer:
    return object.__new__(Trainer)


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named_with_the_version(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, attribute, read = MISSING[name]
    if attribute:
        monkeypatch.delattr(kind, attribute)
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(f"lightning {version('lightning')} has no {name} (")
    assert str(caught.value).endswith("install the version that is named in constraints.txt.")


def test_a_module_of_the_other_package_is_of_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "version", lambda package: f"{package} of old")
    other = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})
    with pytest.raises(
        ConfigurationError, match=r"^pytorch-lightning pytorch_lightning of old has no Trainer\.fit_loop"
    ):
        internals.logged_step(type("OwnTrainer", (other,), {"__module__": "mine", "__name__": "Trainer"})())


# What of Lightning is private: names of trainers, strategies, loggers and modules, however the object is called.
PRIVATE = (
    r"(trainer|strategy|logger|loop|connector|writer)\._[a-z]\w*",
    r"\.(fit_loop|epoch_loop)\b",
    r"self\._(trainer|subcommand_parsers)\b",
    r"\._(model_averager|save_distributed_checkpoint|average_model|wandb_init|mlflow_client|run_id)\b",
    r"\"_(model_averager|save_distributed_checkpoint|average_model|trainer)\"",
)
OF_PEFT = r"(from|import) peft\.(tuners|utils)|import_module\(.peft"


def test_private_names_are_read_in_one_module_each() -> None:
    package = Path(na_lora_lightning.__file__).parent
    for pattern, home in ((r"|".join(PRIVATE), "lightning_internals.py"), (OF_PEFT, "peft_internals.py")):
        found = [
            f"{path.relative_to(package)}: {line.strip()}"
            for path in sorted(package.rglob("*.py"))
            if path.name != home
            for line in path.read_text(encoding="utf-8").splitlines()
            if re.search(pattern, line)
        ]
        assert found == []
