"""The blended update: exact at its ends, and equal to the reference between them."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from na_lora_lightning.core.stepping.rows import blend_rows


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
