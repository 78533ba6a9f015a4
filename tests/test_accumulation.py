"""Accumulation: the micro-batches of a step weigh by their tokens, in its gradient and in its statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMA_TARGETS, tiny_llama, with_lora
from torch import Tensor, nn

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.modules.losses import StepAverage, TokenSums


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    accumulated=st.integers(1, 5),
    scale=st.sampled_from([1.0, 1024.0]),
    seed=st.integers(0, 2**16),
)
def test_a_step_of_micro_batches_has_the_gradient_of_one_batch(
    counts: list[int], accumulated: int, scale: float, seed: int
) -> None:
    counts = counts[:accumulated]
    values = torch.randn(sum(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    average = StepAverage()
    for part in values.split(counts):
        sums = TokenSums((part - weight).square().sum(), torch.tensor(len(part)), torch.tensor(0))
        # What Lightning does to a loss, with the scale of a GradScaler.
        (average.loss(sums) / accumulated * scale).backward()
    average.finish_step([weight], accumulated)
    assert weight.grad is not None
    expected = float(2 * (0.5 - values).sum() / max(1, len(values)))
    assert float(weight.grad) / scale == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_statistics_weigh_micro_batches_by_their_tokens_also_where_a_sample_is_looked_at() -> None:
    def responsiveness(limit: int | None, batches: list[dict[str, Tensor]]) -> Tensor:
        model = with_lora(tiny_llama(), LLAMA_TARGETS)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        controller = GateController(model, discover_gates(model).require(), ObserverOptions(max_tokens=limit))
        importance = controller.set_importance(ImportanceOptions())
        controller.attach([optimizer])
        for batch in batches:
            model(**batch).loss.backward()
        optimizer.step()
        return importance.responsiveness

    # All tokens of a batch alike, so that a sample of it is exact and the weighting alone can differ.
    def batch(token: int, rows: int, padded: int) -> dict[str, Tensor]:
        mask = torch.ones(rows, 8, dtype=torch.long)
        mask[1::2, 8 - padded :] = 0
        return {"input_ids": torch.full((rows, 8), token), "attention_mask": mask, "labels": torch.full((rows, 8), 2)}

    batches = [batch(3, 16, 3), batch(9, 2, 0), batch(5, 1, 0)]
    everything, sampled = responsiveness(None, batches), responsiveness(8, batches)
    assert torch.allclose(sampled, everything, rtol=1e-5)
    assert not torch.allclose(sampled, responsiveness(8, [batch(3, 1, 0), *batches[1:]]), rtol=1e-2)
