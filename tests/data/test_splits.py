"""Encoded records are taken from the cache of ``datasets`` exactly where nothing that they depend on has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from module_helpers import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from na_lora_lightning.data.text import splits
from na_lora_lightning.data.text.encoding import RecordEncoder

RECORDS = [{"prompt": "a", "completion": "b"}]


def encoded(
    change: Callable[[PreTrainedTokenizerFast], Any] = lambda tokenizer: None,
    records: list[dict[str, str]] = RECORDS,
    split: str = "train",
    **options: Any,
) -> tuple[str, list[int]]:
    tokenizer = byte_tokenizer()
    change(tokenizer)
    given: dict[str, Any] = {"max_length": 16, "loss_on": "completion", "use_chat_template": False}
    encoder = RecordEncoder(tokenizer, **{"system_prompt": None, **given, **options})
    found = splits.encode_split(Dataset.from_list(records), encoder, source="records", split=split)
    return found._fingerprint, found[0]["input_ids"]


def test_the_same_records_have_the_same_place_in_the_cache() -> None:
    assert encoded() == encoded()


@pytest.mark.parametrize(
    "changed",
    [
        {"change": lambda tokenizer: tokenizer.add_tokens(["ab"])},
        {"change": lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}")},
        {"change": lambda tokenizer: setattr(tokenizer, "padding_side", "left")},
        {"records": [{"prompt": "a", "completion": "c"}]},
        {"split": "validation"},
        {"max_length": 15},
        {"loss_on": "all"},
        {"too_long": "error"},
    ],
)
def test_a_change_has_another(changed: dict[str, Any]) -> None:
    assert encoded(**changed)[0] != encoded()[0]


def test_a_large_vocabulary_is_hashed_in_its_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.vocabulary_in_python = {str(number): number for number in range(10)}
    assert "vocabulary_in_python" in splits._said_of(tokenizer)[2]
    monkeypatch.setattr(splits, "_MANY_TOKENS", 9)
    kind, backend, rest = splits._said_of(tokenizer)
    assert (kind, backend) == (type(tokenizer), tokenizer.backend_tokenizer.to_str())
    assert rest.keys().isdisjoint({"vocabulary_in_python", "_tokenizer"})
    assert rest["padding_side"] == "right"
