"""The loss of a fit on each record of a split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from na_lora_lightning.errors import DataError
from na_lora_lightning.labels import IGNORED_LABEL
from na_lora_lightning.models.output_head import OutputHead, output_head
from na_lora_lightning.modules.chunked_loss import tokens_per_chunk
from na_lora_lightning.modules.losses import logits_of_targets, model_inputs

_TEXT = ("input_ids", "attention_mask")

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class RecordLosses:
    """Losses of the records of a split, in their order.

    Attributes:
        sums: Negative log likelihood of each record's targets, nats.
        tokens: Number of its targets.
    """

    sums: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """Nats per target token; every token weighs alike."""
        return sum(self.sums) / max(1, sum(self.tokens))

    def part(self, start: int, step: int) -> RecordLosses:
        """Every ``step``-th record from ``start`` on."""
        return RecordLosses(self.sums[start::step], self.tokens[start::step])


@torch.no_grad()
def record_losses(model: Any, batches: Iterable[Batch], device: torch.device) -> RecordLosses:
    """Measures a model on each record by itself.

    Args:
        model: A PEFT model in evaluation mode, on ``device``.
        batches: Of a data module, a row for each record.
        device: Where to compute.
    """
    found: dict[int, tuple[float, int]] = {}
    for places, batch in _by_length(model, batches):
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        tokens = (batch["labels"][:, 1:] != IGNORED_LABEL).sum(dim=1)
        sums = torch.zeros(len(tokens), dtype=torch.float64, device=device)
        for rows, targets, logits in target_logits(model, batch):
            sums.index_add_(0, rows, functional.cross_entropy(logits, targets, reduction="none").double())
        found.update(zip(places, zip(sums.tolist(), tokens.tolist(), strict=True), strict=True))
    if not found:
        raise DataError("there is no record to score; set data.validation and data.test.")
    ordered = [found[place] for place in range(len(found))]
    return RecordLosses([total for total, _ in ordered], [tokens for _, tokens in ordered])


def target_logits(model: Any, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Runs a model, and its head where a target is predicted, if it can run by itself.

    Args:
        model: A language model, with LoRA in it or not, on the device of the batch.
        batch: As :func:`~na_lora_lightning.modules.losses.token_sums` takes it.

    Yields:
        The rows of some targets ``[targets]``, the targets, and their logits ``[targets, vocabulary]`` in float32.
    """
    inputs, labels = {**model_inputs(model, batch), "use_cache": False}, batch["labels"]
    head = output_head(model)
    if not isinstance(head, OutputHead):
        logits, targets = logits_of_targets(model, inputs, labels)
        is_target = targets != IGNORED_LABEL
        yield is_target.nonzero()[:, 0], targets[is_target], logits[is_target].float()
        return
    rows, positions = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    chunk = tokens_per_chunk(head.rows)
    try:
        hidden = head.hidden_states(model, inputs)[rows, positions]
        targets = labels[rows, positions + 1]
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            yield rows[part], targets[part], head.logits(hidden[part]).float()
    finally:
        head.forget()


def right_padded(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of records, each of ``input_ids``, ``attention_mask`` and ``labels``, ``[length]``."""
    return {
        name: pad_sequence(
            [row[name] for row in rows],
            batch_first=True,
            padding_value=IGNORED_LABEL if name == "labels" else 0,
        )
        for name in (*_TEXT, "labels")
    }


def _by_length(model: Any, batches: Iterable[Batch]) -> Iterator[tuple[list[int], Batch]]:
    """The records with the places that they had, those of text alone beside others of their length."""
    texts: list[tuple[int, dict[str, Tensor]]] = []
    count = most = 0
    for batch in batches:
        places = list(range(count, count + len(batch["labels"])))
        count, most = count + len(places), max(most, len(places))
        if model_inputs(model, batch).keys() != set(_TEXT) or not batch["attention_mask"][:, 0].all():
            # Packed, with images, or padded at the left, where another length would be other positions.
            yield places, batch
            continue
        for place, length, *row in zip(
            places,
            batch["attention_mask"].sum(dim=1).tolist(),
            *(batch[name] for name in (*_TEXT, "labels")),
            strict=True,
        ):
            texts.append((place, {name: each[:length] for name, each in zip((*_TEXT, "labels"), row, strict=True)}))
    texts.sort(key=lambda text: len(text[1]["labels"]))
    for start in range(0, len(texts), max(1, most)):
        part = texts[start : start + most]
        yield [place for place, _ in part], right_padded([row for _, row in part])
