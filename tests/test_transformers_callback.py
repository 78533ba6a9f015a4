"""Both mechanisms under transformers' Trainer, against vanilla LoRA and against the plain loop."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from lightning_models import assert_equal_states, lora_state
from packaging.version import Version
from peft import PeftModel
from processes import run_in_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from na_lora_lightning import NALoRATrainerCallback, nonlinearity_aware
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import CheckpointError, ConfigurationError, DataError, DiscoveryError, UpdateError
from na_lora_lightning.report.runs import read_runs
from na_lora_lightning.transformers_callback import STATE_FILE

IMPORTANCE = ImportanceOptions(keep_fraction=0.5, warmup_steps=2, refresh_every=2)
SCALE = StepScaleOptions(granularity="channel", normalize=True)
OPTIONS: dict[str, Any] = {"importance": IMPORTANCE, "step_scale": SCALE}
ROWS = 2


@pytest.fixture(scope="module", autouse=True)
def _collect_little() -> Iterator[None]:
    """Trainer collects garbage among all that is imported, which takes longer than these trainings."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _forget_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def llama(**options: Any) -> PeftModel:
    return with_lora(tiny_llama(), LLAMA_TARGETS, **options)


def records(count: int, first: int = 0) -> list[dict[str, Tensor]]:
    """Padded records; a batch of them is of :func:`random_batch` with two rows."""
    found = []
    for number in range(first, first + count // ROWS):
        batch = random_batch(number, batch=ROWS)
        found += [{name: value[row] for name, value in batch.items()} for row in range(ROWS)]
    return found


def make_trainer(
    folder: Path,
    model: nn.Module,
    callbacks: Sequence[TrainerCallback] = (),
    data: Sequence[dict[str, Tensor]] | None = None,
    kind: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "num_train_epochs": 2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(**{**settings, **options})
    # The option train_sampling_strategy came with transformers 5.
    in_order = type(
        kind.__name__, (kind,), {"_get_train_sampler": lambda self, *_: SequentialSampler(self.train_dataset)}
    )
    return in_order(
        model=model,
        args=arguments,
        train_dataset=records(16) if data is None else data,  # type: ignore[arg-type]
        eval_dataset=records(8, first=90),  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )


def hooks_on(model: nn.Module) -> int:
    on_modules = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    on_tensors = [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return sum(on_modules) + sum(on_tensors)


def test_keeping_all_rows_at_full_scale_is_bitwise_plain_lora(tmp_path: Path) -> None:
    plain, watched = llama(lora_dropout=0.2), llama(lora_dropout=0.2)
    make_trainer(tmp_path, plain).train()
    importance = ImportanceOptions(keep_fraction=1.0, warmup_steps=0)
    callback = NALoRATrainerCallback(importance, StepScaleOptions(eta_min=1.0, matrix_a_factor=1.0))
    make_trainer(tmp_path, watched, [callback]).train()
    assert callback.controller is not None
    assert callback.controller.steps == 8
    assert_equal_states(lora_state(watched), lora_state(plain))


# Trainer of 4.57 and 5.0 counts the first label of a row too, which is not a target.
FIRST_TARGET = 0 if Version(version("transformers")) < Version("5.1") else 1


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_the_trainer_equals_the_plain_loop(tmp_path: Path, optimizer: str) -> None:
    model = llama()
    callback = NALoRATrainerCallback(**OPTIONS)
    make_trainer(tmp_path, model, [callback], optim=optimizer).train()
    assert callback.controller is not None

    twin = llama()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=optimizer.endswith("fused"))
    data = [random_batch(number, batch=ROWS) for number in range(8)] * 2
    with nonlinearity_aware(twin, adamw, **OPTIONS) as controller:
        for first in range(0, 16, 2):
            targets = sum(batch["labels"][:, FIRST_TARGET:].ne(-100).sum() for batch in data[first : first + 2])
            for batch in data[first : first + 2]:
                twin(**batch, num_items_in_batch=targets).loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            adamw.step()
            adamw.zero_grad()
    assert torch.equal(callback.controller.weights, controller.weights)
    for name, value in lora_state(twin).items():
        assert torch.allclose(lora_state(model)[name], value, atol=1e-7), name


def shard(folder: Path, world_size: int) -> None:
    model = llama()
    callback = NALoRATrainerCallback(**OPTIONS, observer=ObserverOptions(max_tokens=None))
    rows = 2 * ROWS // world_size
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": rows, "max_steps": 6}
    if world_size > 1:
        options["ddp_backend"] = "gloo"
    trainer = make_trainer(folder, model, [callback], **options)
    trainer.train()
    assert trainer.args.world_size == world_size
    assert callback.controller is not None
    found = {"lora": lora_state(model), "weights": callback.controller.weights}
    torch.save(found, folder / f"{world_size}_{trainer.args.process_index}.pt")


def test_two_processes_on_shards_equal_one_on_the_whole_batch(tmp_path: Path) -> None:
    shard(tmp_path, 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    run_in_processes(shard, tmp_path, 2)
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["weights"] > 0, one["weights"] > 0)
    assert torch.allclose(first["weights"], one["weights"], atol=1e-5)
    for name, value in one["lora"].items():
        assert torch.equal(first["lora"][name], second["lora"][name])
        assert torch.allclose(first["lora"][name], value, atol=2e-5), name


class RowWatch(TrainerCallback):
    """Checks that masked rows stay and the others move; stands after the callback that it watches."""

    def __init__(self, watched: NALoRATrainerCallback) -> None:
        self.watched = watched
        self.masked = 0

    def rows(self) -> list[Tensor]:
        gates = self.watched.controller.gates  # type: ignore[union-attr]
        return [site.parameters()[0].parameter.detach()[site.rows].clone() for site in gates]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = self.rows()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        moved = torch.cat([(a != b).any(dim=1) for a, b in zip(self.rows(), self.before, strict=True)])
        assert torch.equal(moved, self.watched.controller.weights > 0)  # type: ignore[union-attr]
        self.masked += int((~moved).sum())


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"optim": "adafactor"}], ids=["adamw", "bf16", "adafactor"])
def test_masked_rows_do_not_move(tmp_path: Path, options: dict[str, Any]) -> None:
    model = llama()
    callback = NALoRATrainerCallback(IMPORTANCE, step_scale=None)
    watch = RowWatch(callback)
    make_trainer(tmp_path, model, [callback, watch], **options).train()
    # Six of the eight steps come after the warm-up.
    assert watch.masked == 6 * callback.controller.gates.channels // 2  # type: ignore[union-attr]
    assert hooks_on(model) == 0


class Overflowing(Trainer):
    """Trains with a GradScaler on a CPU; the loss of the third step overflows."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * torch.inf if self.state.global_step == 2 else loss


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_skipped_step_counts_for_nothing(tmp_path: Path, optimizer: str) -> None:
    options: dict[str, Any] = {"max_grad_norm": 0.0, "num_train_epochs": 1, "optim": optimizer}
    callbacks = [NALoRATrainerCallback(**OPTIONS) for _ in range(2)]
    skipping, straight = llama(), llama()
    data = records(16)
    make_trainer(tmp_path, skipping, callbacks[:1], data, kind=Overflowing, **options).train()
    # Its four rows are those of the third step.
    make_trainer(tmp_path, straight, callbacks[1:], data[:8] + data[12:], **options).train()
    first, second = (callback.controller for callback in callbacks)
    assert first is not None
    assert second is not None
    assert first.steps == second.steps == 3
    assert torch.equal(first.weights, second.weights)
    for name, value in lora_state(straight).items():
        assert torch.allclose(lora_state(skipping)[name], value, atol=1e-7), name


def test_padding_prompts_and_evaluation_are_not_counted(tmp_path: Path) -> None:
    found = []
    data = records(16)
    for row in data:
        row["labels"][:2] = -100
    for evaluation in ("no", "steps"):
        observer = ObserverOptions(max_tokens=None, exclude_prompt=True)
        callback = NALoRATrainerCallback(**OPTIONS, observer=observer)
        model = llama()
        seen: list[float] = []

        class Counting(TrainerCallback):
            def on_pre_optimizer_step(
                self, *args: Any, of: NALoRATrainerCallback = callback, to: list[float] = seen, **kwargs: Any
            ) -> None:
                controller = of.controller
                assert controller is not None
                controller._aside.give_back([*controller.observer.buffers, controller.meter.sums])
                to.append(controller.observer._tokens[0].item())  # type: ignore[index]

        options: dict[str, Any] = {"eval_strategy": evaluation, "eval_steps": 1, "num_train_epochs": 1}
        make_trainer(tmp_path, model, [callback, Counting()], data, **options).train()
        expected = [
            sum(float(row["labels"][1:].ne(-100).sum()) for row in data[first : first + 4]) for first in (0, 4, 8, 12)
        ]
        assert seen == expected
        found.append(lora_state(model))
    assert_equal_states(*found)


def test_labels_that_the_trainer_keeps_from_the_model_are_missed_by_name(tmp_path: Path) -> None:
    callback = NALoRATrainerCallback(observer={"exclude_prompt": True})
    trainer = make_trainer(tmp_path, llama(), [callback], label_smoothing_factor=0.1)
    with pytest.raises(DataError, match="exclude_prompt needs labels in the model's forward call"):
        trainer.train()


GROUPS = {"gate_responsiveness", "gate_mask_churn", "gate_step_scale_deviation"}
GROUPS |= {"gate_regime_suppressed", "gate_regime_homogeneous"}
GROUPS |= {"selection_misalignment", "selection_share"}


@pytest.mark.parametrize("layers", [False, True])
def test_metrics_are_in_the_log_history_of_logging_steps(tmp_path: Path, layers: bool) -> None:
    callback = NALoRATrainerCallback(IMPORTANCE, SCALE, log_layers=layers)
    trainer = make_trainer(tmp_path, llama(), [callback], eval_strategy="epoch")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6, 8]
    wanted = {f"gates/{group.removeprefix('gate_')}" for group in GROUPS}
    wanted |= {f"{group}/{layer}" for group in GROUPS for layer in ("layer_00", "layer_01") if layers}
    for entry in logs:
        assert {name for name in entry if "/" in name} == wanted
    # The first mask holds a half.
    assert [entry["gates/mask_churn"] for entry in logs][:2] == [0.0, 0.5]
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert len(others) == 3
    (run,) = read_runs([trainer.args.output_dir])
    assert run.series("loss") == ([2, 4, 6, 8], pytest.approx([entry["loss"] for entry in logs], rel=1e-4))
    assert len(run.history.validations) == 2
    assert run.state == "ended at step 8"
    assert run.gates("selection_misalignment")[1].shape == (2, 4)
    assert not any("/" in name for entry in others for name in entry)
    json.dumps(trainer.state.log_history)


def test_tensorboard_gets_the_metrics_of_a_callback_that_stands_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, llama(), report_to="tensorboard")
    NALoRATrainerCallback(IMPORTANCE).add_to(trainer)
    trainer.train()
    # Version 4 has an argument for the folder, in place of the variable.
    log = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent))
    log.Reload()
    churn = log.Scalars("train/gates/mask_churn")
    assert [event.step for event in churn] == [2, 4, 6, 8]
    assert [event.value for event in churn][:2] == [0.0, 0.5]

    trainer = make_trainer(tmp_path, llama(), [NALoRATrainerCallback()], report_to="tensorboard", max_steps=1)
    with pytest.warns(UserWarning, match=r"not reported to tensorboard.*add this one by .*add_to\(trainer\)"):
        trainer.train()


def resume(folder: Path, callbacks: Sequence[TrainerCallback], checkpoint: Path, **options: Any) -> PeftModel:
    model = llama(lora_dropout=0.1)
    make_trainer(folder, model, callbacks, save_steps=3, save_strategy="steps", **options).train(
        resume_from_checkpoint=str(checkpoint)
    )
    return model


def test_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = llama(lora_dropout=0.1)
    make_trainer(tmp_path, whole, [NALoRATrainerCallback(**OPTIONS)], save_steps=3, save_strategy="steps").train()
    checkpoint = tmp_path / "checkpoint-3"
    assert torch.load(checkpoint / STATE_FILE, weights_only=True)["steps"] == 3
    assert not list(checkpoint.glob("*.partial"))
    expected = lora_state(whole)
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "mine")

    callback = NALoRATrainerCallback(**OPTIONS)
    assert_equal_states(lora_state(resume(tmp_path, [callback], checkpoint)), expected)
    assert callback.controller is not None
    assert callback.controller.steps == 8

    # Trainer can recreate its callbacks, from what it has saved of them.
    default = NALoRATrainerCallback()
    restored = resume(tmp_path, [default], checkpoint, restore_callback_states_from_checkpoint=True)
    assert_equal_states(lora_state(restored), expected)
    assert default.controller is None

    # From another folder: it has to be told, and a state of another run is not taken for this one.
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "checkpoint-6", other / "checkpoint-3")
    with pytest.raises(CheckpointError, match=r"state of the checkpoint at step 3 was not found .*resume_from"):
        resume(other, [NALoRATrainerCallback(**OPTIONS)], moved)
    told = NALoRATrainerCallback(**OPTIONS, resume_from=moved)
    assert_equal_states(lora_state(resume(other, [told], moved)), expected)

    # A damaged file is none.
    (moved / STATE_FILE).write_bytes((moved / STATE_FILE).read_bytes()[:100])
    model = llama()
    trainer = make_trainer(other, model, [NALoRATrainerCallback(**OPTIONS, resume_from=moved)])
    with pytest.raises(CheckpointError, match=f"no intact {STATE_FILE}"):
        trainer.train(resume_from_checkpoint=str(moved))
    assert hooks_on(model) == 0


def test_a_checkpoint_of_plain_lora_begins_anew_and_says_so(tmp_path: Path) -> None:
    make_trainer(tmp_path, llama(), save_steps=3, save_strategy="steps").train()
    callback = NALoRATrainerCallback(**OPTIONS)
    with pytest.warns(UserWarning, match="the statistics of the gates and the warm-up start over"):
        resume(tmp_path, [callback], tmp_path / "checkpoint-3")
    assert callback.controller is not None
    assert callback.controller.steps == 5


def test_a_failed_training_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("the machine went down")

    model = llama()
    first = NALoRATrainerCallback()
    with pytest.raises(RuntimeError, match="went down"):
        make_trainer(tmp_path, model, [first, Failing()]).train()
    assert hooks_on(model) > 0
    second = NALoRATrainerCallback()
    make_trainer(tmp_path, model, [second]).train()
    assert hooks_on(model) == 0
    assert second.controller is not None
    assert second.controller.steps == 8
    with pytest.raises(RuntimeError, match="went down"):
        make_trainer(tmp_path, model, [second, Failing()]).train()
    second.detach()
    assert hooks_on(model) == 0


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, model: nn.Module, *callbacks: NALoRATrainerCallback) -> None:
        before = lora_state(model)
        with pytest.raises(error, match=match):
            make_trainer(tmp_path, model, callbacks).train()
        assert_equal_states(lora_state(model), before)

    refused(DiscoveryError, "none of the model's 2 gates", with_lora(tiny_llama(), ["q_proj"]), NALoRATrainerCallback())
    refused(ConfigurationError, "both None", llama(), NALoRATrainerCallback(importance=None, step_scale=None))
    two = NALoRATrainerCallback(step_scale=None), NALoRATrainerCallback(importance=None)
    refused(ConfigurationError, "keep one callback", llama(), *two)
    for callback in two:
        callback.detach()

    trainer = make_trainer(tmp_path, llama())
    for name, value, match in (
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "DeepSpeed shards or copies"),
        ("fsdp", True, "FSDP shards or copies"),
        ("_n_gpu", 2, "DataParallel .several GPUs in one process. shards or copies"),
    ):
        before = getattr(trainer.args, name)
        setattr(trainer.args, name, value)
        with pytest.raises(UpdateError, match=match):
            NALoRATrainerCallback().add_to(trainer)
        with pytest.raises(UpdateError, match=match):
            NALoRATrainerCallback().on_init_end(trainer.args, trainer.state, trainer.control)
        setattr(trainer.args, name, before)
    trainer = make_trainer(
        tmp_path,
        llama(),
        [NALoRATrainerCallback(example_inputs={"input_ids": torch.tensor([[3, 4]])})],
        restore_callback_states_from_checkpoint=True,
    )
    with pytest.raises(ConfigurationError, match="which cannot hold example_inputs"):
        trainer.train()
