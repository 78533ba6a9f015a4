"""Both mechanisms in a plain loop: what must hold, against vanilla LoRA and against the Lightning callbacks."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import Batches, ForeignModule, assert_equal_states, loader, lora_state, make_trainer
from peft import PeftModel
from processes import run_in_processes
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from na_lora_lightning import GateImportanceCallback, StepScaleCallback, nonlinearity_aware
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError, DiscoveryError, UpdateError

IMPORTANCE = ImportanceOptions(keep_fraction=0.5, warmup_steps=2, refresh_every=2)
SCALE = StepScaleOptions(granularity="channel", normalize=True)
ALL_TOKENS = ObserverOptions(max_tokens=None)
LAYERS_AND_ACTIVATION = ("layer_00", "layer_01", "silu")


def llama(**options: Any) -> PeftModel:
    return with_lora(tiny_llama(), LLAMA_TARGETS, **options)


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[dict[str, Tensor]]) -> list[float]:
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batches(count: int, first: int = 0) -> list[dict[str, Tensor]]:
    return [random_batch(first + index) for index in range(count)]


def hooks_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    on_modules = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for m in model.modules()
    ]
    on_tensors = [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    on_steps = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return sum(on_modules) + sum(on_tensors) + on_steps


def test_keeping_all_rows_at_full_scale_is_bitwise_plain_lora(make_peft_model: Callable[..., PeftModel]) -> None:
    plain, watched = make_peft_model(lora_dropout=0.2), make_peft_model(lora_dropout=0.2)
    torch.manual_seed(3)
    expected = train(plain, adamw(plain), batches(5))
    torch.manual_seed(3)
    optimizer = adamw(watched)
    options = {"importance": ImportanceOptions(keep_fraction=1.0, warmup_steps=0)}
    with nonlinearity_aware(
        watched, optimizer, step_scale=StepScaleOptions(eta_min=1.0, matrix_a_factor=1.0), **options
    ):
        losses = train(watched, optimizer, batches(5))
    assert losses == expected
    assert_equal_states(lora_state(watched), lora_state(plain))


def test_masked_rows_do_not_move_and_the_others_do(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    optimizer = adamw(model)
    masked = 0
    with nonlinearity_aware(model, optimizer, importance=IMPORTANCE, step_scale=None) as controller:
        for batch in batches(6):
            before = [site.parameters()[0].parameter.detach()[site.rows].clone() for site in controller.gates]
            train(model, optimizer, [batch])
            after = [site.parameters()[0].parameter.detach()[site.rows] for site in controller.gates]
            moved = torch.cat([(a != b).any(dim=1) for a, b in zip(after, before, strict=True)])
            assert torch.equal(moved, controller.weights > 0)
            masked += int((~moved).sum())
    # Four of the six steps come after the warm-up.
    assert masked == 4 * controller.gates.channels // 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_plain_loop_is_bitwise_the_lightning_callbacks(tmp_path: Path, kind: str) -> None:
    module = ForeignModule(kind)
    callbacks: list[Any] = [
        GateImportanceCallback(keep_fraction=0.5, warmup_steps=2, refresh_every=2),
        StepScaleCallback(granularity="channel", normalize=True),
    ]
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 3}
    torch.manual_seed(5)
    make_trainer(tmp_path, callbacks=callbacks, **options).fit(module, loader(kind=kind))

    model = ForeignModule(kind).model
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    data = Batches(4, kind=kind)
    losses = []
    torch.manual_seed(5)
    with nonlinearity_aware(model, optimizer, importance=IMPORTANCE, step_scale=SCALE) as controller:
        for micro_step in range(12):
            loss = model(**data[micro_step % 4]).loss
            losses.append(loss.item())
            (loss / 2).backward()
            if micro_step % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert losses == module.losses
    assert_equal_states(lora_state(model), lora_state(module.model))
    assert torch.equal(controller.weights, callbacks[0].controller.weights)


def test_resumed_training_is_bitwise_the_uninterrupted_one(make_peft_model: Callable[..., PeftModel]) -> None:
    def fresh() -> tuple[PeftModel, torch.optim.Optimizer]:
        model = make_peft_model()
        return model, adamw(model)

    options = {"importance": IMPORTANCE, "step_scale": SCALE, "observer": ObserverOptions(max_tokens=5)}
    whole, optimizer = fresh()
    with nonlinearity_aware(whole, optimizer, **options):
        train(whole, optimizer, batches(8))

    first, optimizer = fresh()
    file = io.BytesIO()
    with nonlinearity_aware(first, optimizer, **options) as controller:
        train(first, optimizer, batches(5))
        parts = {"model": lora_state(first), "optimizer": optimizer.state_dict(), "gates": controller.state_dict()}
        torch.save(parts, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    second.load_state_dict(saved["model"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    with nonlinearity_aware(second, optimizer, **options) as controller:
        controller.load_state_dict(saved["gates"])
        train(second, optimizer, batches(3, first=5))
        assert controller.steps == 8
    assert_equal_states(lora_state(second), lora_state(whole))


def test_the_state_of_other_mechanisms_is_refused() -> None:
    model = llama()
    with nonlinearity_aware(model, adamw(model), step_scale=None) as controller:
        state = controller.state_dict()
    with (
        nonlinearity_aware(model, adamw(model)) as controller,
        pytest.raises(ConfigurationError, match="the state of importance and this run has importance and step_scale"),
    ):
        controller.load_state_dict(state)


def test_no_hook_is_left_also_after_an_error(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    optimizer = adamw(model)
    before = hooks_on(model, optimizer)
    options = ImportanceOptions(mask_gradient_to_a=True)

    def go_down() -> None:
        with nonlinearity_aware(model, optimizer, importance=options):
            train(model, optimizer, batches(1))
            model(**random_batch(1)).loss.backward()
            assert hooks_on(model, optimizer) > before
            raise RuntimeError("the machine went down")

    with pytest.raises(RuntimeError, match="went down"):
        go_down()
    assert hooks_on(model, optimizer) == before
    optimizer.zero_grad()
    # And it can be entered again.
    with nonlinearity_aware(model, optimizer, importance=options) as controller:
        train(model, optimizer, batches(1))
        assert controller.steps == 1
    assert hooks_on(model, optimizer) == before


@pytest.mark.parametrize("fused", [False, True], ids=["not called", "called and skips by itself"])
@pytest.mark.parametrize("clear", ["after the step", "before the forward", "before the backward", "by zeros"])
def test_a_skipped_step_counts_for_nothing(fused: bool, clear: str) -> None:
    """A run with overflows in two of its steps, against one that never saw the batches of these steps."""

    def run(numbers: Sequence[int], overflows: Sequence[int]) -> tuple[GateController, dict[str, Tensor]]:
        model = llama()
        optimizer = adamw(model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with nonlinearity_aware(
            model, optimizer, importance=IMPORTANCE, step_scale=SCALE, observer=ALL_TOKENS
        ) as controller:
            for number in numbers:
                if clear == "before the forward":
                    optimizer.zero_grad()
                # Two micro-batches, so that some statistics are put aside and come back.
                for micro in range(2):
                    loss = model(**random_batch(10 * number + micro)).loss / 2
                    if clear == "before the backward" and micro == 0:
                        optimizer.zero_grad()
                    scaler.scale(loss * (torch.inf if number in overflows else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                if clear in ("after the step", "by zeros"):
                    optimizer.zero_grad(set_to_none=clear != "by zeros")
            assert controller.steps == len(numbers) - len(overflows)
        return controller, lora_state(model)

    skipping, moved = run([0, 1, 2, 3, 4, 5, 6], overflows=[0, 3])
    straight, expected = run([1, 2, 4, 5, 6], overflows=[])
    for name, value in straight.state_dict()["importance"].items():
        other = skipping.state_dict()["importance"][name]
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name
    assert torch.equal(skipping.weights, straight.weights)
    assert_equal_states(moved, expected)


def test_a_joint_backward_pass_of_several_forward_passes_keeps_them_all() -> None:
    model = llama()
    optimizer = adamw(model)
    with nonlinearity_aware(model, optimizer, observer=ALL_TOKENS) as controller:
        train(model, optimizer, batches(1))
        tokens = 0.0
        for first in (1, 3):
            pair = batches(2, first)
            tokens += sum(float(batch["attention_mask"].sum()) for batch in pair)
            sum(model(**batch).loss for batch in pair).backward()
        controller._aside.give_back([*controller.observer.buffers, controller.meter.sums])
        assert controller.observer._tokens.tolist() == [tokens, tokens]  # type: ignore[union-attr]


def test_another_optimizer_that_steps_is_noticed() -> None:
    model = llama()
    optimizer = adamw(model)
    with (
        pytest.raises(UpdateError, match="101 backward passes in a row were cleared without a step"),
        nonlinearity_aware(model, optimizer),
    ):
        train(model, adamw(model), [random_batch(0, batch=1, length=2)] * 150)
    with (
        pytest.warns(UserWarning, match="took no step, so whatever was trained was trained as plain LoRA"),
        nonlinearity_aware(model, optimizer),
    ):
        train(model, adamw(model), batches(2))


def test_metrics_have_the_tags_of_tensorboard() -> None:
    model = llama()
    optimizer = adamw(model)
    groups = {"gate_responsiveness", "gate_mask_churn", "gate_step_scale_deviation"}
    groups |= {f"gate_regime_{name}" for name in ("suppressed", "homogeneous")}
    measured = {"selection_misalignment", "selection_share"}
    with nonlinearity_aware(model, optimizer, importance=IMPORTANCE, step_scale=SCALE, measure_every=3) as controller:
        for step in range(1, 7):
            train(model, optimizer, batches(1, first=step))
            metrics = controller.metrics()
            assert all(type(value) is float for value in metrics.values())
            expected = groups | measured if step % 3 == 0 else groups
            by_layer = {f"{group}/{layer}" for group in expected for layer in ("layer_00", "layer_01")}
            assert set(metrics) == by_layer | {f"gates/{group.removeprefix('gate_')}" for group in expected}
    assert 0.0 < metrics["gates/selection_share"] < 1.0
    mean = (metrics["gate_responsiveness/layer_00"] + metrics["gate_responsiveness/layer_01"]) / 2
    assert metrics["gates/responsiveness"] == pytest.approx(mean, rel=1e-9)
    assert controller.step_scale is not None
    scales = [controller.step_scale.scale[columns] for columns in controller.layout.site_slices]
    expected_deviation = sum(float((scale - 1.0).square().mean().sqrt()) for scale in scales) / len(scales)
    assert metrics["gates/step_scale_deviation"] == pytest.approx(expected_deviation, rel=1e-4)
    assert expected_deviation > 0.0


def test_it_needs_no_library_but_torch() -> None:
    code = "import sys, na_lora_lightning.plain_pytorch; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for foreign in ("lightning", "pytorch_lightning", "peft", "transformers", "accelerate"):
        assert f"'{foreign}'" not in loaded


def test_labels_can_be_given_where_the_model_is_called_without() -> None:
    model = llama()
    optimizer = adamw(model)
    batch = random_batch(0, padded=False)
    labels = batch.pop("labels")
    labels[:, :4] = -100
    observer = ObserverOptions(max_tokens=None, exclude_prompt=True)
    with nonlinearity_aware(model, optimizer, observer=observer) as controller:
        controller.observer.labels = labels
        model(**batch)
        assert controller.observer._tokens.tolist() == [9.0, 9.0]  # type: ignore[union-attr]


def test_an_optimizer_that_accelerate_wraps_is_corrected() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    found = []
    for wraps in (False, True):
        model = llama()
        optimizer: Any = adamw(model)
        if wraps:
            optimizer = Accelerator(cpu=True).prepare(optimizer)
            assert type(optimizer).__name__ == "AcceleratedOptimizer"
        with nonlinearity_aware(model, optimizer, importance=IMPORTANCE) as controller:
            train(model, optimizer, batches(5))
            assert controller.steps == 5
        found.append(lora_state(model))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_equal_states(*found)


def in_process(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    torch.save(shard(torch.distributed.get_rank(), 2), folder / f"rank_{torch.distributed.get_rank()}.pt")


def shard(rank: int | None, world_size: int) -> dict[str, Any]:
    model: Any = ForeignModule().model
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = adamw(model)
    options = {"importance": IMPORTANCE, "step_scale": SCALE, "observer": ALL_TOKENS}
    with nonlinearity_aware(wrapped, optimizer, **options) as controller:
        train(wrapped, optimizer, list(Batches(6, rank=rank, world_size=world_size).batches))
    return {"lora": lora_state(model), "weights": controller.weights}


def test_two_processes_on_shards_equal_one_on_the_whole_batch(tmp_path: Path) -> None:
    one = shard(None, 1)
    run_in_processes(in_process, tmp_path)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert torch.equal(ranks[0]["weights"] > 0, one["weights"] > 0)
    assert torch.allclose(ranks[0]["weights"], one["weights"], atol=1e-5)
    for name, value in one["lora"].items():
        assert torch.equal(ranks[0]["lora"][name], ranks[1]["lora"][name])
        assert torch.allclose(ranks[0]["lora"][name], value, atol=2e-5), name


def train_sharded(rank: int, numbers: Sequence[int], skipped: Sequence[int] = ()) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    model: Any = ForeignModule().model
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = adamw(model)
    data = Batches(7, rank=rank, world_size=2)
    options = {"importance": IMPORTANCE, "step_scale": SCALE, "observer": ALL_TOKENS}
    with nonlinearity_aware(model, optimizer, **options) as controller:
        for number in numbers:
            model(**data[number]).loss.backward()
            if number not in skipped:
                optimizer.step()
            optimizer.zero_grad()
    lora = {name: value.full_tensor() for name, value in lora_state(model).items()}  # type: ignore[operator]
    return {"lora": lora, "weights": controller.weights}


def in_sharded_process(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    whole, skipping = train_sharded(rank, range(6)), train_sharded(rank, range(7), skipped=[0, 3])
    torch.save((whole, skipping, train_sharded(rank, [1, 2, 4, 5, 6])), folder / f"rank_{rank}.pt")


def test_a_model_that_fsdp2_shards_equals_one_process_also_after_skipped_steps(tmp_path: Path) -> None:
    one = shard(None, 1)
    run_in_processes(in_sharded_process, tmp_path)
    for rank in range(2):
        whole, skipping, straight = torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True)
        assert torch.equal(whole["weights"] > 0, one["weights"] > 0)
        for name, value in one["lora"].items():
            assert torch.allclose(whole["lora"][name], value, atol=2e-5), name
        assert torch.equal(skipping["weights"], straight["weights"])
        assert_equal_states(skipping["lora"], straight["lora"])


class FullyShardedDataParallel(nn.Module):
    """Named as torch's first FSDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedOptimizer(torch.optim.SGD):
    """Stands for one of DeepSpeed's."""


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before, hooks = lora_state(model), hooks_on(model, adamw(model))
    yield
    assert_equal_states(lora_state(model), before)
    assert hooks_on(model, adamw(model)) == hooks


def test_what_cannot_work_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    # No longer than the test: jsonargparse imports what any optimizer is of.
    monkeypatch.setattr(DeepSpeedOptimizer, "__module__", "deepspeed.runtime")

    def enter(model: nn.Module, optimizer: Any = None, **options: Any) -> None:
        with nonlinearity_aware(model, adamw(model) if optimizer is None else optimizer, **options):
            pytest.fail("it was entered")

    model = llama()
    rows = [parameter for name, parameter in model.named_parameters() if "gate_proj.lora_B" in name]
    with unchanged(model):
        with pytest.raises(DiscoveryError, match="none of the model's 2 gates has LoRA"):
            enter(with_lora(tiny_llama(), ["q_proj"]))
        with pytest.raises(DiscoveryError, match="LlamaForCausalLM holds no LoRA layer"):
            enter(tiny_llama())
        with pytest.raises(DiscoveryError, match="1 of 2 gates have no LoRA"):
            enter(with_lora(tiny_llama(), ["gate_proj", "up_proj"], layers_to_transform=[0]))
        with pytest.raises(ConfigurationError, match="importance and step_scale are both None"):
            enter(model, importance=None, step_scale=None)
        with pytest.raises(ConfigurationError, match="measure_every is -1"):
            enter(model, measure_every=-1)
        with pytest.raises(UpdateError, match="no optimizer holds"):
            enter(model, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
        with pytest.raises(UpdateError, match="spread over 2 optimizers"):
            enter(model, [torch.optim.SGD(rows[:1], lr=0.1), torch.optim.SGD(rows[1:], lr=0.1)])
        with pytest.raises(UpdateError, match=r"DeepSpeedOptimizer \(DeepSpeed\) steps copies"):
            enter(model, DeepSpeedOptimizer(rows, lr=0.1))
        with pytest.raises(UpdateError, match=r"FullyShardedDataParallel flattens .* so gates cannot be masked; use"):
            enter(FullyShardedDataParallel(model))
        with pytest.raises(UpdateError, match="DataParallel runs copies"):
            enter(nn.DataParallel(model))
        optimizer = adamw(model)
        with (
            nonlinearity_aware(model, optimizer, step_scale=None),
            pytest.raises(ConfigurationError, match="corrected by NA-LoRA already"),
        ):
            enter(model, optimizer, importance=None)
