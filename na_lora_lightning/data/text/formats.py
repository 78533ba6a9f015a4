"""The formats that records come in: how a table's columns tell which one it is, and what it is read as."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from na_lora_lightning.errors import ConfigurationError, DataError

Record = dict[str, Any]

# Who speaks in a turn that has 'from' and 'value', as the roles that chat templates know.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
_FOR_TASKS = (
    "Below is an instruction that describes a task{input}. Write a response that appropriately completes the request."
)
# Keys by which a turn is left out of the loss; see loss_keys.
LEFT_OUT = {"train": False}


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        name: What ``data.format`` calls it.
        key: The column that it is known by.
        answer: The column with the answer; None where answers are in ``key``.
        others: Columns that it reads where they are there.
        read: Makes ``messages``, ``prompt`` and ``completion``, or ``text`` of a record; told whether a chat template
            will render it.
    """

    name: str
    key: str
    answer: str | None
    others: tuple[str, ...]
    read: Callable[[Record, bool], Record]

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that it reads."""
        return (self.key, *((self.answer,) if self.answer else ()), *self.others)

    def describe(self) -> str:
        """The name and the columns, for messages."""
        needed = (self.key, self.answer) if self.answer else (self.key,)
        return f"{self.name} ({', '.join(needed)})"


def _read_messages(record: Record, is_rendered: bool) -> Record:
    return _read_prompt(record, is_rendered) if record.get("messages") is None else _turns(record, "messages")


def _read_conversations(record: Record, is_rendered: bool) -> Record:
    return _turns(record, "conversations")


def _read_prompt(record: Record, is_rendered: bool) -> Record:
    """Text, or lists of turns, of which those of the prompt are not learned."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and (completion is None or isinstance(completion, list)):
        messages = [
            {**turn, **LEFT_OUT} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
            for turn in _with_roles(prompt)
        ]
        return {**_without(record, "prompt", "completion"), "messages": messages + _with_roles(completion or [])}
    return record


def _read_alpaca(record: Record, is_rendered: bool) -> Record:
    instruction, given, output = (record.get(key) for key in ("instruction", "input", "output"))
    rest = _without(record, "instruction", "input", "output", "history")
    for key, value in (("instruction", instruction), ("input", given)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"needs text as its {key}, which is of type {type(value).__name__}; make it a string.")
    if not is_rendered and record.get("history"):
        raise DataError("has a 'history', which needs a chat template; use a tokenizer that has one, or remove it.")
    if is_rendered:
        prompt = "\n".join(part for part in (instruction, given) if part)
    else:
        prompt = _FOR_TASKS.format(input=", paired with an input that provides further context" if given else "")
        parts = {"Instruction": instruction or "", **({"Input": given} if given else {}), "Response": ""}
        prompt = "\n\n".join([prompt, *(f"### {name}:\n{part}" for name, part in parts.items())])
    if not record.get("history"):
        return {**rest, "prompt": prompt, **({} if output is None else {"completion": output})}
    messages = []
    for number, pair in enumerate(_list_of(record["history"]), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"has a 'history' whose item {number} is no question and answer; give two texts each.")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": prompt})
    return {**rest, "messages": messages + ([] if output is None else [{"role": "assistant", "content": output}])}


def _read_text(record: Record, is_rendered: bool) -> Record:
    if not isinstance(record.get("text"), str) or not record["text"]:
        kind = type(record.get("text")).__name__
        raise DataError(f"needs text as its text, which is {'empty' if kind == 'str' else f'of type {kind}'}; add it.")
    return _without(record, "messages", "prompt", "completion")


_MESSAGES = Format("messages", "messages", None, ("tools", "system"), _read_messages)
_PROMPT = Format("prompt_completion", "prompt", "completion", ("tools", "system"), _read_prompt)
_TEXT = Format("text", "text", None, (), _read_text)
FORMATS = {
    known.name: known
    for known in (
        _MESSAGES,
        _PROMPT,
        Format("alpaca", "instruction", "output", ("input", "history", "system", "tools"), _read_alpaca),
        Format("sharegpt", "conversations", None, ("tools", "system"), _read_conversations),
        _TEXT,
    )
}
COLUMNS = tuple(dict.fromkeys(column for known in FORMATS.values() for column in known.columns))


def format_named(name: str) -> Format:
    """The format that an option names.

    Raises:
        ConfigurationError: There is none of that name.
    """
    if name not in FORMATS:
        raise ConfigurationError(f"format={name!r} is unknown; use {', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]}.")
    return FORMATS[name]


def recognise(columns: Iterable[str], source: str, asked: str | None, *, needs_completion: bool) -> Format:
    """Which format a table with some columns has.

    A table of ``messages`` may have prompts and completions for records without; ``text`` beside the columns of
    another format is what that was rendered to.

    Args:
        columns: The names of its columns.
        source: The name of the data, for messages.
        asked: The name of the format that it is said to have; None to tell by the columns.
        needs_completion: Whether the column with the answers has to be there.

    Raises:
        DataError: It fits none, or several.
    """
    present = list(columns)
    shown = ", ".join(repr(name) for name in present) or "none"
    if asked is not None:
        known = format_named(asked)
        missing = [
            name for name in (known.key, known.answer if needs_completion else None) if name not in (None, *present)
        ]
        if missing:
            raise DataError(
                f"the data {source!r} has no column {missing[0]!r} (its columns are {shown}), which format={asked!r} "
                "reads; set columns, or another format."
            )
        return known
    found = [known for known in FORMATS.values() if known.key in present]
    if _MESSAGES in found and _PROMPT in found:
        found.remove(_PROMPT)
    # One that has all that it reads is meant, rather than one that lacks its answers.
    complete = [known for known in found if known is not _TEXT and (known.answer is None or known.answer in present)]
    found = complete or [known for known in found if known is not _TEXT] or found
    if needs_completion and not complete and found not in ([_TEXT], [_PROMPT]):
        found = []
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(known.describe() for known in found)
        raise DataError(f"the data {source!r} fits several formats, {names}; say which one with data.format.")
    formats = ", ".join(known.describe() for known in FORMATS.values())
    raise DataError(
        f"the data {source!r} has the columns {shown}, by which none of the formats {formats} is known; say with "
        "data.columns which column is which."
    )


def _turns(record: Record, key: str) -> Record:
    return {**_without(record, key), "messages": _with_roles(_list_of(record.get(key)))}


def _list_of(value: Any) -> Any:
    """A list, or what its JSON text says: a cell of CSV can hold nothing else."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        # What is wrong with it is said where it is read.
        return value


def _with_roles(turns: Any) -> Any:
    if not isinstance(turns, list):
        return turns
    return [
        _with_role(turn, number) if isinstance(turn, dict) and turn.get("from") is not None else turn
        for number, turn in enumerate(turns, start=1)
    ]


def _with_role(turn: Record, number: int) -> Record:
    """A turn of ShareGPT as chat templates know it."""
    speaker, value = turn["from"], turn.get("value")
    if speaker not in _SPEAKERS:
        raise DataError(
            f"has a turn from {speaker!r} (message {number}), which is none of {', '.join(_SPEAKERS)}; rename it."
        )
    rest = _without(turn, "from", "value")
    if speaker != "function_call":
        return {"role": _SPEAKERS[speaker], "content": value, **rest}
    calls = _list_of(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise DataError(f"has a function call without a name (message {number}); give it a 'name' and 'arguments'.")
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls], **rest}


def _without(record: Record, *keys: str) -> Record:
    return {key: value for key, value in record.items() if key not in keys}
