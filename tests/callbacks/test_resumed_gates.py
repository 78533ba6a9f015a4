"""In a foreign project, options of the two callbacks that have changed since the checkpoint: in force, and named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning_models import ForeignModule, RowWatch, loader, make_trainer

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError


def masking(**options: Any) -> GateImportanceCallback:
    return GateImportanceCallback(**{"keep_fraction": 1.0, "warmup_steps": 0, "refresh_every": 100, **options})


def resume(folder: Path, callbacks: list[Callback]) -> Trainer:
    """Four steps with a mask that keeps all, and four more with ``callbacks``."""
    trainer = make_trainer(folder, callbacks=[masking(), StepScaleCallback(matrix_a_factor=0.5)], max_epochs=1)
    trainer.fit(ForeignModule(), loader())
    trainer.save_checkpoint(folder / "first.ckpt")
    trainer = make_trainer(folder, callbacks=callbacks, max_epochs=2)
    trainer.fit(ForeignModule(), loader(), ckpt_path=folder / "first.ckpt", weights_only=True)
    return trainer


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "other options" in message]


def test_unchanged_options_are_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "na_lora_lightning"):
        resume(tmp_path, [masking(), StepScaleCallback(matrix_a_factor=0.5)])
    assert lines_of(caplog) == []


def test_changed_options_are_in_force_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Half of the channels are held in each of the four steps, though the next refresh is far away.
    importance = masking(keep_fraction=0.5, beta=0.5, observer=ObserverOptions(max_tokens=5))
    watch = RowWatch(importance)
    scale = StepScaleCallback(observer=ObserverOptions(max_tokens=5))
    with caplog.at_level(logging.INFO, "na_lora_lightning"):
        resume(tmp_path, [importance, watch, scale])
    assert watch.masked == 4 * 48 // 2
    assert lines_of(caplog) == [
        "GateImportanceCallback resumes with other options than the checkpoint's: "
        "max_tokens 128 → 5, keep_fraction 1.0 → 0.5, beta 0.9 → 0.5.",
        "StepScaleCallback resumes with other options than the checkpoint's: "
        "max_tokens 128 → 5, matrix_a_factor 0.5 → 1.0.",
    ]


def test_a_longer_warmup_takes_the_mask_off(tmp_path: Path) -> None:
    importance = masking(keep_fraction=0.5, warmup_steps=6)
    watch = RowWatch(importance)
    resume(tmp_path, [importance, watch, StepScaleCallback(matrix_a_factor=0.5)])
    # Steps 7 and 8.
    assert watch.masked == 2 * 48 // 2


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (masking(criterion="homogeneity_gap"), "averaged with criterion='output_derivative' and this run has 'homogen"),
        (
            StepScaleCallback(tau=0.3),
            "averaged with tau=0.1 and this run has 0.3, which cannot be continued; set tau as",
        ),
        (StepScaleCallback(granularity="site"), "averaged with granularity='channel' and this run has 'site'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_averages_of_something_else_are_refused(tmp_path: Path, callback: Callback, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resume(tmp_path, [callback])
