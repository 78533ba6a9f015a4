"""Tiny models, tokenizers and data files on disk, batches, and a folder for ``na-lora fit``; nothing from a hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from na_lora_lightning import LoRAOptions, NALoRALightningModule, ScheduleOptions
from na_lora_lightning.cli.main import main

VOCABULARY = 64
END = 1


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens: two specials, then 62 printable characters from the space on."""
    vocabulary = {"<pad>": 0, "<end>": END, **{chr(32 + index): 2 + index for index in range(VOCABULARY - 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="?")


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    special = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": 0}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, **special)
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            **special,
        )
    )


def saved_model(folder: Path, kind: str = "llama", seed: int = 0) -> str:
    """Writes a model with its tokenizer, and returns the folder."""
    tiny_model(kind, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def record(seed: int, prompt_length: int, answer_length: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (prompt_length + answer_length,), generator=generator).tolist()
    return {"prompt": tokens[:prompt_length], "answer": tokens[prompt_length:]}


def make_batch(records: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Pads records as the data module does."""
    tokenizer = tiny_tokenizer()
    rows = [entry["prompt"] + entry["answer"] for entry in records]
    length = max(map(len, rows))
    prompt_length = max(len(entry["prompt"]) for entry in records)

    def right(values: list[int], padding: int) -> list[int]:
        return values + [padding] * (length - len(values))

    def left(values: list[int], padding: int) -> list[int]:
        return [padding] * (prompt_length - len(values)) + values

    return {
        "input_ids": torch.tensor([right(row, 0) for row in rows]),
        "attention_mask": torch.tensor([right([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([right([-100] * len(entry["prompt"]) + entry["answer"], -100) for entry in records]),
        "prompt_input_ids": torch.tensor([left(entry["prompt"], 0) for entry in records]),
        "prompt_attention_mask": torch.tensor([left([1] * len(entry["prompt"]), 0) for entry in records]),
        "prompts": [tokenizer.decode(entry["prompt"]) for entry in records],
        "references": [tokenizer.decode(entry["answer"]) for entry in records],
    }


class Batches(LightningDataModule):
    """Serves fixed batches in order."""

    def __init__(self, train: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.train, self.validation = train, validation or []
        self.tokenizer = tiny_tokenizer()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=None)  # type: ignore[arg-type]

    def setup(self, stage: str) -> None:
        if not self.validation and self.trainer is not None:
            self.trainer.limit_val_batches = 0

    def val_dataloader(self) -> Any:
        return DataLoader(self.validation, batch_size=None) if self.validation else []  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


def some_batches(count: int = 3, rows: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Batches of records whose lengths, and so whose numbers of targets, differ."""
    return [
        make_batch([record(seed + 10 * index + row, 3 + row, 2 + (index + row) % 4) for row in range(rows)])
        for index in range(count)
    ]


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": 1,
        "default_root_dir": folder,
    }
    return Trainer(**{**settings, **options})


def write_records(path: Path, count: int = 8) -> str:
    lines = [json.dumps({"prompt": f"{index}+1=", "completion": f"{index + 1}"}) for index in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = some_batches(1, rows=3)[0]
    with torch.no_grad():
        output: Any = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits


def trained(base: str, folder: Path, **lora: Any) -> NALoRALightningModule:
    """Leaves an adapter in ``folder/adapter`` and a checkpoint in ``folder/checkpoints/last.ckpt``."""
    seed_everything(0, verbose=False)
    module = NALoRALightningModule(
        base,
        lora=LoRAOptions(r=2, alpha=4, **lora),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-2),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
    )
    saver = ModelCheckpoint(folder / "checkpoints", save_last=True)
    quiet_trainer(folder, enable_checkpointing=True, callbacks=[saver]).fit(module, Batches(some_batches(3)))
    return module


def tied_llama(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.tie_word_embeddings = True
    config.pad_token_id = None
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


END_OF_TURN = "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def private_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps converted and tokenised data out of the home directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def byte_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, merges: Iterable[tuple[str, str]] = (), **special_tokens: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: one token for each byte and each merge, and no padding token."""
    merges = list(merges)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = {"eos_token": END_OF_TURN, **special_tokens}
    special_tokens.setdefault("additional_special_tokens", ["<|im_start|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special_tokens)


def saved_tokenizer(folder: Path, **options: Any) -> str:
    byte_tokenizer(**options).save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def numbered_records(count: int) -> list[dict[str, str]]:
    """Records of different lengths, whose completions say which they are."""
    return [{"prompt": "x" * (1 + 5 * number % 7), "completion": str(number)} for number in range(count)]


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of the user and the assistant in alternation."""
    turns = [
        {"role": ("user", "assistant")[position % 2], "content": content} for position, content in enumerate(contents)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


class Fit:
    """A fit of four steps an epoch."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        records = write_records(folder / "records.jsonl", 16)
        self.options: dict[str, Any] = {
            "model": {"model_name_or_path": saved_model(folder / "base"), "lora": {"r": 2, "alpha": 4}},
            "data": {"train": records, "validation": records, "batch_size": 4},
            "trainer": {
                "accelerator": "cpu",
                "default_root_dir": str(folder / "run"),
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
            },
        }

    def file(self, name: str, content: Any) -> str:
        path = self.folder / name
        path.write_text(yaml.safe_dump(content))
        return str(path)

    def __call__(self, *arguments: str) -> int:
        return main(["fit", "--config", self.file("run.yaml", self.options), *arguments])

    def error(self, *arguments: str) -> str:
        self._capsys.readouterr()
        assert self(*arguments) == 2
        (line,) = [line for line in self._capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert not list(self.folder.glob("run/**/*.ckpt"))
        return line.removeprefix("error: ")

    @property
    def newest(self) -> Path:
        return max(self.folder.glob("run/**/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)

    @property
    def checkpoint(self) -> dict[str, Any]:
        return torch.load(self.newest, weights_only=True)  # type: ignore[no-any-return]

    @property
    def steps(self) -> int:
        return int(self.checkpoint["global_step"])
