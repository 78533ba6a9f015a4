"""What transformers' Trainer is told when a training begins and ends, and that watching shows every curve."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from na_lora_lightning import NALoRATrainerCallback
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.errors import PlainLoRAWarning

MASK = ImportanceOptions(keep_fraction=0.5, warmup_steps=2, refresh_every=2)
LINE = "NA-LoRA: 2 silu gates, 48 channels; rows of the least responsive 50 % (24) held from step 3; no step scale."


class Stop(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_training_stop = state.global_step == 2
        return control


def train(
    folder: Path, importance: ImportanceOptions, *others: TrainerCallback, resume: str | None = None, **options: Any
) -> tuple[Trainer, list[str]]:
    """A trained Trainer, and the sentences of its warnings of plain LoRA."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_steps=2,
        per_device_train_batch_size=1,
        **{"save_strategy": "no", **options},
    )
    data: Any = [{name: value[0] for name, value in random_batch(number, batch=1).items()} for number in range(8)]
    callback = NALoRATrainerCallback(importance, None)
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback, *others])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume)
    return trainer, [str(entry.message) for entry in caught if entry.category is PlainLoRAWarning]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "na_lora_lightning"]


def test_the_line_comes_once_and_a_resumed_training_says_where_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(tmp_path, MASK, max_steps=4, save_strategy="steps", save_steps=3)[1] == []
    assert told(caplog) == [LINE]
    caplog.clear()
    assert train(tmp_path, MASK, max_steps=4, resume=str(tmp_path / "checkpoint-3"))[1] == []
    assert told(caplog) == [f"{LINE[:-1].replace('from step', 'since step')}; resuming at step 4."]


def test_a_training_within_the_warmup_is_warned_of(tmp_path: Path) -> None:
    assert train(tmp_path, MASK, max_steps=2)[1] == [
        "training is planned to end at optimizer step 2 and the mask holds no row before step 3 (warm-up of 2), so "
        "this is plain LoRA; lower warmup_steps or train longer."
    ]
    assert train(tmp_path, MASK, Stop(), max_steps=4)[1] == [
        "training ended at optimizer step 2 and no row had been held by then (warm-up of 2), so this was plain LoRA; "
        "lower warmup_steps or train longer."
    ]


def test_watching_logs_the_regimes_and_the_scale_that_would_be(tmp_path: Path) -> None:
    trainer, sentences = train(tmp_path, ImportanceOptions(keep_fraction=1.0), max_steps=3)
    assert sentences == []
    logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["step"] for entry in logged] == [2]
    assert 0.0 < logged[0]["gates/regime_suppressed"] + logged[0]["gates/regime_homogeneous"] < 1.0
    assert logged[0]["gates/step_scale_deviation"] > 0
