"""A fit that goes on after an epoch, with a number of steps, accumulation and no validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning_models import ForeignModule, assert_equal_states, loader, lora_state, make_trainer

from na_lora_lightning import RunCheckpoint


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("accumulation", [1, 2, 3, 100])
def test_the_next_epoch_steps_after_the_same_micro_batches(tmp_path: Path, accumulation: int) -> None:
    options: dict[str, Any] = {
        "max_epochs": 3,
        "max_steps": 7 if accumulation == 1 else 3,
        "accumulate_grad_batches": accumulation,
        "enable_checkpointing": True,
    }
    whole, resumed = ForeignModule(), ForeignModule()
    folder = tmp_path / "checkpoints"

    def trainer() -> Trainer:
        return make_trainer(tmp_path, callbacks=[RunCheckpoint(0, 5, str(folder))], **options)

    trainer().fit(whole, loader(3))
    (first,) = folder.glob("epoch=0-*.ckpt")
    trainer().fit(resumed, loader(3), ckpt_path=first)
    assert resumed.losses == whole.losses[3:]
    assert_equal_states(lora_state(resumed), lora_state(whole))
