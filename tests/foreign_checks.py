"""What has to hold for the callbacks in any project."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning_models import ForeignModule, RowWatch, assert_equal_states, hooks_of, loader, lora_state, make_trainer
from torch import Tensor

from na_lora_lightning import GateImportanceCallback, StepScaleCallback


def both() -> list[Any]:
    """Both callbacks, with masks that change."""
    return [GateImportanceCallback(0.5, warmup_steps=2, refresh_every=2), StepScaleCallback(granularity="channel")]


@cache
def fitted_alone(kind: str = "llama") -> dict[str, Tensor]:
    """What a fit with fresh callbacks gives."""
    module = ForeignModule(kind)
    make_trainer(Path(), callbacks=both()).fit(module, loader(kind=kind))
    return lora_state(module)


def check(
    folder: Path,
    make_module: Callable[[], LightningModule],
    make_data: Callable[[], Any] = loader,
    make_others: Callable[[], list[Callback]] = list,
    example_inputs: Any = None,
    **options: Any,
) -> tuple[Any, GateImportanceCallback]:
    """Fits three times: watching alone is bitwise plain LoRA, and masked rows stay at each optimizer step."""
    plain, watched, masked = make_module(), make_module(), make_module()
    make_trainer(folder, callbacks=make_others(), **options).fit(plain, make_data())
    watching: list[Callback] = [
        GateImportanceCallback(keep_fraction=1.0, warmup_steps=0, example_inputs=example_inputs),
        StepScaleCallback(eta_min=1.0, matrix_a_factor=1.0, example_inputs=example_inputs),
    ]
    make_trainer(folder, callbacks=[*make_others(), *watching], **options).fit(watched, make_data())
    assert_equal_states(lora_state(plain), lora_state(watched))
    importance = GateImportanceCallback(0.25, warmup_steps=0, refresh_every=1, example_inputs=example_inputs)
    watch = RowWatch(importance)
    trainer = make_trainer(folder, callbacks=[*make_others(), importance, watch], **options)
    trainer.fit(masked, make_data())
    controller: Any = importance.controller
    assert controller.steps > 0
    assert watch.masked == controller.steps * controller.gates.channels * 3 // 4
    assert masked.global_step == trainer.global_step
    if masked.automatic_optimization:
        assert controller.steps == importance._mechanism.steps == trainer.global_step  # type: ignore[union-attr]
    assert hooks_of(masked) == hooks_of(plain)
    return masked, importance
