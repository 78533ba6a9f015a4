"""What a run shows of its gates, read back from its files."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_models import ForeignModule, assert_equal_states, both, loader, lora_state, make_trainer
from PIL import Image
from stand_ins import Fleeting, OfflineMLFlow, OfflineWandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tiny_models import PLAIN_SCALE

from na_lora_lightning import GateImportanceCallback, StepScaleCallback, ViewOptions
from na_lora_lightning.errors import ConfigurationError, ViewWarning
from na_lora_lightning.history import read_history

pytestmark = pytest.mark.draws
IMPORTANCE = {"gate_responsiveness", "gate_mask_churn"}
SCALE = {"gate_regime_suppressed", "gate_regime_homogeneous"}
MISALIGNMENT = {"selection_misalignment", "selection_share"}
LAYERS = ("layer_00", "layer_01")


def over_layers(groups: set[str]) -> set[str]:
    return {f"gates/{group.removeprefix('gate_')}" for group in groups}


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


@pytest.mark.parametrize("layers", [False, True], ids=["overview", "layers"])
def test_tensorboard_holds_curves_over_all_layers_and_of_each_where_asked(tmp_path: Path, layers: bool) -> None:
    logger, view = TensorBoardLogger(tmp_path, name="", version="run"), ViewOptions(layer_curves=layers)
    importance = GateImportanceCallback(0.5, warmup_steps=2, refresh_every=2, histogram_every_n_steps=4, view=view)
    scale = StepScaleCallback(**PLAIN_SCALE, view=view)
    trainer = make_trainer(tmp_path, callbacks=[importance, scale], logger=logger, log_every_n_steps=2)
    trainer.fit(ForeignModule(), loader())
    log = events(tmp_path / "run")
    groups = IMPORTANCE | SCALE | MISALIGNMENT | {"gate_step_scale"}
    wanted = over_layers(groups) | {f"{group}/{layer}" for group in groups for layer in LAYERS if layers}
    assert {tag for tag in log.Tags()["scalars"] if tag.startswith(("gate", "selection"))} == wanted
    last = {}
    for tag in wanted:
        points = log.Scalars(tag)
        assert [event.step for event in points] == [1, 3, 5, 7], tag
        last[tag] = points[-1].value
    # The first mask, in the third step, holds a half of the channels.
    assert [event.value for event in log.Scalars("gates/mask_churn")][:2] == [0.0, 0.5]
    assert last["gates/step_scale"] == pytest.approx(scale.controller.step_scale.scale[0].item(), abs=1e-6)  # type: ignore[union-attr]
    responsiveness = importance.controller.importance.responsiveness  # type: ignore[union-attr]
    assert last["gates/responsiveness"] == pytest.approx(responsiveness.mean().item(), abs=1e-6)
    assert 0.0 < last["gates/selection_misalignment"] < 1.0
    assert [event.step for event in log.Histograms("responsiveness_of_channels/layer_00")] == [0, 4]


@pytest.mark.parametrize(
    ("callback", "groups"),
    [
        (GateImportanceCallback(0.5), IMPORTANCE | MISALIGNMENT),
        (GateImportanceCallback(0.5, scope="global"), IMPORTANCE | MISALIGNMENT),
        (StepScaleCallback(**PLAIN_SCALE), SCALE | {"gate_step_scale"} | MISALIGNMENT),
        (StepScaleCallback("channel", normalize=True), SCALE | {"gate_step_scale_deviation"} | MISALIGNMENT),
    ],
    ids=["importance", "importance_global", "scale", "scale_per_channel"],
)
def test_each_callback_alone_shows_its_own_and_nothing_constant(
    tmp_path: Path, callback: GateImportanceCallback | StepScaleCallback, groups: set[str]
) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    make_trainer(tmp_path, callbacks=[callback], logger=logger).fit(ForeignModule(), loader())
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {name for name in header if "/" in name} == over_layers(groups)
    assert (tmp_path / "run" / "pictures" / "selection_misalignment.png").is_file()


def test_the_history_has_each_layer_without_curves_of_layers(tmp_path: Path) -> None:
    logger, callbacks = CSVLogger(tmp_path, name="", version="run"), both()
    make_trainer(tmp_path, callbacks=callbacks, logger=logger, log_every_n_steps=2).fit(ForeignModule(), loader())
    history = read_history(tmp_path / "run")
    assert history is not None
    assert history.start["in_force"].startswith("NA-LoRA: 2 silu gates, 48 channels; ")
    assert [site["label"] for site in history.start["sites"]] == list(LAYERS)
    assert [entry["step"] for entry in history.steps] == [2, 4, 6, 8]
    controller = callbacks[0].controller
    assert controller is not None
    for group, values in controller.gate_metrics().sites.items():
        if group in history.steps[-1]["gates"]:
            assert history.steps[-1]["gates"][group] == pytest.approx(values, rel=1e-4)
    assert history.steps[-1]["gates"].keys() >= IMPORTANCE | MISALIGNMENT | SCALE
    assert history.steps[-1]["metrics"]["learning_rate"] > 0.0
    assert (history.end or {})["outcome"] == "ended"
    assert len((history.channels or {})["quiet"]) == 2


def test_pages_of_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    view = ViewOptions(picture_every_n_steps=4)
    trainer = make_trainer(tmp_path, callbacks=both(view=view), logger=logger, log_every_n_steps=2)
    trainer.fit(ForeignModule(), loader())
    log = EventMultiplexer({"run": str(tmp_path / "run")})
    log.Reload()
    assert "0 is the base model's" in log.SummaryMetadata("run", "gates/selection_misalignment").summary_description
    plugins = {name: set(log.PluginRunToTagToContent(name)["run"]) for name in ("hparams", "text", "custom_scalars")}
    assert plugins["hparams"] == {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert plugins["text"] == {"gates/what the curves mean/text_summary"}
    assert plugins["custom_scalars"] == {"custom_scalars__config__"}
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = log.PluginRunToTagToContent("hparams")["run"]
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert start["gates.importance.keep_fraction"].number_value == 0.5
    assert start["lora.r"].number_value == 4
    metrics = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    assert "gates/selection_misalignment" in {info.name.tag for info in metrics}
    pictures = EventAccumulator(str(tmp_path / "run")).Reload()
    tag = "gates/selection_misalignment_by_layer"
    assert [image.step for image in pictures.Images(tag)] == [3, 7]
    with Image.open(tmp_path / "run" / "pictures" / "selection_misalignment.png") as picture:
        assert (picture.width, picture.height) == (pictures.Images(tag)[0].width, pictures.Images(tag)[0].height)


def test_pictures_go_to_loggers_that_take_them(tmp_path: Path) -> None:
    loggers = [OfflineWandb(str(tmp_path)), OfflineMLFlow(str(tmp_path)), Fleeting(str(tmp_path))]
    make_trainer(tmp_path, callbacks=both(), logger=loggers).fit(ForeignModule(), loader())
    for taken in (loggers[0].pictures, loggers[1].pictures):  # type: ignore[union-attr]
        assert {name.partition("_by_layer")[0] for name in taken} >= over_layers(MISALIGNMENT | SCALE)
    run = tmp_path / "lightning_logs" / loggers[0].experiment.id
    assert (run / "pictures" / "gate_responsiveness.png").is_file()
    assert read_history(run) is not None


@pytest.mark.parametrize("full", ["nearly", "in the middle of a picture"])
def test_pictures_without_room_are_left_out_and_curves_are_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    def fitted(name: str) -> EventAccumulator:
        torch.manual_seed(0)
        logger, view = TensorBoardLogger(tmp_path, name="", version=name), ViewOptions(picture_every_n_steps=2)
        trainer = make_trainer(tmp_path, callbacks=both(view=view), logger=logger, log_every_n_steps=2)
        trainer.fit(ForeignModule(), loader())
        return events(tmp_path / name)

    undisturbed = fitted("undisturbed")
    write_bytes = Path.write_bytes

    def without_room(path: Path, content: bytes) -> int:
        write_bytes(path, content[:100])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    if full == "nearly":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    else:
        monkeypatch.setattr(Path, "write_bytes", without_room)
    reason = "100,000 bytes are free" if full == "nearly" else "No space left"
    with pytest.warns(ViewWarning, match=rf"heat maps cannot be written \(OSError: .*{reason}.*goes on") as told:
        log = fitted("full")
    assert [entry.category for entry in told].count(ViewWarning) == 1
    assert list((tmp_path / "full" / "pictures").iterdir()) == []
    assert undisturbed.Tags()["images"] != [] == log.Tags()["images"]
    assert log.Tags()["scalars"] == undisturbed.Tags()["scalars"]
    for tag in log.Tags()["scalars"]:
        points, wanted = ([(event.step, event.value) for event in each.Scalars(tag)] for each in (log, undisturbed))
        assert points == wanted, tag


class Breaks(Callback):
    """Takes the place of the run's folder away in the middle of training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            path = self.folder / "history.jsonl"
            if path.is_file():
                path.unlink()
            path.mkdir(exist_ok=True)


def test_a_history_that_cannot_be_written_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callbacks, module, undisturbed = [*both(), Breaks(tmp_path / "run")], ForeignModule(), ForeignModule()
    with pytest.warns(
        ViewWarning, match=r"the history cannot be written \(IsADirectoryError.*training goes on"
    ) as told:
        make_trainer(tmp_path, callbacks=callbacks, logger=logger).fit(module, loader())
    assert [entry.category for entry in told].count(ViewWarning) == 1
    make_trainer(tmp_path, callbacks=both(), logger=False).fit(undisturbed, loader())
    assert_equal_states(lora_state(module), lora_state(undisturbed))


def test_what_is_shown_can_be_left_out(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callbacks = both(view=ViewOptions(history=False))
    make_trainer(tmp_path, callbacks=callbacks, logger=logger).fit(ForeignModule(), loader())
    assert read_history(tmp_path / "run") is None
    with pytest.raises(ConfigurationError, match="picture_every_n_steps is -1"):
        ViewOptions(picture_every_n_steps=-1)
    with pytest.raises(ConfigurationError, match="different values of view"):
        make_trainer(tmp_path, callbacks=[GateImportanceCallback(view=ViewOptions(True)), StepScaleCallback()]).fit(
            ForeignModule(), loader()
        )


def test_an_unlogged_step_measures_no_misalignment(tmp_path: Path) -> None:
    callback = GateImportanceCallback()
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = make_trainer(tmp_path, callbacks=[callback], logger=logger, log_every_n_steps=8, max_steps=5)
    trainer.fit(ForeignModule(), loader(8))
    assert callback.controller is not None
    assert not callback.controller.meter.sums.any()
    assert callback.controller.misalignment is None


class Validates(ForeignModule):
    """Measures in validation what training logs too."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.detach())
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.log("loss/held_out", torch.tensor(float(batch_idx)))


def test_a_resumed_run_goes_on_in_its_history(tmp_path: Path) -> None:
    steps: list[list[Any]] = []
    for name, ends in (("whole", [2]), ("resumed", [1, 2])):
        checkpoint = None
        for epochs in ends:
            logger = TensorBoardLogger(tmp_path, name="", version=name)
            options: dict[str, Any] = {
                "log_every_n_steps": 2,
                "max_epochs": epochs,
                "num_sanity_val_steps": -1,
                "limit_val_batches": 3,
            }
            trainer = make_trainer(tmp_path / name, callbacks=both(), logger=logger, **options)
            trainer.fit(Validates(), loader(), loader(), ckpt_path=checkpoint)
            checkpoint = str(tmp_path / f"{name}.ckpt")
            trainer.save_checkpoint(checkpoint)
        history = read_history(tmp_path / name)
        assert history is not None
        assert len(history.starts) == len(ends)
        assert [(entry["step"], entry["metrics"]) for entry in history.validations] == [
            (step, {"loss/held_out": 1.0}) for step in (0, 4, 8)
        ]
        steps.append([{**entry, "time": 0} for entry in history.steps])
    assert steps[0] == steps[1]
    assert [entry["step"] for entry in steps[0]] == [2, 4, 6, 8]
    assert all("loss" in entry["metrics"] for entry in steps[0])
