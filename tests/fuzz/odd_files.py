"""Odd data files, and a reading of them that shares nothing with the package."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from hypothesis import strategies as st

START, END = "<|im_start|>", "<|im_end|>"
# Texts of a record with whether they are targets.
Pieces = list[tuple[str, bool]]

_LOOKALIKES = [
    *(
        "2020-01-01",
        "2020-01-01T12:00:00Z",
        "2020-01-01 12:00:00.5+02:00",
        "12:30",
        "042",
        "1.50",
        "1e5",
        "1E400",
        "-0",
    ),
    *(
        "NaN",
        "nan",
        "null",
        "None",
        "NA",
        "N/A",
        "true",
        "False",
        "Infinity",
        "0x1F",
        "1_000",
        "1,000",
        "=1+1",
        "sep=;",
    ),
    *("sep=;", "[1]", '{"a": 1}', '"a"', "\\", "\\n", "\\ud800", "data[1].jsonl", "123456789012345678901234567890"),
]
_PIECES = [
    *",;\t|\"'\n\r\\{}[]:\0\ufeff \u2028\x85\xa0é👍𝕏龘\x1a\x7f#ab0-/%",
    *('""', "\r\n", '\\"', "e\u0301", "👍🏽"),
]
_TEXTS = st.one_of(
    st.sampled_from(_LOOKALIKES),
    st.lists(st.sampled_from(_PIECES), min_size=1, max_size=8).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    st.text("ab \n", min_size=1, max_size=3).map(lambda text: text * 700),
)
_ODD_VALUES = st.sampled_from([None, 42, 1.5, True, ["a"], {"a": "b"}, "", "half \ud800", 10**40])
_UNUSED = st.sampled_from(
    [None, 1, -1.5, True, "2020-01-01", "text", [1, "a"], {"a": None}, {"b": [{}]}, 10**30, "\udfff", {"": {"": 0}}]
)
_ENCODINGS = ["utf-8"] * 9 + [
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "cp1252",
    "shift_jis",
    "koi8-r",
]
_NAMES = ["data", "data[1]", "w?", "*", "a:b", "a::b", "{a,b}", "a b", "~a", "train", "é", "a'b\"", "x.y", "#%41", "-"]
_KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "saved", "folder"]


@dataclass(frozen=True)
class OddFile:
    """A file to be written.

    Attributes:
        kind: Its format.
        name: Its name without an ending.
        records: What is in it.
        options: How it is written.
        harm: A place in the file in thousandths, and what happens there: it is cut off, or a byte becomes another.
    """

    kind: str
    name: str
    records: list[dict[str, Any]]
    options: dict[str, Any]
    harm: tuple[int, int | None] | None

    @property
    def has_messages(self) -> bool:
        """Whether it has conversations."""
        return any("messages" in record for record in self.records)

    @property
    def is_sound(self) -> bool:
        """Whether it has to be accepted."""
        if self.harm is not None or not self.options["is_decodable"] or self.options.get("quoting") == "none":
            return False
        texts = [text for record in self.records for text in _texts(record)]
        return all(isinstance(text, str) and text and _is_text(text) for text in texts)

    def write(self, folder: Path) -> str:
        """Writes it and returns the name to load it by."""
        suffix = {"saved": "", "folder": ""}.get(self.kind, f".{self.kind}")
        path = folder / (self.name + (suffix.upper() if self.options["upper"] else suffix))
        if self.kind == "saved":
            Dataset.from_list(self.records).save_to_disk(str(path.with_name("saved")))
            return str(path.with_name("saved"))
        if self.kind == "parquet":
            content = _parquet(self.records, self.options)
        elif self.kind in ("csv", "tsv"):
            content = _csv(self.records, self.kind, self.options).encode(self.options["encoding"], "replace")
        else:
            content = _json(self.records, self.kind, self.options).encode(self.options["encoding"], "surrogatepass")
        if self.harm is not None:
            place, byte = self.harm[0] * len(content) // 1000, self.harm[1]
            content = content[:place] + (b"" if byte is None else bytes([byte]) + content[place + 1 :])
        if self.kind == "folder":
            path.mkdir()
            (path / "train.jsonl").write_bytes(content)
        else:
            path.write_bytes(content)
        return str(path)

    def read(self, source: str) -> list[Pieces] | None:
        """What is to be trained on; None where the file does not say."""
        records = self.records
        if self.harm is not None:
            path = Path(source) / "train.jsonl" if self.kind == "folder" else Path(source)
            read = _read_harmed(path, self.kind, self.options)
            if read is None:
                return None
            records = read
        return [_pieces(record) for record in records]


def _texts(record: dict[str, Any]) -> list[Any]:
    if "messages" in record:
        return [turn.get("content") for turn in record["messages"]]
    return [record.get("prompt"), record.get("completion")]


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _pieces(record: dict[str, Any]) -> Pieces:
    if "messages" not in record:
        return [(record["prompt"], False), (record["completion"] + END, True)]
    pieces: Pieces = []
    for turn in record["messages"]:
        is_answer = turn["role"] == "assistant"
        pieces += [(f"{START}{turn['role']}\n", False), (turn["content"] + END, is_answer), ("\n", False)]
    return pieces[:-1]


def _json(records: list[dict[str, Any]], kind: str, options: dict[str, Any]) -> str:
    style = {"ensure_ascii": options["ascii"], "indent": options["indent"]}
    if kind == "json" and options["array"]:
        return json.dumps(records, **style)
    end = options["line_end"]
    lines = [json.dumps(record, **style).replace("\n", end) for record in records]
    return end * options["blank"] + (end * (1 + options["blank"])).join(lines) + end * options["last"]


def _csv(records: list[dict[str, Any]], kind: str, options: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record))
    delimiter = "\t" if kind == "tsv" else options["delimiter"]
    rows = [names, *([str(record.get(name, "")) for name in names] for record in records)]
    if options["index"]:
        rows = [["", *rows[0]], *([str(number), *row] for number, row in enumerate(rows[1:]))]
    if options["quoting"] == "none":
        return options["line_end"].join(delimiter.join(row) for row in rows)
    file = io.StringIO(newline="")
    # Minimally, the writer quotes no other line break than its own.
    has_breaks = any(end in cell for row in rows for cell in row for end in "\r\n")
    quoting = csv.QUOTE_ALL if options["quoting"] == "all" or has_breaks else csv.QUOTE_MINIMAL
    csv.writer(file, delimiter=delimiter, lineterminator=options["line_end"], quoting=quoting).writerows(rows)
    return options["line_end"] * options["blank"] + file.getvalue()


def _parquet(records: list[dict[str, Any]], options: dict[str, Any]) -> bytes:
    table = Dataset.from_list(records).data.table.replace_schema_metadata(None)
    for name in ("prompt", "completion"):
        if name in table.column_names and pa.types.is_string(table[name].type):
            place = table.column_names.index(name)
            column = table[name].combine_chunks()
            types = {"large": pa.large_string(), "view": pa.string_view()}
            if options["text"] == "categories":
                column = column.dictionary_encode()
            elif options["text"] in types:
                column = column.cast(types[options["text"]])
            table = table.set_column(place, name, column)
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _read_harmed(path: Path, kind: str, options: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Reads a file with the standard library alone; Parquet knows when it is harmed, or keeps what it says."""
    if kind == "parquet":
        return pq.read_table(io.BytesIO(path.read_bytes())).to_pylist()
    content = path.read_bytes()
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and content[1:4:2] == b"\0\0":
        encoding = "utf-16-le"
    elif encoding == "utf-8" and content[:4:2] == b"\0\0":
        encoding = "utf-16-be"
    try:
        text = content.decode(encoding)
        if kind in ("csv", "tsv"):
            delimiter = "\t" if kind == "tsv" else options["delimiter"]
            header, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
            return [dict(zip(header, row, strict=True)) for row in rows]
        records: list[dict[str, Any]] = []
        rest = text.replace("\r\n", "\n").replace("\r", "\n").strip(" \t\n")
        while rest:
            value, end = json.JSONDecoder().raw_decode(rest)
            records += value if isinstance(value, list) else [value]
            rest = rest[end:].strip(" \t\n")
    except (ValueError, csv.Error):
        return None
    return records


@st.composite
def odd_files(draw: st.DrawFn) -> OddFile:
    """A file of any format, sound or not."""
    kind = draw(st.sampled_from(_KINDS))
    is_table = kind in ("csv", "tsv")
    has_messages = not is_table and draw(st.booleans())
    records = draw(st.lists(_conversations() if has_messages else _pairs(), min_size=1, max_size=5))
    takes_anything = kind in ("jsonl", "json", "folder")
    if takes_anything and draw(st.integers(0, 3)) == 0:
        # Something else in the place of a text.
        record = draw(st.sampled_from(records))
        target, key = (record["messages"][-1], "content") if has_messages else (record, "completion")
        target[key] = draw(_ODD_VALUES)
    if takes_anything and draw(st.booleans()):
        for record in records:
            if draw(st.booleans()):
                record[draw(st.sampled_from(["meta", "id", "", "other", "\ud800"]))] = draw(_UNUSED)
    line_end = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    quoting = draw(st.sampled_from(["all", "minimal", "minimal", "none"]))
    delimiter = draw(st.sampled_from([",", ",", ";", "\t", "|"]))
    if is_table and quoting == "none":
        # A row that has too many cells for certain.
        records[-1]["completion"] = f"a{delimiter if kind == 'csv' else chr(9)}b"
    options = {
        "encoding": draw(st.sampled_from(_ENCODINGS)) if kind not in ("parquet", "saved") else "utf-8",
        "upper": draw(st.integers(0, 3)) == 0,
        "ascii": draw(st.booleans()),
        "indent": draw(st.sampled_from([None, None, None, 1])),
        "array": draw(st.booleans()),
        "line_end": line_end,
        "blank": draw(st.sampled_from([0, 0, 1, 2])),
        "last": draw(st.booleans()),
        "quoting": quoting if is_table else "",
        "delimiter": delimiter,
        "index": draw(st.booleans()),
        "text": draw(st.sampled_from(["plain", "large", "view", "categories"])),
    }
    if takes_anything and not all(_is_text(text) for text in _strings(records)):
        options["ascii"] = True
    options["is_decodable"] = options["encoding"].startswith("utf")
    if not options["is_decodable"]:
        # Only what the encoding has, and something that is not ASCII.
        letter = {"cp1252": "é", "shift_jis": "ア", "koi8-r": "ж"}[options["encoding"]]
        records = [{"prompt": letter, "completion": letter} for _ in records]
        options["ascii"] = False
    harm = None
    if draw(st.integers(0, 4)) == 0 and kind != "saved":
        harm = (draw(st.sampled_from(range(3, 1000, 7))), draw(st.one_of(st.none(), st.integers(0, 255))))
    return OddFile(kind, draw(st.sampled_from(_NAMES)), records, options, harm)


@st.composite
def _pairs(draw: st.DrawFn) -> dict[str, Any]:
    return {"prompt": draw(_TEXTS), "completion": draw(_TEXTS)}


@st.composite
def _conversations(draw: st.DrawFn) -> dict[str, Any]:
    texts = draw(st.lists(_TEXTS, min_size=1, max_size=2))
    turns = [
        turn
        for text in texts
        for turn in ({"role": "user", "content": draw(_TEXTS)}, {"role": "assistant", "content": text})
    ]
    if draw(st.booleans()):
        turns.insert(0, {"role": "system", "content": draw(_TEXTS)})
    return {"messages": turns}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _strings(item)]
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []
