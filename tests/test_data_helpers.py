"""A tokenizer and data files for the tests of the data module; nothing comes from a hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
