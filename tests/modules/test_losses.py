from __future__ import annotations

import pytest
import torch
from torch import nn

from na_lora_lightning.modules.losses import StepAverage, TokenSums, target_positions


def squared_error_sums(weight: nn.Parameter, values: list[float]) -> TokenSums:
    """Stands in for a model: every value is a target token whose loss is its squared distance to the weight."""
    loss = ((torch.tensor(values) - weight) ** 2).sum()
    return TokenSums(loss, torch.tensor(len(values)), torch.tensor(0))


@pytest.mark.parametrize(
    "micro_batches",
    [
        # One list per process, in it one list of targets per micro-batch.
        [[[1.0, 2.0, 3.0]], [[4.0]]],
        [[[1.0], [2.0, 3.0]], [[4.0, 5.0, 6.0, 7.0], []]],
        [[[], [2.0]], [[], [5.0, 6.0]]],
    ],
)
def test_gradient_is_that_of_the_mean_over_processes_and_micro_batches(
    micro_batches: list[list[list[float]]],
) -> None:
    accumulate = 2
    counts = [[len(values) for values in process] for process in micro_batches]
    gradients = []
    for process in micro_batches:
        weight = nn.Parameter(torch.tensor(0.5))
        means = iter([sum(column) / len(micro_batches) for column in zip(*counts, strict=True)])
        average = StepAverage(lambda _, means=means: torch.tensor(next(means)))
        for values in process:
            (average.loss(squared_error_sums(weight, values)) / accumulate).backward()
        assert weight.grad is not None
        # Gradients of both processes are averaged before they are finished.
        gradients.append((weight, average))
    mean = sum(weight.grad for weight, _ in gradients) / len(gradients)
    everything = [value for process in micro_batches for values in process for value in values]
    expected = 2 * (0.5 - sum(everything) / len(everything))
    for weight, average in gradients:
        weight.grad = mean.clone()
        average.finish_step([weight], accumulate)
        assert float(weight.grad) == pytest.approx(expected, rel=1e-6)


def test_a_step_begins_afresh() -> None:
    weight = nn.Parameter(torch.tensor(0.0))
    average = StepAverage()
    for values in ([1.0, 3.0], [5.0]):
        weight.grad = None
        average.loss(squared_error_sums(weight, values)).backward()
        average.finish_step([weight], 1)
        assert float(weight.grad) == -2 * sum(values) / len(values)
    # Nothing happened since: no gradient is touched.
    before = weight.grad.clone()
    average.finish_step([weight], 4)
    assert torch.equal(weight.grad, before)


@pytest.mark.parametrize(
    ("labels", "positions"),
    [
        ([[-100, -100, 5, 6]], [1, 2]),
        ([[-100, 5, -100, -100], [-100, -100, -100, 7]], [0, 2]),
        # The first label is predicted by nothing.
        ([[5, -100, -100]], [0]),
        ([[-100, -100, -100]], [0]),
        ([[5]], [0]),
    ],
)
def test_target_positions(labels: list[list[int]], positions: list[int]) -> None:
    assert target_positions(torch.tensor(labels)).tolist() == positions
