"""The two forms of a record, read as one: a conversation."""

from __future__ import annotations

from typing import Any

from na_lora_lightning.errors import DataError

Message = dict[str, Any]


def read_conversation(record: dict[str, Any], *, needs_completion: bool) -> list[Message]:
    """Returns the turns of a record that has ``messages``, or ``prompt`` and ``completion``.

    Args:
        record: The record; ``messages`` are used if it has both forms.
        needs_completion: Whether a record without completion is an error.

    Raises:
        DataError: If the record cannot be used. The message lacks its subject, which the caller knows.
    """
    record = _without_missing_values(record)
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
    _check_turns(messages, described_as_messages="messages" in record)
    roles = [message["role"] for message in messages]
    if needs_completion and "assistant" not in roles:
        raise DataError(
            f"has no completion (its keys are {keys}); give it a 'completion', or 'messages' with an assistant turn."
        )
    if roles[0] == "assistant":
        raise DataError("starts with an assistant turn; put the turn that it answers before it.")
    return messages


def _check_turns(messages: Any, *, described_as_messages: bool) -> None:
    if not isinstance(messages, list) or not messages or not all(isinstance(turn, dict) for turn in messages):
        raise DataError("has 'messages' that are no list of turns; give each turn a 'role' and a 'content'.")
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            value = message.get(key)
            if not isinstance(value, str):
                fallback = "completion" if message.get("role") == "assistant" else "prompt"
                name = f"{key} of message {number}" if described_as_messages else fallback
                kind = "missing" if value is None else f"of type {type(value).__name__}"
                raise DataError(f"needs text as its {name}, which is {kind}; make it a string.")
        if message["role"] == "assistant" and not message["content"]:
            raise DataError("has an empty completion; give it a completion or remove the record.")


def _without_missing_values(value: Any) -> Any:
    """Removes the keys that only other records have, which a table fills with None."""
    if isinstance(value, dict):
        return {key: _without_missing_values(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_missing_values(item) for item in value]
    return value
