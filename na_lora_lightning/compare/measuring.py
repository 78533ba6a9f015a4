"""The scores of a fit: losses record by record, and how far the model moved on text that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from na_lora_lightning.errors import ConfigurationError, DataError
from na_lora_lightning.labels import IGNORED_LABEL
from na_lora_lightning.modules.losses import logits_of_targets, model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_PASSAGE = 128
_PASSAGES_AT_ONCE = 4


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
def record_losses(model: Any, batches: Iterable[Mapping[str, Any]], device: torch.device) -> RecordLosses:
    """Measures a model on each record by itself.

    Args:
        model: A PEFT model in evaluation mode, on ``device``.
        batches: Of a data module, a row for each record.
        device: Where to compute.
    """
    sums, tokens = [], []
    for batch in batches:
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        inputs = {**model_inputs(model, batch), "use_cache": False}
        logits, targets = logits_of_targets(model, inputs, batch["labels"])
        losses = functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        sums.append(losses.view(targets.shape).double().sum(dim=1))
        tokens.append((targets != IGNORED_LABEL).sum(dim=1))
    if not sums:
        raise DataError("there is no record to score; set data.validation and data.test.")
    return RecordLosses(torch.cat(sums).tolist(), torch.cat(tokens).tolist())


class OtherText:
    """A text that no arm is trained on, on which forgetting is measured.

    Args:
        tokenizer: Of the model.
        file: A text file, whose passages are separated by empty lines; None stands for one that ships.

    Raises:
        ConfigurationError: The file cannot be read, or has no passage of at least two tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: str | None = None) -> None:
        try:
            source = resources.files("na_lora_lightning.compare") / "other_text.txt" if file is None else Path(file)
            text = source.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"the text {file!r} cannot be read ({error}); correct --other-text.") from error
        passages = [" ".join(passage.split()) for passage in text.split("\n\n")]
        encoded = [tokenizer(passage)["input_ids"][:_LONGEST_PASSAGE] for passage in passages if passage]
        self._passages = sorted((ids for ids in encoded if len(ids) > 1), key=len)
        if not self._passages:
            raise ConfigurationError(f"the text {file!r} has no passage of two tokens; correct --other-text.")

    @torch.no_grad()
    def measure(self, model: Any, base: Any, device: torch.device) -> dict[str, float]:
        """Loss of model and base model, and how far the one is from the other.

        Args:
            model: Adapted, in evaluation mode, on ``device``.
            base: The base model, likewise.
            device: Where to compute.

        Returns:
            ``other_loss`` and ``base_other_loss`` (nats per token), and ``other_kl``, the mean over tokens of
            KL(base ‖ model) in nats.
        """
        totals = torch.zeros(3, dtype=torch.float64)
        count = 0
        for start in range(0, len(self._passages), _PASSAGES_AT_ONCE):
            rows = self._passages[start : start + _PASSAGES_AT_ONCE]
            length = max(map(len, rows))
            ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            is_target = mask[:, 1:].bool()
            of_base, of_model = (
                each(**inputs).logits[:, :-1][is_target].float().log_softmax(dim=-1) for each in (base, model)
            )
            targets = ids[:, 1:][is_target][:, None]
            kl = functional.kl_div(of_model, of_base, log_target=True, reduction="sum")
            losses = (-of_model.gather(1, targets).sum(), -of_base.gather(1, targets).sum(), kl)
            totals += torch.stack(losses).double().cpu()
            count += len(targets)
        model_loss, base_loss, kl_mean = (totals / count).tolist()
        return {"other_loss": model_loss, "base_other_loss": base_loss, "other_kl": kl_mean}
