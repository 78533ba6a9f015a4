"""The formats of records: by which columns each is known, and the tokens and targets of a worked example."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from expected_of_others import CALL, RECORDS, TEMPLATE, tokenizer_of
from module_helpers import (  # noqa: F401
    END_OF_TURN,
    conversation,
    private_dataset_cache,
    saved_tokenizer,
    write_jsonl,
)

from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.data.files.sources import load_records
from na_lora_lightning.data.text.encoding import RecordEncoder
from na_lora_lightning.data.text.formats import _SPEAKERS, FORMATS, recognise
from na_lora_lightning.errors import ConfigurationError, DataError

EXPECTED = json.loads((Path(__file__).parent / "expected_of_others.json").read_text(encoding="utf-8"))
NEWLINE = 198


def encoder_of(template: str | None = TEMPLATE, **options: Any) -> RecordEncoder:
    settings: dict[str, Any] = {"loss_on": "completion", "use_chat_template": None, "system_prompt": None}
    return RecordEncoder(tokenizer_of(template), max_length=4096, **{**settings, **options})


def encode(record: dict[str, Any], encoder: RecordEncoder | None = None, **options: Any) -> dict[str, Any]:
    settings = {"source": "data.jsonl", "evaluation": True, "needs_completion": True, **options}
    return (encoder or encoder_of())(record, 2, **settings)


def texts(record: dict[str, Any], encoder: RecordEncoder | None = None, **options: Any) -> tuple[str, str]:
    """What a record becomes, and what of it is learned."""
    encoder = encoder or encoder_of()
    encoded = encode(record, encoder, **options)
    learned = [label for label in encoded["labels"] if label != -100]
    return str(encoder.tokenizer.decode(encoded["input_ids"])), str(encoder.tokenizer.decode(learned))


@pytest.mark.parametrize("name", RECORDS)
def test_tokens_and_targets_are_those_of_others(name: str) -> None:
    # TRL renders no prompt that is a string.
    encoder = encoder_of(use_chat_template=False if name == "prompt and completion" else None)
    encoded = encode(RECORDS[name], encoder)
    ((other, expected),) = EXPECTED[name].items()
    ids, labels = expected["input_ids"], list(expected["labels"])
    ends = [place for place, token in enumerate(ids) if token == encoder.tokenizer.eos_token_id]
    if ids[-1] == NEWLINE:
        # They go on with the line break after the last turn, which no model generates: it has stopped before.
        is_learned = other == "llamafactory" or "completion" in RECORDS[name]
        assert labels[-1] == (NEWLINE if is_learned else -100)
        ids, labels = ids[:-1], labels[:-1]
    if other == "llamafactory":
        # It learns that line break after each answer.
        labels = [-100 if place - 1 in ends else label for place, label in enumerate(labels)]
    assert encoded["input_ids"] == ids
    assert encoded["labels"] == labels


def test_alpaca_without_a_chat_template_has_the_prompt_of_its_authors() -> None:
    encoder = encoder_of(None)
    record = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    # Word for word that of axolotl (`type: alpaca`) and LitGPT.
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 1\n\n### Response:\n"
    )
    assert texts(record, encoder) == (f"{prompt}2{END_OF_TURN}", f"2{END_OF_TURN}")
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert texts({**record, "input": ""}, encoder)[0] == f"{prompt}2{END_OF_TURN}"
    for key, value in (("history", [["a", "b"]]), ("system", "Be short.")):
        with pytest.raises(DataError, match=rf"^record 3 of 'data\.jsonl' has a '{key}'.* needs a chat template; use"):
            encode({**record, key: value}, encoder)


def test_text_is_learned_whole_and_gone_on_with() -> None:
    encoder = encoder_of()
    assert texts({"text": "One\n"}) == (f"One\n{END_OF_TURN}", f"One\n{END_OF_TURN}")
    assert texts({"text": f"One{END_OF_TURN}"}) == (f"One{END_OF_TURN}", f"One{END_OF_TURN}")
    encoded = encode({"text": "One"}, encoder)
    assert (encoded["prompt_input_ids"], encoded["prompt"], encoded["reference"]) == ([256], "", "One")
    open_ended = encode({"text": "One"}, encoder, needs_completion=False)
    ids = encoder.tokenizer("One")["input_ids"]
    assert (open_ended["input_ids"], open_ended["prompt_input_ids"]) == (ids, ids)
    assert (open_ended["labels"], open_ended["prompt"], open_ended["reference"]) == ([-100] * 3, "One", "")
    with pytest.raises(DataError, match="needs text as its text, which is empty; add it"):
        encode({"text": ""})


def test_turns_of_the_prompt_and_calls_of_sharegpt() -> None:
    first, second = conversation("a", "b"), conversation("c", "d")
    rendered, learned = texts({"prompt": [*first, second[0]], "completion": second[1:]})
    assert rendered == texts({"messages": first + second})[0]
    assert learned == f"d{END_OF_TURN}"
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "b", "weight": 0},
    ]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [CALL], "content": None},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "b", "train": False},
    ]
    record = {"tools": [], "system": "Be short."}
    assert texts({"conversations": turns, **record}) == texts({"messages": messages, **record})
    assert texts({"conversations": turns, **record})[1] == f'<call>add{{"a": 1}}</call>{END_OF_TURN}'
    # A cell of a CSV file.
    assert texts({"conversations": json.dumps(turns), **record}) == texts({"messages": messages, **record})
    for turn, reason in (
        ({"from": "narrator", "value": "x"}, r"has a turn from 'narrator' \(message 1\), which is none of human, user"),
        ({"from": "function_call", "value": "x"}, r"has a function call without a name \(message 1\); give it"),
        ({"from": "human", "value": None}, "needs text as its content of message 1, which is missing"),
    ):
        with pytest.raises(DataError, match=reason):
            encode({"conversations": [turn, *turns]})


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("messages", "messages"),
        # Records without messages may have a prompt.
        ("messages prompt completion", "messages"),
        ("prompt completion id", "prompt_completion"),
        ("prompt answer", "prompt_completion"),
        # What stands beside a whole format lacks its own answers.
        ("prompt completion instruction", "prompt_completion"),
        ("prompt instruction output", "alpaca"),
        # As in the original file of Alpaca.
        ("instruction input output text", "alpaca"),
        ("id conversations", "sharegpt"),
        ("text meta", "text"),
    ],
)
def test_format_is_known_by_the_columns(columns: str, name: str) -> None:
    assert recognise(columns.split(), "x", None, needs_completion=True) is FORMATS[name]


@pytest.mark.parametrize(
    ("columns", "asked", "reason"),
    [
        (
            "question answer",
            None,
            r"has the columns 'question', 'answer', by which none of the formats messages \(mess",
        ),
        ("instruction response", None, "has the columns 'instruction', 'response', by which none"),
        (
            "messages conversations",
            None,
            r"fits several formats, messages \(messages\) and sharegpt \(conversations\); s",
        ),
        ("prompt completion instruction output", None, "fits several formats, prompt_completion "),
        (
            "instruction response",
            "alpaca",
            r"has no column 'output' \(its columns are .*\), which format='alpaca' reads",
        ),
        ("prompt", "text", "has no column 'text'"),
    ],
)
def test_columns_that_say_nothing_or_too_much_are_refused(columns: str, asked: str | None, reason: str) -> None:
    with pytest.raises(DataError, match=rf"^the data 'x' {reason}") as raised:
        recognise(columns.split(), "x", asked, needs_completion=True)
    assert "\n" not in str(raised.value)


def test_format_that_is_asked_for() -> None:
    assert recognise(["messages", "conversations"], "x", "sharegpt", needs_completion=True) is FORMATS["sharegpt"]
    assert recognise(["instruction"], "x", "alpaca", needs_completion=False) is FORMATS["alpaca"]
    with pytest.raises(
        ConfigurationError, match="format='parquet' is unknown; use messages, prompt_completion, alpaca"
    ):
        recognise(["text"], "x", "parquet", needs_completion=True)


@pytest.mark.usefixtures("private_dataset_cache")
def test_a_line_says_what_each_file_is_taken_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"ask": "a", "output": "b", "text": "ab"}]
    data = write_jsonl(tmp_path / "a.jsonl", rows)
    module = InstructionDataModule(saved_tokenizer(tmp_path / "t"), train=data, columns={"instruction": "ask"})
    with caplog.at_level(logging.INFO):
        module.setup("fit")
    line = f"The data {data!r} is read as alpaca, from 'instruction', 'output'; it does not read 'text'."
    assert [record.message for record in caplog.records if "is read as" in record.message] == [line]
    assert module.describe()["train"].target_tokens == 2
    as_text = InstructionDataModule(str(tmp_path / "t"), train=data, format="text")
    as_text.setup("fit")
    assert as_text.describe()["train"].target_tokens == 3


FILES = {
    "data.jsonl": "".join(json.dumps({"prompt": f"é{n}", "completion": str(n)}) + "\n" for n in range(3)),
    "data.ndjson": "".join(json.dumps({"prompt": f"é{n}", "completion": str(n)}) + "\n" for n in range(3)),
    "data.json": json.dumps([{"prompt": f"é{n}", "completion": str(n)} for n in range(3)]),
    "data.csv": "prompt,completion\n" + "".join(f"é{n},{n}\n" for n in range(3)),
    "data.tsv": "prompt\tcompletion\n" + "".join(f"é{n}\t{n}\n" for n in range(3)),
}


@pytest.mark.usefixtures("private_dataset_cache")
@pytest.mark.parametrize("name", FILES)
def test_compressed_files_are_read_as_others(name: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / name, tmp_path / "folder" / f"train-{name}.gz"
    packed.parent.mkdir()
    plain.write_text(FILES[name], encoding="utf-8")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    expected = [{"prompt": f"é{n}", "completion": str(n)} for n in range(3)]
    for source in (plain, packed, packed.parent, f"{packed}:train[:3]"):
        assert load_records(str(source), default_split="train").to_list() == expected
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"cannot be unpacked with gzip \(.*\); correct its name or copy it again"):
        load_records(str(packed), default_split="train")
    packed.write_bytes(plain.read_bytes())
    with pytest.raises(DataError, match=r"cannot be unpacked with gzip \(Not a gzipped file"):
        load_records(str(packed), default_split="train")


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```json\n(.*?)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("record", "text"), EXAMPLES)
def test_worked_examples_of_the_documentation(record: str, text: str) -> None:
    encoder = encoder_of()
    encoded = encode(json.loads(record), encoder)
    shown, is_learned = "", False
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        if (label != -100) is not is_learned:
            shown, is_learned = shown + "⟧⟦"[label != -100], label != -100
        shown += str(encoder.tokenizer.decode(token))
    assert shown + "⟧" * is_learned == text


def test_the_documentation_has_every_format() -> None:
    assert len(EXAMPLES) == 6
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(FORMATS)
    assert all(f"`{column}`" in PAGE for known in FORMATS.values() for column in known.columns)
    assert all(f"`{speaker}`" in PAGE for speaker in _SPEAKERS)
