"""A record that was read as messages, or as prompt and completion, as one thing: a conversation."""

from __future__ import annotations

import json
from typing import Any, Literal

from na_lora_lightning.data.text.loss_keys import learned_turns, refuse_keys_of_records
from na_lora_lightning.errors import DataError

Message = dict[str, Any]
# An assistant turn that has one of these may do without text.
CALLS = ("tool_calls", "function_call")


def read_conversation(
    record: dict[str, Any], *, needs_completion: bool, loss_on: Literal["completion", "all"] = "completion"
) -> list[Message]:
    """Returns the turns of a record that has ``messages``, or ``prompt`` and ``completion``.

    A key of a record or a turn whose value is null is missing, but for the ``content`` of an assistant turn that calls
    tools, which is None where it is null or missing. What is inside ``tool_calls`` stays as it is.

    Args:
        record: The record; ``messages`` are used if it has both forms.
        needs_completion: Whether a record without completion is an error.
        loss_on: What the loss is on; a key that asks for another one is an error.

    Raises:
        DataError: The record cannot be used. The message lacks its subject, which the caller knows.
    """
    record = _without_nulls(record)
    keys = ", ".join(repr(key) for key in record) or "none"
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record:
        messages = [{"role": "user", "content": record["prompt"]}]
        if "completion" in record:
            messages.append({"role": "assistant", "content": record["completion"]})
    else:
        raise DataError(
            f"has neither 'messages' nor 'prompt' (its keys are {keys}); rename them or use the option columns."
        )
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise DataError("has 'messages' that are not a list of turns; give each turn a 'role' and a 'content'.")
    messages = [_read_turn(turn, number, "messages" in record) for number, turn in enumerate(messages, start=1)]
    roles = [message["role"] for message in messages]
    if needs_completion and "assistant" not in roles:
        raise DataError(
            f"has no completion (its keys are {keys}); give it a 'completion', or 'messages' with an assistant turn."
        )
    if roles[0] == "assistant":
        raise DataError("starts with an assistant turn; put the turn that it answers before it.")
    refuse_keys_of_records(record, loss_on)
    learned = learned_turns(messages, loss_on)
    if needs_completion and not any(learned):
        raise DataError(
            "has no answer to learn, as keys leave all of them out of the loss; remove the keys, or the record."
        )
    return messages


def read_tools(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Returns the tools of a record: a list, or the JSON text of one; None where it has none.

    Raises:
        DataError: They are something else. The message lacks its subject, which the caller knows.
    """
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise DataError(f"has 'tools' that are not JSON ({error}); correct or remove them.") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError("has 'tools' that are not a list of functions; give the JSON schema of each.")
    if not tools and record.get("messages") is not None and record.get("functions"):
        raise DataError(
            "has 'functions', an older name of 'tools' that chat templates do not know; rename them, or remove them."
        )
    _require_characters(tools, "tools")
    return tools or None


def _read_turn(turn: Message, number: int, described_as_message: bool) -> Message:
    message = _without_nulls(turn)
    for key in set(message) - {"role", "content"}:
        _require_characters({key: message[key]}, f"message {number}")
    if any(call in message and not message[call] for call in CALLS):
        message = {key: value for key, value in message.items() if key not in CALLS or value}
    is_answer = message.get("role") == "assistant"
    calls = is_answer and any(call in message for call in CALLS)
    if calls:
        _check_calls(message, number)
        message.setdefault("content", None)
    for key in ("role", "content"):
        value = message.get(key)
        fallback = "completion" if is_answer else "prompt"
        name = f"{key} of message {number}" if described_as_message else fallback
        if isinstance(value, str):
            _require_characters(value, name)
        elif not (calls and key == "content" and value is None):
            kind = "missing" if value is None else f"of type {type(value).__name__}"
            raise DataError(f"needs text as its {name}, which is {kind}; make it a string.")
    if is_answer and not message["content"] and not calls:
        raise DataError("has an empty completion; give it a completion or remove the record.")
    return message


def _check_calls(message: Message, number: int) -> None:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"has 'tool_calls' in message {number} that are not a list of calls; give each a 'function'.")


def _require_characters(value: Any, name: str) -> None:
    """Refuses halves of characters in a text, or in the texts of a list or a dictionary."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _require_characters(item, name)
    elif isinstance(value, dict):
        _require_characters([*value, *value.values()], name)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise DataError(
                f"has {half} in its {name}, which is half of a character and no text; remove it or write the whole "
                "pair."
            ) from error


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}
