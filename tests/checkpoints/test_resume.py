"""Real kills of ``na-lora fit`` at chosen places; ``make faults`` has many more at random ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from faults.runs import SETTINGS, Remains, Setting, Workplace, differences, fit, last_run, remains
from faults.traps import TRAPS
from lightning.pytorch import Trainer
from lightning_models import ForeignModule, assert_equal_states, loader, lora_state, make_trainer

from na_lora_lightning import RunCheckpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a fit is killed in a forked process")

SETTING = SETTINGS[0]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def whole(workplace: Workplace) -> Remains:
    status, _ = fit(workplace.arguments(workplace.folder / "whole", SETTING), workplace.folder / "whole.log")
    assert status == 0, (workplace.folder / "whole.log").read_text()
    return remains(workplace.folder / "whole")


@pytest.mark.parametrize(
    ("kills", "left"),
    [
        # Before the first checkpoint, in the middle of one, between micro-batches, and at the very end.
        ([("a training step begins", 2)], 0),
        ([("half of a checkpoint is written", 2), ("between micro-batches", 3)], 2),
        ([("the optimizer has stepped, the rows not masked", 6), ("a point of a curve is written", 40)], 2),
        ([("the rows are masked, the step of A not shortened", 5)], 2),
        ([("half of the adapter is written", 1)], 2),
    ],
)
def test_a_killed_run_ends_as_if_it_never_was(
    workplace: Workplace, whole: Remains, tmp_path: Path, kills: list[tuple[str, int]], left: int
) -> None:
    arguments = workplace.arguments(tmp_path / "run", SETTING, "--ckpt_path=last")
    for place, number in kills:
        trap, _ = TRAPS[place]
        status, _ = fit(arguments, tmp_path / "log", trap=lambda trap=trap, number=number: trap(number))
        assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert len(list((tmp_path / "run").rglob("*.ckpt"))) == left
    status, _ = fit(arguments, tmp_path / "log")
    assert status == 0, (tmp_path / "log").read_text()
    assert differences(whole, remains(tmp_path / "run")) == []
    # One run, in one folder.
    assert last_run(tmp_path / "run").name == "version_0"
    assert not list((tmp_path / "run").rglob("*.partial"))


@pytest.mark.parametrize("setting", SETTINGS[-2:], ids=["stream", "mixture"])
def test_a_killed_run_on_other_data_ends_as_if_it_never_was(
    workplace: Workplace, tmp_path: Path, setting: Setting
) -> None:
    assert fit(workplace.arguments(tmp_path / "whole", setting), tmp_path / "log")[0] == 0
    arguments = workplace.arguments(tmp_path / "run", setting, "--ckpt_path=last")
    # In the middle of a checkpoint; in the first epoch, and after its end.
    for place, number in [
        ("half of a checkpoint is written", 2),
        ("a training step begins", 6),
        ("a training step begins", 6),
    ]:
        trap, _ = TRAPS[place]
        status, _ = fit(arguments, tmp_path / "log", trap=lambda trap=trap, number=number: trap(number))
        assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert fit(arguments, tmp_path / "log")[0] == 0, (tmp_path / "log").read_text()
    assert differences(remains(tmp_path / "whole"), remains(tmp_path / "run")) == []


def test_what_differs_is_found(workplace: Workplace, whole: Remains, tmp_path: Path) -> None:
    arguments = workplace.arguments(tmp_path / "run", SETTING, "--seed_everything=2")
    assert fit(arguments, tmp_path / "log")[0] == 0
    found = differences(whole, remains(tmp_path / "run"))
    assert any(difference.startswith("adapter ") for difference in found)
    assert any(difference.startswith("point train/loss at 3") for difference in found)


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
