"""Another data module than the one for text, on the command line and in configuration files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dual_encoder_helpers import saved_dual_encoder, write_shapes
from module_helpers import private_dataset_cache  # noqa: F401
from vision_helpers import vlm_folders, write_vision_records  # noqa: F401

from na_lora_lightning.cli.main import main
from na_lora_lightning.data import InstructionDataModule

# The machine of the tests may have one processor.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

Vlm = Callable[[str], str]
VISION = "na_lora_lightning.data.VisionInstructionDataModule"
LABELLED = "na_lora_lightning.LabelledImageDataModule"


@pytest.fixture
def options(vlm: Vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    # Nothing may be written elsewhere.
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return {
        "model": {
            "model_name_or_path": vlm("llava"),
            "lora": {"r": 2, "alpha": 4},
            "evaluation": {"generate": True, "max_new_tokens": 2},
        },
        "gate_importance": {"warmup_steps": 1, "refresh_every": 1, "allow_unmasked_gates": True},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }


def config(folder: Path, options: dict[str, Any], **groups: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**options, **groups}))
    return str(path)


def sources(folder: Path) -> dict[str, Any]:
    source = write_vision_records(folder, 4)
    return {**dict.fromkeys(("train", "validation", "predict"), source), "batch_size": 2, "num_workers": 0}


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_fit_and_predict_with_images(
    options: dict[str, Any], vlm: Vlm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, options, data={"class_path": VISION, "init_args": sources(tmp_path)})
    assert main(["fit", "--config", path]) == 0
    (run,) = (tmp_path / "run" / "lightning_logs").iterdir()
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    # The processor follows the model.
    assert saved["datamodule_hyper_parameters"]["processor_name_or_path"] == vlm("llava")
    assert "exact_match" in capsys.readouterr().out
    assert main(["predict", "--config", path, "--ckpt_path", str(checkpoint)]) == 0
    (written,) = (tmp_path / "run").glob("**/predictions.jsonl")
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["x", "xxxxxx", "xxxx", "xx"]


def test_class_and_options_on_the_command_line(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", VISION, "--data.train", "a.jsonl", "--data.skip_broken_images", "true"]
    assert main(["fit", "--config", config(tmp_path, options), *given, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    arguments = printed["data"]["init_args"]
    assert printed["data"]["class_path"].rpartition(".")[2] == "VisionInstructionDataModule"
    assert (arguments["train"], arguments["skip_broken_images"], arguments["batch_size"]) == ("a.jsonl", True, 4)
    assert "processor_name_or_path" not in arguments
    # What is printed is a configuration.
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(printed))
    assert main(["fit", "--config", str(tmp_path / "printed.yaml"), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == printed


@pytest.mark.parametrize("written", [VISION, {"class_path": VISION}])
def test_class_in_a_file_and_options_on_the_command_line(
    written: Any, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, options, data=written)
    assert main(["fit", "--config", path, "--data.train", "a.jsonl", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["init_args"]["train"] == "a.jsonl"


def test_text_is_the_default_and_can_be_named(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(tmp_path, options)
    assert main(["fit", "--config", path, "--data.train", "a.jsonl", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["data"]
    named = ["--data", "na_lora_lightning.InstructionDataModule", "--data.train", "a.jsonl"]
    assert main(["fit", "--config", path, *named, "--print_config"]) == 0
    also_printed = yaml.safe_load(capsys.readouterr().out)["data"]
    assert also_printed["class_path"].rpartition(".")[2] == InstructionDataModule.__name__
    assert also_printed["init_args"] == {key: value for key, value in printed.items() if key != "class_path"}


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (None, ["--data", VISION, "--data.trian", "a"], "the class given for 'data' has no option 'trian'; correct or"),
        (
            None,
            ["--data", "Nonsense"],
            "the option 'data' is 'Nonsense', which is not a known class; give its import path",
        ),
        (None, ["--data", VISION, "--data.batch_size", "x"], "the option 'data.batch_size' cannot be 'x'; '--help'"),
        (
            {"train": "a.jsonl"},
            ["--data", VISION],
            "config.yaml' is beside the class of the data and not among its arg",
        ),
        ({"class_path": VISION, "train": "a"}, [], "the option 'data.train' of "),
        ({"class_path": VISION, "init_args": {"trian": "a"}}, [], "the class given for 'data' has no option 'trian'"),
        (
            {"class_path": VISION, "init_args": {"batch_size": "x"}},
            [],
            "the option 'data.batch_size' cannot be 'x'; '-",
        ),
        (None, ["--data", VISION, "--data.streaming", "true"], "group_by_length=True needs all training data before"),
        (None, ["--data", LABELLED, "--data.validation_fraction", "0.1"], "'validation_fraction', which data for"),
        (
            None,
            ["--data", LABELLED, "--data.streaming", "true"],
            "'data' has no option 'streaming', which data for language models alone have; leave it out.",
        ),
        *(
            (None, ["--data", LABELLED, "--data.train", mixed], ", and must be one source, as data for language models")
            for mixed in ('[{"path": "a.jsonl", "weight": 2}]', '["a.jsonl", "b.jsonl"]', '{"path": "a.jsonl"}')
        ),
        (None, ["--data", VISION, "--data.batch_size", "0"], "batch_size=0 is too small; set it to 1 or more"),
        (None, ["--data", VISION], "the data for 'train' is not given but is needed to fit; set data.train"),
        (None, ["--data", VISION, "--data.train", "absent.jsonl"], "the data file 'absent.jsonl' does not exist"),
    ],
)
def test_mistakes(
    data: Any,
    arguments: list[str],
    message: str,
    options: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config(tmp_path, options, **({} if data is None else {"data": data}))
    assert message in error_of(capsys, ["fit", "--config", path, *arguments])


def test_broken_image_stops_training_in_one_sentence(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"class_path": VISION, "init_args": {**sources(tmp_path), "num_workers": 2}}
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    message = error_of(capsys, ["fit", "--config", config(tmp_path, options, data=data)])
    assert message.startswith("record 4 of '")
    assert message.endswith("or set skip_broken_images to true to leave such records out.")


def test_a_dual_encoder_learns_classes_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    shapes = write_shapes(tmp_path / "shapes", 2)
    options: dict[str, Any] = {
        "model": {
            "class_path": "na_lora_lightning.DualEncoderLightningModule",
            "init_args": {
                "model_name_or_path": saved_dual_encoder(tmp_path / "clip"),
                "lora": {"r": 2, "alpha": 4},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.125}},
            },
        },
        "data": {
            "class_path": "na_lora_lightning.LabelledImageDataModule",
            "init_args": {"train": shapes, "validation": shapes, "batch_size": 4, "num_workers": 0},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path / "run")},
    }
    options["trainer"]["log_every_n_steps"] = 1
    assert main(["fit", "--config", config(tmp_path, options), "--trainer.enable_progress_bar=false"]) == 0
    (checkpoint,) = tmp_path.glob("run/**/*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["hyper_parameters"]["optimizer"]["init_args"]["lr"] == 0.125
    assert saved["hyper_parameters"]["lora"]["r"] == 2
    (run,) = tmp_path.glob("run/**/version_0")
    capsys.readouterr()
    # The adapter names the base, and the file the class.
    del options["model"]["init_args"]["model_name_or_path"]
    assert main(["validate", "--config", config(tmp_path, options), "--adapter", str(run)]) == 0
    assert "validation/accuracy" in capsys.readouterr().out
    options["model"] = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1}}
    assert "torch.nn.Linear" in error_of(capsys, ["fit", "--config", config(tmp_path, options)])


@pytest.mark.parametrize("kind", ["idefics3", "qwen2_vl"])
def test_an_adapter_of_two_parts_is_found_again(
    vlm: Vlm, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    options["model"] |= {"model_name_or_path": vlm(kind), "lora": {"r": 2, "alpha": 4, "parts": ["language", "vision"]}}
    options["model"]["evaluation"] = {}
    path = config(tmp_path, options, data={"class_path": VISION, "init_args": sources(tmp_path)})
    assert main(["fit", "--config", path]) == 0
    (run,) = tmp_path.glob("run/**/version_0")
    (checkpoint,) = run.glob("checkpoints/*.ckpt")
    losses = []
    for arguments in (["--ckpt_path", str(checkpoint)], ["--adapter", str(run)]):
        if arguments[0] == "--adapter":
            del options["model"]["lora"]
            path = config(tmp_path, options, data={"class_path": VISION, "init_args": sources(tmp_path)})
        capsys.readouterr()
        assert main(["validate", "--config", path, *arguments]) == 0
        losses.append([line for line in capsys.readouterr().out.splitlines() if "validation/loss" in line])
    assert losses[0] == losses[1] != []
