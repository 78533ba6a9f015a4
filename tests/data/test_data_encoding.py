"""Which tokens a record has, and which of them the loss is on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from module_helpers import END_OF_TURN, byte_tokenizer, conversation
from transformers import PreTrainedTokenizerFast

from na_lora_lightning.data.text.encoding import RecordEncoder
from na_lora_lightning.data.text.tokenizer import load_tokenizer
from na_lora_lightning.errors import ConfigurationError, DataError

MARKED_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}"
    "<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The end of a turn is not the end of the sequence, and the content is trimmed, as with Llama 3.
HEADER_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|end|>\n\n"
    "{{ message['content'] | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n"
    "{% endif %}"
)
# Only the last answer keeps its reasoning, as with Qwen 3.
REASONING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

FEW_EXAMPLES = settings(max_examples=50, deadline=None)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=12)


@cache
def tokenizer_of(template: str | None = None) -> PreTrainedTokenizerFast:
    return byte_tokenizer() if template is None else byte_tokenizer(chat_template=template)


def encoder_of(tokenizer: PreTrainedTokenizerFast, **options: Any) -> RecordEncoder:
    settings: dict[str, Any] = {
        "max_length": 4096,
        "loss_on": "completion",
        "use_chat_template": None,
        "system_prompt": None,
    }
    return RecordEncoder(tokenizer, **{**settings, **options})


def encode(encoder: RecordEncoder, record: dict[str, Any], **options: bool) -> dict[str, Any]:
    settings = {"evaluation": True, "needs_completion": True, **options}
    return encoder(record, 2, source="data.jsonl", **settings)


def target_text(encoder: RecordEncoder, encoded: dict[str, Any]) -> str:
    pairs = list(zip(encoded["input_ids"], encoded["labels"], strict=True))
    assert all(label in (-100, token_id) for token_id, label in pairs)
    assert encoded["target_tokens"] == sum(label != -100 for _, label in pairs)
    return str(encoder.tokenizer.decode([label for _, label in pairs if label != -100]))


def test_exact_labels_of_a_prompt_and_its_completion() -> None:
    tokenizer = tokenizer_of()
    encoder = encoder_of(tokenizer)
    encoded = encode(encoder, {"prompt": "1+1", "completion": "22"})
    prompt = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    # One token for each special token and for each byte: 1 + 5 + 3 + 2 of the turn, 1 + 10 of the header.
    assert len(tokenizer(prompt)["input_ids"]) == 22
    eos = tokenizer.eos_token_id
    two = tokenizer.convert_tokens_to_ids("2")
    assert encoded["labels"] == [-100] * 22 + [two, two, eos]
    assert tokenizer.decode(encoded["input_ids"]) == prompt + "22" + END_OF_TURN
    assert tokenizer.decode(encoded["prompt_input_ids"]) == prompt
    assert (encoded["prompt"], encoded["reference"]) == ("1+1", "22")
    assert (encoded["tokens"], encoded["target_tokens"], encoded["truncated"]) == (25, 3, False)


def test_exact_labels_without_a_chat_template() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    encoded = encode(encoder_of(tokenizer), {"prompt": "ab", "completion": "cd"})
    a, b, c, d = tokenizer.convert_tokens_to_ids(list("abcd"))
    assert encoded["input_ids"] == [a, b, c, d, tokenizer.eos_token_id]
    assert encoded["labels"] == [-100, -100, c, d, tokenizer.eos_token_id]
    assert encoded["prompt_input_ids"] == [a, b]


def test_no_token_reaches_from_the_prompt_into_the_completion() -> None:
    tokenizer = byte_tokenizer(chat_template=None, merges=[("b", "c"), ("c", "d")])
    encoded = encode(encoder_of(tokenizer), {"prompt": "ab", "completion": "cd"})
    a, b, cd = tokenizer.convert_tokens_to_ids(["a", "b", "cd"])
    assert tokenizer("abcd")["input_ids"] != [a, b, cd]
    assert encoded["input_ids"] == [a, b, cd, tokenizer.eos_token_id]
    assert encoded["labels"] == [-100, -100, cd, tokenizer.eos_token_id]


def test_leading_token_of_the_tokenizer_is_part_of_the_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(chat_template=None, bos_token="<s>")
    bos = tokenizer.bos_token_id
    # Puts the end token behind every text too, which must not get between prompt and completion.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", bos), (END_OF_TURN, tokenizer.eos_token_id)]
    )
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert tokenizer("a")["input_ids"] == [bos, a, tokenizer.eos_token_id]
    encoded = encode(encoder_of(tokenizer), {"prompt": "a", "completion": "b"})
    assert encoded["input_ids"] == [bos, a, b, tokenizer.eos_token_id]
    assert encoded["labels"] == [-100, -100, b, tokenizer.eos_token_id]
    assert encoded["prompt_input_ids"] == [bos, a]


@FEW_EXAMPLES
@given(prompt=WORDS, completion=WORDS, use_chat_template=st.booleans())
def test_targets_are_the_completion_and_its_end(prompt: str, completion: str, use_chat_template: bool) -> None:
    encoder = encoder_of(tokenizer_of(), use_chat_template=use_chat_template)
    encoded = encode(encoder, {"prompt": prompt, "completion": completion})
    assert target_text(encoder, encoded) == completion + END_OF_TURN
    assert encoded["input_ids"][: len(encoded["prompt_input_ids"])] == encoded["prompt_input_ids"]
    assert encoded["reference"] == completion


@FEW_EXAMPLES
@given(
    answers=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    system=st.none() | WORDS,
    template=st.sampled_from([None, MARKED_TEMPLATE]),
)
def test_targets_are_all_answers_of_a_conversation(
    answers: list[tuple[str, str]], system: str | None, template: str | None
) -> None:
    encoder = encoder_of(tokenizer_of(template))
    messages = conversation(*(text for pair in answers for text in pair), system=system)
    encoded = encode(encoder, {"messages": messages})
    assert target_text(encoder, encoded) == "".join(answer + END_OF_TURN for _, answer in answers)
    rendered = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    assert encoder.tokenizer.decode(encoded["input_ids"]) == rendered.removesuffix("\n")
    assert encoded["reference"] == answers[-1][1]
    assert encoded["prompt"] == answers[-1][0]
    prompt = encoder.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert encoder.tokenizer.decode(encoded["prompt_input_ids"]) == prompt


def test_turns_after_the_last_answer_are_left_out() -> None:
    encoder = encoder_of(tokenizer_of())
    encoded = encode(encoder, {"messages": conversation("a", "b", "c")})
    assert encoder.tokenizer.decode(encoded["input_ids"]).endswith("assistant\nb<|im_end|>")
    assert (encoded["prompt"], encoded["reference"]) == ("a", "b")


def test_end_of_turn_that_is_not_the_end_of_the_sequence() -> None:
    tokenizer = byte_tokenizer(
        chat_template=HEADER_TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|start|>", "<|end|>", "<|eot|>"],
    )
    encoder = encoder_of(tokenizer)
    encoded = encode(encoder, {"messages": conversation("a ", " b ", "c", "d")})
    assert target_text(encoder, encoded) == "b<|eot|>d<|eot|>"
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_sequence_end_is_added_where_the_template_marks_none() -> None:
    encoder = encoder_of(tokenizer_of(UNMARKED_TEMPLATE))
    encoded = encode(encoder, {"messages": conversation("a", "b", "c", "d")})
    assert target_text(encoder, encoded) == "b\nd\n" + END_OF_TURN


def test_template_that_renders_answers_differently_later_is_refused() -> None:
    encoder = encoder_of(tokenizer_of(REASONING_TEMPLATE))
    with pytest.raises(DataError, match=r"^record 3 of 'data.jsonl' has an answer \(message 2\) .*; set chat_te"):
        encode(encoder, {"messages": conversation("a", "b", "c", "d")})
    one = encode(encoder, {"messages": conversation("a", "b")})
    assert target_text(encoder, one) == "<think>\n\n</think>\n\nb" + END_OF_TURN
    everything = encode(
        encoder_of(tokenizer_of(REASONING_TEMPLATE), loss_on="all"), {"messages": conversation("a", "b", "c", "d")}
    )
    assert everything["labels"] == everything["input_ids"]


@pytest.mark.parametrize("record", [{"prompt": "a", "completion": "b"}, {"messages": conversation("a", "b")}])
def test_loss_on_all_tokens(record: dict[str, Any]) -> None:
    encoder = encoder_of(tokenizer_of(), loss_on="all")
    encoded = encode(encoder, record)
    expected = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert target_text(encoder, encoded) == expected


def test_system_prompt_is_for_records_without_one() -> None:
    encoder = encoder_of(tokenizer_of(), system_prompt="S")
    encoded = encode(encoder, {"prompt": "a", "completion": "b"})
    start = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert encoder.tokenizer.decode(encoded["prompt_input_ids"]) == start
    assert encoder.tokenizer.decode(encoded["input_ids"]) == start + "b" + END_OF_TURN
    own = encode(encoder, {"messages": conversation("a", "b", system="T")})
    assert encoder.tokenizer.decode(own["input_ids"]).startswith("<|im_start|>system\nT<|im_end|>\n<|im_start|>user")


def test_missing_values_of_other_records_are_no_keys() -> None:
    encoder = encoder_of(tokenizer_of())
    turns = [{**turn, "name": None} for turn in conversation("a", "b")]
    encoded = encode(encoder, {"messages": turns, "prompt": None, "completion": None})
    assert target_text(encoder, encoded) == "b" + END_OF_TURN


def test_truncation_cuts_the_end_and_is_counted() -> None:
    record = {"prompt": "abc", "completion": "defg"}
    lengths = {}
    for max_length in (8, 7, 4):
        encoder = encoder_of(tokenizer_of(), use_chat_template=False, max_length=max_length)
        encoded = encode(encoder, record)
        lengths[max_length] = (target_text(encoder, encoded), encoded["tokens"], encoded["truncated"])
    assert lengths == {8: ("defg<|im_end|>", 8, False), 7: ("defg", 7, True), 4: ("d", 4, True)}


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("use_chat_template", [False, True])
def test_completion_that_is_cut_off_is_refused(loss_on: str, use_chat_template: bool) -> None:
    prompt_length = 22 if use_chat_template else 3
    options = {"loss_on": loss_on, "use_chat_template": use_chat_template}
    record = {"prompt": "1+1", "completion": "22"}
    encode(encoder_of(tokenizer_of(), max_length=prompt_length + 1, **options), record)
    with pytest.raises(DataError, match=rf"^record 3 of .* max_length={prompt_length}; raise max_length or"):
        encode(encoder_of(tokenizer_of(), max_length=prompt_length, **options), record)


def test_open_prompt_is_cut_at_its_start() -> None:
    encoder = encoder_of(tokenizer_of(), use_chat_template=False, max_length=2)
    encoded = encode(encoder, {"prompt": "abc"}, needs_completion=False)
    b, c = encoder.tokenizer.convert_tokens_to_ids(["b", "c"])
    assert encoded["input_ids"] == encoded["prompt_input_ids"] == [b, c]
    assert (encoded["labels"], encoded["truncated"], encoded["reference"]) == ([-100, -100], True, "")


def test_conversation_is_open_after_a_turn_of_the_user() -> None:
    encoder = encoder_of(tokenizer_of())
    encoded = encode(encoder, {"messages": conversation("a", "b", "c")}, needs_completion=False)
    assert encoder.tokenizer.decode(encoded["prompt_input_ids"]).endswith("user\nc<|im_end|>\n<|im_start|>assistant\n")
    assert (encoded["prompt"], encoded["reference"], encoded["target_tokens"]) == ("c", "", 0)


def test_training_records_have_no_columns_for_generation() -> None:
    encoded = encode(encoder_of(tokenizer_of()), {"prompt": "a", "completion": "b"}, evaluation=False)
    assert set(encoded) == set(RecordEncoder.features(evaluation=False))
    assert "prompt" not in encoded


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "answer": "b"}, r"has no completion \(its keys are 'prompt', 'answer'\); give it"),
        ({"prompt": "a", "completion": None}, r"has no completion \(its keys are 'prompt'\)"),
        ({"messages": conversation("a")}, r"has no completion \(its keys are 'messages'\)"),
        ({"prompt": "a", "completion": ""}, "has an empty completion; give"),
        ({"prompt": "a", "completion": 42}, "needs text as its completion, which is of type int; make"),
        ({"prompt": ["a"], "completion": "b"}, "needs text as its prompt, which is of type list; make"),
        ({"messages": "a"}, "has 'messages' that are not a list of turns; give"),
        ({"messages": []}, "has 'messages' that are not a list of turns; give"),
        ({"messages": [{"content": "a"}]}, "needs text as its role of message 1, which is missing; make"),
        ({"messages": conversation("a", "b")[::-1]}, "starts with an assistant turn; put"),
    ],
)
def test_record_that_cannot_be_used_is_named(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"^record 3 of 'data.jsonl' {reason}") as raised:
        encode(encoder_of(tokenizer_of()), record)
    assert "\n" not in str(raised.value)


def test_messages_without_a_chat_template_are_refused() -> None:
    with pytest.raises(DataError, match="has 'messages', which need a chat template; use a tokenizer"):
        encode(encoder_of(tokenizer_of(), use_chat_template=False), {"messages": conversation("a", "b")})


def test_empty_prompt_is_refused_where_it_leaves_no_token() -> None:
    with pytest.raises(DataError, match="has an empty prompt"):
        encode(encoder_of(tokenizer_of(), use_chat_template=False), {"prompt": "", "completion": "b"})
    assert encode(encoder_of(tokenizer_of()), {"prompt": "", "completion": "b"})["target_tokens"] == 2


def test_roles_that_the_template_refuses_are_reported() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role.') }}{% endif %}"
    encoder = encoder_of(byte_tokenizer(chat_template=template))
    with pytest.raises(DataError, match=r"is refused by the chat template \(No system role\); change"):
        encode(encoder, {"messages": conversation("a", "b", system="S")})
    with pytest.raises(DataError, match="has no completion in what the chat template renders"):
        encode(encoder, {"messages": conversation("a", "b")})


@pytest.mark.parametrize(
    ("tokenizer", "options", "reason"),
    [
        ({"eos_token": None}, {}, "has no end-of-sequence token"),
        ({"chat_template": None}, {"use_chat_template": True}, "use_chat_template needs a chat template"),
        ({"chat_template": None}, {"system_prompt": "S"}, "system_prompt needs a chat template"),
    ],
)
def test_tokenizer_that_lacks_something(tokenizer: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        encoder_of(byte_tokenizer(**tokenizer), **options)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("./absent", r"^the tokenizer folder '\./absent' does not exist; correct"),
        (".", r"^the tokenizer '.*' cannot be loaded \(the folder has no tokenizer that transformers can read\); give"),
    ],
)
def test_folder_without_a_tokenizer(folder: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=reason):
        load_tokenizer(folder, revision=None, trust_remote_code=False)
