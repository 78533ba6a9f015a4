"""Conversations with tools: what a chat template is given, and whether it writes all of it."""

from __future__ import annotations

import json
from typing import Any

from na_lora_lightning.data.text.chat import ChatTemplate
from na_lora_lightning.data.text.records import CALLS, Message
from na_lora_lightning.errors import DataError

# Text of an answer beside its content.
_REASONING = ("reasoning_content", "reasoning", "thinking")


def settle_tool_use(messages: list[Message], template: ChatTemplate) -> list[Message]:
    """Makes sure that tools, calls and reasoning reach the text.

    A ``content`` of None is left out, or becomes ``""`` where the template cannot do without. Arguments that are JSON
    text become the object that they are where the template would write them as a quoted string.

    Args:
        messages: The turns.
        template: The template, with the tools if there are any.

    Returns:
        The turns as the template is to have them.

    Raises:
        DataError: The template leaves something out. The message lacks its subject, which the caller knows.
    """
    has_tools = template.options.get("tools") is not None
    if not has_tools and not any(key in message for message in messages for key in (*CALLS, *_REASONING)):
        return messages
    messages = _with_arguments(_with_contents(messages, template), template)
    complete = template.render(messages)
    if has_tools and _rendered(template.with_options({"tools": None}), messages) == complete:
        raise DataError(
            "has 'tools', which the chat template leaves out; use a template that knows tools, or remove them."
        )
    for number, message in enumerate(messages, start=1):
        for key in CALLS:
            if key in message and _rendered(template, _without(messages, key, number)) == complete:
                raise DataError(
                    f"has {key!r} in message {number}, which the chat template leaves out; use a template that knows "
                    "them, or write them as text."
                )
    for key in _REASONING:
        # Templates drop the reasoning of earlier turns on purpose, but not all of it.
        if any(message.get(key) for message in messages) and _rendered(template, _without(messages, key)) == complete:
            raise DataError(
                f"has {key!r} in its messages, which the chat template leaves out; use a template that knows it, or "
                "remove it."
            )
    return messages


def _with_contents(messages: list[Message], template: ChatTemplate) -> list[Message]:
    if all(message["content"] is not None for message in messages):
        return messages
    without = [message if message["content"] is not None else _without([message], "content")[0] for message in messages]
    if _rendered(template, without) is not None:
        return without
    return [{**message, "content": message["content"] or ""} for message in messages]


def _with_arguments(messages: list[Message], template: ChatTemplate) -> list[Message]:
    as_text = [
        arguments
        for message in messages
        for call in message.get("tool_calls", ())
        if _object_of(arguments := _function_of(call).get("arguments")) is not None
    ]
    if not as_text or not any(json.dumps(text, ensure_ascii=False) in template.render(messages) for text in as_text):
        return messages
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _function_of(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = _function_of(call)
    arguments = _object_of(function.get("arguments"))
    if arguments is None:
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _object_of(arguments: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _without(messages: list[Message], key: str, number: int | None = None) -> list[Message]:
    return [
        {name: value for name, value in message.items() if name != key} if number in (None, place) else message
        for place, message in enumerate(messages, start=1)
    ]


def _rendered(template: ChatTemplate, messages: list[Message]) -> str | None:
    """What is rendered; None where the template refuses it."""
    try:
        return template.render(messages)
    except DataError:
        return None
