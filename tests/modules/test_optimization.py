"""Optimizers that a function makes of the model (LoRA+, LoRA-FA), and steps over several micro-batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import peft.optimizers
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from module_helpers import Fit
from tiny_models import LLAMA_TARGETS, tiny_llama, with_lora
from torch import Tensor, nn
from torch.optim import Optimizer

from na_lora_lightning.cli.main import main
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.language import NALoRALightningModule
from na_lora_lightning.modules.losses import StepAverage, TokenSums
from na_lora_lightning.modules.optimization import describe_optimizer, make_optimizer, optimizer_factory, takes_model

LORA_PLUS = partial(
    peft.optimizers.create_loraplus_optimizer, optimizer_cls=torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
)


def of_network(network: nn.Module, rate: float = 0.1) -> Optimizer:
    return torch.optim.SGD(network.parameters(), lr=rate)


def of_annotated(anything: nn.Linear) -> Optimizer:
    return torch.optim.SGD(anything.parameters())


def of_weights(model: nn.Module) -> Optimizer:
    return torch.optim.SGD([entry for name, entry in model.named_parameters() if "weight" in name])


def of_parameters(parameters: Iterable[nn.Parameter], model: int = 3) -> Optimizer:
    return torch.optim.SGD(parameters)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (LORA_PLUS, True),
        (peft.optimizers.create_lorafa_optimizer, True),
        (of_network, True),
        (of_annotated, True),
        (lambda model: None, True),
        (torch.optim.AdamW, False),
        (partial(torch.optim.AdamW, lr=1e-3), False),
        (of_parameters, False),
        (lambda parameters: None, False),
    ],
)
def test_the_first_parameter_tells_what_a_factory_takes(factory: Any, expected: bool) -> None:
    assert takes_model(factory) is expected


def test_a_function_is_described_and_made_again() -> None:
    description = {
        "class_path": "peft.optimizers.create_loraplus_optimizer",
        "init_args": {"optimizer_cls": "torch.optim.AdamW", "lr": 1e-3, "loraplus_lr_ratio": 16.0},
    }
    assert describe_optimizer(LORA_PLUS) == description
    made = optimizer_factory(description)
    assert isinstance(made, partial)
    assert (made.func, made.keywords) == (LORA_PLUS.func, LORA_PLUS.keywords)
    assert describe_optimizer(lambda model: of_network(model)) is None


def of_anything(model: nn.Module) -> None:
    """No optimizer."""


@pytest.mark.parametrize("path", ["os.system", "json.dumps", f"{__name__}.of_anything", f"{__name__}.of_parameters"])
def test_a_checkpoint_cannot_have_any_function_called(path: str) -> None:
    with pytest.raises(ConfigurationError, match="is not an imported optimizer class"):
        optimizer_factory({"class_path": path, "init_args": {}})


def test_parameters_that_would_not_train_are_named() -> None:
    layer = nn.Linear(2, 2)
    assert len(make_optimizer(of_network, layer, layer).param_groups[0]["params"]) == 2
    with pytest.raises(ConfigurationError, match=r"of_weights makes leaves out 1 trainable parameters, such as 'bias'"):
        make_optimizer(of_weights, layer, layer)


# ---- one kernel for all parameters ----


class Sub(torch.optim.AdamW):
    """May do more in its step."""


@pytest.mark.parametrize(
    ("factory", "fused"),
    [
        (torch.optim.Adam, True),
        (partial(torch.optim.AdamW, amsgrad=True), True),
        (torch.optim.SGD, None),
        (lambda parameters: torch.optim.AdamW([{"params": [each]} for each in parameters]), True),
        (partial(torch.optim.AdamW, fused=False), False),
        (partial(torch.optim.AdamW, foreach=True), None),
        (Sub, None),
        (torch.optim.NAdam, None),
    ],
)
def test_optimizers_of_torch_are_fused_where_nothing_was_said_of_it(factory: Any, fused: bool | None) -> None:
    layer = nn.Linear(2, 2)
    optimizer = make_optimizer(factory, layer, layer)
    assert {group.get("fused") for group in optimizer.param_groups} == {fused}
    # What was said, which another process or a resumed fit is compared by.
    assert optimizer.defaults.get("fused") is (False if fused is False else None)
    assert not any(group.get("fused") for group in make_optimizer(factory, layer, layer, fuse=False).param_groups)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_steps_are_those_of_torch(kind: Any, dtype: torch.dtype) -> None:
    found = []
    for fuse in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(7, 5).to(dtype)
        optimizer = make_optimizer(partial(kind, lr=1e-2, weight_decay=0.1), layer, layer, fuse)
        for step in range(5):
            layer(torch.randn(3, 7, generator=torch.Generator().manual_seed(step)).to(dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(layer.weight.detach())
    torch.testing.assert_close(*found, rtol=100 * torch.finfo(dtype).eps, atol=10 * torch.finfo(dtype).eps)


# ---- on the command line ----


@pytest.fixture
def fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fit:
    found = Fit(tmp_path, capsys)
    found.options["gate_importance"] = {"warmup_steps": 1, "refresh_every": 1}
    found.options["trainer"]["max_epochs"] = 1
    return found


PLUS = [
    "--model.optimizer=peft.optimizers.create_loraplus_optimizer",
    "--model.optimizer.optimizer_cls=torch.optim.AdamW",
    "--model.optimizer.lr=1e-3",
    "--model.optimizer.loraplus_lr_ratio=16",
]


def rates(checkpoint: dict[str, Any]) -> list[float]:
    return [group["initial_lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]]


def test_lora_plus(fit: Fit) -> None:
    assert fit(*PLUS) == 0
    # A, embeddings, B, and what does not decay.
    assert rates(fit.checkpoint) == [1e-3, 1e-6, 16e-3, 16e-3]
    described = fit.checkpoint["hyper_parameters"]["optimizer"]
    assert described["class_path"] == "peft.optimizers.create_loraplus_optimizer"
    assert described["init_args"]["optimizer_cls"] == "torch.optim.AdamW"
    loaded = NALoRALightningModule.load_from_checkpoint(fit.newest)
    assert describe_optimizer(loaded._optimizer_factory) == described
    # The saved configuration is one, and the function is what it was.
    (saved,) = fit.folder.glob("run/**/config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["optimizer"]["class_path"] == described["class_path"]
    assert peft.optimizers.create_loraplus_optimizer is LORA_PLUS.func
    assert main(["fit", "--config", str(saved), "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert fit.steps == 8
    assert fit(*PLUS, "--ckpt_path=last", "--trainer.max_epochs=3", "--model.optimizer.loraplus_lr_ratio=8") == 0
    assert (fit.steps, rates(fit.checkpoint)) == (12, [1e-3, 1e-6, 8e-3, 8e-3])
    assert fit("--model.optimizer=torch.optim.AdamW", "--ckpt_path=last", "--trainer.max_epochs=4") == 2


def test_lora_fa_trains_b_alone(fit: Fit) -> None:
    fit.options["model"]["optimizer"] = {
        "class_path": "peft.optimizers.create_lorafa_optimizer",
        "init_args": {"r": 2, "lora_alpha": 4, "lr": 1e-2},
    }
    assert fit("--checkpoint.every_n_steps=2") == 0
    first, last = sorted(fit.folder.glob("run/**/*.ckpt"))
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (first, last))
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert moved == {name for name in before if "lora_B" in name} & moved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            PLUS[:3],
            "the class or function given for 'model.optimizer' needs loraplus_lr_ratio; give it as model.optimi",
        ),
        ([*PLUS, "--model.optimizer.foo=1"], "the class given for 'model.optimizer' has no option 'foo'"),
        (["--model.optimizer=peft.optimizers.create_foo"], "module 'peft.optimizers' has no attribute 'create_foo'"),
        (["--model.optimizer=json.dumps"], "Expected 'json.dumps' to be a function that returns"),
    ],
)
def test_what_an_optimizer_lacks_is_said(fit: Fit, arguments: list[str], message: str) -> None:
    assert message in fit.error(*arguments)


def test_a_bare_name_is_torchs_where_others_have_it_too(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ModuleType("others")
    others.AdamW = type("AdamW", (Optimizer,), {"__module__": "others"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "others", others)
    fit.options["model"]["optimizer"] = {"class_path": "AdamW", "init_args": {"lr": 0.5}}
    assert fit() == 0
    assert fit("--model.optimizer=AdamW", "--model.optimizer.lr=0.25") == 0
    assert fit.checkpoint["hyper_parameters"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert rates(fit.checkpoint) == [0.25]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    accumulated=st.integers(1, 5),
    scale=st.sampled_from([1.0, 1024.0]),
    seed=st.integers(0, 2**16),
)
def test_a_step_of_micro_batches_has_the_gradient_of_one_batch(
    counts: list[int], accumulated: int, scale: float, seed: int
) -> None:
    counts = counts[:accumulated]
    values = torch.randn(sum(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    average = StepAverage()
    for part in values.split(counts):
        sums = TokenSums((part - weight).square().sum(), torch.tensor(len(part)), torch.tensor(0))
        # What Lightning does to a loss, with the scale of a GradScaler.
        (average.loss(sums) / accumulated * scale).backward()
    average.finish_step([weight], accumulated)
    assert weight.grad is not None
    expected = float(2 * (0.5 - values).sum() / max(1, len(values)))
    assert float(weight.grad) / scale == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_statistics_weigh_micro_batches_by_their_tokens_also_where_a_sample_is_looked_at() -> None:
    def responsiveness(limit: int | None, batches: list[dict[str, Tensor]]) -> Tensor:
        model = with_lora(tiny_llama(), LLAMA_TARGETS)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        controller = GateController(model, discover_gates(model).require(), ObserverOptions(max_tokens=limit))
        importance = controller.set_importance(ImportanceOptions())
        controller.attach([optimizer])
        for batch in batches:
            model(**batch).loss.backward()
        optimizer.step()
        return importance.responsiveness

    # All tokens of a batch alike, so that a sample of it is exact and the weighting alone can differ.
    def batch(token: int, rows: int, padded: int) -> dict[str, Tensor]:
        mask = torch.ones(rows, 8, dtype=torch.long)
        mask[1::2, 8 - padded :] = 0
        return {"input_ids": torch.full((rows, 8), token), "attention_mask": mask, "labels": torch.full((rows, 8), 2)}

    batches = [batch(3, 16, 3), batch(9, 2, 0), batch(5, 1, 0)]
    everything, sampled = responsiveness(None, batches), responsiveness(8, batches)
    assert torch.allclose(sampled, everything, rtol=1e-5)
    assert not torch.allclose(sampled, responsiveness(8, [batch(3, 1, 0), *batches[1:]]), rtol=1e-2)
