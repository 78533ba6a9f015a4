"""FSDP2: every process masks the rows that it holds, and together they do what one process does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_in_processes
from tiny_models import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    enable_checkpointing,
    needs_stacked_experts,
    random_batch,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    with_lora,
)
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from na_lora_lightning.core.activations import KNOWN_ACTIVATIONS
from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.experts import Experts
from na_lora_lightning.core.lora_layers import is_lora_layer
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.core.pre_activations import ActivationInput
from na_lora_lightning.core.sharding import local_rows
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.core.stepping.rows import RowUpdate
from na_lora_lightning.errors import UpdateError

# ---- rows of shards, as each of several processes sees them ----


class LoRALayer(nn.Module):
    """As much of a PEFT layer as rows need."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.base_layer, self.active_adapters = nn.Identity(), ["default"]
        self.lora_A = nn.ModuleDict({"default": nn.Identity()})
        self.lora_B = nn.ModuleDict({"default": nn.Identity()})
        self.lora_B["default"].weight = nn.Parameter(weight)


def site_of(weight: Tensor, rows: Tensor, experts: int) -> GateSite:
    layer = LoRALayer(weight)
    several = Experts(experts, layer, "sorted") if experts > 1 else None
    source = ActivationInput(nn.SiLU())
    return GateSite("gate", "gated", KNOWN_ACTIVATIONS[0], source, "layer", layer, rows, experts=several)


def one_of_several() -> Any:
    """Lets this process play one of several, which never talk to one another, and returns their mesh."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    return init_device_mesh("cpu", (count,))


def updated(weight: Tensor, moved: Tensor, rows: Tensor | None, experts: int, weights: Tensor) -> Tensor:
    """``weight`` after an update by ``moved`` that is corrected with ``weights``; ``weight`` may be sharded.

    Without ``rows`` it is corrected as a whole matrix.
    """
    site = site_of(weight, torch.arange(0) if rows is None else rows, experts)
    if rows is None:
        update = RowUpdate([], Layout([], torch.device("cpu")), site.parameters())
    else:
        update = RowUpdate([site], Layout([(experts, rows.numel())], torch.device("cpu")))
    optimizer = torch.optim.SGD([site.parameters()[0].parameter], lr=1.0)
    update.remember(optimizer)
    parameter: Any = site.parameters()[0].parameter
    with torch.no_grad():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local += moved
    update.correct(optimizer, weights, float(weights[0]))
    return local.detach()


def shards_are_updated_as_the_whole_is() -> None:
    mesh = one_of_several()
    rank, count = mesh.get_rank(), mesh.size()

    @settings(max_examples=60, deadline=None, database=None)
    @given(
        seed=st.integers(0, 2**20),
        out=st.integers(1, 13),
        columns=st.integers(1, 3),
        experts=st.integers(1, 3),
        chosen=st.data(),
    )
    def check(seed: int, out: int, columns: int, experts: int, chosen: st.DataObject) -> None:
        rows = torch.tensor(chosen.draw(st.lists(st.integers(0, out - 1), min_size=1, max_size=out, unique=True)))
        generator = torch.Generator().manual_seed(seed)
        weight, moved = (torch.randn(out, columns * experts, generator=generator) for _ in range(2))
        weights = torch.rand(rows.numel() * experts, generator=generator)
        weights[::2] = weights[::2].round()
        expected = updated(weight.clone(), moved, rows, experts, weights)
        share = -(-out // count)
        held = slice(min(out, share * rank), min(out, share * (rank + 1)))
        sharded = DTensor.from_local(
            weight[held].clone(), mesh, [Shard(0)], shape=weight.shape, stride=weight.stride(), run_check=False
        )
        assert list(local_rows(sharded, "it")) == list(range(out))[held]
        assert torch.equal(updated(sharded, moved[held], rows, experts, weights), expected[held])
        whole = DTensor.from_local(
            weight[held].clone(), mesh, [Shard(0)], shape=weight.shape, stride=weight.stride(), run_check=False
        )
        expected = torch.lerp(weight, weight + moved, 0.25)
        assert torch.equal(updated(whole, moved[held], None, 1, torch.tensor([0.25])), expected[held])

    check()


def other_distributions_are_refused_by_name() -> None:
    mesh = one_of_several()
    if mesh.get_rank() == 0:
        by_columns = DTensor.from_local(torch.zeros(4, 2), mesh, [Shard(1)])
        with pytest.raises(UpdateError, match=r"it is distributed as S\(1\), from which the rows .* without tensor"):
            local_rows(by_columns, "it")
        copied = DTensor.from_local(torch.zeros(4, 2), mesh, [Replicate()])
        assert local_rows(copied, "it") == range(4)
        model: Any = with_lora(tiny_llama(), LLAMA_TARGETS)
        gates = discover_gates(model).require()
        matrix = gates.sites[0].lora_layer.lora_B["default"]  # type: ignore[index]
        matrix.weight = nn.Parameter(DTensor.from_local(matrix.weight.data[:12], mesh, [Shard(0)]))
        with pytest.raises(UpdateError, match="and no fully_shard\\(\\) gathers it"):
            GateController(model, gates)


# In processes of their own, as torch remembers things about a process group beyond its end.
@pytest.mark.parametrize("count", [1, 3])
def test_shards_are_updated_as_the_whole_is(count: int) -> None:
    run_in_processes(shards_are_updated_as_the_whole_is, count=count)


def test_other_distributions_are_refused_by_name() -> None:
    run_in_processes(other_distributions_are_refused_by_name)


# ---- training, in processes that do talk ----

OUTPUT = 6


class Functional(nn.Module):
    """Blocks without activation modules, and with odd widths: one has fewer channels than there are processes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FunctionalBlock(width) for width in (7, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class FunctionalBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(OUTPUT, width), nn.Linear(OUTPUT, width), nn.Linear(width, OUTPUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def functional() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Functional(), LoraConfig(r=2, target_modules=["w1", "w3", "w2"]))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "lora_" not in name else 0.2)
    return model.train()


def model_of(kind: str) -> Any:
    if kind == "functional":
        return functional()
    if kind == "gpt2":
        return with_lora(tiny_gpt2(), GPT2_TARGETS)
    if kind == "experts":
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return with_lora(tiny_mixtral(), ["q_proj"], target_parameters=experts)
    if kind == "bfloat16":
        # The adapters stay in float32.
        return with_lora(tiny_llama().bfloat16(), LLAMA_TARGETS)
    return with_lora(tiny_llama(), LLAMA_TARGETS, use_dora=kind == "dora")


def shard(model: Any, how: str, count: int) -> None:
    """Makes units of parts of a model, the inner ones first."""
    names = ("copies", "shards")
    mesh = init_device_mesh("cpu", (2, count // 2) if how == "copies" else (1, count), mesh_dim_names=names)
    mesh = mesh if how == "copies" else mesh["shards"]
    base = model.get_base_model()
    inner = getattr(base, "model", getattr(base, "transformer", base))
    layers = list(inner.layers if hasattr(inner, "layers") else inner.h)
    adapted = [module for module in base.modules() if is_lora_layer(module)]
    units: dict[str, list[Any]] = {
        "one_unit": [],
        "every_layer": layers,
        "copies": layers,
        "feed_forward": [layer.mlp for layer in layers] if how == "feed_forward" else [],
        "every_linear_layer": [*adapted, *layers],
        "adapters_apart": [
            *(m[name] for layer in adapted for m in (layer.lora_A, layer.lora_B) for name in m),
            *layers,
        ],
    }
    for unit in units[how]:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


def batch_of(kind: str, step: int) -> dict[str, Tensor]:
    if kind == "functional":
        return {"x": torch.randn(6, 3, OUTPUT, generator=torch.Generator().manual_seed(step))}
    return random_batch(step, batch=6, padded=False)


def loss_of(kind: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).square().mean() if kind == "functional" else model(**batch).loss


def train(folder: Path, kind: str, how: str | None, count: int) -> None:
    model = model_of(kind)
    rank, reduce = 0, None
    if kind == "checkpointed":
        enable_checkpointing(model)
    if how is not None:
        distributed.init_process_group("gloo")
        rank, reduce = distributed.get_rank(), distributed.all_reduce
        shard(model, how, count)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    if how == "one_unit":
        # A pass that has no backward pass leaves the unit gathered.
        loss_of(kind, model, batch_of(kind, 0))
    inputs = batch_of(kind, 0) if kind == "functional" else None
    controller = GateController(
        model,
        discover_gates(model, inputs).require(),
        ObserverOptions(max_tokens=None),
        reduce,
    )
    controller.set_importance(ImportanceOptions(warmup_steps=0, refresh_every=1))
    controller.set_step_scale(StepScaleOptions(granularity="channel", normalize=True))
    controller.attach([optimizer])
    controller.meter.enabled = True
    found: dict[str, Any] = {"weights": [], "misalignment": []}
    share = 6 // count
    for step in range(3):
        own = {name: value[rank * share : (rank + 1) * share] for name, value in batch_of(kind, step).items()}
        loss_of(kind, model, own).backward()
        optimizer.step()
        optimizer.zero_grad()
        found["weights"].append(controller.weights)
        assert controller.misalignment is not None
        found["misalignment"].append(torch.cat([controller.misalignment[0][None], controller.misalignment[1]]))
    found["lora"] = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    torch.save(found, folder / f"{'one' if how is None else rank}.pt")


@pytest.mark.parametrize(
    ("kind", "how", "count"),
    [
        ("llama", "one_unit", 2),
        ("llama", "every_layer", 3),
        ("llama", "adapters_apart", 2),
        ("llama", "every_linear_layer", 2),
        ("llama", "feed_forward", 2),
        ("gpt2", "every_layer", 3),
        ("functional", "every_layer", 3),
        ("functional", "every_linear_layer", 3),
        ("dora", "every_layer", 2),
        pytest.param("experts", "every_layer", 3, marks=needs_stacked_experts),
        ("bfloat16", "every_layer", 2),
        ("checkpointed", "every_layer", 2),
        ("llama", "copies", 6),
    ],
)
def test_processes_with_shards_equal_one_with_the_whole(tmp_path: Path, kind: str, how: str, count: int) -> None:
    train(tmp_path, kind, None, 1)
    run_in_processes(train, tmp_path, kind, how, count, count=count)
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)]
    tolerance = 2e-2 if kind == "bfloat16" else 1e-5
    for step in range(3):
        mask = one["weights"][step] > 0
        assert 0 < int(mask.sum()) < mask.numel()
        for other in ranks:
            assert torch.equal(other["weights"][step], ranks[0]["weights"][step])
            assert torch.equal(other["misalignment"][step], ranks[0]["misalignment"][step]) or kind == "experts"
        if kind != "bfloat16":
            assert torch.equal(ranks[0]["weights"][step] > 0, mask)
        assert torch.allclose(
            ranks[0]["misalignment"][step], one["misalignment"][step], rtol=tolerance, atol=1e-6, equal_nan=True
        )
    for name, value in one["lora"].items():
        assert all(torch.equal(other["lora"][name], ranks[0]["lora"][name]) for other in ranks)
        assert torch.allclose(ranks[0]["lora"][name], value, atol=tolerance), name
