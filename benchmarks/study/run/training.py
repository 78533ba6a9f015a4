"""Runs one cell: builds it, trains it in a plain loop around the package's core, scores it at intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.study import StudyError
from benchmarks.study.arms.building import build
from benchmarks.study.arms.hooks import BuiltArm
from benchmarks.study.base_models.loading import base_model, fresh_model, held_out_windows
from benchmarks.study.run.probes import GateProbe
from benchmarks.study.run.specification import Cell
from benchmarks.study.tasks import pools
from benchmarks.study.tasks.encoding import IGNORED, Encoded, collate, encode, inputs_of, tokenizer_of
from na_lora_lightning.arguments import ScheduleOptions
from na_lora_lightning.modules.schedules import make_schedule

_PROBE_EXAMPLES = 16
Batches = list[dict[str, Tensor]]


def evaluation_batches(
    encoded: Sequence[Encoded], padding: int, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Batches:
    """Batches in order of length, so that little is padded; pixels are in ``dtype``."""
    ordered = sorted(encoded, key=lambda entry: len(entry.ids))
    parts = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return [collate(part, padding, device, dtype) for part in parts]


def text_batches(windows: Tensor, batch_size: int, device: torch.device) -> Batches:
    """Batches of ``[count, length]`` windows of plain text, of which every token but the first is predicted."""
    parts = [part.to(device) for part in windows.split(batch_size)]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in parts]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Scores a model, in evaluation mode, and puts it back into training mode.

    Returns:
        Mean negative log-likelihood in nats per predicted token, and the share of examples that are predicted without
        a wrong token, which is the share that greedy decoding gets exactly right.
    """
    model.eval()
    total, tokens, exact, examples = 0.0, 0, 0, 0
    for batch in batches:
        logits = model(**inputs_of(batch)).logits[:, :-1].float()
        targets = batch["labels"][:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        predicted = targets != IGNORED
        wrong = (logits.argmax(dim=-1) != targets) & predicted
        total += losses.double().sum().item()
        tokens += int(predicted.sum())
        exact += int((~wrong.any(dim=1)).sum())
        examples += len(targets)
    model.train()
    return total / tokens, exact / examples


class Memory:
    """Samples of the memory in use: reserved by the allocator on a GPU, resident set on a CPU, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self.samples: list[int] = []

    def sample(self) -> None:
        """Takes a sample."""
        if self._device.type == "cuda":
            self.samples.append(torch.cuda.memory_reserved(self._device))
        else:
            self.samples.append(self._process.memory_info().rss)


def device_of(cell: Cell) -> torch.device:
    """The device of a cell.

    Raises:
        StudyError: It is not there.
    """
    device = torch.device(cell.training["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StudyError(f"the cell {cell.name!r} wants a GPU and there is none; run a study for the CPU.")
    return device


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains and scores a cell.

    Returns:
        ``metrics`` (one dictionary per interval), ``probes`` alike, and what
        :mod:`benchmarks.study.run.result` writes beside them.
    """
    training = cell.training
    device = device_of(cell)
    memory = Memory(device)
    _, processor, model_sha256 = base_model(cell.setting.model, training["dtype"])
    data = pools.load(cell.setting.data, cell.seed)
    encoded = {
        part: encode(processor, getattr(data, part), training["max_length"]) for part in ("train", "valid", "test")
    }
    tokenizer = tokenizer_of(processor)
    padding, dtype = tokenizer.pad_token_id, getattr(torch, training["dtype"])
    size = training["evaluation_batch_size"]
    scored = {part: evaluation_batches(encoded[part], padding, size, device, dtype) for part in ("valid", "test")}
    held_out = text_batches(held_out_windows(cell.setting.model, tokenizer), size, device)
    order = pools.batch_order(len(encoded["train"]), training["batch_size"], training["steps"], cell.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    base = fresh_model(cell.setting.model, training["dtype"], device)
    probed = collate(encoded["valid"][:_PROBE_EXAMPLES], padding, device, dtype)
    example_inputs = inputs_of(probed) if "pixel_values" in probed else None
    built = build(base, cell.arm, cell.setting.lora, training, cell.rate, cell.seed, example_inputs)
    probe = GateProbe(built, probed)
    schedule = make_schedule(
        ScheduleOptions(name=training["schedule"], warmup_fraction=training["warmup_fraction"]),
        built.optimizer,
        training["steps"],
    )
    metrics: list[dict[str, Any]] = []
    probes: list[dict[str, Any]] = []
    # One thread of a shared CPU costs its processor time, however busy the machine is; a GPU its wall time.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = {"train": 0.0, "evaluation": 0.0}
    losses: list[Tensor] = []
    tokens = 0

    def score(step: int) -> bool:
        started = clock()
        entry: dict[str, Any] = {"step": step}
        for part, batches in (*scored.items(), ("held-out", held_out)):
            loss, exact = evaluate(built.model, batches)
            entry[f"{part} loss"] = loss
            if part != "held-out":
                entry[f"{part} accuracy"] = exact
        entry["train loss"] = torch.stack(losses).mean().item() if losses else None
        entry["train samples"] = step * training["batch_size"]
        entry["train tokens"] = tokens
        losses.clear()
        probes.append({"step": step, **probe.measure()})
        seconds["evaluation"] += clock() - started
        entry["train time"] = seconds["train"]
        entry["eval time"] = seconds["evaluation"]
        entry["tokens / sec"] = tokens / seconds["train"] if seconds["train"] else None
        metrics.append(entry)
        return math.isfinite(entry["valid loss"])

    finite = score(0)
    for step, chosen in enumerate(order):
        started = clock()
        batch = collate([encoded["train"][index] for index in chosen], padding, device, dtype)
        losses.append(_train_step(built, batch, training["clip"], step))
        schedule.step()
        seconds["train"] += clock() - started
        tokens += int(batch["attention_mask"].sum())
        memory.sample()
        done = step + 1
        if done % training["evaluate_every"] == 0 or done == training["steps"]:
            if device.type == "cuda":
                started = clock()
                torch.cuda.synchronize(device)
                seconds["train"] += clock() - started
            finite = score(done)
            if not finite:
                break
    return {
        "status": "success" if finite else "diverged",
        "metrics": metrics,
        "probes": probes,
        "train_seconds": seconds["train"],
        "memory": memory.samples,
        "model_sha256": model_sha256,
        "data_sha256": data.sha256,
        "peft_config": built.model.peft_config["default"].to_dict(),
        "gates": [site.lora_layer_name for site in built.gates],
        "trainable": sum(p.numel() for p in built.model.parameters() if p.requires_grad),
        "total": sum(p.numel() for p in built.model.parameters()),
        "adapter_bytes": _adapter_bytes(built),
    }


def _train_step(built: BuiltArm, batch: dict[str, Tensor], clip: float, step: int) -> Tensor:
    """One optimizer step; returns the loss, detached."""
    loss = built.model(**batch).loss
    loss.backward()
    if clip > 0:
        torch.nn.utils.clip_grad_norm_([p for p in built.model.parameters() if p.requires_grad], clip)
    for hook in built.hooks:
        hook.before_step(step)
    built.optimizer.step()
    for hook in built.hooks:
        hook.after_step(step)
    built.optimizer.zero_grad()
    return loss.detach()


def _adapter_bytes(built: BuiltArm) -> int:
    """Bytes of the adapter's tensors, as a file of them would hold."""
    return sum(t.numel() * t.element_size() for t in get_peft_model_state_dict(built.model).values())
