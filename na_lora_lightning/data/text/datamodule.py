"""The data module for supervised fine-tuning on instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from transformers import DataCollatorWithFlattening, PreTrainedTokenizerBase

from na_lora_lightning.data.batching import Collator
from na_lora_lightning.data.options import TextOptions
from na_lora_lightning.data.text.encoding import RecordEncoder, TooLong
from na_lora_lightning.data.text.formats import COLUMNS
from na_lora_lightning.data.text.mixture import PART, StoppingStrategy
from na_lora_lightning.data.text.sourced import SourcedDataModule
from na_lora_lightning.data.text.tokenizer import (
    add_tokens,
    choose_chat_template,
    load_tokenizer,
    require_new_tokens,
)
from na_lora_lightning.errors import ConfigurationError


class InstructionDataModule(SourcedDataModule):
    """Prompts and completions, conversations, or texts for supervised fine-tuning of a causal language model.

    A record has the columns of one of these formats, by which it is recognised:

    * ``messages``: a list of turns with ``role`` and ``content``, of which every assistant turn is learned;
    * ``prompt`` and ``completion``: two strings, or two lists of turns, of which those of the completion are learned;
    * ``instruction``, ``input`` and ``output`` (Alpaca), with ``history`` where there is one;
    * ``conversations`` (ShareGPT): a list of turns with ``from`` and ``value``;
    * ``text``: all of it is learned, and no chat template is used.

    ``system`` is the record's system message. ``tools``, a list of functions or its JSON text, is given to the chat
    template; an assistant turn with ``tool_calls`` needs no ``content``. What the template leaves out of these is an
    error. A turn of the assistant with ``weight: 0``, ``train: false`` or the like is not learned; a key that asks for
    anything else is an error. Each of ``train``, ``validation``, ``test`` and ``predict`` is one of

    * a local ``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` or ``.tsv`` file, with or without ``.gz``, or a ``.parquet``
      file,
    * a folder written by ``datasets.Dataset.save_to_disk``, or one with data files,
    * the name of a data set on the Hugging Face hub,

    and may end in a colon and the name of a split or of a part of one, as in ``data.jsonl:train[:90%]``.

    Batches have ``input_ids``, ``attention_mask`` and ``labels``, padded on the right. Packed batches have
    ``position_ids``, which begin anew with each record, in place of the mask, and one row. Batches for
    validation, test and prediction also have ``prompt_input_ids`` and ``prompt_attention_mask``, padded on
    the left and ready for generation, and the lists of strings ``prompts`` and ``references``. Records for
    prediction need no completion; their reference is then empty.

    The batches of an epoch depend on nothing but the data, these arguments and the epoch. A run that is resumed
    from a checkpoint goes on with the next batch, within an epoch too. Where the trainer cuts epochs short
    (``limit_train_batches``), the next one goes on with the batches that are left.

    Args:
        tokenizer_name_or_path: The folder or hub name of the model's tokenizer.
        train: The training data: a source, or a list of sources. A source in a list is a name, or a dictionary with its
            ``path``, and where it has its own ``format``, ``columns`` and ``dataset_config``. With a ``weight`` for
            each, records are drawn from them by these weights; without, all records of all of them are taken.
        validation: The validation data, a source or a list of sources without weights, as are the next two.
        test: The test data.
        predict: The data to predict completions for.
        validation_fraction: The share of the records of each source of the training data that is kept for validation in
            place of other data, drawn at random by the seed.
        stopping_strategy: Whether an epoch of sources with weights ends where the first has no more records, or where
            all have been through, the others repeating theirs.
        streaming: Whether training data are read and tokenised as they are needed: for data that are too large for the
            disk, or to begin at once. Epochs then have no known length, so that most schedules need
            ``trainer.max_steps``. Needs ``group_by_length: false``.
        shuffle_buffer: The number of records that the next record of streamed data is drawn from.
        dataset_config: The configuration of hub data sets that have several.
        format: What records are; None stands for what their columns tell, which a line says.
        columns: The names that the data has for the columns of its format, for example
            ``{"prompt": "question", "completion": "answer"}``.
        batch_size: The number of records in a training batch of each process.
        validation_batch_size: The number of records in other batches; None stands for ``batch_size``.
        max_length: The largest number of tokens of a record.
        too_long: What becomes of longer ones: ``truncate`` cuts them, and a record that would lose its whole completion
            is an error; ``leave_out`` leaves them out; ``error`` refuses the first. How many were cut or left out is
            reported by a ``TruncationWarning`` or a ``LeftOutRecordsWarning``.
        loss_on: ``completion`` for the loss on the completions, each with the token that ends it; ``all`` for
            the loss on every token.
        chat_template: Another chat template than the tokenizer's: a file, the folder or hub name of a tokenizer that
            has one, or the name of one of several that the tokenizer has. ``training`` trains with TRL's version of the
            tokenizer's own, in which answers are marked, and generates with the tokenizer's; needs ``trl``.
        use_chat_template: Whether to render records with the tokenizer's chat template. None stands for
            whenever it has one. Without it, a completion follows its prompt directly.
        system_prompt: A system message for records that have none; needs a chat template.
        shuffle: Whether to shuffle the training data in each epoch.
        group_by_length: Whether to form training batches of records of similar length, which saves padding.
        pad_to_multiple_of: Pads batches to a length that is a multiple of this number.
        packing: Whether the records of a training batch stand one after another in one row, without padding and
            without one seeing another, instead of in a row each (what others call padding-free). It saves what padding
            costs where lengths differ much; ``attention_implementation: flash_attention_2`` saves attention between
            records too. A model that cannot keep records apart is refused.
        num_proc: The number of processes that tokenise the records; None stands for this one alone.
        num_workers: The number of processes that load batches. Records are tokenised beforehand, so none are
            needed as a rule.
        seed: The seed of the order of the training data.
        tokenizer_revision: The branch, tag or commit of a tokenizer from the hub.
        trust_remote_code: Whether a tokenizer from the hub may run code of its own.
        new_tokens: Texts that are one token each, as the model has them.

    Raises:
        ConfigurationError: An argument has a value that cannot work.
    """

    COLUMNS = COLUMNS

    def __init__(
        self,
        tokenizer_name_or_path: str,
        train: list[str | dict[str, Any]] | str | None = None,
        validation: list[str | dict[str, Any]] | str | None = None,
        test: list[str | dict[str, Any]] | str | None = None,
        predict: list[str | dict[str, Any]] | str | None = None,
        validation_fraction: float | None = None,
        stopping_strategy: StoppingStrategy = "first_exhausted",
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        dataset_config: str | None = None,
        format: Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"] | None = None,
        columns: dict[str, str] | None = None,
        batch_size: int = 8,
        validation_batch_size: int | None = None,
        max_length: int = 1024,
        too_long: TooLong = "truncate",
        loss_on: Literal["completion", "all"] = "completion",
        chat_template: str | None = None,
        use_chat_template: bool | None = None,
        system_prompt: str | None = None,
        shuffle: bool = True,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 1,
        packing: bool = False,
        num_proc: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer_revision: str | None = None,
        trust_remote_code: bool = False,
        new_tokens: list[str] | None = None,
    ) -> None:
        if loss_on not in ("completion", "all"):
            raise ConfigurationError(f"loss_on={loss_on!r} is unknown; set it to 'completion' or 'all'.")
        if too_long not in ("error", "truncate", "leave_out"):
            raise ConfigurationError(f"too_long={too_long!r} is unknown; set it to 'error', 'truncate' or 'leave_out'.")
        if packing and pad_to_multiple_of != 1:
            raise ConfigurationError(
                f"packing leaves no padding, which pad_to_multiple_of={pad_to_multiple_of} asks for; leave one out."
            )
        super().__init__(
            TextOptions.among(locals()),
            validation_fraction=validation_fraction,
            stopping_strategy=stopping_strategy,
            streaming=streaming,
            shuffle_buffer=shuffle_buffer,
            num_proc=num_proc,
        )
        self.packing = packing
        self.save_hyperparameters(logger=False)
        self.tokenizer_name_or_path = tokenizer_name_or_path
        self.loss_on: Literal["completion", "all"] = loss_on
        self.too_long: TooLong = too_long
        self.tokenizer_revision = tokenizer_revision
        self.trust_remote_code = trust_remote_code
        self.new_tokens = require_new_tokens(new_tokens or ())
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._training_template: str | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self.tokenizer_name_or_path,
                revision=self.tokenizer_revision,
                trust_remote_code=self.trust_remote_code,
            )
            add_tokens(self._tokenizer, self.new_tokens)
            if self.options.chat_template is not None:
                self._training_template = choose_chat_template(self._tokenizer, self.options.chat_template)
        return self._tokenizer

    def _record_encoder(self) -> RecordEncoder:
        return RecordEncoder(
            self.tokenizer,
            max_length=self.options.max_length,
            loss_on=self.loss_on,
            use_chat_template=self.options.use_chat_template,
            system_prompt=self.options.system_prompt,
            training_template=self._training_template,
            too_long=self.too_long,
        )

    def _dataset(self, split: str) -> Any:
        prepared = self._prepared_split(split)
        unread = {"index", "tokens", "target_tokens", "truncated", "end_ids", PART}
        return prepared.remove_columns([name for name in prepared.column_names if name in unread])

    def _collator(self, split: str) -> Callable[[list[Any]], Any]:
        if self.packing and split == "train":
            return DataCollatorWithFlattening()
        pad_token_id = self.tokenizer.pad_token_id
        if pad_token_id is None:
            pad_token_id = self.tokenizer.eos_token_id
        return Collator(pad_token_id, self.options.pad_to_multiple_of)
