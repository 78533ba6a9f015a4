"""Files say what they say: no types, columns, encodings or names are guessed."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from module_helpers import (  # noqa: F401
    END_OF_TURN,
    conversation,
    private_dataset_cache,
    saved_tokenizer,
    write_jsonl,
)

from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.data.files.sources import load_records
from na_lora_lightning.errors import DataError

# Each looks like something else than text to some reader.
TEXTS = [
    *("2020-01-01", "2020-01-01T12:00:00Z", "12:30", "042", "1.50", "1e5", "1E400", "NaN", "nan", "null", "None", "NA"),
    *(
        "true",
        "False",
        "-0",
        "0x1F",
        "1_000",
        "Infinity",
        "",
        " a ",
        "\ta\t",
        "\na\n",
        "a\r\nb",
        "a\rb",
        "\u00a0a\u3000",
    ),
    *(
        "a\u2028b\u0085c",
        "e\u0301 \u00e9",
        "👍🏽",
        "𝕏",
        "a\0b",
        '"a"',
        "a,b;c\td|e",
        "\\n",
        "#a",
        "'a'",
        "[1]",
        '{"a": 1}',
    ),
    *("\ufeffa", "123456789012345678901234567890", "=1+1", "a" * 200_000),
]


def load(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    return list(load_records(str(path), default_split="train", **options))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(texts: list[str]) -> list[dict[str, str]]:
    return [{"prompt": f"p{text}", "completion": text} for text in texts]


@pytest.mark.parametrize("kind", ["jsonl", "json", "JSONL", "csv", "tsv", "parquet", "saved", "folder", "messages"])
@pytest.mark.parametrize("texts", [TEXTS, ["2020-01-01", "2021-02-03"], ["042", "7"], ["True", "False"]])
def test_text_stays_text_to_the_letter(kind: str, texts: list[str], tmp_path: Path) -> None:
    records: list[dict[str, Any]] = pairs(texts)
    path = tmp_path / f"data.{kind}"
    if kind in ("csv", "tsv"):
        pd.DataFrame(records).to_csv(path, index=False, sep="\t" if kind == "tsv" else ",", lineterminator="\r\n")
    elif kind == "parquet":
        pd.DataFrame(records).to_parquet(path)
    elif kind == "saved":
        Dataset.from_list(records).save_to_disk(str(path))
    elif kind == "json":
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif kind == "folder":
        write_jsonl(write(path / "data" / "train.jsonl", ""), records)
    else:
        records = [{"messages": conversation("a", text)} for text in texts] if kind == "messages" else records
        path = path.with_suffix(".jsonl") if kind == "messages" else path
        write_jsonl(path, records)
    assert load(path) == records


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("has_messages", [True, False])
def test_dates_are_trained_on_as_they_are_written(has_messages: bool, suffix: str, tmp_path: Path) -> None:
    # Readers guess a type where all texts of a field look like it, those of the user too.
    texts = ["2020-01-01T00:00:00Z", "2021-02-03T04:05:06Z"]
    records = [
        {"messages": conversation(text, text)} if has_messages else {"prompt": text, "completion": text}
        for text in texts
    ]
    lines = [json.dumps(record) for record in records]
    source = str(write(tmp_path / f"data.{suffix}", f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines)))
    datamodule = InstructionDataModule(
        saved_tokenizer(tmp_path / "t"), train=source, shuffle=False, group_by_length=False
    )
    datamodule.setup("fit")
    (batch,) = datamodule.train_dataloader()
    kept = [ids[labels != -100] for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert [datamodule.tokenizer.decode(ids) for ids in kept] == [text + END_OF_TURN for text in texts]


def test_values_stay_as_they_are_written(tmp_path: Path) -> None:
    arguments = {
        "null": None,
        "big": 10**30,
        "float": 1e5,
        "dates": ["2020-01-01", None],
        "deep": {"a": [{}, {"b": None}]},
    }
    rows = [
        {
            "messages": [{"role": "user", "content": "a", "tool_calls": [{"arguments": arguments}]}],
            "tools": [{"x": None}],
        },
        {"messages": [{"role": "user", "content": "b", "name": "c"}], "n": 1},
        {"messages": None, "n": "text"},
    ]
    read = load(write_jsonl(tmp_path / "data.jsonl", rows))
    assert read == [{"tools": None, "n": None, **row} for row in rows]


def test_nulls_of_a_parquet_struct_are_not_written_into_other_records(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b", "name": "c"}]]
    pq.write_table(pa.table({"messages": turns}), tmp_path / "data.parquet")
    assert load(tmp_path / "data.parquet")[0]["messages"][0]["name"] is None
    template = "{% for m in messages %}{{ m.name is defined }}{{ m.content }}{% endfor %}"
    datamodule = InstructionDataModule(
        saved_tokenizer(tmp_path / "t", chat_template=template), predict=str(tmp_path / "data.parquet")
    )
    datamodule.setup("predict")
    (batch,) = datamodule.predict_dataloader()
    shown = [
        datamodule.tokenizer.decode(ids[m == 1])
        for ids, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert shown == ["Falsea", "Trueb"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "messages", "parquet", "parquet date"])
def test_number_in_place_of_text_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{kind.split()[0].replace('messages', 'jsonl')}"
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 42}
    if kind.startswith("parquet"):
        values = pd.to_datetime(["2020-01-01", "2020-01-02"]) if kind == "parquet date" else [1, 42]
        pd.DataFrame({"prompt": ["a", "b"], "completion": values}).to_parquet(path)
    elif kind == "messages":
        write_jsonl(path, [{"messages": conversation("a", "b")}, {"messages": conversation("a", 42)}])  # type: ignore[arg-type]
    else:
        path.write_text(json.dumps([good, bad]) if kind == "json" else f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    datamodule = InstructionDataModule(saved_tokenizer(tmp_path / "t"), train=str(path))
    number, type_name = (1 if "parquet" in kind else 2), ("datetime" if "date" in kind else "int")
    with pytest.raises(DataError, match=rf"^record {number} of .* needs text as its .*, which is of type {type_name};"):
        datamodule.setup("fit")


# ---- CSV ----


def test_unquoted_commas_are_refused_with_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "prompt,completion\nred, or blue,sky\n")
    with pytest.raises(DataError, match=r"^line 2 of '.*' has 3 cells where the header has 2; put text that"):
        load(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("prompt,completion\na,b\n\n\nc\n", "line 5 of .* has 1 cell where the header has 2; put"),
        ('prompt,completion\n"a\nb",c\nd,e,f\n', "line 4 of .* has 3 cells where"),
        ("prompt;completion\na;b;c\n", "line 2 of .* has 3 cells .*; put text that has semicolons or"),
        ('prompt,completion\na,b\n"c,d\ne,f\n', r"line 3 of .* is malformed \(a double quote is not closed\); put"),
        ('prompt,completion\n"a"b,c\n', r"line 2 of .* is malformed \(.*\); put text with quotes"),
        ("prompt,prompt,completion\na,b,c\n", "the file .* has the column 'prompt' twice; rename"),
        ("\n\n", "the file .* has no header; put"),
        ("prompt,completion\n", "the data .* has no records; give"),
        (
            "prompt,completion\ncaf\u00e9,b\n".encode("cp1252"),
            r"is not in UTF-8 \(byte 0xe9 at position 4 of line 2\); save",
        ),
        (b"\xff\xfep", "begins like UTF-16 and is not; save"),
    ],
)
def test_table_that_cannot_be_read_is_refused(content: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        load(write(tmp_path / "data.csv", content))
    assert "\n" not in str(raised.value)


EVERYDAY = [
    "prompt,completion\na é,b\nc,d\n".encode("utf-8-sig"),
    "prompt,completion\r\na é,b\r\nc,d".encode("utf-16"),
    "prompt,completion\na é,b\nc,d\n".encode("utf-16-le"),
    "prompt,completion\na é,b\nc,d\n".encode("utf-32"),
    "\n  \nprompt,completion\n\na é,b\n\nc,d\n\n".encode(),
    "prompt,completion\ra é,b\rc,d\r".encode(),
    "prompt;completion\na é;b\nc;d\n".encode(),
    "prompt\tcompletion\na é\tb\nc\td\n".encode(),
    "sep=;\nprompt;completion\na é;b\nc;d\n".encode(),
    ' "prompt" , completion\na é,b\nc,d\n'.replace(' "prompt" ', '"prompt"').encode(),
    ",prompt,completion\n0,a é,b\n1,c,d\n".encode(),
]


@pytest.mark.parametrize("content", EVERYDAY)
def test_everyday_tables_are_read(content: bytes, tmp_path: Path) -> None:
    expected = [{"prompt": "a é", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert load(write(tmp_path / "data.csv", content)) == expected


def test_header_with_a_quote_loses_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", 'prompt,completion,size 5"\na,b,1\nc,d,2\n')
    assert [row["prompt"] for row in load(path)] == ["a", "c"]
    path = write(tmp_path / "other.csv", '"prompt","completion","two\nlines"\na,b,1\n')
    assert load(path) == [{"prompt": "a", "completion": "b", "two\nlines": "1"}]


def test_columns_of_a_table_are_named_in_any_separator(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", "question;answer\na,b;c\n")
    assert load(path, columns={"prompt": "question", "completion": "answer"}) == [{"prompt": "a,b", "completion": "c"}]


# ---- JSON ----


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "a"}\r\n\r\n{"prompt": "é"}',
        '{"prompt": "a"}\r{"prompt": "é"}\r',
        '[{"prompt": "a"},\n {"prompt": "é"}]\n',
        '{\n "prompt": "a"\n}\n{\n "prompt": "é"\n}\n',
        '{"prompt": "a"}{"prompt": "\\u00e9"}',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "Json"])
def test_everyday_json_is_read(content: str, encoding: str, suffix: str, tmp_path: Path) -> None:
    assert load(write(tmp_path / f"data.{suffix}", content.encode(encoding))) == [{"prompt": "a"}, {"prompt": "é"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"prompt": "a", "prompt": "b"}', "line 1 of .*it has the key 'prompt' twice"),
        ('{"prompt": "a"}\n{"prompt": {"b": 1, "b": 2}}', "line 2 of .*it has the key 'b' twice"),
        ('{"prompt": "a"}\n{"prompt": 1e400}', "line 2 of .*it has the number 1e400, which is too large"),
        ('{"prompt": "a\nb"}', "line 1 of .*Invalid control character at"),
        ('[{"prompt": "a"}\n{"prompt": "b"}]', "line 2 of .*its array has no comma or end here"),
        ('[{"prompt": "a"}] 1', "line 1 of .*there is something after the end of its array"),
        ('{"prompt": ' + "[" * 100_000, "line 1 of .*it is nested too deeply"),
        ('{"prompt": "a"}\n{"n": ' + "1" * 5000 + "}", "line 2 of .*Exceeds the limit"),
        (
            '{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}\n' * 3,
            "line 3 of .*Expecting ',' delimiter at column 15",
        ),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', r"not in UTF-8 \(byte 0xff at position 13 of line 2\); save"),
    ],
)
def test_malformed_json_is_refused_with_its_line(content: str | bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        load(write(tmp_path / "data.jsonl", content))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_unused_column_that_changes_its_type_is_no_matter(tmp_path: Path) -> None:
    with (tmp_path / "data.jsonl").open("w") as file:
        for number in range(22_000):
            other: Any = {"score": number} if number < 21_000 else {"score": ["x"], "more": {"2020": None}}
            file.write(json.dumps({"prompt": "p" * 500, "completion": str(number), "meta": other}) + "\n")
    assert (tmp_path / "data.jsonl").stat().st_size > 10 << 20
    tracemalloc.start()
    records = load_records(str(tmp_path / "data.jsonl"), default_split="train")
    assert (len(records), records[21_999]["completion"]) == (22_000, "21999")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


# ---- Parquet ----


def test_everyday_parquet_is_read(tmp_path: Path) -> None:
    texts = ["042", "2020-01-01"]
    columns = {
        "prompt": pd.Categorical(texts),
        "completion": pd.array(texts, dtype="string[pyarrow]"),
        "when": pd.to_datetime(["2020-01-01", "2020-01-02"]),
    }
    pd.DataFrame(columns).to_parquet(tmp_path / "data.parquet")
    table = pq.read_table(tmp_path / "data.parquet").append_column(
        "odd", pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64()))
    )
    table = table.set_column(1, "completion", table["completion"].cast(pa.string_view()))
    pq.write_table(table, tmp_path / "data.PARQUET")
    read = load(tmp_path / "data.PARQUET")
    assert [(row["prompt"], row["completion"]) for row in read] == [(text, text) for text in texts]


def test_parquet_that_is_no_text_is_refused(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"cannot be loaded \(.*Invalid UTF8"):
        load(tmp_path / "data.parquet")
    pq.write_table(
        pa.table({"prompt": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))}), tmp_path / "odd.parquet"
    )
    with pytest.raises(DataError, match=r"the column 'prompt' of '.*' cannot be read \(.*\); save"):
        load(tmp_path / "odd.parquet")
