from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from module_helpers import saved_model, write_records

from na_lora_lightning import __version__
from na_lora_lightning.callbacks.gate_importance import GateImportanceCallback
from na_lora_lightning.callbacks.step_scale import StepScaleCallback
from na_lora_lightning.cli.errors import explain
from na_lora_lightning.cli.main import main
from na_lora_lightning.cli.training import NALoRACLI
from na_lora_lightning.modules.fit_summary import FitSummaryCallback


class Workplace:
    """A folder with a model, data and a configuration to run the command line in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = saved_model(folder / "base")
        records = write_records(folder / "records.jsonl")
        self.options: dict[str, Any] = {
            "model": {
                "model_name_or_path": self.base,
                "lora": {"r": 2, "alpha": 4},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "evaluation": {"generate": True, "max_new_tokens": 3},
            },
            "data": {"train": records, "validation": records, "test": records, "predict": records, "batch_size": 4},
            "gate_importance": {"warmup_steps": 1, "refresh_every": 1},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "default_root_dir": str(folder / "run"),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
            },
        }

    def config(self, **groups: Any) -> str:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump({**self.options, **groups}))
        return str(path)

    def run(self, command: str, *arguments: object) -> int:
        return main([command, "--config", self.config(), *map(str, arguments)])

    @property
    def log_folder(self) -> Path:
        return max((self.folder / "run" / "lightning_logs").iterdir(), key=lambda path: int(path.name.split("_")[1]))

    @property
    def checkpoint(self) -> Path:
        return next((self.folder / "run" / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    # Nothing may be written elsewhere.
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return Workplace(tmp_path)


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


# ---- the commands ----


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "merge", "inspect"):
        assert f"\n  {command} " in printed
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(f"na-lora {__version__}\n")


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from na_lora_lightning.cli.main import main; assert main(['--help']) == 0;"
        "assert not {'torch', 'lightning', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "na_lora_lightning", "--version"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"na-lora {__version__}\n"


def test_fit_help_explains_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    printed = capsys.readouterr().out
    for option in ("--model.lora.r R", "--gate_importance.keep_fraction", "--step_scale.tau", "--data.train"):
        assert option in printed
    assert "Whether fit uses GateImportanceCallback." in printed
    assert main(["merge", "--help"]) == 0
    assert "--overwrite" in capsys.readouterr().out


def test_print_config_is_a_configuration(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.run("fit", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["lora"]["r"] == 2
    assert printed["gate_importance"]["enabled"] is True
    assert printed["gate_importance"]["warmup_steps"] == 1
    assert printed["trainer"]["num_sanity_val_steps"] == -1
    assert printed["seed_everything"] == 0
    (workplace.folder / "printed.yaml").write_text(yaml.safe_dump(printed))
    assert main(["fit", "--config", str(workplace.folder / "printed.yaml"), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == printed


def test_fit_then_evaluate_predict_resume_and_merge(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.run("fit") == 0
    printed = capsys.readouterr().out
    folder = workplace.log_folder
    assert "exact_match" in printed
    assert f"Adapter  {folder}/adapter\n" in printed
    assert f"tensorboard --logdir {folder}\n" in printed
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "config.yaml").is_file()
    checkpoint = torch.load(workplace.checkpoint, weights_only=True)
    assert {"GateImportanceCallback", "StepScaleCallback", "FitSummaryCallback"} <= set(checkpoint["callbacks"])
    assert "_instantiator" not in checkpoint["hyper_parameters"]
    # The tokenizer follows the model.
    assert checkpoint["datamodule_hyper_parameters"]["tokenizer_name_or_path"] == workplace.base

    after = checkpoint["callbacks"]["FitSummaryCallback"]["metrics_after"]
    for command, stage in (("validate", "validation"), ("test", "test")):
        assert workplace.run(command, "--ckpt_path", workplace.checkpoint) == 0
        printed = capsys.readouterr().out
        assert f"{stage}/perplexity" in printed
        # As a number: the rounded one need not begin the printed one.
        (loss,) = re.findall(rf"{stage}/loss\s*│\s*([\d.]+)", printed)
        assert float(loss) == pytest.approx(after["loss"], abs=1e-6)

    assert workplace.run("predict", "--ckpt_path", workplace.checkpoint) == 0
    lines = (workplace.log_folder / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [f"{index}+1=" for index in range(8)]
    assert f"Predictions {workplace.log_folder}/predictions.jsonl" in capsys.readouterr().out

    assert workplace.run("fit", "--ckpt_path", workplace.checkpoint, "--trainer.max_epochs", 2) == 0
    assert "4 optimizer steps" in capsys.readouterr().out
    merged = workplace.folder / "merged"
    assert main(["merge", "--adapter", str(folder / "adapter"), "--output", str(merged)]) == 0
    assert main(["fit", "--config", workplace.config(), "--model.model_name_or_path", str(merged)]) == 0
    assert list((workplace.folder / "empty").iterdir()) == []


def test_saved_configuration_reproduces_the_run_bitwise(workplace: Workplace) -> None:
    assert workplace.run("fit", "--model.lora.dropout", 0.1) == 0
    first = workplace.log_folder
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    second = workplace.log_folder
    assert first != second
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_evaluation_option_beats_that_of_the_checkpoint(
    workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workplace.run("fit") == 0
    capsys.readouterr()
    arguments = ("--ckpt_path", workplace.checkpoint, "--model.evaluation.generate", "false")
    assert workplace.run("validate", *arguments) == 0
    assert "exact_match" not in capsys.readouterr().out


# ---- callbacks ----


def callbacks_of(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, *arguments: str, **groups: Any) -> list[Any]:
    """The callbacks that a fit would have."""
    monkeypatch.setattr(NALoRACLI, "_run_subcommand", lambda self, subcommand: None)
    cli = NALoRACLI("fit", ["fit", "--config", workplace.config(**groups), *arguments])
    return cli.trainer.callbacks  # type: ignore[attr-defined]


# Outside main, which silences it: Lightning calls its parser by retired names.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "groups", "mechanisms"),
    [
        ([], {}, {GateImportanceCallback, StepScaleCallback}),
        (["--gate_importance.enabled", "false"], {}, {StepScaleCallback}),
        (["--gate_importance", "false"], {}, {StepScaleCallback}),
        (["--step_scale=false"], {}, {GateImportanceCallback}),
        ([], {"step_scale": False}, {GateImportanceCallback}),
        ([], {"step_scale": None, "gate_importance": {"enabled": False, "keep_fraction": 0.25}}, set()),
        ([], {"step_scale": False, "gate_importance": True}, {GateImportanceCallback}),
    ],
)
def test_mechanisms_are_on_unless_switched_off(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, arguments: list[str], groups: Any, mechanisms: set[type]
) -> None:
    listed = {"trainer": {**workplace.options["trainer"], "callbacks": {"class_path": "RichModelSummary"}}}
    callbacks = callbacks_of(workplace, monkeypatch, *arguments, **groups, **listed)
    kinds = {type(callback) for callback in callbacks}
    assert kinds & {GateImportanceCallback, StepScaleCallback} == mechanisms
    assert {FitSummaryCallback, LearningRateMonitor} <= kinds


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_options_reach_the_callbacks(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks = callbacks_of(
        workplace, monkeypatch, "--gate_importance.keep_fraction", "0.25", "--step_scale.granularity", "channel"
    )
    gate_importance = next(c for c in callbacks if isinstance(c, GateImportanceCallback))
    step_scale = next(c for c in callbacks if isinstance(c, StepScaleCallback))
    assert gate_importance.options.keep_fraction == 0.25
    assert gate_importance.options.warmup_steps == 1
    assert step_scale.options.granularity == "channel"


@pytest.mark.parametrize("group", ["gate_importance", "step_scale"])
def test_what_both_mechanisms_observe_is_set_once(workplace: Workplace, group: str) -> None:
    options = [f"--{group}.observer.exclude_prompt", "true", f"--{group}.allow_unmasked_gates", "true"]
    assert workplace.run("fit", *options) == 0
    saved = yaml.safe_load((workplace.log_folder / "config.yaml").read_text())
    for name in ("gate_importance", "step_scale"):
        assert saved[name]["observer"]["exclude_prompt"] is True
        assert saved[name]["allow_unmasked_gates"] is True


def test_a_mechanism_is_not_added_twice(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    callback = {"class_path": "na_lora_lightning.GateImportanceCallback"}
    config = workplace.config(trainer={**workplace.options["trainer"], "callbacks": [callback]})
    assert "GateImportanceCallback is in trainer.callbacks, and the group 'gate_importance' has options of it" in (
        error_of(capsys, ["fit", "--config", config])
    )


def test_a_mechanism_among_the_trainers_callbacks_takes_the_place_of_its_group(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = {"class_path": "na_lora_lightning.GateImportanceCallback", "init_args": {"keep_fraction": 0.25}}
    trainer = {**workplace.options["trainer"], "callbacks": [callback]}
    switch = "--step_scale.observer.exclude_prompt=true"
    callbacks = callbacks_of(workplace, monkeypatch, switch, trainer=trainer, gate_importance={})
    (found,) = [entry for entry in callbacks if isinstance(entry, GateImportanceCallback)]
    assert found.options.keep_fraction == 0.25
    assert any(isinstance(entry, StepScaleCallback) for entry in callbacks)


def test_options_come_from_the_environment(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NA_LORA_FIT__TRAINER__MAX_EPOCHS", "7")
    monkeypatch.setenv("NA_LORA_FIT__MODEL__LORA__DROPOUT", "0.5")
    monkeypatch.setenv("NA_LORA_FIT__MODEL__LORA__R", "5")
    assert workplace.run("fit", "--trainer.min_epochs=1", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    # Files and the command line win.
    assert (printed["trainer"]["max_epochs"], printed["model"]["lora"]["r"]) == (1, 2)
    assert printed["model"]["lora"]["dropout"] == 0.5
    monkeypatch.setenv("NA_LORA_FIT__MODEL__LORA__DROPUT", "0.5")
    error = error_of(capsys, ["fit", "--config", workplace.config()])
    assert error.startswith(
        "the environment variable NA_LORA_FIT__MODEL__LORA__DROPUT is no option of 'na-lora fit'; did"
    )
    assert error.strip().endswith("did you mean NA_LORA_FIT__MODEL__LORA__DROPOUT?")


def test_plain_lora_is_announced(workplace: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        switches = ("--gate_importance", "false", "--step_scale", "false")
        assert workplace.run("fit", *switches, "--trainer.logger", "false") == 0
    told = [record.getMessage() for record in caplog.records if record.name == "na_lora_lightning"]
    assert told == ["NA-LoRA: gate_importance and step_scale are switched off, so this is plain LoRA."]
    assert "Tip" not in caplog.text


# ---- mistakes ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.lora.rank", "3"], "no option 'model.lora.rank'; did you mean 'model.lora.r'?"),
        (["--modle.lora.r=3"], "no option 'modle.lora.r'; did you mean 'model.lora.r'?"),
        (["--model.lora.r", "x"], "'model.lora.r' is 'x', and must be a whole number"),
        (["--model.lora.r", "0"], "lora.r is 0"),
        (
            ["--model.lora.target_modules", "[nothing]"],
            "has 'nothing', and the model has no such layer; its layers are embed_tokens, q_proj",
        ),
        (["--model.optimizer", "Adan"], "'model.optimizer' is 'Adan', which is not a known class"),
        (["--model.optimizer", "SGD", "--model.optimizer.rate", "1"], "'model.optimizer' has no option 'rate'"),
        (
            ["--model.optimizer", "SGD", "--model.optimizer.lr", "x"],
            "the option 'model.optimizer.lr' cannot be 'x'; '-",
        ),
        (["--model.optimizer", "SGD", "--model.optimizer.lr", "-1"], "Invalid learning rate"),
        (["--model.optimizer", "SparseAdam"], "the optimizer SparseAdam cannot step here (SparseAdam does"),
        (
            ["--model.optimizer", "AdamW", "--model.optimizer.capturable", "true"],
            "optimizer AdamW cannot step here",
        ),
        (
            ["--trainer.val_check_interval", "99"],
            "the trainer cannot fit: `val_check_interval` (99) must",
        ),
        (["--model.schedule.name", "sine"], "schedule.name='sine' is unknown; use one of 'linear', 'cosine'"),
        (["--gate_importance.keep_fraction", "2"], "keep_fraction is 2"),
        (["--gate_importance.enabled", "perhaps"], "must be true or false"),
        (["--gate_importance", "perhaps"], "to switch it off, set gate_importance.enabled to false"),
        (["--trainer.accelerator", "abacus"], "invalid accelerator name"),
        (["--trainer.precision", "3"], "'trainer.precision' cannot be '3'"),
        (["--trainer.max_epochs"], "--trainer.max_epochs: expected one argument"),
        (["--trainer.callbacks", "Foo"], "'trainer.callbacks' is 'Foo', which is not a known class"),
        (["--ckpt_path", "missing.ckpt"], "checkpoint 'missing.ckpt' does not exist"),
        (["--data.train", "missing.jsonl"], "missing.jsonl"),
        (["--model.model_name_or_path", "./missing"], "the model folder './missing' does not exist"),
        (["--data.tokenizer_name_or_path", "x"], 'must be given via "model.model_name_or_path"'),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["stray"], "'stray' belongs to no option"),
    ],
)
def test_mistakes_on_the_command_line(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in error_of(capsys, ["fit", "--config", workplace.config(), *arguments])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"trianer": {"max_epochs": 3}}, "no option 'trianer'; did you mean 'trainer'?"),
        ({"trainer": {"max_epoch": 3}}, "no option 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        ({"model": {"lora": {"rnk": 3}}}, "no option 'model.lora.rnk'; did you mean 'model.lora"),
        ({"keep_fraction": 0.5}, "no option 'keep_fraction'; did you mean 'gate_importance.keep_fraction'?"),
        ({"model": {}}, "'model.model_name_or_path' is required"),
        ({"gate_importance": 7}, "set gate_importance.enabled to false"),
    ],
)
def test_mistakes_in_a_configuration(
    workplace: Workplace, capsys: pytest.CaptureFixture[str], groups: Any, message: str
) -> None:
    assert message in error_of(capsys, ["fit", "--config", workplace.config(**groups)])


def test_a_broken_configuration(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace.folder / "broken.yaml"
    path.write_text("model: [\n")
    assert "Problems parsing config" in error_of(capsys, ["fit", "--config", str(path)])


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, ["train"]).startswith("there is no command 'train'; use one of fit, validate")


def test_a_checkpoint_of_another_adapter(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.run("fit") == 0
    arguments = ["--config", workplace.config(), "--ckpt_path", str(workplace.checkpoint), "--model.lora.r", "4"]
    assert "lora.r=2 and the current model has 4" in error_of(capsys, ["test", *arguments])


def test_other_messages_of_the_parser_become_one_line() -> None:
    message = 'Parser key "trainer.x":\n  Something odd\n    - and more'
    assert explain(message, {"trainer.x"}, (), ()) == "trainer.x: Something odd and more."
    assert explain("odd\nand more", (), (), ()) == "odd and more."
