"""What is computed on a GPU is what PEFT, torch and a CPU compute; skipped where there is none.

``python -m pytest -m gpu tests`` runs these and the other tests that a GPU is for.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from na_lora_lightning import ImportanceOptions, ObserverOptions, StepScaleOptions, use_fast_lora_layers
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.models.loading import enable_gradient_checkpointing
from na_lora_lightning.modules import chunked_loss
from na_lora_lightning.modules.losses import token_sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
IN, OUT = 96, 64
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class One(nn.Module):
    """A network of one layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def layers(
    base: torch.dtype, adapter: torch.dtype, kind: str = "linear", **options: Any
) -> tuple[PeftModel, PeftModel]:
    """The layer of this package and PEFT's, alike, with an adapter that is not at its start."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=5, target_modules=["layer"], fan_in_fan_out=kind == "conv1d", **options)
    network = One(kind).to(DEVICE, base)
    theirs: PeftModel = get_peft_model(network, config, autocast_adapter_dtype=False)  # type: ignore[assignment, arg-type]
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(True)
        if "lora_" in name:
            parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).to(adapter)
    ours = copy.deepcopy(theirs.train())
    assert not use_fast_lora_layers(ours).left
    return ours, theirs


def pass_through(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.detach().clone().requires_grad_(True)
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y))
    assert x.grad is not None
    return {"output": y.detach(), "input": x.grad} | {name: p.grad for name, p in model.named_parameters()}  # type: ignore[dict-item]


DTYPES = [
    (torch.float32, torch.float32, None),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.float32, torch.float16),
    (torch.bfloat16, torch.float32, None),
    (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, None),
    (torch.float16, torch.float32, None),
    (torch.float16, torch.float16, None),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}, {"kind": "conv1d"}], ids=str)
def test_layers_are_those_of_peft_to_rounding(dtypes: Any, variant: dict[str, Any]) -> None:
    base, adapter, autocast = dtypes
    ours, theirs = layers(base, adapter, **variant)
    x = torch.randn(3, 11, IN, generator=torch.Generator().manual_seed(3)).to(DEVICE, base)
    exact = pass_through(copy.deepcopy(theirs).double(), x.double())
    one, other = pass_through(ours, x, autocast), pass_through(theirs, x, autocast)
    rounding = max(ROUNDING[dtype] for dtype in (base, adapter, autocast or base))
    for name, value in exact.items():
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        of_ours, of_theirs = (float((found[name].double() - value).norm()) for found in (one, other))
        assert of_ours <= 2 * of_theirs + rounding * float(value.norm()), (name, of_ours, of_theirs)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dropout_draws_what_peft_draws(dtypes: Any) -> None:
    base, adapter, autocast = dtypes
    ours, theirs = layers(base, adapter, lora_dropout=0.4)
    x = torch.randn(3, 11, IN, generator=torch.Generator().manual_seed(3)).to(DEVICE, base)
    one, other = pass_through(ours, x, autocast), pass_through(theirs, x, autocast)
    rounding = max(ROUNDING[dtype] for dtype in (base, adapter, autocast or base))
    for name, value in other.items():
        # Another choice of what is dropped would be off by a third and more.
        assert float((one[name].double() - value.double()).norm()) <= 4 * rounding * float(value.double().norm()), name


def on_device(batch: dict[str, Tensor], device: str = DEVICE) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def loss_and_gradients(model: Any, logits: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    sums = token_sums(model, on_device(random_batch(0)), logits, count_correct=False)
    sums.mean_loss.backward()
    return {"loss": sums.mean_loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits", ["chunked", "fused"])
def test_losses_of_few_logits_are_those_of_all(
    logits: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if logits == "fused":
        pytest.importorskip("liger_kernel", reason="Liger's loss needs the package liger-kernel")
    monkeypatch.setattr(chunked_loss, "tokens_per_chunk", lambda vocabulary: 5)
    model = with_lora(tiny_llama().to(DEVICE, dtype), LLAMA_TARGETS)
    expected, found = loss_and_gradients(model, "all"), loss_and_gradients(model, logits)
    assert found.keys() == expected.keys()
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= tolerance * float(value.norm()) + 1e-6, name


def trained(device: str, fused: bool = False) -> dict[str, Tensor]:
    """Four steps with both mechanisms: the averages, the weights of rows, and the adapter."""
    model = with_lora(tiny_llama(), LLAMA_TARGETS).to(device)
    use_fast_lora_layers(model)
    controller = GateController(model, discover_gates(model).require(), ObserverOptions(max_tokens=None))
    importance = controller.set_importance(ImportanceOptions(warmup_steps=0, refresh_every=1, keep_fraction=0.5))
    scale = controller.set_step_scale(StepScaleOptions(granularity="channel"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Adam's first steps are signs, which rounding turns where a gradient is nearly 0.
    optimizer = torch.optim.AdamW(parameters, fused=True) if fused else torch.optim.SGD(parameters, lr=0.1)
    controller.attach([optimizer])
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    for step in range(4):
        model(**on_device(random_batch(step), device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if fused:
            break
    controller.detach()
    found = {"importance": importance.importance, "mask": importance.weights, "shares": scale.network_shares}
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters() if name in before}
    return {name: value.cpu() for name, value in (found | moved).items()}


def test_statistics_and_corrected_steps_are_those_of_a_cpu() -> None:
    found, expected = trained(DEVICE), trained("cpu")
    assert torch.equal(found["mask"], expected["mask"])
    assert 0 < float(expected["mask"].mean()) < 1
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-4 * float(value.norm()), name


def test_held_rows_stand_still_under_a_fused_optimizer() -> None:
    found = trained(DEVICE, fused=True)
    rows = [value for name, value in found.items() if "gate_proj.lora_B" in name]
    held = found["mask"].view(len(rows), -1) == 0
    for moved, still in zip(rows, held, strict=True):
        assert not moved[still].any()
        assert moved[~still].any(dim=1).all()


def test_offloaded_checkpoints_free_memory_and_change_no_gradient() -> None:
    found = []
    for offload in (False, True):
        base = tiny_llama(layers=8).to(DEVICE)
        enable_gradient_checkpointing(base, offload=offload)
        model = with_lora(base, LLAMA_TARGETS)
        batch = on_device(random_batch(0, batch=8, length=60, padded=False))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(**batch).loss
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        found.append((held, [p.grad for p in model.parameters() if p.requires_grad]))
    # What seven blocks more are given, 8 × 60 tokens of 16 features.
    assert found[0][0] - found[1][0] >= 7 * 8 * 60 * 16 * 4
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other)
