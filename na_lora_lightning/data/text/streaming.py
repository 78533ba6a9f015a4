"""Training data that is read and tokenised as it is needed, in an order that is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from na_lora_lightning.data.files.streams import stream_records
from na_lora_lightning.data.text.encoding import RecordEncoder
from na_lora_lightning.data.text.extent import Limits, require_bound, require_token
from na_lora_lightning.data.text.formats import recognise
from na_lora_lightning.data.text.mixture import Source, StoppingStrategy, probabilities
from na_lora_lightning.data.text.splits import LeftOutRecordsWarning, TruncationWarning, report_format
from na_lora_lightning.errors import DataError

# A record, its place in its source, and that source's place among the others; or what it was encoded to.
Item = dict[str, Any]


class RecordStream(IterableDataset[Any]):
    """The batches of an epoch, which depend on the data, the options and the epoch alone.

    Records pass through a buffer from which they are drawn at random. Batches are formed across all processes, of which
    each takes its share; where the last batch has too few for all of them, its records are repeated. Every process
    reads all records, and tokenises those that it needs.

    Args:
        sources: The sources.
        encoder: What records are encoded with.
        collate: Makes a batch of encoded records.
        buffer: The number of records that the next one is drawn from; 1 keeps their order.
        seed: The seed of the order.
        stopping_strategy: Whether drawing from sources with weights ends with the first that has no more records, or
            with the last.

    Raises:
        DataError: A source cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: RecordEncoder,
        collate: Callable[[list[Any]], Any],
        *,
        buffer: int,
        seed: int,
        stopping_strategy: StoppingStrategy,
    ) -> None:
        self.sources = list(sources)
        self.encoder = encoder
        self.collate = collate
        self.buffer = buffer
        self.seed = seed
        self.stopping_strategy = stopping_strategy
        self.batch_size, self.num_replicas, self.rank = 1, 1, 0
        self.limits: Limits | None = None
        # Which batches come next, and how many those epochs had that are over.
        self.epoch = 0
        self.skipped_batches = 0
        self.lengths: dict[int, int] = {}
        self._tokenised = self._long = 0
        self._has_warned = False
        self._readers = [
            stream_records(each.path, default_split="train", config=each.dataset_config, columns=each.columns)
            for each in sources
        ]
        self._forms = []
        for source, read in zip(sources, self._readers, strict=True):
            record = next(read(), None)
            if record is None:
                raise DataError(f"the data {source.path!r} has no records; give data with at least one record.")
            first = self._first_of(record, source)
            self._forms.append(recognise(first, source.path, source.format, needs_completion=True))
            report_format(self._forms[-1], first, source.path)

    def _first_of(self, record: dict[str, Any], source: Source) -> dict[str, Any]:
        """What of the first record of a source its format is told by.

        Raises:
            DataError: The source is none of this sort of data.
        """
        return record

    def share(self, batch_size: int, num_replicas: int = 1, rank: int = 0, **_: Any) -> None:
        """Says what a batch is.

        Args:
            batch_size: The number of records in a batch of one process.
            num_replicas: The number of processes that share the records.
            rank: The index of this process among them.
        """
        self.batch_size, self.num_replicas, self.rank = batch_size, num_replicas, rank

    @property
    def plan(self) -> dict[str, Any]:
        """Everything that decides the order, besides the data and the epoch."""
        return {
            "streaming": True,
            "sources": ", ".join(
                f"{each.path}" + (f" × {each.weight:g}" if each.weight else "") for each in self.sources
            ),
            "batch_size": self.batch_size,
            "processes": self.num_replicas,
            "shuffle_buffer": self.buffer,
            "stopping_strategy": self.stopping_strategy,
            "seed": self.seed,
        }

    def go_to(self, processed_batches: int) -> None:
        """Goes to the batch after some that are done, those of former epochs included."""
        self.epoch = 0
        while processed_batches and processed_batches >= self.lengths.get(self.epoch, processed_batches + 1):
            processed_batches -= self.lengths[self.epoch]
            self.epoch += 1
        self.skipped_batches = processed_batches

    def require_model_takes(self, limits: Limits) -> None:
        """Checks what is known before records are read, and the tokens of each when it is.

        Raises:
            ConfigurationError: Records may have more tokens than the model has positions.
        """
        require_bound(self.encoder.max_length, limits)
        self.limits = limits

    def __iter__(self) -> Iterator[Any]:
        """Iterates over the batches of this process that are left of the epoch.

        Raises:
            DataError: A record cannot be used.
        """
        self._tokenised = self._long = 0
        size = self.batch_size * self.num_replicas
        items = self._ordered() if self.encoder.too_long != "leave_out" else self._fitting()
        for batch, group in enumerate(iter(lambda: list(islice(items, size)), [])):
            if batch >= self.skipped_batches:
                missing = -len(group) % self.num_replicas
                all_get_some = (group * self.num_replicas)[: len(group) + missing]
                yield self.collate([self._encoded(item) for item in all_get_some[self.rank :: self.num_replicas]])
        if self._long:
            self._warn(f"{self._long} of {self._tokenised} records that were tokenised in an epoch have", "were")

    def _fitting(self) -> Iterator[Item]:
        """The records that are not too long, encoded, which is how that is known."""
        for item in self._ordered():
            encoded = self._encoded(item)
            if not encoded["truncated"]:
                yield {"encoded": encoded}
        if self._long == self._tokenised:
            raise DataError(
                f"all {self._long} records have more tokens than max_length={self.encoder.max_length}, so that none is "
                "left; raise max_length or shorten them."
            )

    def _encoded(self, item: Item) -> dict[str, Any]:
        if "encoded" in item:
            encoded: dict[str, Any] = item["encoded"]
            return encoded
        source, number = self.sources[item["source"]].path, item["number"]
        encoded = self.encoder(
            item["record"],
            number,
            source=source,
            evaluation=False,
            needs_completion=True,
            form=self._forms[item["source"]],
        )
        if self.limits is not None:
            ids = encoded["input_ids" if "input_ids" in encoded else "text_ids"]
            require_token(max(ids, default=0), number, source, self.encoder.tokenizer, self.limits)
        self._tokenised += 1
        self._long += encoded["truncated"]
        if encoded["truncated"] and not self._has_warned:
            self._has_warned = True
            self._warn(f"record {number + 1} of {source!r}, and maybe others, has", "is")
        return encoded

    def _warn(self, subject: str, verb: str) -> None:
        """Says at once that there are records that are too long, and after each epoch how many."""
        cut = self.encoder.too_long == "truncate"
        what = f"{verb} {'cut' if cut else 'left out'}"
        rank_zero_warn(
            f"{subject} more tokens than max_length={self.encoder.max_length} and {what}; raise max_length or "
            "shorten them.",
            category=TruncationWarning if cut else LeftOutRecordsWarning,
        )

    def _ordered(self) -> Iterator[Item]:
        # The sum of seed and epoch would give neighbouring seeds the same orders, one epoch apart.
        own, *others = map(
            np.random.default_rng, np.random.SeedSequence((self.seed, self.epoch)).spawn(1 + len(self._readers))
        )
        shares = probabilities(self.sources)
        if shares is None:
            return self._shuffled(chain.from_iterable(map(self._numbered, range(len(self._readers)))), own)
        read = [partial(self._shuffled_part, place, generator) for place, generator in enumerate(others)]
        return _drawn(read, shares, own, self.stopping_strategy)

    def _shuffled_part(self, place: int, generator: np.random.Generator) -> Iterator[Item]:
        return self._shuffled(self._numbered(place), generator)

    def _numbered(self, place: int) -> Iterator[Item]:
        for number, record in enumerate(self._readers[place]()):
            yield {"source": place, "number": number, "record": record}

    def _shuffled(self, items: Iterator[Item], generator: np.random.Generator) -> Iterator[Item]:
        """Each item that is read takes the place of one that is drawn from those before it."""
        held: list[Item] = list(islice(items, self.buffer))
        if self.buffer > 1:
            generator.shuffle(held)
        for item in items:
            place = int(generator.integers(len(held)))
            item, held[place] = held[place], item
            yield item
        yield from held


def _drawn(
    read: Sequence[Callable[[], Iterator[Item]]],
    shares: Sequence[float],
    generator: np.random.Generator,
    stopping_strategy: StoppingStrategy,
) -> Iterator[Item]:
    """Draws from several readers, as ``datasets.interleave_datasets`` does, but in the same way in every process."""
    readers = [each() for each in read]
    are_left = set(range(len(read)))
    while True:
        place = int(generator.choice(len(read), p=shares))
        item = next(readers[place], None)
        if item is None:
            are_left.discard(place)
            if stopping_strategy == "first_exhausted" or not are_left:
                return
            readers[place] = read[place]()
            item = next(readers[place])
        yield item


class StreamLoader(DataLoader[Any]):
    """A loader of the batches of a stream that goes on where a resumed run was interrupted.

    Each pass yields the batches that are left of an epoch of the data.

    Args:
        stream: The batches.
        processed_batches: Tells how many batches the run has processed, in all epochs together. Without it, each pass
            is the first epoch.
        **keywords: The keyword arguments of ``DataLoader``.
    """

    def __init__(
        self, stream: RecordStream, *, processed_batches: Callable[[], int] | None = None, **keywords: Any
    ) -> None:
        super().__init__(stream, batch_size=None, **keywords)
        self.stream = stream
        self._processed_batches = processed_batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Iterates over the batches that are left of the epoch that the run is in.

        This is a generator, so nothing is read before the first batch is asked for: Lightning creates the iterator
        before it is done with restoring its progress.
        """
        stream = self.stream
        stream.go_to(0 if self._processed_batches is None else self._processed_batches())
        while True:
            count = 0
            for batch in super().__iter__():
                count += 1
                yield batch
            stream.lengths[stream.epoch] = stream.skipped_batches + count
            if count or not stream.skipped_batches:
                return
            # All of the epoch was processed before the run was interrupted.
            stream.epoch, stream.skipped_batches = stream.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing, but tells Lightning that this loader can be resumed within an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing; see ``state_dict``."""
