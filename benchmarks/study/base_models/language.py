"""Small language models that the study pretrains itself, once, on documentation.

A model is kept in a folder that transformers reads, with ``pretraining.json`` beside the weights: recipe, loss, digest
of the text and of the weights. Weights are rounded to bfloat16 when they are saved (and loaded as float32), so that a
model takes two bytes a parameter.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.study.tasks import corpus

END = "<end>"
VOCABULARY = 1024
_LAYERS, _HIDDEN, _HEADS, _POSITIONS = 4, 128, 4, 256
_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": 384,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "max_position_embeddings": _POSITIONS,
    "tie_word_embeddings": True,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-silu": _LLAMA | {"hidden_act": "silu"},
    "llama-gelu": _LLAMA | {"hidden_act": "gelu_pytorch_tanh"},
    "gpt2-gelu": {
        "model_type": "gpt2",
        "n_embd": _HIDDEN,
        "n_layer": _LAYERS,
        "n_head": _HEADS,
        "n_positions": _POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 tokens; ``<end>`` ends documents and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row of token ids, each followed by ``<end>``, int64."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for encoded in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids += [*encoded, end]
    return torch.tensor(ids)


def windows_of(stream: Tensor, count: int, length: int) -> Tensor:
    """``[count, length]`` evenly spread windows of a token stream."""
    starts = torch.linspace(0, stream.numel() - length, count).long()
    return torch.stack([stream[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: Tensor, batch_size: int = 16) -> float:
    """Mean negative log-likelihood in nats per token of ``[count, length]`` windows."""
    model.eval()
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(batch_size)]
    model.train()
    return sum(losses) / len(windows)


def pretrain(
    name: str, folder: Path, steps: int = 5000, batch_size: int = 16, length: int = 128, peak_rate: float = 3e-3
) -> dict[str, Any]:
    """Pretrains one model and saves it under ``folder / name``.

    Args:
        name: A key of :data:`ARCHITECTURES`.
        folder: Where models are kept.
        steps: Optimizer steps; AdamW, cosine to a tenth of the peak rate after a warm-up of 100.
        batch_size: Windows of a step.
        length: Tokens of a window.
        peak_rate: Highest learning rate.

    Returns:
        What ``pretraining.json`` holds.
    """
    train, held_out = (list(part) for part in corpus.pretraining_text())
    tokenizer = make_tokenizer(train)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **ARCHITECTURES[name],
    )
    model = AutoModelForCausalLM.from_config(config).float().train()
    stream = token_stream(tokenizer, train)
    windows = windows_of(token_stream(tokenizer, held_out), 64, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    started = time.time()
    for step in range(steps):
        progress = min(1.0, (step + 1) / steps)
        warm = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = peak_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        starts = torch.randint(stream.numel() - length, (batch_size,), generator=generator).tolist()
        batch = torch.stack([stream[start : start + length] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            print(f"{name} step {step} loss {loss.item():.3f} after {time.time() - started:.0f} s", flush=True)
    place = folder / name
    model.to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    # Rounding reached rotary frequencies, which are not saved: what the record tells of is the model that is read.
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    record = {
        "name": name,
        "recipe": {"steps": steps, "batch_size": batch_size, "length": length, "peak_rate": peak_rate, "seed": 0},
        "packages": corpus.versions_of(corpus.PRETRAINING_PACKAGES),
        "text_sha256": corpus.digest([*train, *held_out]),
        "train_tokens": stream.numel(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_loss": mean_loss(model, windows),
        "weights_sha256": weights_digest(model),
        "seconds": round(time.time() - started),
    }
    torch.save(windows, place / "held_out.pt")
    (place / "pretraining.json").write_text(json.dumps(record, indent=1))
    return record
