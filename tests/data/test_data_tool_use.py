"""Records with tools, calls and reasoning, and keys that ask for another loss."""

from __future__ import annotations

from typing import Any

import pytest
from module_helpers import END_OF_TURN, byte_tokenizer, conversation

from na_lora_lightning.data.images.records import read_vision_conversation
from na_lora_lightning.data.text.encoding import RecordEncoder
from na_lora_lightning.errors import DataError

# Like Qwen 2.5.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"zone": None}}}


def call_turn(arguments: Any, **keys: Any) -> dict[str, Any]:
    function = {"name": "now", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **keys}


def encode(record: dict[str, Any], template: str = TOOL_TEMPLATE, **options: Any) -> tuple[str, str]:
    """The whole text of a record, and its targets."""
    settings: dict[str, Any] = {"max_length": 999, "loss_on": "completion", "use_chat_template": None}
    encoder = RecordEncoder(byte_tokenizer(template), **{**settings, "system_prompt": None, **options})
    encoded = encoder(record, 2, source="data.jsonl", evaluation=True, needs_completion=True)
    assert isinstance(encoded["prompt"], str)
    assert isinstance(encoded["reference"], str)
    kept = [label for label in encoded["labels"] if label != -100]
    return str(encoder.tokenizer.decode(encoded["input_ids"])), str(encoder.tokenizer.decode(kept))


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_tools_and_calls_are_trained_on_with_their_nulls(content: dict[str, Any]) -> None:
    turns = [
        {"role": "user", "content": "time?"},
        call_turn({"zone": None, "list": [None, 1]}, **content),
        {"role": "tool", "content": "noon", "name": None},
        {"role": "assistant", "content": "It is noon.", "tool_calls": None, "function_call": None},
    ]
    text, targets = encode({"messages": turns, "tools": [TOOL]})
    call = '<call>now{"zone": null, "list": [null, 1]}</call>'
    schema = '{"type": "function", "function": {"name": "now", "parameters": {"zone": null}}}'
    assert targets == f"{call}{END_OF_TURN}It is noon.{END_OF_TURN}"
    assert text == (
        f"<|im_start|>system\n{schema}<|im_end|>\n<|im_start|>user\ntime?<|im_end|>\n<|im_start|>assistant\n{call}"
        "<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\nIt is noon.<|im_end|>"
    )


def test_call_without_text_can_be_the_last_turn() -> None:
    _, targets = encode({"messages": [*conversation("time?"), call_turn({})]})
    assert targets == "<call>now{}</call>" + END_OF_TURN


def test_template_that_cannot_do_without_text_is_given_an_empty_one() -> None:
    template = TOOL_TEMPLATE.replace("message.content", "message.content + '.'")
    assert encode({"messages": [*conversation("time?"), call_turn({})]}, template)[1].startswith(".<call>")


def test_tools_as_json_text_and_with_a_prompt() -> None:
    text, _ = encode({"prompt": "a", "completion": "b", "tools": '[{"name": "now", "zone": null}]'})
    assert text.startswith('<|im_start|>system\n{"name": "now", "zone": null}<|im_end|>\n<|im_start|>user\na')
    for nothing in ([], None, "", "[]", "null"):
        assert encode({"prompt": "a", "completion": "b", "tools": nothing})[0].startswith("<|im_start|>user\na")


def test_arguments_as_text_are_not_quoted_twice() -> None:
    arguments = '{"zone":  "a"}'
    turns = [*conversation("time?"), call_turn(arguments)]
    assert encode({"messages": turns})[1] == f'<call>now{{"zone": "a"}}</call>{END_OF_TURN}'
    as_text = TOOL_TEMPLATE.replace("arguments | tojson", "arguments")
    assert encode({"messages": turns}, as_text)[1] == f"<call>now{arguments}</call>{END_OF_TURN}"


PAIR = {"prompt": "a", "completion": "b"}
IGNORANT = "{% for message in messages %}{{ message.role }}{{ message.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("record", "template", "reason"),
    [
        ({**PAIR, "tools": [TOOL]}, IGNORANT, "has 'tools', which the chat template leaves out; use"),
        (
            {"messages": [*conversation("a", "b", "c"), call_turn({})]},
            IGNORANT,
            "has 'tool_calls' in message 4, which the chat template leaves out; use",
        ),
        (
            {"messages": [*conversation("a"), {"role": "assistant", "function_call": {"name": "now"}}]},
            TOOL_TEMPLATE,
            "has 'function_call' in message 2, which the chat template leaves out; use",
        ),
        (
            {"messages": [*conversation("a"), {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
            TOOL_TEMPLATE,
            "has 'reasoning_content' in its messages, which the chat template leaves out; use",
        ),
        (
            {"messages": conversation("a", "b"), "functions": [TOOL["function"]]},
            TOOL_TEMPLATE,
            "has 'functions', an older name of 'tools' that chat templates do not know; rename",
        ),
        ({**PAIR, "tools": "[1]"}, TOOL_TEMPLATE, "has 'tools' that are not a list of functions; give"),
        ({**PAIR, "tools": "now"}, TOOL_TEMPLATE, r"has 'tools' that are not JSON \(.*\); correct"),
        (
            {"messages": [*conversation("a"), {"role": "assistant", "tool_calls": "now"}]},
            TOOL_TEMPLATE,
            "has 'tool_calls' in message 2 that are not a list of calls; give",
        ),
        (
            {"messages": [*conversation("a"), {"role": "assistant", "content": None, "tool_calls": []}]},
            TOOL_TEMPLATE,
            "needs text as its content of message 2, which is missing; make",
        ),
        (
            {"prompt": "a", "completion": "b\ud800"},
            TOOL_TEMPLATE,
            r"has \\ud800 in its completion, which is half of a character and no text; remove",
        ),
        ({**PAIR, "tools": [{"name": "\udfff"}]}, TOOL_TEMPLATE, r"has \\udfff in its tools, which is half"),
        (
            {"messages": [*conversation("a"), call_turn({"\ud800": 1})]},
            TOOL_TEMPLATE,
            r"has \\ud800 in its message 2, which is half of a character",
        ),
    ],
)
def test_what_would_be_lost_is_refused(record: dict[str, Any], template: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"^record 3 of 'data.jsonl' {reason}") as raised:
        encode(record, template)
    assert "\n" not in str(raised.value)


def test_tools_without_a_chat_template_are_refused() -> None:
    with pytest.raises(DataError, match="has 'tools', which need a chat template; use"):
        encode({**PAIR, "tools": [TOOL]}, use_chat_template=False)


def test_template_that_fails_on_what_it_is_given_is_reported() -> None:
    template = "{% for message in messages %}{{ message.content + 1 }}{% endfor %}"
    with pytest.raises(DataError, match=r"is refused by the chat template \(can only concatenate str .*\); change"):
        encode(PAIR, template)


@pytest.mark.parametrize(
    ("keys", "loss_on"),
    [
        ({"weight": 0.5}, "completion"),
        ({"train": "maybe"}, "completion"),
        ({"loss_mask": [0, 1]}, "completion"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, "completion"),
        ({"weight": 0}, "all"),
    ],
)
def test_turn_that_asks_for_another_loss_is_refused(keys: dict[str, Any], loss_on: str) -> None:
    (key,) = keys
    turns = conversation("a", "b", "c", "d")
    turns[1] = {**turns[1], **keys}
    with pytest.raises(DataError, match=rf"^record 3 of 'data.jsonl' has the key '{key}' \(.*\) in message 2, but"):
        encode({"messages": turns}, loss_on=loss_on)


def test_turns_that_ask_for_what_is_done_are_trained_on() -> None:
    user, assistant = conversation("a", "b")
    for keys in ({"weight": 1}, {"weight": 1.0, "train": True}, {"masked": False}, {"weight": None, "loss_mask": None}):
        assert encode({"messages": [user, {**assistant, **keys}]})[1] == "b" + END_OF_TURN
    assert encode({"messages": [{**user, "weight": 0, "train": False}, assistant]})[1] == "b" + END_OF_TURN
    with pytest.raises(DataError, match=r"has the key 'train' \(True\) in message 1, but the loss is on the assist"):
        encode({"messages": [{**user, "train": True}, assistant]})
    with pytest.raises(DataError, match=r"has the key 'train' \(False\) in message 1, but the loss is on every turn;"):
        encode({"messages": [{**user, "train": False}, assistant]}, loss_on="all")


LEFT_OUT: list[dict[str, Any]] = [
    {"weight": 0},
    {"weight": "0"},
    {"train": False},
    {"training": False},
    {"trainable": False},
    {"loss": False},
    {"masked": True},
    {"mask": 1},
    {"ignore": True},
]


@pytest.mark.parametrize("keys", LEFT_OUT)
def test_turn_that_is_left_out_of_the_loss_is_read_all_the_same(keys: dict[str, Any]) -> None:
    turns = conversation("a", "b", "c", "d")
    text, targets = encode({"messages": turns})
    assert targets == f"b{END_OF_TURN}d{END_OF_TURN}"
    for place, rest in ((1, "d"), (3, "b")):
        asked = [{**turn, **(keys if number == place else {})} for number, turn in enumerate(turns)]
        assert encode({"messages": asked}) == (text, rest + END_OF_TURN)
        # Nor is it what generation is scored with.
        encoder = RecordEncoder(
            byte_tokenizer(), max_length=99, loss_on="completion", use_chat_template=None, system_prompt=None
        )
        encoded = encoder({"messages": asked}, 0, source="x", evaluation=True, needs_completion=True)
        assert (encoded["prompt"], encoded["reference"]) == ("ac"[place == 1], rest)
    with pytest.raises(
        DataError, match=r"^record 3 of 'data\.jsonl' has no answer to learn, as keys leave all of them"
    ):
        encode({"messages": [turns[0], {**turns[1], **keys}]})


@pytest.mark.parametrize(
    "keys", [{"weight": 0}, {"weight": 0.3}, {"train": False}, {"loss_on": "all"}, {"train_on_inputs": True}]
)
def test_record_that_asks_for_another_loss_is_refused(keys: dict[str, Any]) -> None:
    (key,) = keys
    with pytest.raises(DataError, match=rf"^record 3 of 'data.jsonl' has the key '{key}' \(.*\), but all records are"):
        encode({**PAIR, **keys})
    usual = {"weight": "1", "train": True, "loss_on": "completion", "train_on_inputs": False, "loss": 2.5, "mask": 0}
    assert encode({**PAIR, **usual})[1] == "b" + END_OF_TURN


def test_calls_without_text_among_images() -> None:
    turns = [*conversation("a"), call_turn({}, content=None)]
    read = read_vision_conversation({"messages": turns}, 1, needs_completion=True)
    assert [turn["content"] for turn in read] == [[{"type": "image"}, {"type": "text", "text": "a"}], []]
