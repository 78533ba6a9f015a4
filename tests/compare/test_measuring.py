"""Scores of a fit: losses record by record, other text, and what the base model itself answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor, nn

from na_lora_lightning.compare.forgetting import FixedText, own_answers
from na_lora_lightning.compare.measuring import record_losses, right_padded
from na_lora_lightning.errors import DataError

CPU = torch.device("cpu")


def record(length: int, given: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:given] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


RECORDS = [record(length, given, length) for length, given in ((9, 4), (3, 1), (12, 0), (5, 5), (7, 2))]


def log_probabilities(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + 0.1 * (index % 3))
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_each_record_has_its_own_loss_whichever_it_is_beside(make: Any) -> None:
    model = make().eval()
    found = record_losses(model, [right_padded(RECORDS[:2]), right_padded(RECORDS[2:])], CPU)
    for each, total, tokens in zip(RECORDS, found.sums, found.tokens, strict=True):
        targets = each["labels"][1:]
        own = log_probabilities(model, each["input_ids"].tolist())[torch.arange(len(targets)), targets.clamp_min(0)]
        assert tokens == int((targets != -100).sum())
        assert total == pytest.approx(-float(own[targets != -100].sum()), rel=1e-5)
    # Padded at the left, where positions are others, records stay as they are.
    left = {name: torch.cat([value[:, :1] * 0, value], dim=1) for name, value in right_padded(RECORDS[:1]).items()}
    left["labels"][:, 0] = -100
    assert record_losses(model, [left], CPU).tokens == found.tokens[:1]
    with pytest.raises(DataError, match="no record to score"):
        record_losses(model, [], CPU)


def test_divergence_from_the_base_model_is_over_scored_tokens_alone() -> None:
    base, model = tiny_llama().eval(), moved(tiny_llama()).eval()
    rows = [([5, 6, 7, 8, 9], 3), ([1, 2, 3], 1)]
    divergence, of_base, of_model, count = 0.0, 0.0, 0.0, 0
    for ids, given in rows:
        before, after = (log_probabilities(each, ids)[given - 1 :] for each in (base, model))
        divergence += float((before.exp() * (before - after)).sum())
        targets = torch.tensor(ids[given:])[:, None]
        of_base, of_model = (
            of_base - float(before.gather(1, targets).sum()),
            of_model - float(after.gather(1, targets).sum()),
        )
        count += len(targets)
    loads = []

    def load_base() -> nn.Module:
        loads.append(1)
        return base

    text = FixedText(rows)
    for key in ("a", "a", "b", None, None):
        found = text.measure(model, load_base, CPU, key)
        assert found == pytest.approx((of_model / count, of_base / count, divergence / count), rel=1e-4)
    # What the base model says is kept as long as it is the same one.
    assert len(loads) == 4
    assert text.measure(base, load_base, CPU, "b")[2] == pytest.approx(0.0, abs=1e-7)


def test_the_base_models_answers_are_drawn_once(tmp_path: Path) -> None:
    base, calls = tiny_llama().eval(), []

    def load_base() -> nn.Module:
        calls.append(1)
        return base

    batches = [right_padded(RECORDS)]
    first = own_answers(batches, load_base, "base", CPU, tmp_path)
    again = own_answers(batches, load_base, "base", CPU, tmp_path)
    assert len(calls) == 1
    assert first is not None
    assert again is not None
    # Of 4 and 2 tokens: the others have no target, or one at once.
    kept = [each for batch in first._batches for each in batch["labels"]]
    assert sorted(int((labels == -100).sum() > 0) for labels in kept) == [1, 1]
    assert first.measure(base, load_base, CPU)[:2] == again.measure(base, load_base, CPU)[:2]
    assert own_answers([right_padded([record(6, 0, 1)])], load_base, "base", CPU, tmp_path) is None
