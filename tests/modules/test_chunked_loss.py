"""Chunks of logits: the loss and every gradient are those of all logits at once, or the model is left as it is."""

from __future__ import annotations

import gc
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_helpers import Batches, quiet_trainer, saved_model, some_batches
from tiny_models import LLAMA_TARGETS, SIZES, VOCABULARY, tiny_gpt2, tiny_llama, tiny_mixtral, with_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from na_lora_lightning import GateImportanceCallback, NALoRALightningModule, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, LossOptions
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.output_head import output_head
from na_lora_lightning.modules import chunked_loss
from na_lora_lightning.modules.losses import token_sums

# PEFT's word on merging LoRA of a tied head.
pytestmark = pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`")

# What each does to its logits, or what is special about its head.
MODELS: dict[str, Any] = {
    "plain": tiny_llama,
    "experts": tiny_mixtral,
    "tied": tiny_gpt2,
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
}
HEADS: dict[str, Any] = {
    "frozen": {},
    "LoRA": {"targets": [*LLAMA_TARGETS, "lm_head"]},
    "trained": {"modules_to_save": ["lm_head"]},
    "head alone": {"targets": ["lm_head"], "fan_in_fan_out": False},
}


def adapted(kind: str, head: str = "frozen") -> Any:
    torch.manual_seed(0)
    model = MODELS[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    options = dict(HEADS[head])
    targets = options.pop("targets", ["q_proj"] if kind == "experts" else "all-linear")
    return with_lora(model, targets, **options)


def batch_of(seed: int, rows: int, length: int, targets: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).long()
    is_target = (torch.rand(rows, length, generator=generator) < targets) & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~is_target, -100)}


def loss_and_gradients(model: Any, batch: dict[str, Tensor], logits: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    model.zero_grad(set_to_none=True)
    sums = token_sums(model, batch, logits)
    (sums.mean_loss * 3).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sums.negative_log_likelihood.detach(), gradients, (int(sums.target_tokens), int(sums.correct_tokens or 0))


def assert_same(model: Any, batch: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    expected, gradients, counts = loss_and_gradients(model, batch, "all")
    found, others, other_counts = loss_and_gradients(model, batch, "chunked")
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    assert counts == other_counts
    assert gradients.keys() >= others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others.get(name, torch.zeros_like(gradient)), gradient, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("head", ["frozen", "LoRA"])
def test_every_kind_of_head(kind: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if head == "LoRA" and kind in ("tied", "experts"):
        head = "head alone"
    monkeypatch.setattr(chunked_loss, "tokens_per_chunk", lambda vocabulary: 3)
    model = adapted(kind, head)
    assert not isinstance(output_head(model), str)
    assert_same(model, batch_of(0, 3, 7, 0.7))


_model = cache(partial(adapted, "plain"))


@settings(deadline=None, max_examples=25)
@given(
    head=st.sampled_from(list(HEADS)),
    chunk=st.integers(1, 20),
    rows=st.integers(1, 4),
    length=st.integers(1, 8),
    targets=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_chunk(head: str, chunk: int, rows: int, length: int, targets: float, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "tokens_per_chunk", lambda vocabulary: chunk)
        assert_same(_model(head), batch_of(seed, rows, length, targets))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_16_bits(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within four roundings of 16 bits of what float32 gives, with a float16 loss scale as a GradScaler has it."""
    monkeypatch.setattr(chunked_loss, "tokens_per_chunk", lambda vocabulary: 5)
    model, batch = adapted("plain", "LoRA"), batch_of(1, 3, 8, 0.9)
    expected, exact, _ = loss_and_gradients(model, batch, "all")
    if not autocast:
        model.get_base_model().to(dtype)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.float()
    with torch.autocast("cpu", dtype, enabled=autocast):
        found, gradients, _ = loss_and_gradients(model, batch, "chunked")
    tolerance = 8 * torch.finfo(dtype).eps
    assert float(found) == pytest.approx(float(expected), rel=tolerance)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() <= tolerance * exact[name].norm() + 1e-4, name


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return output


def test_no_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "tokens_per_chunk", lambda vocabulary: 8)
    model, batch = adapted("plain"), batch_of(0, 6, 30, 1.0)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["labels"] = batch["input_ids"]
    output_head(model)
    largest = {}
    for logits in ("all", "chunked"):
        with _Largest() as mode:
            loss_and_gradients(model, batch, logits)
        largest[logits] = mode.elements
    # 6 × 29 targets, and what attention and the blocks hold of 6 × 30 tokens.
    assert largest["all"] >= 6 * 29 * VOCABULARY
    assert largest["chunked"] <= 6 * 2 * 30 * 30


class Positional(LlamaForCausalLM):
    """Does to its logits what depends on where a token is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        places = torch.arange(output.logits.shape[1], dtype=torch.float32)
        output.logits = output.logits * (1 + places)[None, :, None]
        return output


def test_a_model_that_does_more_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("na_lora_lightning.modules.losses.tokens_per_chunk", lambda vocabulary: 1)
    model = with_lora(Positional(tiny_llama().config), LLAMA_TARGETS)
    batch = batch_of(0, 3, 7, 1.0)
    assert output_head(model) == "its logits depend on more than the last hidden state of their token"
    for mine, expected in zip(
        loss_and_gradients(model, batch, "auto")[:1], loss_and_gradients(model, batch, "targets")[:1], strict=True
    ):
        assert torch.equal(mine, expected)
    with pytest.raises(ConfigurationError, match="which Positional does not allow, as its logits depend on more"):
        token_sums(model, batch, "chunked")


def test_the_probe_leaves_no_trace() -> None:
    model = adapted("plain")
    state, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    modules = dict(model.named_modules())
    output_head(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(model.named_modules()) == modules
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(IndexError, match="out of range"):
        token_sums(model, {**batch_of(0, 2, 5, 1.0), "input_ids": torch.full((2, 5), -1)}, "chunked")
    assert dict(model.named_modules()) == modules


def test_a_model_is_not_kept_alive_by_its_head() -> None:
    model = adapted("plain")
    assert not isinstance(output_head(model), str)
    kept = ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_gates_see_the_same_tokens(tmp_path: Path) -> None:
    """A fit with both mechanisms ends with the weights of one whose logits are computed at targets at once."""
    base = saved_model(tmp_path / "base")
    weights = []
    for logits in ("targets", "chunked"):
        torch.manual_seed(0)
        module = NALoRALightningModule(
            base,
            lora=LoRAOptions(r=2, alpha=4),
            loss=LossOptions(logits=logits),  # type: ignore[arg-type]
            adapter=AdapterOptions(write="never"),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        )
        callbacks = [GateImportanceCallback(keep_fraction=0.5), StepScaleCallback()]
        trainer = quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=2)
        trainer.fit(module, Batches(some_batches(4, rows=3), some_batches(1)))
        assert trainer.global_step == 8
        weights.append({n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad})
    assert any(value.abs().max() > 0.01 for name, value in weights[0].items() if "lora_B" in name)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_fused_is_refused_where_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = NALoRALightningModule(
        saved_model(tmp_path / "base"), loss=LossOptions(logits="fused"), adapter=AdapterOptions(write="never")
    )
    with pytest.raises(ConfigurationError, match="runs on a GPU, and the model is not on one; use 'auto'"):
        quiet_trainer(tmp_path).fit(module, Batches(some_batches(1)))
    with pytest.raises(ConfigurationError, match="takes an output head that is a plain linear layer, and that"):
        token_sums(adapted("plain", "LoRA"), batch_of(0, 2, 5, 1.0), "fused", count_correct=False)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    monkeypatch.setattr(chunked_loss, "DEVICES", ("cpu",))
    with pytest.raises(ConfigurationError, match=r"needs the package liger-kernel; install na-lora-lightning\[liger\]"):
        token_sums(adapted("plain"), batch_of(0, 2, 5, 1.0), "fused", count_correct=False)


@pytest.mark.parametrize(("kind", "works"), [("plain", True), ("capped", True), ("bias", True), ("scaled", False)])
def test_fused_takes_what_its_kernel_computes(kind: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for Liger's function, which is given all that makes the logits."""

    def cross_entropy(
        hidden: Tensor, weight: Tensor, target: Tensor, bias: Any, reduction: str, softcap: Any
    ) -> Tensor:
        logits = nn.functional.linear(hidden, weight, bias)
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return nn.functional.cross_entropy(logits, target, reduction=reduction)

    stand_in = type(sys)("functional")
    stand_in.liger_fused_linear_cross_entropy = cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", type(sys)("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", type(sys)("transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", stand_in)
    monkeypatch.setattr(chunked_loss, "DEVICES", ("cpu",))
    model, batch = adapted(kind), batch_of(0, 3, 7, 0.7)
    if not works:
        with pytest.raises(ConfigurationError, match="CohereForCausalLM does more to them"):
            token_sums(model, batch, "fused", count_correct=False)
        return
    found = token_sums(model, batch, "fused", count_correct=False).mean_loss
    torch.testing.assert_close(found, token_sums(model, batch, "all").mean_loss)
