"""The data module as a whole, alone and with a trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from module_helpers import (  # noqa: F401
    END_OF_TURN,
    byte_tokenizer,
    conversation,
    numbered_records,
    private_dataset_cache,
    saved_tokenizer,
    write_jsonl,
)
from torch import Tensor
from torch.utils.data import DataLoader

from na_lora_lightning.data import InstructionDataModule, SplitSummary, TruncationWarning
from na_lora_lightning.errors import ConfigurationError, DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning 2.6 with newer versions of PyTorch.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

MakeDataModule = Callable[..., InstructionDataModule]
Batch = dict[str, Any]


@pytest.fixture
def make_datamodule(tmp_path: Path) -> MakeDataModule:
    """A factory of data modules with eleven training records, in six batches, and three for validation."""
    tokenizer = saved_tokenizer(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "data.jsonl", numbered_records(11))

    def make(**options: Any) -> InstructionDataModule:
        settings = {"train": data, "validation": f"{data}:train[:3]", "batch_size": 2}
        return InstructionDataModule(tokenizer, **{**settings, **options})

    return make


def target_texts(datamodule: InstructionDataModule, batch: Batch) -> list[str]:
    kept = [ids[labels != -100] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    return [str(datamodule.tokenizer.decode(ids)) for ids in kept]


def test_every_record_comes_once_in_an_epoch(make_datamodule: MakeDataModule) -> None:
    datamodule = make_datamodule()
    datamodule.prepare_data()
    datamodule.setup("fit")
    batches = list(datamodule.train_dataloader())
    texts = [text for batch in batches for text in target_texts(datamodule, batch)]
    assert sorted(texts) == sorted(f"{number}{END_OF_TURN}" for number in range(11))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2, 2, 2, 1]
    assert all(set(batch) == {"input_ids", "attention_mask", "labels"} for batch in batches)


def test_processes_that_tokenise_give_the_same_tokens(make_datamodule: MakeDataModule, tmp_path: Path) -> None:
    encoded = []
    # More than there are records for the last.
    for num_proc, number in ((None, 0), (3, 100), (20, 200)):
        # Of its own, so that none is read from the cache.
        data = write_jsonl(tmp_path / f"{number}.jsonl", numbered_records(11))
        datamodule = make_datamodule(num_proc=num_proc, train=data, validation=None)
        datamodule.setup("fit")
        encoded.append(datamodule._prepared["train"].to_list())
    assert len(encoded[0]) == 11
    assert encoded[1] == encoded[0]
    assert encoded[2] == encoded[0]
    bad = write_jsonl(tmp_path / "bad.jsonl", [*numbered_records(3), {"prompt": "a"}])
    with pytest.raises(DataError, match=r"^record 4 of '.*bad\.jsonl' has no completion"):
        make_datamodule(train=bad, validation=None, num_proc=2).setup("fit")
    with pytest.raises(ConfigurationError, match="num_proc=0 is too small"):
        make_datamodule(num_proc=0)


def test_same_seed_gives_the_same_batches(make_datamodule: MakeDataModule) -> None:
    def epochs(seed: int) -> list[list[list[int]]]:
        datamodule = make_datamodule(seed=seed)
        datamodule.setup("fit")
        loader = datamodule.train_dataloader()
        seen = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            seen.append([batch["input_ids"].tolist() for batch in loader])
        return seen

    first, second = epochs(seed=3)
    assert [first, second] == epochs(seed=3)
    assert first != second
    assert [first, second] != epochs(seed=4)


def test_loading_leaves_the_global_random_state_alone(make_datamodule: MakeDataModule) -> None:
    datamodule = make_datamodule()
    datamodule.setup("fit")
    before = torch.get_rng_state()
    list(datamodule.train_dataloader())
    list(datamodule.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_batches_are_ready_for_generation(make_datamodule: MakeDataModule) -> None:
    datamodule = make_datamodule(validation_batch_size=3)
    datamodule.setup("validate")
    loader = datamodule.val_dataloader()
    assert isinstance(loader, DataLoader)
    (batch,) = loader
    assert batch["references"] == ["0", "1", "2"]
    assert batch["prompts"] == [record["prompt"] for record in numbered_records(3)]
    assert target_texts(datamodule, batch) == [f"{number}{END_OF_TURN}" for number in range(3)]
    header = datamodule.tokenizer("<|im_start|>assistant\n")["input_ids"]
    rows = zip(batch["prompt_input_ids"], batch["prompt_attention_mask"], numbered_records(3), strict=True)
    for ids, mask, record in rows:
        assert ids[-len(header) :].tolist() == header
        shown = datamodule.tokenizer.decode(ids[mask == 1])
        assert shown == f"<|im_start|>user\n{record['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        # The padding is on the left.
        assert mask.tolist() == sorted(mask.tolist())


def test_prediction_needs_no_completion(make_datamodule: MakeDataModule, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "open.jsonl", [{"prompt": "a"}, {"prompt": "b", "completion": "c"}])
    datamodule = make_datamodule(predict=source)
    datamodule.setup("predict")
    (batch,) = datamodule.predict_dataloader()
    assert (batch["prompts"], batch["references"]) == (["a", "b"], ["", "c"])
    assert target_texts(datamodule, batch) == ["", "c" + END_OF_TURN]


def test_messages_and_columns(make_datamodule: MakeDataModule, tmp_path: Path) -> None:
    turns = {"turns": conversation("a", "b", "c", "d")}
    pairs = {"question": "a", "answer": "b"}
    for record, columns, target in (
        (turns, {"messages": "turns"}, "b<|im_end|>d<|im_end|>"),
        (pairs, {"prompt": "question", "completion": "answer"}, "b<|im_end|>"),
    ):
        source = write_jsonl(tmp_path / f"{min(columns)}.jsonl", [record])
        datamodule = make_datamodule(train=source, validation=None, columns=columns)
        datamodule.setup("fit")
        (batch,) = datamodule.train_dataloader()
        assert target_texts(datamodule, batch) == [target]


@pytest.mark.parametrize("pad_token", [None, "<|im_end|>", "<pad>"])
def test_padding_token(pad_token: str | None, make_datamodule: MakeDataModule, tmp_path: Path) -> None:
    options = {} if pad_token is None else {"pad_token": pad_token}
    datamodule = make_datamodule()
    datamodule.tokenizer_name_or_path = saved_tokenizer(tmp_path / "other", **options)
    datamodule.setup("fit")
    expected = datamodule.tokenizer.convert_tokens_to_ids(pad_token or END_OF_TURN)
    padding = [
        token_id
        for batch in datamodule.train_dataloader()
        for token_id in batch["input_ids"][batch["attention_mask"] == 0].tolist()
    ]
    assert set(padding) == {expected}


def test_description_counts_records_and_tokens(make_datamodule: MakeDataModule) -> None:
    datamodule = make_datamodule()
    assert datamodule.describe() == {}
    datamodule.setup("fit")
    # Around its prompt and completion, a record has 20 tokens: 6 and 2 of the user's turn, 11 and 1 of the other.
    prompts = [len(record["prompt"]) for record in numbered_records(11)]
    assert datamodule.describe() == {
        "train": SplitSummary(records=11, tokens=sum(prompts) + 12 + 11 * 20, target_tokens=12 + 11, truncated=0),
        "validation": SplitSummary(records=3, tokens=sum(prompts[:3]) + 3 * 21, target_tokens=6, truncated=0),
    }


def test_truncation_is_reported_once_for_each_split(make_datamodule: MakeDataModule, tmp_path: Path) -> None:
    records = [{"prompt": "a", "completion": "b" * length} for length in (1, 9, 12)]
    source = write_jsonl(tmp_path / "long.jsonl", records)
    datamodule = make_datamodule(train=source, validation=None, max_length=24)
    for _ in range(2):
        # The second one takes the tokens from the cache, and warns too.
        fresh = make_datamodule(train=source, validation=None, max_length=24)
        with pytest.warns(TruncationWarning, match=r"^2 of 3 records of '.*long.jsonl' .* max_length=24 and"):
            fresh.setup("fit")
        fresh.setup("fit")
        assert fresh.describe()["train"] == SplitSummary(records=3, tokens=22 + 48, target_tokens=2 + 8, truncated=2)
    assert datamodule.describe() == {}


def test_unusable_record_is_an_error_before_training(make_datamodule: MakeDataModule, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c"}])
    datamodule = make_datamodule(train=source)
    datamodule.prepare_data()
    with pytest.raises(DataError, match=r"^record 2 of '.*bad\.jsonl' has no completion \(its keys are 'prompt'\)"):
        datamodule.setup("fit")
    with pytest.raises(DataError, match="does not exist"):
        make_datamodule(validation=str(tmp_path / "absent.jsonl")).prepare_data()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 0}, "batch_size=0 is too small; set it to 1 or more"),
        ({"validation_batch_size": 0}, "validation_batch_size=0 is too small"),
        ({"max_length": 1}, "max_length=1 is too small; set it to 2 or more"),
        ({"num_workers": -1}, "num_workers=-1 is too small"),
        ({"seed": -1}, "seed=-1 is too small"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 is too small"),
        ({"loss_on": "prompt"}, "loss_on='prompt' is unknown; set it"),
        ({"shuffle": False}, "shuffle=False keeps the order of the records, which group_by_length=True"),
        ({"system_prompt": "a", "use_chat_template": False}, "system_prompt needs a chat template"),
        ({"columns": {"question": "prompt"}}, "columns has the unknown key 'question'; use"),
    ],
)
def test_argument_that_cannot_work(options: dict[str, Any], reason: str, make_datamodule: MakeDataModule) -> None:
    with pytest.raises(ConfigurationError, match=reason) as raised:
        make_datamodule(**options)
    assert "\n" not in str(raised.value)


def test_stage_without_data(make_datamodule: MakeDataModule) -> None:
    datamodule = make_datamodule()
    with pytest.raises(ConfigurationError, match=r"for 'test' is not given but is needed to test; set data\.test"):
        datamodule.setup("test")
    with pytest.raises(ConfigurationError, match="for 'train' is not set up"):
        datamodule.train_dataloader()


def test_arguments_on_a_command_line(make_datamodule: MakeDataModule, tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(InstructionDataModule, "data")
    arguments = ["--data.tokenizer_name_or_path=t", "--data.train=a.jsonl", "--data.loss_on=all"]
    arguments += ['--data.columns={"prompt": "question"}', "--data.use_chat_template=null"]
    datamodule = parser.instantiate(parser.parse_args(arguments)).data
    assert datamodule.sources == {"train": "a.jsonl", "validation": None, "test": None, "predict": None}
    assert (datamodule.loss_on, datamodule.columns) == ("all", {"prompt": "question"})
    explanation = InstructionDataModule.__doc__ or ""
    assert all(f"\n        {name}: " in explanation for name in signature(InstructionDataModule).parameters)


class RecordingModule(LightningModule):
    """Records the batches that it is trained on, and can be interrupted before one of them."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Any] = []
        self.validated: list[str] = []
        self.predicted: list[str] = []
        self.interrupted_at = interrupted_at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if len(self.seen) == self.interrupted_at:
            raise RuntimeError("interrupted")
        self.seen.append({key: value.tolist() for key, value in batch.items()})
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch["references"]

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        return batch["prompts"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint at every call of one hook, named by the number of batches trained on."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.checkpoints: dict[int, Path] = {}

        def save(trainer: Trainer, module: RecordingModule, *_: Any) -> None:
            path = folder / f"{len(module.seen)}.ckpt"
            self.checkpoints[len(module.seen)] = path
            trainer.save_checkpoint(path)

        setattr(self, hook, save)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(callbacks=list(callbacks), **settings, **dict.fromkeys(quiet, False), **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_validation_and_prediction(num_workers: int, make_datamodule: MakeDataModule) -> None:
    alone = make_datamodule()
    alone.setup("fit")
    loader = alone.train_dataloader()
    expected = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        expected += [{key: value.tolist() for key, value in batch.items()} for batch in loader]
    datamodule = make_datamodule(predict=alone.sources["train"], num_workers=num_workers)
    module = RecordingModule()
    trainer(max_epochs=2).fit(module, datamodule=datamodule)
    assert module.seen == expected
    assert module.validated == ["0", "1", "2"] * 2
    predictions = trainer().predict(module, datamodule=datamodule)
    assert predictions is not None
    prompts = [prompt for batch in predictions for prompt in batch]
    assert prompts == [record["prompt"] for record in numbered_records(11)]


def test_training_without_validation_data(make_datamodule: MakeDataModule) -> None:
    module = RecordingModule()
    one = trainer(max_epochs=1)
    one.fit(module, datamodule=make_datamodule(validation=None))
    assert (len(module.seen), module.validated) == (6, [])
    one.validate(module, datamodule=make_datamodule(), verbose=False)
    assert module.validated == ["0", "1", "2"]


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_overfitting_repeats_the_same_batches(make_datamodule: MakeDataModule) -> None:
    module = RecordingModule()
    trainer(max_epochs=3, overfit_batches=2).fit(module, datamodule=make_datamodule())
    assert len(module.seen) == 6
    assert module.seen[:2] == module.seen[2:4] == module.seen[4:]


def test_limited_epochs_go_through_all_data(make_datamodule: MakeDataModule) -> None:
    module, limited = RecordingModule(), RecordingModule()
    trainer(max_epochs=2).fit(module, datamodule=make_datamodule())
    trainer(max_epochs=3, limit_train_batches=4).fit(limited, datamodule=make_datamodule())
    assert limited.seen == module.seen


@pytest.mark.parametrize(
    ("hook", "options"),
    [
        ("on_train_batch_end", {"max_epochs": 3}),
        ("on_train_batch_end", {"max_steps": 18}),
        ("on_train_batch_end", {"max_epochs": 3, "accumulate_grad_batches": 2}),
        ("on_validation_end", {"max_epochs": 3, "val_check_interval": 2}),
        ("on_validation_end", {"max_steps": 18}),
        ("on_train_batch_end", {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}),
        ("on_train_epoch_end", {"max_epochs": 3}),
        ("on_train_epoch_end", {"max_steps": 18}),
        ("on_train_epoch_end", {"max_steps": 18, "limit_val_batches": 0}),
    ],
)
def test_resumed_run_sees_the_batches_that_are_left(
    hook: str, options: dict[str, Any], make_datamodule: MakeDataModule, tmp_path: Path
) -> None:
    uninterrupted, saving = RecordingModule(), SaveAt(hook, tmp_path)
    trainer(saving, **options).fit(uninterrupted, datamodule=make_datamodule())
    assert len(uninterrupted.seen) == 18
    # Early and late in the first epoch, at its end, and within and at the end of the second.
    for done in sorted({2, 5, 6, 8, 12} & set(saving.checkpoints)):
        resumed = RecordingModule()
        checkpoint = saving.checkpoints[done]
        trainer(**options).fit(resumed, datamodule=make_datamodule(), ckpt_path=checkpoint)
        assert resumed.seen == uninterrupted.seen[done:], done


@pytest.mark.parametrize("interrupted_at", [0, 4, 6, 9])
def test_batch_that_was_interrupted_is_repeated(
    interrupted_at: int, make_datamodule: MakeDataModule, tmp_path: Path
) -> None:
    uninterrupted, interrupted, resumed = RecordingModule(), RecordingModule(interrupted_at), RecordingModule()
    trainer(max_epochs=2).fit(uninterrupted, datamodule=make_datamodule())
    saving = SaveAt("on_exception", tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(saving, max_epochs=2).fit(interrupted, datamodule=make_datamodule())
    checkpoint = saving.checkpoints[interrupted_at]
    trainer(max_epochs=2).fit(resumed, datamodule=make_datamodule(), ckpt_path=checkpoint)
    assert interrupted.seen + resumed.seen == uninterrupted.seen


def test_resumption_with_workers_and_again(make_datamodule: MakeDataModule, tmp_path: Path) -> None:
    uninterrupted = RecordingModule()
    trainer(max_epochs=3).fit(uninterrupted, datamodule=make_datamodule())
    seen = []
    checkpoint = None
    for steps in (4, 9, 18):
        part, saving = RecordingModule(), SaveAt("on_train_end", tmp_path)
        one = trainer(saving, max_steps=steps)
        one.fit(part, datamodule=make_datamodule(num_workers=1), ckpt_path=checkpoint)
        seen += part.seen
        (checkpoint,) = saving.checkpoints.values()
    assert seen == uninterrupted.seen


@pytest.mark.parametrize("option", [{"batch_size": 3}, {"seed": 1}, {"group_by_length": False}])
def test_resumption_with_other_batches_is_refused(
    option: dict[str, Any], make_datamodule: MakeDataModule, tmp_path: Path
) -> None:
    saving = SaveAt("on_train_end", tmp_path)
    trainer(saving, max_steps=2).fit(RecordingModule(), datamodule=make_datamodule())
    checkpoint = saving.checkpoints[2]
    ((name, value),) = option.items()
    with pytest.raises(ConfigurationError, match=rf"cannot be resumed from it with {name}={value}; restore"):
        trainer(max_steps=4).fit(RecordingModule(), datamodule=make_datamodule(**option), ckpt_path=checkpoint)
    # Evaluating the checkpoint does not depend on how it was trained.
    module = RecordingModule()
    trainer().validate(module, datamodule=make_datamodule(**option), ckpt_path=checkpoint, verbose=False)
    assert module.validated == ["0", "1", "2"]


def test_processes_of_a_distributed_run_see_different_batches(make_datamodule: MakeDataModule) -> None:
    class Strategy:
        def __init__(self, rank: int) -> None:
            self.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank}

    class Stub:
        def __init__(self, rank: int) -> None:
            self.strategy = Strategy(rank)

    texts = []
    for rank in (0, 1):
        datamodule = make_datamodule(batch_size=2)
        datamodule.setup("fit")
        datamodule.trainer = Stub(rank)  # type: ignore[assignment]
        loader = datamodule.train_dataloader()
        loader._processed_batches = None
        texts.append([text for batch in loader for text in target_texts(datamodule, batch)])
    # Eleven records for two processes: one is repeated.
    assert [len(share) for share in texts] == [6, 6]
    counts = [texts[0].count(text) + texts[1].count(text) for text in set(itertools.chain(*texts))]
    assert sorted(counts) == [1] * 10 + [2]
