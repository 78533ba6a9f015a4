"""What a fit says of the mechanisms when it begins or resumes with other options; a watched fit shows every curve."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning_models import ForeignModule, RowWatch, assert_equal_states, loader, lora_state, make_trainer
from processes import run_in_processes
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora

from na_lora_lightning import GateImportanceCallback, StepScaleCallback, nonlinearity_aware
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError, PlainLoRAWarning

LINE = "NA-LoRA: 2 silu gates, 48 channels; rows of the least responsive 50 % (24) held from step 5; no step scale."
BOTH = LINE.replace("no step scale", "step scale by activation, not normalised")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "na_lora_lightning"]


def fit(folder: Path, callbacks: list[Callback], batches: int = 8, ckpt_path: Any = None, **options: Any) -> list[str]:
    """A fit of one epoch; the sentences of its warnings of plain LoRA."""
    trainer = make_trainer(folder, callbacks=callbacks, **{"max_epochs": 1, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(ForeignModule(), loader(batches), ckpt_path=ckpt_path)
    return [str(entry.message) for entry in caught if entry.category is PlainLoRAWarning]


def mask(**options: Any) -> GateImportanceCallback:
    return GateImportanceCallback(**{"keep_fraction": 0.5, "warmup_steps": 4, "refresh_every": 2, **options})


@pytest.mark.parametrize("scale_first", [False, True])
def test_two_callbacks_say_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, scale_first: bool) -> None:
    callbacks: list[Callback] = [mask(), StepScaleCallback()]
    fit(tmp_path, callbacks[::-1] if scale_first else callbacks)
    assert told(caplog) == [BOTH]


def test_a_learning_rate_finder_does_not_say_it_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Finder(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            super().on_fit_start(*args)

    module = ForeignModule()
    module.lr = 0.01  # type: ignore[assignment]
    finder = Finder(num_training_steps=3, update_attr=False)
    make_trainer(tmp_path, callbacks=[finder, mask()], max_epochs=1).fit(module, loader(8))
    assert told(caplog) == [LINE]


def test_each_fit_says_it_and_a_resumed_one_says_where_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks: list[Callback] = [mask()]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_epochs=1)
    trainer.fit(ForeignModule(), loader(6))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert told(caplog) == [LINE]
    caplog.clear()
    assert fit(tmp_path, [mask()], 6, tmp_path / "end.ckpt", max_epochs=2) == []
    assert told(caplog) == [f"{LINE[:-1].replace('from step', 'since step')}; resuming at step 7."]


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({}, 4),
        ({"max_epochs": 3, "limit_train_batches": 1}, 3),
        ({"max_epochs": -1, "max_steps": 2}, 2),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 6),
        ({"overfit_batches": 1}, 1),
    ],
)
def test_a_plan_within_the_warmup_is_warned_of(tmp_path: Path, options: dict[str, Any], last: int) -> None:
    (sentence,) = fit(tmp_path, [mask(warmup_steps=6)], 4, **options)
    assert sentence == (
        f"training is planned to end at optimizer step {last} and the mask holds no row before step 7 (warm-up of 6), "
        "so this is plain LoRA; lower warmup_steps or train longer."
    )


def test_a_plan_that_goes_beyond_the_warmup_is_not(tmp_path: Path) -> None:
    assert fit(tmp_path, [mask(warmup_steps=6)], 7) == []
    assert fit(tmp_path, [mask(warmup_steps=6)], 4, max_epochs=2) == []
    # A dry run trains nothing that anybody keeps.
    assert fit(tmp_path, [mask(warmup_steps=6)], fast_dev_run=True) == []


def test_a_resumed_fit_counts_what_came_before(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[mask(warmup_steps=6)], max_epochs=1)
    trainer.fit(ForeignModule(), loader(4))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert fit(tmp_path, [mask(warmup_steps=6)], 4, tmp_path / "end.ckpt", max_epochs=2) == []
    (sentence,) = fit(tmp_path, [mask(warmup_steps=6)], 4, tmp_path / "end.ckpt", max_epochs=2, max_steps=6)
    assert sentence.startswith("training is planned to end at optimizer step 6 and the mask holds no row before step 7")


def test_what_cannot_be_planned_is_warned_of_at_the_end(tmp_path: Path) -> None:
    (sentence,) = fit(tmp_path, [mask(), GradientAccumulationScheduler({0: 2})], 8)
    assert sentence.startswith("training ended at optimizer step 4 and no row had been held by then (warm-up of 4)")


def test_without_batches_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fit(tmp_path, [mask()], limit_train_batches=0) == []
    assert told(caplog) == []


def announce_in_process(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    logging.getLogger("na_lora_lightning").addHandler(logging.FileHandler(folder / os.environ["RANK"]))
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with nonlinearity_aware(model, optimizer, step_scale=None):
        model(**random_batch(0)).loss.backward()
        optimizer.step()


def test_watching_shows_the_regimes_and_the_scale_that_would_be(tmp_path: Path) -> None:
    watched, plain = ForeignModule(), ForeignModule()
    logger = CSVLogger(tmp_path, name="", version="run")
    callback = GateImportanceCallback(keep_fraction=1.0)
    options: dict[str, Any] = {"log_every_n_steps": 4, "max_epochs": 1}
    make_trainer(tmp_path, callbacks=[callback], logger=logger, **options).fit(watched, loader(8))
    make_trainer(tmp_path, **options).fit(plain, loader(8))
    assert watched.losses == plain.losses
    assert_equal_states(lora_state(watched), lora_state(plain))
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    # Neither what follows from the others nor what is 0 or 1 at each step.
    wanted = {"responsiveness", "regime_suppressed", "regime_homogeneous", "step_scale_deviation"}
    wanted |= {"selection_misalignment", "selection_share"}
    assert {name for name in header.split(",") if "/" in name} == {f"gates/{name}" for name in wanted}
    assert {row.split(",")[header.split(",").index("step")] for row in rows if row} == {"3", "7"}


def test_a_watched_step_is_measured_as_the_step_scale_measures_it() -> None:
    found: list[dict[str, float]] = []
    # With no memory and no part in the update, the step scale sees of each step what watching does.
    of_channels = StepScaleOptions(granularity="channel", normalize=True, beta=0.0)
    for importance, scale in ((ImportanceOptions(keep_fraction=1.0), None), (None, of_channels)):
        model = with_lora(tiny_llama(), LLAMA_TARGETS)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        with nonlinearity_aware(model, optimizer, importance=importance, step_scale=scale, measure_every=2) as gates:
            for step in range(4):
                model(**random_batch(step)).loss.backward()
                optimizer.step()
                metrics = gates.metrics()
                shown = {name: value for name, value in metrics.items() if name.startswith(("gates/r", "gates/step"))}
                if scale is None:
                    # Between two measurements nothing is summed up.
                    assert ("gates/step_scale_deviation" in shown) == (step % 2 == 1)
                    shown.pop("gates/responsiveness")
        found.append({name: value for name, value in shown.items() if "responsiveness" not in name})
    assert found[0] == found[1]
    assert 0.0 < found[0]["gates/regime_suppressed"] + found[0]["gates/regime_homogeneous"] < 1.0
    assert found[0]["gates/step_scale_deviation"] > 0


def test_of_several_processes_the_first_says_it(tmp_path: Path) -> None:
    run_in_processes(announce_in_process, tmp_path)
    assert (tmp_path / "0").read_text().startswith("NA-LoRA: 2 silu gates, 48 channels; rows of the least")
    assert (tmp_path / "1").read_text() == ""


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
        (StepScaleCallback(granularity="site"), "averaged with granularity='activation' and this run has 'site'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_averages_of_something_else_are_refused(tmp_path: Path, callback: Callback, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resume(tmp_path, [callback])
