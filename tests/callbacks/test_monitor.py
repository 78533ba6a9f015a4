"""What TensorBoard gets to see, read back from the event file."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_models import ForeignModule, loader, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import PLAIN_SCALE

from na_lora_lightning import GateImportanceCallback, StepScaleCallback

IMPORTANCE_GROUPS = {"gate_responsiveness", "gate_mask_density", "gate_mask_churn"}
SCALE_GROUPS = {"gate_regime_suppressed", "gate_regime_transitional", "gate_regime_homogeneous", "gate_step_scale"}
MISALIGNMENT_GROUPS = {"selection_misalignment", "selection_share"}


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_holds_every_curve_by_layer_and_activation(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    importance = GateImportanceCallback(keep_fraction=0.5, warmup_steps=2, refresh_every=2, histogram_every_n_steps=4)
    callbacks = [importance, StepScaleCallback(**PLAIN_SCALE)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, logger=logger, log_every_n_steps=2)
    trainer.fit(ForeignModule(), loader())
    log = events(tmp_path / "run")
    tags = set(log.Tags()["scalars"])
    for group in IMPORTANCE_GROUPS | SCALE_GROUPS | MISALIGNMENT_GROUPS:
        for suffix in ("layer_00", "layer_01", "silu"):
            assert f"{group}/{suffix}" in tags
            assert [event.step for event in log.Scalars(f"{group}/{suffix}")] == [1, 3, 5, 7]
    assert [event.value for event in log.Scalars("gate_mask_density/silu")] == [1.0, 0.5, 0.5, 0.5]
    scale = callbacks[1].controller.step_scale  # type: ignore[union-attr]
    last = {tag: log.Scalars(tag)[-1].value for tag in tags}
    assert last["gate_step_scale/silu"] == pytest.approx(scale.scale[0].item(), abs=1e-6)  # type: ignore[union-attr]
    occupancy = [last[f"gate_regime_{name}/layer_01"] for name in ("suppressed", "transitional", "homogeneous")]
    assert sum(occupancy) == pytest.approx(1.0, abs=1e-5)
    responsiveness = importance.controller.importance.responsiveness  # type: ignore[union-attr]
    assert last["gate_responsiveness/silu"] == pytest.approx(responsiveness.mean().item(), abs=1e-6)
    assert 0.0 < last["selection_misalignment/silu"] < 1.0
    assert 0.0 < last["selection_share/silu"] < 1.0
    assert [event.step for event in log.Histograms("gate_responsiveness_of_channels/layer_00")] == [0, 4]


@pytest.mark.parametrize(
    ("callback", "groups"),
    [
        (GateImportanceCallback(), IMPORTANCE_GROUPS | MISALIGNMENT_GROUPS),
        (StepScaleCallback(**PLAIN_SCALE), SCALE_GROUPS | MISALIGNMENT_GROUPS),
        (StepScaleCallback(), SCALE_GROUPS | {"gate_step_scale_deviation"} | MISALIGNMENT_GROUPS),
    ],
    ids=["importance", "scale", "scale_per_channel"],
)
def test_each_callback_alone_writes_its_own_under_another_logger(
    tmp_path: Path, callback: GateImportanceCallback | StepScaleCallback, groups: set[str]
) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    make_trainer(tmp_path, callbacks=[callback], logger=logger).fit(ForeignModule(), loader())
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {name.split("/")[0] for name in header if "/" in name} == groups


def test_an_unlogged_step_measures_no_misalignment(tmp_path: Path) -> None:
    callback = GateImportanceCallback()
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = make_trainer(tmp_path, callbacks=[callback], logger=logger, log_every_n_steps=8, max_steps=5)
    trainer.fit(ForeignModule(), loader(8))
    assert callback.controller is not None
    assert not callback.controller.meter.sums.any()
    assert callback.controller.misalignment is None
