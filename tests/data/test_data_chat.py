"""Where answers begin and end in what chat templates make of them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from module_helpers import byte_tokenizer, conversation, private_dataset_cache, write_jsonl  # noqa: F401
from test_data_encoding import encode, encoder_of, target_text

from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.data.text.tokenizer import choose_chat_template
from na_lora_lightning.errors import ConfigurationError, DataError

START = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
OTHERWISE = (
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ways to mark an answer that all come to the same conversation.
MARKS = {
    "text": "{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n",
    "text and token": "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}",
    "turn": "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}",
    "controlled": "{%- generation -%} {{ message['content'] }} {%- endgeneration -%} <|im_end|>{{ '\n' }}",
    "in parts": (
        "{% generation %}{{ message['content'] }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}"
        "{{ '\n' }}"
    ),
}
ANSWERS = ["ok 👍", "龘", "👩‍👩‍👧‍👦", "e\u0301", "\u0301", "é", "\ufffd", "👍 ok", " ", "\n", "  ok  ", "ok\u3000"]


def marked(mark: str) -> str:
    return START + MARKS[mark] + OTHERWISE


def other_eos(**options: Any) -> Any:
    """A tokenizer whose template ends turns with another token than the end of the sequence."""
    special = ["<|im_start|>", "<|im_end|>"]
    return byte_tokenizer(**{"eos_token": "<|endoftext|>", "additional_special_tokens": special, **options})


def token(tokenizer: Any, text: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(text))


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_marked_answers_are_whole_and_every_turn_ends(mark: str, answer: str) -> None:
    tokenizer = other_eos(chat_template=marked(mark))
    encoder = encoder_of(tokenizer)
    encoded = encode(encoder, {"messages": conversation("a", answer, "b", answer)})
    assert target_text(encoder, encoded) == f"{answer}<|im_end|>{answer}<|im_end|>"
    assert encoded["end_ids"] == [token(tokenizer, "<|im_end|>")]
    assert encoded["reference"] == answer
    header = "<|im_start|>assistant\n"
    turn = f"<|im_start|>user\na<|im_end|>\n{header}{answer}<|im_end|>\n"
    rendered = turn + turn.replace("\na<", "\nb<").removesuffix("\n")
    assert tokenizer.decode(encoded["input_ids"]) == rendered


def test_marked_answers_without_an_end_of_turn() -> None:
    template = START + "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '\n' }}" + OTHERWISE
    tokenizer = other_eos(chat_template=template)
    encoder = encoder_of(tokenizer)
    encoded = encode(encoder, {"messages": conversation("a", "b", "c", "d", "e")})
    # The next turn begins with a special token too, which is no end.
    assert target_text(encoder, encoded) == "bd<|endoftext|>"
    assert encoded["end_ids"] == [token(tokenizer, "<|endoftext|>")]


def test_marks_of_a_template_that_removes_reasoning() -> None:
    template = (
        START + "{% generation %}{% if loop.last %}<think>\n{{ message['reasoning_content'] }}\n</think>\n{% endif %}"
        "{{ message['content'] }}{% endgeneration %}<|im_end|>\n" + OTHERWISE
    )
    encoder = encoder_of(other_eos(chat_template=template))
    messages = conversation("a", "b", "c", "d")
    for message in messages:
        message["reasoning_content"] = "hm"
    encoded = encode(encoder, {"messages": messages})
    assert target_text(encoder, encoded) == "b<|im_end|><think>\nhm\n</think>\nd<|im_end|>"
    assert encoded["reference"] == "<think>\nhm\n</think>\nd"


@pytest.mark.parametrize("is_special", [True, False])
def test_end_of_turn_that_the_tokenizer_need_not_call_special(is_special: bool) -> None:
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=is_special)
    encoder = encoder_of(tokenizer)
    encoded = encode(encoder, {"messages": conversation("a", "b", "c", "d")})
    assert target_text(encoder, encoded) == "b<|im_end|>d<|im_end|>"
    assert encoded["end_ids"] == encoder.end_token_ids() == [token(tokenizer, "<|im_end|>")]
    assert encoded["reference"] == "d"


def test_end_of_turn_that_is_text() -> None:
    # <|im_end|> is ten tokens here, as where a template is used with the tokenizer of another model.
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    encoder = encoder_of(tokenizer)
    encoded = encode(encoder, {"messages": conversation("a", "b", "c", "d")})
    assert target_text(encoder, encoded) == "b<|im_end|>\nd<|im_end|>\n<|endoftext|>"
    assert encoded["end_ids"] == encoder.end_token_ids() == [token(tokenizer, "<|endoftext|>")]
    assert encoded["reference"] == "d<|im_end|>\n"


@pytest.mark.parametrize(
    ("ending", "token_name"),
    [
        ("{{ message['content'] | trim }}<|eot_id|>", "<|eot_id|>"),
        ("{{ message['content'] }}<end_of_turn>\n", "<end_of_turn>"),
        (" {{ message['content'] }}{{ eos_token }}", "<|endoftext|>"),
        ("\n{{ message['content'] }}<|end|>\n<|endoftext|>", "<|endoftext|>"),
    ],
    ids=["llama3", "gemma", "mistral", "both"],
)
def test_ends_of_families(ending: str, token_name: str) -> None:
    template = "{% for message in messages %}[{{ message['role'] }}]" + ending + "{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    special = ["<|eot_id|>", "<end_of_turn>", "<|end|>"]
    tokenizer = byte_tokenizer(chat_template=template, eos_token="<|endoftext|>", additional_special_tokens=special)
    encoder = encoder_of(tokenizer)
    encoded = encode(encoder, {"messages": conversation("a", "b", "c", "d")})
    assert token(tokenizer, token_name) in encoded["end_ids"]
    assert encoder.end_token_ids() == encoded["end_ids"]
    assert encoded["reference"].strip() == "d"


def test_turns_of_one_conversation_can_end_differently() -> None:
    # As with calls of tools, after which Llama 3 waits for more.
    template = (
        "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
        "{{ '<|eom|>' if '(' in message['content'] else '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = byte_tokenizer(chat_template=template, additional_special_tokens=["<|eom|>", "<|eot|>"])
    encoder = encoder_of(tokenizer)
    encoded = encode(encoder, {"messages": conversation("a", "f(1)", "b", "2")})
    assert target_text(encoder, encoded) == "f(1)<|eom|>2<|eot|>"
    assert encoded["end_ids"] == sorted([token(tokenizer, "<|eom|>"), token(tokenizer, "<|eot|>")])


@pytest.mark.parametrize("use_chat_template", [True, False])
@pytest.mark.parametrize("name", ["<|im_end|>", "<|endoftext|>"])
def test_an_end_within_an_answer_is_refused(use_chat_template: bool, name: str) -> None:
    tokenizer = other_eos()
    encoder = encoder_of(tokenizer, use_chat_template=use_chat_template)
    record = {"prompt": "a", "completion": f"b{name}c"}
    if name == "<|im_end|>" and not use_chat_template:
        assert encode(encoder, record)["reference"] == "bc"
        return
    with pytest.raises(DataError, match=r"^record 3 of 'data.jsonl' has an answer with '.*' within it, .*; remove"):
        encode(encoder, record)
    # Where all of a text is learned from, it may be several documents.
    assert encode(encoder_of(tokenizer, use_chat_template=use_chat_template, loss_on="all"), record)
    ended = encode(encoder, {"prompt": "a", "completion": f"b{name}"})
    assert ended["reference"] == "b"


def test_the_reference_is_the_answer_as_it_is_rendered() -> None:
    thinking = "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    template = START + thinking + "{{ message['content'] | trim }}<|im_end|>\n" + OTHERWISE
    for options in ({}, {"loss_on": "all"}):
        encoder = encoder_of(other_eos(chat_template=template), **options)
        encoded = encode(encoder, {"messages": conversation("a", " b \n")})
        assert encoded["reference"] == "<think>\n\n</think>\n\nb"
        prompt = len(encoded["prompt_input_ids"])
        answer = encoder.tokenizer.decode(encoded["input_ids"][prompt:], skip_special_tokens=True)
        assert answer == encoded["reference"]


@pytest.mark.parametrize("answer", ["abc👍", "abc龘d", "a\ufffd\ufffd"])
def test_a_record_is_cut_between_characters(answer: str) -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    complete = tokenizer(answer)["input_ids"]
    for max_length in range(3, len(complete) + 2):
        encoder = encoder_of(tokenizer, max_length=max_length)
        encoded = encode(encoder, {"prompt": "x", "completion": answer})
        text = target_text(encoder, encoded).removesuffix("<|im_end|>")
        assert answer.startswith(text)
        assert len((answer[: len(text) + 1]).encode()) > max_length - 1 or text == answer
        assert encoded["truncated"] is (max_length < len(complete) + 2)


def test_a_prompt_is_cut_between_characters() -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    encoder = encoder_of(tokenizer, max_length=5)
    encoded = encode(encoder, {"prompt": "👍👍ab"}, needs_completion=False)
    assert tokenizer.decode(encoded["prompt_input_ids"]) == "ab"
    encoded = encode(encoder, {"prompt": "👍👍a"}, needs_completion=False)
    assert tokenizer.decode(encoded["prompt_input_ids"]) == "👍a"


def test_bytes_of_a_sentencepiece_tokenizer() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "o", "k", "a", "<", ">", "\n"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{{ eos_token }}{% else %}<{{ message['content'] }}>{% endif %}{% endfor %}"
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, eos_token="</s>", unk_token="<unk>"
    )
    encoder = encoder_of(fast)
    encoded = encode(encoder, {"messages": conversation("a", "ok 👍", "a", "龘")})
    assert target_text(encoder, encoded) == "ok 👍</s>龘</s>"
    assert encoded["reference"] == "龘"


# The reasoning of earlier answers is left out, as by Qwen 3; and a version for training, in which it is not.
DROPS_REASONING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' and "
    "loop.last %}<think></think>{% endif %}{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEEPS_REASONING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}<think></think>{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)


def trl_with(monkeypatch: pytest.MonkeyPatch, template: str | None) -> None:
    """In the place of TRL, as its release 1.16 answers."""

    def get_training_chat_template(reader: Any) -> str | None:
        if reader.chat_template != DROPS_REASONING:
            raise ValueError("The chat template is not training-compatible")
        return template

    module = ModuleType("trl.chat_template_utils")
    module.get_training_chat_template = get_training_chat_template  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", ModuleType("trl"))
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", module)


def test_template_for_training_beside_that_for_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = other_eos(chat_template=DROPS_REASONING)
    record = {"messages": conversation("a", "b", "c", "d")}
    with pytest.raises(DataError, match=r"renders differently .* set chat_template to 'training' for TRL's version of"):
        encode(encoder_of(tokenizer), record)
    trl_with(monkeypatch, KEEPS_REASONING)
    training = choose_chat_template(tokenizer, "training")
    assert (training, tokenizer.chat_template) == (KEEPS_REASONING, DROPS_REASONING)
    encoder = encoder_of(tokenizer, training_template=training)
    encoded = encode(encoder, record)
    answers = [f"<think></think>{text}<|im_end|>" for text in "bd"]
    turns = [f"<|im_start|>user\n{text}<|im_end|><|im_start|>assistant\n" for text in "ac"]
    assert target_text(encoder, encoded) == "".join(answers)
    assert tokenizer.decode(encoded["input_ids"]) == turns[0] + answers[0] + turns[1] + answers[1]
    # A prompt is rendered as where the model will be used.
    assert tokenizer.decode(encoded["prompt_input_ids"]) == f"{turns[0]}b<|im_end|>{turns[1]}"
    assert encoded["reference"] == "<think></think>d"


def test_chat_template_by_file_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "marked.jinja", tmp_path / "other"
    file.write_text(marked("turn"), encoding="utf-8")
    other_eos(chat_template=marked("text")).save_pretrained(other)
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path / "without")
    for name, template in ((str(file), marked("turn")), (str(other), marked("text")), ("b", "B")):
        tokenizer = other_eos(chat_template={"default": "A", "b": "B"})
        assert choose_chat_template(tokenizer, name) is None
        assert tokenizer.chat_template == template
    for name, reason in (
        ("absent.jinja", "the chat template 'absent.jinja' does not exist; correct the path"),
        (str(tmp_path / "without"), "has no chat template; name one that has, or give a file"),
        (str(tmp_path / "absent"), "the tokenizer folder '.*absent' does not exist; correct"),
        ("training", r"chat_template='training' needs TRL \(.*\); install trl, or mark the answers of the template"),
    ):
        for module in ("trl", "trl.chat_template_utils"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigurationError, match=reason) as raised:
            choose_chat_template(other_eos(chat_template="A"), name)
        assert "\n" not in str(raised.value)
    trl_with(monkeypatch, None)
    assert choose_chat_template(other_eos(chat_template=DROPS_REASONING), "training") is None
    with pytest.raises(ConfigurationError, match="TRL has no training version of the model's chat template; mark the"):
        choose_chat_template(other_eos(chat_template="A"), "training")
    with pytest.raises(ConfigurationError, match="chat_template='training' needs a template to begin with; name one"):
        choose_chat_template(byte_tokenizer(chat_template=None), "training")


@pytest.mark.usefixtures("private_dataset_cache")
def test_the_data_module_takes_a_chat_template(tmp_path: Path) -> None:
    file = tmp_path / "marked.jinja"
    file.write_text(marked("turn"), encoding="utf-8")
    other_eos(chat_template=None).save_pretrained(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation("a", "b")}])
    options: dict[str, Any] = {"tokenizer_name_or_path": str(tmp_path / "tokenizer"), "train": data}
    module = InstructionDataModule(**options, chat_template=str(file))
    module.setup("fit")
    assert module.tokenizer.chat_template == marked("turn")
    assert module.describe()["train"].target_tokens == 2
    with pytest.raises(ConfigurationError, match="chat_template needs a chat template, which use_chat_template=False"):
        InstructionDataModule(**options, chat_template=str(file), use_chat_template=False)
