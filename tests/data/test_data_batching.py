"""Padding, and the order of the batches of an epoch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from na_lora_lightning.data.batching import Collator, EpochSampler

FEW_EXAMPLES = settings(max_examples=50, deadline=None)
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def batches_of(sampler: EpochSampler) -> list[list[int]]:
    order = list(sampler)
    return [order[start : start + sampler.batch_size] for start in range(0, len(order), sampler.batch_size)]


def test_padding_on_the_right_and_of_prompts_on_the_left() -> None:
    rows = [
        {
            "input_ids": [5, 9, 9],
            "labels": [-100, 9, 9],
            "prompt_input_ids": [5],
            "prompt": "a",
            "reference": "b",
        },
        {"input_ids": [7, 8], "labels": [-100, 8], "prompt_input_ids": [7, 8], "prompt": "c", "reference": ""},
    ]
    batch = Collator(pad_token_id=9)(rows)
    expected = {
        "input_ids": [[5, 9, 9], [7, 8, 9]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        # The padding token is a target where it is text, and only there.
        "labels": [[-100, 9, 9], [-100, 8, -100]],
        "prompt_input_ids": [[9, 5], [7, 8]],
        "prompt_attention_mask": [[0, 1], [1, 1]],
    }
    assert {key: value.tolist() for key, value in batch.items() if isinstance(value, torch.Tensor)} == expected
    assert {value.dtype for value in batch.values() if isinstance(value, torch.Tensor)} == {torch.int64}
    assert (batch["prompts"], batch["references"]) == (["a", "c"], ["b", ""])


def test_padding_to_a_multiple() -> None:
    rows = [{"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "prompt_input_ids": [1, 2]}]
    rows = [{**row, "prompt": "", "reference": ""} for row in rows]
    batch = Collator(pad_token_id=0, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4, 5, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["prompt_input_ids"].tolist() == [[0, 0, 1, 2]]
    assert batch["prompt_attention_mask"].tolist() == [[0, 0, 1, 1]]


@FEW_EXAMPLES
@given(
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=5),
    multiple=st.integers(1, 5),
)
def test_padding_is_never_a_target(sequences: list[list[int]], multiple: int) -> None:
    # Every token is a target here, the padding token 0 among them.
    rows = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
    batch = Collator(pad_token_id=0, pad_to_multiple_of=multiple)(rows)
    assert torch.equal(batch["labels"] != -100, batch["attention_mask"] == 1)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(sequence) for sequence in sequences]
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    assert 0 <= width - max(map(len, sequences)) < multiple


@FEW_EXAMPLES
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 9),
    group_by_length=st.booleans(),
)
def test_every_record_once_in_each_epoch(
    lengths: list[int], batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> None:
    sampler = EpochSampler(lengths, batch_size=batch_size, seed=seed, group_by_length=group_by_length)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(order)
    # The order is a function of the seed and the epoch, whatever was drawn before.
    other = EpochSampler(lengths, batch_size=batch_size, seed=seed, group_by_length=group_by_length)
    torch.manual_seed(epoch)
    list(other)
    other.set_epoch(epoch)
    assert list(other) == order
    if group_by_length:
        assert lengths[order[0]] == max(lengths)


def test_orders_differ_between_epochs_and_between_seeds() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = EpochSampler(range(1, 101), batch_size=4, seed=seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_batches_hold_records_of_similar_length_in_random_order() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1000, (800,), generator=generator).tolist()

    def padding(group_by_length: bool) -> float:
        batches = batches_of(EpochSampler(lengths, batch_size=8, group_by_length=group_by_length))
        padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
        return 1 - sum(lengths) / padded

    assert padding(group_by_length=False) > 0.4
    assert padding(group_by_length=True) < 0.1
    longest = [max(lengths[index] for index in batch) for batch in batches_of(EpochSampler(lengths, batch_size=8))]
    assert longest[0] == max(lengths)
    rises = sum(first < second for first, second in pairwise(longest))
    # Random order rises at half of the steps; batches sorted by length would hardly rise at all.
    assert 35 <= rises <= 65


def test_order_of_the_records_without_shuffling() -> None:
    sampler = EpochSampler([3, 1, 2], batch_size=2, shuffle=False, group_by_length=False)
    sampler.set_epoch(5)
    assert list(sampler) == [0, 1, 2]


@FEW_EXAMPLES
@given(lengths=LENGTHS, batch_size=st.integers(1, 4), processes=st.integers(1, 4), epoch=st.integers(0, 3))
def test_processes_share_the_records(lengths: list[int], batch_size: int, processes: int, epoch: int) -> None:
    shares = []
    for rank in range(processes):
        sampler = EpochSampler(lengths, batch_size=batch_size, num_replicas=processes, rank=rank)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
    assert len({len(share) for share in shares}) == 1
    drawn = sorted(index for share in shares for index in share)
    assert set(drawn) == set(range(len(lengths)))
    # Only what is needed for equal shares is repeated.
    assert len(drawn) - len(lengths) == -len(lengths) % processes


def test_batches_of_all_processes_together_are_of_similar_length() -> None:
    lengths = list(range(1, 401))
    shares = [batches_of(EpochSampler(lengths, batch_size=4, num_replicas=2, rank=rank)) for rank in (0, 1)]
    spans = []
    for batches in zip(*shares, strict=True):
        together = [lengths[index] for batch in batches for index in batch]
        spans.append(max(together) - min(together))
    # The first batch, and one other, have exchanged the longest record of all.
    assert sorted(spans)[-3] < 60


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_skipped_batches_are_skipped_once(skipped: int) -> None:
    sampler = EpochSampler(range(1, 12), batch_size=3)
    batches = batches_of(sampler)
    sampler.skipped_batches = skipped
    assert batches_of(sampler) == batches[skipped:]
    assert batches_of(sampler) == batches
    assert len(sampler) == 11
