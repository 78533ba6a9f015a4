"""Scores of a model on examples and on held-out text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.study.tasks.encoding import IGNORED, Encoded, collate, inputs_of

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
