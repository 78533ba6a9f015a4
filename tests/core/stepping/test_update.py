"""The blended update against the reference, and gradient sums against a loop that writes down what is alive."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from na_lora_lightning.core.stepping.rows import blend_rows
from na_lora_lightning.core.stepping.skipped_steps import Aside, GradientWatch
from na_lora_lightning.errors import UpdateError


@given(
    rows=st.integers(1, 8),
    rank=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_blending_equals_the_reference(rows: int, rank: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(rows, rank, generator=generator).to(dtype) for _ in range(2))
    weight = 1.5 * torch.rand(rows, generator=generator)
    weight[0] = 0.0
    weight[-1] = 1.0
    found = blend_rows(before, after, weight)
    expected = torch.tensor(reference.update_rows(before.tolist(), after.tolist(), weight.tolist()))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(found[-1], after[-1])
    if rows > 1:
        assert torch.equal(found[0], before[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_masked_row_survives_an_update_that_is_not_finite(bad: float) -> None:
    before = torch.tensor([[1.0, -0.0], [2.0, 3.0]])
    found = blend_rows(before, torch.full((2, 2), bad), torch.tensor([0.0, 1.0]))
    assert torch.equal(found[0], before[0])
    assert torch.signbit(found[0, 1])
    assert not torch.isfinite(found[1]).any()


def test_vectors_are_blended_row_by_row_too() -> None:
    found = blend_rows(torch.zeros(3), torch.ones(3), torch.tensor([0.0, 0.25, 1.0]))
    assert found.tolist() == [0.0, 0.25, 1.0]


class Sums:
    """What a controller does with the watch: each pass adds its own number to a sum."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.sum = torch.zeros(1)
        self.aside = Aside()
        self.watch = GradientWatch(parameters, self.aside.drop)
        self.watch.attach()

    def forward(self, number: int) -> None:
        if self.watch.begin_pass():
            self.aside.take([self.sum])
        self.sum += number

    def step(self) -> float:
        self.aside.give_back([self.sum])
        self.watch.stepped()
        found = self.sum.item()
        self.sum.zero_()
        return found


CLEARS = ["not", "before the forward", "before the backward", "before the backward by zeros"]
MICRO_STEPS = st.lists(
    st.fixed_dictionaries(
        {
            "passes": st.integers(1, 3),
            "clear": st.sampled_from(
                ["not", "before the forward", "before the backward", "before the backward by zeros"]
            ),
            "clips": st.booleans(),
            "used": st.sampled_from(["both", "first", "second"]),
            "steps": st.booleans(),
        }
    ),
    min_size=1,
    max_size=12,
)


@given(MICRO_STEPS)
def test_a_step_has_the_sums_of_the_passes_whose_gradients_it_uses(micro_steps: list[dict[str, object]]) -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    sums = Sums(parameters)
    alive: list[int] = []
    number = 0
    # A parameter that one pass does not use says nothing of it, so all of them are used in the first of a step.
    fresh = True
    for micro in micro_steps:
        if micro["clear"] == "before the forward":
            optimizer.zero_grad()
            alive, fresh = [], True
        passes = []
        for _ in range(micro["passes"]):  # type: ignore[call-overload]
            number += 1
            passes.append(number)
            sums.forward(number)
        if str(micro["clear"]).startswith("before the backward"):
            optimizer.zero_grad(set_to_none="zeros" not in str(micro["clear"]))
            alive, fresh = [], True
        used = (
            parameters
            if fresh
            else {"first": parameters[:1], "second": parameters[1:]}.get(str(micro["used"]), parameters)
        )
        loss: Tensor = sum((parameter.sum() for parameter in used), torch.zeros(()))
        loss.backward()
        alive += passes
        fresh = False
        if micro["clips"]:
            nn.utils.clip_grad_norm_(parameters, 0.5)
        if micro["steps"]:
            assert sums.step() == sum(alive)
            optimizer.step()
            optimizer.zero_grad()
            alive, fresh = [], True
    sums.watch.detach()
    assert not any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters)


def test_gradients_without_backward_passes_are_no_business_of_the_watch() -> None:
    parameter = nn.Parameter(torch.ones(2))
    sums = Sums([parameter])
    for number in (1, 2, 4):
        sums.forward(number)
        torch.autograd.grad(parameter.sum(), parameter)
    assert not sums.watch.backward_passes
    assert sums.step() == 7.0


def test_overflowed_sums_leave_no_trace() -> None:
    parameter = nn.Parameter(torch.ones(2))
    sums = Sums([parameter])
    sums.sum += torch.nan
    parameter.sum().backward()
    parameter.grad = None
    sums.forward(3)
    parameter.sum().backward()
    assert sums.step() == 3.0


def test_a_hundred_skipped_steps_in_a_row_are_no_skipped_steps() -> None:
    parameter = nn.Parameter(torch.ones(2))
    sums = Sums([parameter])

    def skip(times: int) -> None:
        for _ in range(times):
            sums.forward(1)
            parameter.sum().backward()
            parameter.grad = None

    skip(100)
    # The last one is seen in the backward pass of this step.
    sums.forward(1)
    parameter.sum().backward()
    assert sums.step() == 1.0
    with pytest.raises(UpdateError, match="give NA-LoRA the optimizer that steps"):
        skip(103)
