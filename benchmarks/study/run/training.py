"""Runs one cell: builds it, trains it in a plain loop around the package's core, scores and probes it at intervals.

A probe is one forward pass of a fixed batch between two optimizer steps, the same batch for every arm, read by the
package's own observer and meter. It leaves no trace in the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.study.arms.building import build
from benchmarks.study.arms.hooks import BuiltArm
from benchmarks.study.cells import Cell
from benchmarks.study.run.models import (
    IGNORED,
    Encoded,
    base_model,
    collate,
    encode,
    fresh_model,
    held_out_windows,
    inputs_of,
    tokenizer_of,
)
from benchmarks.study.tasks import sources
from na_lora_lightning.arguments import ScheduleOptions
from na_lora_lightning.core.lora_layers import lora_b
from na_lora_lightning.core.mechanisms.importance import ResponsivenessCollector
from na_lora_lightning.core.mechanisms.importance_options import Criterion
from na_lora_lightning.core.model_entry import root_of
from na_lora_lightning.core.observation.misalignment import MisalignmentMeter, share_of_selection
from na_lora_lightning.core.observation.observer import GateObserver, ObserverOptions
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.modules.schedules import make_schedule

CRITERIA: dict[str, Criterion] = {"output": "output_derivative", "selection": "selection_derivative"}
GROUPS = 10
_PROBE_EXAMPLES = 16
Batches = list[dict[str, Tensor]]


def evaluation_batches(encoded: Sequence[Encoded], padding: int, batch_size: int) -> Batches:
    """Batches in order of length, so that little is padded."""
    ordered = sorted(encoded, key=lambda entry: len(entry.ids))
    return [collate(ordered[start : start + batch_size], padding) for start in range(0, len(ordered), batch_size)]


def text_batches(windows: Tensor, batch_size: int) -> Batches:
    """Batches of ``[count, length]`` windows of plain text, of which every token but the first is predicted."""
    parts = windows.split(batch_size)
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


def by_decile(ranking: Tensor, values: Tensor) -> Tensor:
    """Means of ``values`` in ten groups of channels, from least to greatest ``ranking``; both ``[channels]``."""
    ordered = values[torch.argsort(ranking, stable=True)]
    return torch.stack([group.mean() for group in ordered.tensor_split(GROUPS)])


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


class GateProbe:
    """Probes of one cell.

    Args:
        built: The arm.
        batch: The batch of every probe.
    """

    def __init__(self, built: BuiltArm, batch: dict[str, Tensor]) -> None:
        self._built = built
        self._batch = batch
        self._previous = {site.name: self._rows(site) for site in built.gates}

    def _rows(self, site: GateSite) -> Tensor:
        weights = [lora_b(site.lora_layer, adapter).weight for adapter in site.adapters]
        rows = torch.cat([weight.detach().float() for weight in weights], dim=1)  # type: ignore[operator]
        return rows[site.rows.to(rows.device)].clone()

    def measure(self) -> dict[str, Any]:
        """One probe.

        Returns:
            Per gate site ``misalignment`` (mean |Δρ|) and ``share`` (of the selection term); ``walk``, the mean
            distance that rows of B went since the last probe, by decile of the responsiveness |φ'| (``output``) and
            |ρ'| (``selection``) of their channels, averaged over sites, and ``row_norm``, the mean norm of the rows
            themselves alike. Empty for an arm whose gates have no LoRA that the package reads.
        """
        sites = self._built.gates.sites
        if not sites:
            return {}
        observer = GateObserver(root_of(self._built.model), sites, ObserverOptions(max_tokens=None))
        layouts = {
            name: observer.add(name, ResponsivenessCollector(criterion, signed=False))
            for name, criterion in CRITERIA.items()
        }
        meter = MisalignmentMeter(observer)
        meter.enabled = True
        meter.attach()
        observer.attach()
        self._forward_without_trace()
        statistics = observer.finish_step(None)
        measured = meter.finish_step(None)
        observer.detach()
        meter.detach()
        assert measured is not None
        moved, norms = measured
        rows = {site.name: self._rows(site) for site in sites}
        walk: dict[str, list[Tensor]] = {name: [] for name in CRITERIA}
        norm: dict[str, list[Tensor]] = {name: [] for name in CRITERIA}
        for index, site in enumerate(sites):
            distance = (rows[site.name] - self._previous[site.name]).norm(dim=1)
            for name in CRITERIA:
                responsiveness = statistics[name].sums[0, layouts[name].site_slices[index]]
                walk[name].append(by_decile(responsiveness, distance))
                norm[name].append(by_decile(responsiveness, rows[site.name].norm(dim=1)))
        self._previous = rows
        return {
            "misalignment": _rounded(moved),
            "share": _rounded(share_of_selection(norms)),
            "walk": {name: _rounded(torch.stack(values).mean(dim=0)) for name, values in walk.items()},
            "row_norm": {name: _rounded(torch.stack(values).mean(dim=0)) for name, values in norm.items()},
        }

    def _forward_without_trace(self) -> None:
        """The forward pass; what the arm's own observer saw of it is forgotten."""
        controller = self._built.controller
        passes = 0 if controller is None else controller.observer.forward_passes
        # With gradients, since observers look at training passes alone; nothing is backpropagated.
        with torch.enable_grad():
            self._built.model(**inputs_of(self._batch))
        if controller is not None:
            controller.observer.reset()
            controller.meter.reset()
            controller.observer.forward_passes = passes


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains and scores a cell.

    Returns:
        ``metrics`` (one dictionary per interval), ``probes`` alike, and the digests ``model_sha256`` and
        ``data_sha256``, as records have them.
    """
    training = cell.training
    _, processor, model_sha256 = base_model(cell.setting.model)
    data = sources.load(cell.setting.data, cell.seed)
    encoded = {
        part: encode(processor, getattr(data, part), training["max_length"]) for part in ("train", "valid", "test")
    }
    padding, size = tokenizer_of(processor).pad_token_id, training["evaluation_batch_size"]
    scored = {part: evaluation_batches(encoded[part], padding, size) for part in ("valid", "test")}
    held_out = text_batches(held_out_windows(cell.setting.model), size)
    order = sources.batch_order(len(encoded["train"]), training["batch_size"], training["steps"], cell.seed)
    base = fresh_model(cell.setting.model)
    probed = collate(encoded["valid"][:_PROBE_EXAMPLES], padding)
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
    losses: list[Tensor] = []
    tokens = 0

    def score(step: int) -> bool:
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
        metrics.append(entry)
        return math.isfinite(entry["valid loss"])

    score(0)
    for step, chosen in enumerate(order):
        batch = collate([encoded["train"][index] for index in chosen], padding)
        losses.append(_train_step(built, batch, training["clip"], step))
        schedule.step()
        tokens += int(batch["attention_mask"].sum())
        done = step + 1
        if (done % training["evaluate_every"] == 0 or done == training["steps"]) and not score(done):
            break
    return {"metrics": metrics, "probes": probes, "model_sha256": model_sha256, "data_sha256": data.sha256}


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
