"""Packed records: the loss, every gradient, what gates see and how a run goes on are those of padded batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from module_helpers import quiet_trainer, saved_model, tiny_tokenizer, write_records
from tiny_models import SIZES as PLAIN_SIZES
from tiny_models import VOCABULARY, with_lora
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from na_lora_lightning import GateImportanceCallback, NALoRALightningModule, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.data.batching import Collator
from na_lora_lightning.errors import ConfigurationError, DataError
from na_lora_lightning.models.limits import ModelLimits
from na_lora_lightning.models.packing import require_packable
from na_lora_lightning.modules.losses import token_sums
from na_lora_lightning.modules.throughput import ThroughputCallback

# Token 0 is padding, as it is in `OLD`.
SIZES = {**PLAIN_SIZES, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1}
LAYERS_ = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TAKE = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 4},
    "mixtral": {**SIZES, "num_local_experts": 4, "sliding_window": None},
    "qwen2": {**SIZES, **LAYERS_, "use_sliding_window": True},
    "qwen3": SIZES,
    "gemma2": {**SIZES, **LAYERS_},
    "gemma3_text": {**SIZES, **LAYERS_},
    "cohere2": {**SIZES, **LAYERS_},
    "phi": SIZES,
    "phi3": {**SIZES, "sliding_window": 4},
    "smollm3": {**SIZES, "no_rope_layers": [1, 0]},
    "granite": SIZES,
    "olmo2": SIZES,
    "gpt_neox": {**SIZES, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "gpt2": {**OLD, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **_NO_DROPOUT},
}
ALIBI = {**OLD, "hidden_size": 16, "n_layer": 1, "n_head": 2}
REFUSED = {
    "bloom": (ALIBI, "its forward takes no position_ids"),
    "mamba": (
        {**OLD, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
        "its forward takes no position_ids",
    ),
    "falcon": ({**ALIBI, "num_attention_heads": 2, "alibi": True}, "others than alone"),
    "lfm2": (
        {**SIZES, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        "depend on the record before it|others than alone",
    ),
    "opt": ({**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}, "others than alone"),
    "gpt_neo": (
        {**SIZES, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        "it does not run on them|others than alone",
    ),
}


def made(kind: str, options: dict[str, Any], attention: str | None = None) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def adapted(kind: str, attention: str | None = None) -> Any:
    targets: Any = ["q_proj", "v_proj"] if kind == "mixtral" else "all-linear"
    return with_lora(made(kind, TAKE[kind], attention), targets, fan_in_fan_out=kind == "gpt2")


def records(seed: int, lengths: list[int]) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        prompt = int(torch.randint(0, length, (1,), generator=generator))
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def loss_and_gradients(model: Any, batch: Any) -> tuple[Tensor, int, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    sums = token_sums(model, batch)
    sums.mean_loss.backward()
    return (
        sums.mean_loss.detach(),
        int(sums.target_tokens),
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    )


def assert_same(model: Any, examples: list[dict[str, list[int]]]) -> None:
    padded, packed = Collator(0)(examples), DataCollatorWithFlattening()(examples)
    assert packed["input_ids"].shape == (1, sum(len(each["input_ids"]) for each in examples))
    loss, targets, gradients = loss_and_gradients(model, padded)
    other_loss, other_targets, others = loss_and_gradients(model, packed)
    assert targets == other_targets
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("kind", TAKE)
def test_packed_records_do_not_see_each_other(kind: str) -> None:
    model = adapted(kind)
    before = torch.get_rng_state()
    require_packable(model, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(model, records(0, [11, 3, 8]))
    # A row that is longer than the positions of a record.
    assert_same(model, records(1, [40, 39]))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_eager_attention(kind: str) -> None:
    model = adapted(kind, "eager")
    require_packable(model, 64)
    assert_same(model, records(0, [11, 3, 8]))


_llama = adapted("llama")


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=5), st.integers(0, 99))
def test_records_of_any_length(lengths: list[int], seed: int) -> None:
    assert_same(_llama, records(seed, lengths))


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_are_refused(kind: str) -> None:
    options, reason = REFUSED[kind]
    model = made(kind, options)
    with pytest.raises(ConfigurationError, match=rf"which {type(model).__name__} cannot take: .*({reason})"):
        require_packable(model, ModelLimits(model).positions and 64)


def test_positions_of_packed_records_begin_anew() -> None:
    limits = ModelLimits(made("gpt2", TAKE["gpt2"]))
    limits.require_batch(DataCollatorWithFlattening()(records(0, [40, 40])), 0)
    with pytest.raises(DataError, match="81 tokens long"):
        limits.require_batch(DataCollatorWithFlattening()(records(0, [81, 40])), 0)


# ---- fits ----

LENGTHS = [3, 17, 9, 30, 5, 12, 22, 7, 14, 4]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    path = saved_model(folder / "model")
    lines = [json.dumps({"prompt": "a" * length, "completion": "bc" * (1 + length % 3)}) for length in LENGTHS]
    (folder / "train.jsonl").write_text("\n".join(lines))
    return path


def fitted(base: str, folder: Path, packing: bool, resume: str | None = None, **trainer: Any) -> Any:
    torch.manual_seed(0)
    module = NALoRALightningModule(
        base,
        lora=LoRAOptions(r=2, alpha=4),
        adapter=AdapterOptions(write="never"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    )
    data = InstructionDataModule(base, str(Path(base).parent / "train.jsonl"), batch_size=3, packing=packing)
    callbacks = [
        GateImportanceCallback(keep_fraction=0.5, warmup_steps=1, observer=ObserverOptions(max_tokens=None)),
        StepScaleCallback(observer=ObserverOptions(max_tokens=None)),
        *trainer.pop("callbacks", []),
    ]
    fit = quiet_trainer(folder, callbacks=callbacks, **{"max_epochs": 2, **trainer})
    fit.fit(module, data, ckpt_path=resume, weights_only=False)
    return module, fit


def weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def tensors_in(value: Any, name: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {key: found for part, inner in items for key, found in tensors_in(inner, f"{name}.{part}").items()}


def test_gates_see_each_token_once(base: str, tmp_path: Path) -> None:
    """With all tokens looked at, the rows that are held and the steps of a fit are those of padded batches."""
    padded, packed = (fitted(base, tmp_path, packing) for packing in (False, True))
    assert padded[1].global_step == packed[1].global_step == 8
    states = [trainer.callbacks[0].state_dict() for _, trainer in (padded, packed)]
    statistics = [tensors_in(state) for state in states]
    assert statistics[0].keys() == statistics[1].keys()
    assert any(value.is_floating_point() and value.numel() > 1 for value in statistics[0].values())
    for name, value in statistics[0].items():
        torch.testing.assert_close(statistics[1][name], value, rtol=1e-3, atol=1e-6)
    for name, value in weights(padded[0]).items():
        torch.testing.assert_close(weights(packed[0])[name], value, rtol=1e-3, atol=1e-6)
    assert any(value.abs().max() > 0.01 for name, value in weights(padded[0]).items() if "lora_B" in name)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_packed_run_goes_on_bit_by_bit_within_an_epoch(base: str, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        saved = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        return {"enable_checkpointing": True, "callbacks": [saved]}

    whole, _ = fitted(base, tmp_path, True, **options())
    resumed, trainer = fitted(base, tmp_path, True, resume=str(tmp_path / "step=6.ckpt"), **options())
    assert trainer.global_step == 8
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_speed_counts_the_same_tokens(base: str) -> None:
    counted = []
    for packing in (False, True):
        data = InstructionDataModule(base, str(Path(base).parent / "train.jsonl"), batch_size=3, packing=packing)
        data.setup("fit")
        callback, tokens = ThroughputCallback(), []
        trainer: Any = type("T", (), {"global_step": 0, "log_every_n_steps": 100, "is_last_batch": False})()
        for index, batch in enumerate(data.train_dataloader()):
            callback.on_train_batch_end(trainer, None, None, batch, index)  # type: ignore[arg-type]
            tokens.append((int(callback._tokens), int(callback._target_tokens)))
        counted.append(tokens)
    assert counted[0] == counted[1]
    assert counted[0][-1][0] == sum(length + 2 * (1 + length % 3) + 1 for length in LENGTHS)


def test_a_model_that_cannot_is_refused_before_the_first_step(tmp_path: Path) -> None:
    made("bloom", ALIBI).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_records(tmp_path / "train.jsonl")
    with pytest.raises(ConfigurationError, match=r"set data\.packing to false"):
        fitted(str(tmp_path / "model"), tmp_path, True)


def test_padding_to_a_multiple_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="packing leaves no padding, which pad_to_multiple_of=8 asks for"):
        InstructionDataModule("model", "train.jsonl", packing=True, pad_to_multiple_of=8)
