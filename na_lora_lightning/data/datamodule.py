"""The data module for supervised fine-tuning on instructions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from na_lora_lightning.data.batching import Collator, EpochSampler, ResumableDataLoader
from na_lora_lightning.data.encoding import RecordEncoder, load_tokenizer
from na_lora_lightning.data.sources import load_records
from na_lora_lightning.data.splits import SplitSummary, encode_split
from na_lora_lightning.errors import ConfigurationError

_SPLITS_OF_STAGE: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "validation", "test", "predict"),
}
# What each split is called in a data set that does not say otherwise.
_DEFAULT_SPLITS = {"train": "train", "validation": "validation", "test": "test", "predict": "test"}
_COLUMNS = ("messages", "prompt", "completion")


class InstructionDataModule(LightningDataModule):
    """Prompts and completions, or conversations, for supervised fine-tuning of a causal language model.

    A record has the strings ``prompt`` and ``completion``, or ``messages``: a list of turns with ``role`` and
    ``content``, of which every assistant turn is a completion. Each of ``train``, ``validation``, ``test``
    and ``predict`` is one of

    * a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file,
    * a folder written by ``datasets.Dataset.save_to_disk``, or one with data files,
    * the name of a data set on the Hugging Face hub,

    and may end in a colon and the name of a split or of a part of one, as in ``data.jsonl:train[:90%]``.

    Batches have ``input_ids``, ``attention_mask`` and ``labels``, padded on the right. Batches for
    validation, test and prediction also have ``prompt_input_ids`` and ``prompt_attention_mask``, padded on
    the left and ready for generation, and the lists of strings ``prompts`` and ``references``. Records for
    prediction need no completion; their reference is then empty.

    The batches of an epoch depend on nothing but the data, these arguments and the epoch. A run that is resumed
    from a checkpoint goes on with the next batch, within an epoch too. Where the trainer cuts epochs short
    (``limit_train_batches``), the next one goes on with the batches that are left.

    Args:
        tokenizer_name_or_path: The folder or hub name of the model's tokenizer.
        train: The training data.
        validation: The validation data.
        test: The test data.
        predict: The data to predict completions for.
        dataset_config: The configuration of hub data sets that have several.
        columns: The names that the data has for ``prompt``, ``completion`` or ``messages``, for example
            ``{"prompt": "question", "completion": "answer"}``.
        batch_size: The number of records in a training batch of each process.
        validation_batch_size: The number of records in other batches; None stands for ``batch_size``.
        max_length: The number of tokens that a longer record is cut to. How many were cut is reported by a
            ``TruncationWarning``; a record that would lose its whole completion is an error.
        loss_on: ``completion`` for the loss on the completions, each with the token that ends it; ``all`` for
            the loss on every token.
        use_chat_template: Whether to render records with the tokenizer's chat template. None stands for
            whenever it has one. Without it, a completion follows its prompt directly.
        system_prompt: A system message for records that have none; needs a chat template.
        shuffle: Whether to shuffle the training data in each epoch.
        group_by_length: Whether to form training batches of records of similar length, which saves padding.
        pad_to_multiple_of: Pads batches to a length that is a multiple of this number.
        num_workers: The number of processes that load batches. Records are tokenised beforehand, so none are
            needed as a rule.
        seed: The seed of the order of the training data.
        tokenizer_revision: The branch, tag or commit of a tokenizer from the hub.
        trust_remote_code: Whether a tokenizer from the hub may run code of its own.

    Raises:
        ConfigurationError: If an argument has a value that cannot work.
    """

    def __init__(
        self,
        tokenizer_name_or_path: str,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        dataset_config: str | None = None,
        columns: dict[str, str] | None = None,
        batch_size: int = 8,
        validation_batch_size: int | None = None,
        max_length: int = 1024,
        loss_on: Literal["completion", "all"] = "completion",
        use_chat_template: bool | None = None,
        system_prompt: str | None = None,
        shuffle: bool = True,
        group_by_length: bool = True,
        pad_to_multiple_of: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        tokenizer_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        _require_at_least(1, batch_size=batch_size, pad_to_multiple_of=pad_to_multiple_of)
        _require_at_least(2, max_length=max_length)
        _require_at_least(0, num_workers=num_workers, seed=seed)
        if validation_batch_size is not None:
            _require_at_least(1, validation_batch_size=validation_batch_size)
        if loss_on not in ("completion", "all"):
            raise ConfigurationError(f"loss_on={loss_on!r} is unknown; set it to 'completion' or 'all'.")
        if group_by_length and not shuffle:
            raise ConfigurationError(
                "shuffle=False keeps the order of the records, which group_by_length=True changes; set "
                "group_by_length=False too."
            )
        if system_prompt is not None and use_chat_template is False:
            raise ConfigurationError(
                "system_prompt needs a chat template, which use_chat_template=False turns off; leave one out."
            )
        unknown = sorted(set(columns or {}) - set(_COLUMNS))
        if unknown:
            raise ConfigurationError(
                f"columns has the unknown key {unknown[0]!r}; use 'messages', 'prompt' and 'completion'."
            )
        self.save_hyperparameters(logger=False)
        self.tokenizer_name_or_path = tokenizer_name_or_path
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_config = dataset_config
        self.columns = dict(columns or {})
        self.batch_size = batch_size
        self.validation_batch_size = validation_batch_size
        self.max_length = max_length
        self.loss_on: Literal["completion", "all"] = loss_on
        self.use_chat_template = use_chat_template
        self.system_prompt = system_prompt
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer_revision = tokenizer_revision
        self.trust_remote_code = trust_remote_code
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._encoded: dict[str, Dataset] = {}
        self._limit_val_batches: int | float | None = None
        self._plan: dict[str, Any] = {}
        self._plan_to_resume: dict[str, Any] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(
                self.tokenizer_name_or_path,
                revision=self.tokenizer_revision,
                trust_remote_code=self.trust_remote_code,
            )
        return self._tokenizer

    def prepare_data(self) -> None:
        """Downloads and converts the data once, before every process loads it."""
        for split, source in self.sources.items():
            if source is not None:
                self._load(split, source)

    def setup(self, stage: str | None = None) -> None:
        """Tokenises the data of a stage.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None stands for all data that is given.

        Raises:
            ConfigurationError: If the stage needs data that was not given, or the tokenizer does not fit.
            DataError: If the data, or a record of it, cannot be used.
        """
        # Lightning gives an enumeration whose members equal, but do not print as, their names.
        stage = getattr(stage, "value", stage)
        splits = _SPLITS_OF_STAGE[stage]
        if stage is not None and self.sources[splits[0]] is None:
            raise ConfigurationError(
                f"The data for {splits[0]!r} is not given but is needed to {stage}; set data.{splits[0]}."
            )
        if stage == "fit" and self.sources["validation"] is None and self.trainer is not None:
            # Lightning warns of a validation step without data, however it is told that there is none.
            self._limit_val_batches = self.trainer.limit_val_batches
            self.trainer.limit_val_batches = 0
        encoder = RecordEncoder(
            self.tokenizer,
            max_length=self.max_length,
            loss_on=self.loss_on,
            use_chat_template=self.use_chat_template,
            system_prompt=self.system_prompt,
        )
        for split in splits:
            source = self.sources[split]
            if source is not None and split not in self._encoded:
                self._encoded[split] = encode_split(
                    self._load(split, source),
                    encoder,
                    source=source,
                    evaluation=split != "train",
                    needs_completion=split != "predict",
                )

    def teardown(self, stage: str | None = None) -> None:
        """Lets the trainer validate again, should it be used with other data.

        Args:
            stage: The stage that ends.
        """
        if self._limit_val_batches is not None and self.trainer is not None:
            self.trainer.limit_val_batches = self._limit_val_batches
            self._limit_val_batches = None

    def describe(self) -> dict[str, SplitSummary]:
        """Returns the size of each split that has been set up."""
        return {split: SplitSummary.of(encoded) for split, encoded in self._encoded.items()}

    def train_dataloader(self) -> ResumableDataLoader:
        """Returns the shuffled training batches."""
        encoded = self._encoded_split("train")
        strategy = self.trainer.strategy if self.trainer is not None else None
        sampler = EpochSampler(
            list(encoded["tokens"]),
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            group_by_length=self.group_by_length,
            seed=self.seed,
            **(getattr(strategy, "distributed_sampler_kwargs", None) or {}),
        )
        if self._plan_to_resume:
            sampler.refuse_other_plan(self._plan_to_resume)
        self._plan, self._plan_to_resume = sampler.plan, {}
        return ResumableDataLoader(
            **self._loader_options(encoded, self.batch_size),
            sampler=sampler,
            processed_batches=None if self.trainer is None else self._processed_batches,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[DataLoader[dict[str, Any]]]:
        """Returns the validation batches, or none if no validation data was given."""
        return [] if self.sources["validation"] is None else self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the test batches."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the batches to predict."""
        return self._evaluation_loader("predict")

    def state_dict(self) -> dict[str, Any]:
        """Returns what the order of the training batches depends on."""
        return {"plan": self._plan}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what the order of the training batches depended on, to be checked if training goes on."""
        self._plan_to_resume = state_dict["plan"]

    def _load(self, split: str, source: str) -> Dataset:
        return load_records(
            source, default_split=_DEFAULT_SPLITS[split], config=self.dataset_config, columns=self.columns
        )

    def _encoded_split(self, split: str) -> Dataset:
        if split not in self._encoded:
            raise ConfigurationError(f"The data for {split!r} is not set up; give data.{split} and call setup() first.")
        return self._encoded[split]

    def _evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        batch_size = self.validation_batch_size or self.batch_size
        return DataLoader(**self._loader_options(self._encoded_split(split), batch_size))

    def _loader_options(self, encoded: Dataset, batch_size: int) -> dict[str, Any]:
        pad_token_id = self.tokenizer.pad_token_id
        if pad_token_id is None:
            pad_token_id = self.tokenizer.eos_token_id
        return {
            "dataset": encoded.remove_columns(["tokens", "target_tokens", "truncated"]),
            "batch_size": batch_size,
            "collate_fn": Collator(pad_token_id, self.pad_to_multiple_of),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            # Otherwise each epoch would advance the global random state, which dropout depends on.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _processed_batches(self) -> int:
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed


def _require_at_least(minimum: int, **options: int) -> None:
    for name, value in options.items():
        if value < minimum:
            raise ConfigurationError(f"{name}={value} is too small; set it to {minimum} or more.")
