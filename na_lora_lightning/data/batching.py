"""Batches: padding, their order within an epoch, and resumption in the middle of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.labels import IGNORED_LABEL


@dataclass(frozen=True)
class Collator:
    """Pads records into a batch.

    Training sequences are padded on the right; prompts are padded on the left, so that generation continues
    every prompt at its last token.

    Attributes:
        pad_token_id: The token to pad with; attention masks, not this token, tell padding from text.
        pad_to_multiple_of: Rounds the padded length up to a multiple of this number.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Builds the batch of ``records``."""
        input_ids = [record["input_ids"] for record in records]
        batch: dict[str, Any] = {
            "input_ids": self._pad(input_ids, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(ids) for ids in input_ids], 0),
            "labels": self._pad([record["labels"] for record in records], IGNORED_LABEL),
        }
        if "prompt_input_ids" in records[0]:
            prompt_ids = [record["prompt_input_ids"] for record in records]
            batch["prompt_input_ids"] = self._pad(prompt_ids, self.pad_token_id, side="left")
            batch["prompt_attention_mask"] = self._pad([[1] * len(ids) for ids in prompt_ids], 0, side="left")
            batch["prompts"] = [record["prompt"] for record in records]
            batch["references"] = [record["reference"] for record in records]
        return batch

    def _pad(self, sequences: list[list[int]], value: int, side: str = "right") -> Tensor:
        tensors = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
        padded = pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
        missing = -padded.shape[1] % self.pad_to_multiple_of
        return pad(padded, (missing, 0) if side == "left" else (0, missing), value=value)


class EpochSampler(DistributedSampler[int]):
    """Draws the order of the records of an epoch, as a pure function of the seed and the epoch.

    With ``group_by_length``, each batch holds records of similar length, the batches come in random order,
    and the batch of the longest record comes first, so that a lack of memory shows at once. The batches are
    formed across all processes before they are shared out. Because this is a ``DistributedSampler``,
    Lightning uses it as it is. If the records cannot be shared evenly, a few are repeated, as PyTorch's own
    sampler does.

    Args:
        lengths: The number of tokens of each record.
        batch_size: The number of records in a batch of one process.
        shuffle: Whether to shuffle; otherwise the records come in their own order.
        group_by_length: Whether to group records of similar length.
        seed: The seed.
        num_replicas: The number of processes that share the records.
        rank: The index of this process among them.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        shuffle: bool = True,
        group_by_length: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.skipped_batches = 0

    @property
    def plan(self) -> dict[str, int | bool]:
        """Everything that decides the order, besides the epoch."""
        return {
            "records": len(self.lengths),
            "tokens": sum(self.lengths),
            "batch_size": self.batch_size,
            "processes": self.num_replicas,
            "shuffle": self.shuffle,
            "group_by_length": self.group_by_length,
            "seed": self.seed,
        }

    def __iter__(self) -> Iterator[int]:
        """Iterates over the records of this process, once without those of the first ``skipped_batches``."""
        order = self._order()
        order = (order * math.ceil(self.total_size / len(order)))[: self.total_size]
        own = order[self.rank :: self.num_replicas]
        first, self.skipped_batches = self.skipped_batches * self.batch_size, 0
        return iter(own[first:])

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.lengths)))
        # The sum of seed and epoch would give neighbouring seeds the same orders, one epoch apart.
        generator = torch.Generator()
        generator.manual_seed(int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]))
        if not self.group_by_length:
            return torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * self.num_replicas
        order = get_length_grouped_indices(self.lengths, size, generator=generator)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        # The first batch has the longest record and the last one may be smaller: both keep their places.
        middle = batches[1:-1]
        shuffled = [middle[place] for place in torch.randperm(len(middle), generator=generator).tolist()]
        return [index for batch in [*batches[:1], *shuffled, *batches[1:][-1:]] for index in batch]


def refuse_other_plan(plan: dict[str, Any], former: dict[str, Any]) -> None:
    """Refuses to resume a run whose batches would not be those of the interrupted run.

    Args:
        plan: What the order of batches depends on.
        former: What it depended on in the interrupted run.

    Raises:
        ConfigurationError: The plans differ.
    """
    changed = {name: value for name, value in plan.items() if former.get(name) != value}
    if changed:
        before = ", ".join(f"{name}={former.get(name)}" for name in changed)
        now = ", ".join(f"{name}={value}" for name, value in changed.items())
        raise ConfigurationError(
            f"the checkpoint was saved with {before}, so training cannot be resumed from it with {now}; "
            "restore the former data and settings, or start a new run from the trained weights."
        )


class ResumableDataLoader(DataLoader[dict[str, Any]]):
    """A data loader that goes on where a resumed run was interrupted, within an epoch too.

    The batches of all epochs form one stream. Each pass yields as many batches as an epoch has, from the place
    that the run has reached. The trainer keeps that place in its checkpoints, so that the loader itself needs no
    state. Batches before the place are not read.

    Args:
        *arguments: The arguments of ``DataLoader``; its sampler is an ``EpochSampler``.
        processed_batches: Tells how many batches the run has processed, in all epochs together. Without it, each
            pass is the epoch that the sampler is set to.
        **keywords: The keyword arguments of ``DataLoader``.
    """

    def __init__(self, *arguments: Any, processed_batches: Callable[[], int] | None = None, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._processed_batches = processed_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Iterates over as many batches as an epoch has.

        This is a generator, so nothing is drawn before the first batch is asked for: Lightning creates the
        iterator before it is done with restoring its progress.
        """
        if self._processed_batches is None or not isinstance(self.sampler, EpochSampler):
            # Lightning replaces the sampler for ``overfit_batches``, where each pass has to be the same.
            yield from super().__iter__()
            return
        remaining = len(self)
        epoch, skipped = divmod(self._processed_batches(), remaining)
        while remaining:
            self.sampler.set_epoch(epoch)
            self.sampler.skipped_batches = skipped
            for batch in islice(super().__iter__(), remaining):
                remaining -= 1
                yield batch
            epoch, skipped = epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing, but tells Lightning that this loader can be resumed within an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing; see ``state_dict``."""
