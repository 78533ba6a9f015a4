"""torch.compile: statistics and weights are those of eager mode, whenever and whatever is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning_models import RowWatch, make_trainer
from module_helpers import Batches, quiet_trainer, saved_model, some_batches
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from na_lora_lightning import GateImportanceCallback, NALoRALightningModule, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models import loading
from na_lora_lightning.models.lora_inputs import keep_inputs_uncast

ALL_TOKENS = ObserverOptions(max_tokens=None)

# Dynamo imports what warns, and warns itself where it ends a graph.
pytestmark = pytest.mark.filterwarnings("ignore")


class Blocks(nn.Module):
    """Two gated blocks, without the many frames of a Hugging Face model, which take long to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
        self.acts = nn.ModuleList([nn.SiLU(), nn.GELU()])
        self.use_reentrant: bool | None = None

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for index in range(2):
            if self.training and self.use_reentrant is not None:
                x = checkpoint(self.block, x, index, use_reentrant=self.use_reentrant)
            else:
                x = self.block(x, index)
        return x

    def block(self, x: Tensor, index: int) -> Tensor:
        return x + self.downs[index](self.acts[index](self.gates[index](x)) * self.ups[index](x))


def blocks() -> PeftModel:
    torch.manual_seed(0)
    inner = Blocks()
    for parameter in inner.parameters():
        nn.init.normal_(parameter, std=0.7)
    model = get_peft_model(inner, LoraConfig(r=3, target_modules=["gates.0", "gates.1", "ups.0"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def batch(step: int) -> dict[str, Tensor]:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(step))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return {"x": x, "attention_mask": mask}


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def train(
    called: Callable[..., Tensor], model: PeftModel, controller: GateController, optimizer: Any, steps: int = 3
) -> dict[str, Tensor]:
    """What a few steps leave behind: statistics, scale, misalignment, and the trained weights."""
    controller.meter.enabled = True
    for step in range(steps):
        called(**batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert controller.importance is not None
    assert controller.step_scale is not None
    assert controller.misalignment is not None
    assert controller.observer.forward_passes == steps
    return {
        "importance": controller.importance.importance.clone(),
        "scale": controller.step_scale.scale.clone(),
        "misalignment": controller.misalignment[0],
        "share": controller.misalignment[1],
        **{name: value.detach().clone() for name, value in model.named_parameters() if "lora" in name},
    }


def controlled(model: PeftModel, **options: Any) -> tuple[GateController, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = GateController(model, discover_gates(model, {"x": torch.randn(1, 3, 6)}).require(), ALL_TOKENS)
    controller.set_importance(ImportanceOptions(warmup_steps=1, refresh_every=1, **options))
    controller.set_step_scale(StepScaleOptions(granularity="site", normalize=False))
    controller.attach([optimizer])
    return controller, optimizer


def in_eager_mode(**options: Any) -> dict[str, Tensor]:
    model = blocks()
    controller, optimizer = controlled(model, **options)
    return train(model, model, controller, optimizer)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, value in expected.items():
        if tolerance:
            assert torch.allclose(found[name], value, atol=tolerance, rtol=tolerance), name
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("backend", "mask_gradient_to_a"), [("eager", False), ("aot_eager", True)])
def test_a_compiled_model_is_bitwise_the_eager_one(backend: str, mask_gradient_to_a: bool) -> None:
    model = blocks()
    controller, optimizer = controlled(model, mask_gradient_to_a=mask_gradient_to_a)
    compiled: Any = torch.compile(model, backend=backend)
    assert_same(train(compiled, model, controller, optimizer), in_eager_mode(mask_gradient_to_a=mask_gradient_to_a))


def test_hooks_that_come_after_compilation_are_called_and_no_longer_when_they_have_gone() -> None:
    model = blocks()
    model.compile(backend="eager")
    # In training mode, without the hooks; Dynamo would go on with this graph.
    model(**batch(0)).square().mean().backward()
    model.zero_grad()
    controller, optimizer = controlled(model)
    assert_same(train(model, model, controller, optimizer), in_eager_mode())
    controller.detach()
    passes = controller.observer.forward_passes
    model(**batch(0))
    assert controller.observer.forward_passes == passes


def _require_gradient(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    # Reentrant checkpoints train nothing without a gradient that reaches them.
    kwargs["x"].requires_grad_()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_compiled_model_with_checkpoints_is_bitwise_the_eager_one_without(use_reentrant: bool) -> None:
    model = blocks()
    controller, optimizer = controlled(model)
    inner: Any = model.get_base_model()
    inner.use_reentrant = use_reentrant
    inner.register_forward_pre_hook(_require_gradient, with_kwargs=True)
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert_same(train(compiled, model, controller, optimizer), in_eager_mode())


def test_a_block_compiled_by_itself_is_observed() -> None:
    model = blocks()
    inner = model.get_base_model()
    controller, optimizer = controlled(model)
    inner.acts[0].compile(backend="eager")
    inner.gates[1].compile(backend="eager")
    assert_same(train(model, model, controller, optimizer), in_eager_mode())


def test_inductor_is_close_to_eager_mode() -> None:
    model = blocks()
    controller, optimizer = controlled(model)
    compiled: Any = torch.compile(model)
    try:
        found = train(compiled, model, controller, optimizer)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(f"no compiler: {str(error).splitlines()[0]}")
    assert_same(found, in_eager_mode(), tolerance=1e-5)


def test_lora_inputs_that_are_kept_uncast_compile_into_one_graph() -> None:
    found = []
    for whole_graph in (False, True):
        model = blocks()
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        assert keep_inputs_uncast(model) == 3
        called: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if whole_graph else model
        called(x=batch(0)["x"].bfloat16()).float().square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 6
    assert_same(found[1], found[0])


def test_a_whole_graph_cannot_hold_the_hooks() -> None:
    model = blocks()
    controlled(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile with fullgraph=False"):
        compiled(**batch(0))


class Compiled(LightningModule):
    """Compiles what is inside of it, or is compiled itself."""

    def __init__(self, compile_inside: bool = False) -> None:
        super().__init__()
        model = blocks()
        self.network: Any = torch.compile(model, backend="eager") if compile_inside else model
        self.example_inputs = {"x": torch.randn(1, 3, 6)}
        self.losses: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.network(**batch).square().mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.network(**batch)

    def train_dataloader(self) -> Any:
        return DataLoader([batch(step) for step in range(3)], batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_lightning_trains_a_compiled_network_or_is_compiled_as_a_whole(tmp_path: Path) -> None:
    found = []
    for kind in ("eager", "network", "module"):
        torch.compiler.reset()
        module = Compiled(compile_inside=kind == "network")
        importance = GateImportanceCallback(keep_fraction=0.5, warmup_steps=0, refresh_every=1, observer=ALL_TOKENS)
        watch, scale = RowWatch(importance), StepScaleCallback(observer=ALL_TOKENS)
        fitted: Any = torch.compile(module, backend="eager") if kind == "module" else module
        trainer = make_trainer(tmp_path, callbacks=[importance, watch, scale], num_sanity_val_steps=1)
        trainer.fit(fitted)
        assert watch.masked == 6 * 16 // 2
        controller: Any = importance.controller
        rows = [site.parameters()[0].parameter.detach() for site in controller.gates]
        found.append((module.losses, [controller.importance.importance, controller.step_scale.scale, *rows]))
    for losses, values in found[1:]:
        assert losses == found[0][0]
        assert all(torch.equal(one, other) for one, other in zip(values, found[0][1], strict=True))


def test_a_module_that_compiles_its_blocks_trains_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "COMPILE_OPTIONS", {"backend": "eager"})
    base = saved_model(tmp_path / "base")
    weights = []
    for compiles in (False, True):
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        module = NALoRALightningModule(
            base,
            lora=LoRAOptions(r=2, alpha=4),
            adapter=AdapterOptions(write="never"),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
            compile=compiles,
        )
        quiet_trainer(tmp_path).fit(module, Batches(some_batches(3), some_batches(1)))
        weights.append({name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad})
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # Both blocks share one for each kind of shape and mode.
        assert 0 < graphs <= 6 if compiles else graphs == 0
    assert any(value.abs().max() > 0.01 for name, value in weights[0].items() if "lora_B" in name)
    assert_same(weights[1], weights[0], tolerance=1e-6)


def test_a_module_does_not_compile_blocks_that_gates_are_read_in(tmp_path: Path) -> None:
    module = NALoRALightningModule(saved_model(tmp_path / "base"), compile=True)
    with pytest.raises(ConfigurationError, match=r"set model\.compile to false"):
        quiet_trainer(tmp_path, callbacks=[StepScaleCallback()]).fit(module, Batches(some_batches(1)))
    with pytest.raises(ConfigurationError, match="set compile to false, or gradient_checkpointing to true"):
        NALoRALightningModule("model", compile=True, gradient_checkpointing="offload")
    with pytest.raises(ConfigurationError, match="Blocks does not name its blocks"):
        loading.compile_blocks(Blocks())
