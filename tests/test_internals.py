"""What Lightning and PEFT do not document: there, or missing in one sentence, and read in one module each."""

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
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora
from torch.utils.data import DataLoader

import na_lora_lightning
from na_lora_lightning import lightning_internals as internals
from na_lora_lightning.checkpoints.run_folders import ContinuedWriter
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.model_entry import entrance_of, root_of
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.peft_internals import (
    converted_config,
    is_adapted,
    is_left_by_merge,
    is_lora,
    is_refused,
    is_target,
    trains_tokens,
    with_all_linear,
)


def test_targets_are_resolved_as_peft_resolves_them() -> None:
    model = tiny_llama()
    resolved = with_all_linear(LoraConfig(target_modules="all-linear", exclude_modules=["down_proj"]), model)
    assert {name.rpartition(".")[2] for name in resolved.target_modules or ()} == {*LLAMA_TARGETS, "k_proj", "o_proj"}
    assert is_target(resolved, "model.layers.0.mlp.gate_proj")
    assert not is_target(resolved, "model.layers.0.mlp.down_proj")
    assert not is_target(resolved, "lm_head")
    assert not is_refused(model, "gate_proj")
    model.config.model_type = "falcon_mamba"
    assert is_refused(model, "out_proj")
    assert converted_config(LoraConfig(target_modules=["q_proj"]), tiny_llama()) is None


def test_a_missing_function_is_named_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tuners_utils, "_maybe_include_all_linear_layers")
    expected = (
        f"peft {version('peft')} has no peft.tuners.tuners_utils._maybe_include_all_linear_layers, by which the "
        "targets of LoRA are resolved; install the version that is named in constraints.txt."
    )
    with pytest.raises(ConfigurationError) as caught:
        with_all_linear(LoraConfig(target_modules="all-linear"), tiny_llama())
    assert str(caught.value) == expected


def test_kinds_of_layers_are_told_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1, 2])
    modules = dict(get_peft_model(tiny_llama(), config).base_model.model.named_modules())
    asked = (is_lora, is_adapted, trains_tokens, is_left_by_merge)
    told = {name: [ask(modules[name]) for ask in asked] for name in ("model.layers.0.self_attn.q_proj", "model.norm")}
    told["tokens"] = [ask(modules["model.embed_tokens"].token_adapter) for ask in asked]  # type: ignore[arg-type]
    assert told == {
        "model.layers.0.self_attn.q_proj": [True, True, False, True],
        "model.norm": [False, False, False, True],
        "tokens": [False, True, True, True],
    }
    assert [ask(modules["model.layers.0.mlp.up_proj"]) for ask in asked] == [False] * 4
    monkeypatch.delattr("peft.utils.other.AuxiliaryTrainingWrapper")
    expected = f"peft {version('peft')} has no peft.utils.other.AuxiliaryTrainingWrapper, by which layers with adapters"
    with pytest.raises(ConfigurationError, match=re.escape(expected)):
        is_left_by_merge(torch.nn.Linear(1, 1))


def _past_hooks(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    return self.model.forward(*args, **kwargs)


def _through_hooks(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    return self.model(*args, **kwargs)


def _trained(masked: bool) -> dict[str, torch.Tensor]:
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if masked:
        controller = GateController(model, discover_gates(model).require())
        controller.set_importance(ImportanceOptions(keep_fraction=0.5, warmup_steps=0))
        controller.attach([optimizer])
    for step in range(2):
        model(**random_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def test_training_is_the_same_whether_a_tuner_passes_hooks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for forward in (_past_hooks, _through_hooks, BaseTuner.forward):
        monkeypatch.setattr(BaseTuner, "forward", forward)
        model = with_lora(tiny_llama(), LLAMA_TARGETS)
        assert (entrance_of(model) is root_of(model)) == ("forward" not in forward.__code__.co_names)
        seen: list[int] = []
        entrance_of(model).register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        model(**random_batch(0))
        assert seen == [7]
        states.append(_trained(masked=True))
    plain = _trained(masked=False)
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    assert not all(torch.equal(value, plain[name]) for name, value in states[0].items())


def test_without_peft_around_it_the_model_is_its_own_entrance() -> None:
    model = tiny_llama()
    assert entrance_of(model) is model


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


def test_a_module_is_told_whether_a_checkpoint_comes(tmp_path: Path) -> None:
    told: list[bool] = []

    class Told(Line):
        def configure_model(self) -> None:
            told.append(internals.loads_checkpoint(self))
            assert not internals.loads_checkpoint(Line())

        forward = Line.training_step

    data, trainer = DataLoader(torch.ones(1, 2)), quiet(tmp_path, max_steps=1, enable_checkpointing=False)
    Told().configure_model()
    trainer.fit(Told(), data)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    assert told == [False] * 2
    Told.load_from_checkpoint(tmp_path / "it.ckpt")
    quiet(tmp_path, max_steps=2, enable_checkpointing=False).fit(Told(), data, ckpt_path=tmp_path / "it.ckpt")
    trainer.predict(Told(), data, ckpt_path=tmp_path / "it.ckpt")
    assert told == [False] * 2 + [True] * 3
    # What was loaded before is no sign.
    trainer.predict(Told(), data)
    assert told[-1] is False


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
