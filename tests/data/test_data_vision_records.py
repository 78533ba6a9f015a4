"""Records with images: what their text is, where its answers are, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from module_helpers import private_dataset_cache, write_jsonl  # noqa: F401
from tokenizers.processors import TemplateProcessing
from vision_helpers import picture, target_texts, tiny_vlm_processor, vlm_folders  # noqa: F401

from na_lora_lightning.data import VisionInstructionDataModule
from na_lora_lightning.data.images.encoding import NUMBER_OF_IMAGES, VisionRecordEncoder
from na_lora_lightning.errors import DataError

Vlm = Callable[[str], str]
IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def conversation(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": content} for turn, content in enumerate(contents)]


@cache
def processor_of(kind: str, **options: Any) -> Any:
    processor = tiny_vlm_processor(kind, **options)
    processor.tokenizer.chat_template = processor.chat_template
    return processor


def encoder_of(kind: str, *, processor: Any = None, **options: Any) -> VisionRecordEncoder:
    settings: dict[str, Any] = {"max_length": 4096, "use_chat_template": None, "system_prompt": None}
    return VisionRecordEncoder(processor or processor_of(kind), **{**settings, **options})


def encode(encoder: VisionRecordEncoder, record: dict[str, Any], images: int = 1, **options: bool) -> dict[str, Any]:
    settings = {"evaluation": True, "needs_completion": True, **options}
    return encoder({**record, NUMBER_OF_IMAGES: images}, 2, source="data.jsonl", **settings)


def answers_of(encoder: VisionRecordEncoder, encoded: dict[str, Any]) -> list[str]:
    pairs = zip(encoded["answer_starts"], encoded["answer_ends"], strict=True)
    return [str(encoder.tokenizer.decode(encoded["text_ids"][start:end])) for start, end in pairs]


def test_exact_text_of_a_prompt_and_its_completion() -> None:
    encoder = encoder_of("qwen2_vl")
    encoded = encode(encoder, {"prompt": "1+1", "completion": "22"})
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    prompt = f"<|im_start|>user\n{image}1+1<|im_end|>\n<|im_start|>assistant\n"
    assert encoded["text"] == f"{prompt}22<|im_end|>"
    start = len(encoder.tokenizer(prompt)["input_ids"])
    assert (encoded["answer_starts"], encoded["answer_ends"]) == ([start], [start + 3])
    assert (encoded["tokens"], encoded["target_tokens"], encoded["images"]) == (start + 3, 3, 1)
    assert (encoded["index"], encoded["prompt"], encoded["reference"]) == (2, "1+1", "22")


def test_images_stand_where_their_parts_are_or_first() -> None:
    encoder = encoder_of("gemma3")
    image = "<start_of_image>"
    for messages, images, shown in (
        (conversation([text("a"), IMAGE, text("b"), IMAGE], "c"), 2, f"a{image}b{image}"),
        (conversation([text("a"), text("b")], "c"), 2, f"{image}{image}ab"),
        (conversation("ab", [text("c")]), 1, f"{image}ab"),
        (conversation([IMAGE], "c"), 1, image),
        (conversation("ab", "c"), 0, "ab"),
    ):
        encoded = encode(encoder, {"messages": messages}, images)
        header = "<end_of_turn>\n<start_of_turn>model\n"
        assert encoded["text"] == f"<bos><start_of_turn>user\n{shown}{header}c<end_of_turn>"
        assert answers_of(encoder, encoded) == ["c<end_of_turn>"]
    system = [{"role": "system", "content": "S"}, *conversation("a", "b")]
    assert f"system\nS<end_of_turn>\n<start_of_turn>user\n{image}a" in encode(encoder, {"messages": system})["text"]


def test_system_prompt_is_for_records_without_one() -> None:
    encoder = encoder_of("qwen2_vl", system_prompt="S")
    assert encode(encoder, {"prompt": "a", "completion": "b"})["text"].startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|v"
    )
    own = [{"role": "system", "content": [text("T")]}, *conversation("a", "b")]
    assert encode(encoder, {"messages": own})["text"].startswith("<|im_start|>system\nT<|im_end|>")


def test_turns_after_the_last_answer_take_their_images_with_them() -> None:
    encoder = encoder_of("qwen2_vl")
    messages = conversation([IMAGE, text("a")], "b", [IMAGE, text("c")])
    encoded = encode(encoder, {"messages": messages}, 2)
    assert (encoded["images"], encoded["text"].count("<|image_pad|>")) == (1, 1)
    assert answers_of(encoder, encoded) == ["b<|im_end|>"]
    open_ended = encode(encoder, {"messages": messages}, 2, needs_completion=False)
    assert (open_ended["images"], open_ended["answer_starts"], open_ended["reference"]) == (2, [], "")
    assert open_ended["text"].endswith("c<|im_end|>\n<|im_start|>assistant\n")


def test_text_without_a_chat_template() -> None:
    encoder = encoder_of("llava", use_chat_template=False)
    encoded = encode(encoder, {"prompt": "ab", "completion": " cd"}, 2)
    assert encoded["text"] == "<image><image>ab cd</s>"
    assert answers_of(encoder, encoded) == [" cd</s>"]
    assert (
        encode(
            encoder_of("llava", processor=processor_of("llava", chat_template=None)),
            {"prompt": "ab", "completion": " cd"},
            2,
        )["text_ids"]
        == encoded["text_ids"]
    )
    with pytest.raises(DataError, match=r"^record 3 of 'data.jsonl' has 'messages', which need a chat template; use"):
        encode(encoder, {"messages": conversation("a", "b")})


def test_beginning_is_marked_once() -> None:
    processor = tiny_vlm_processor("llava")
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    record = {"prompt": "a", "completion": "b"}
    without = encode(encoder_of("llava", processor=processor), record)["text_ids"]
    assert bos not in without
    for template in ("<s> $A", "<s> $A </s>"):
        special = [("<s>", bos), ("</s>", eos)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        encoder = encoder_of("llava", processor=processor)
        encoded = encode(encoder, record)
        assert encoded["text_ids"] == [bos, *without]
        assert answers_of(encoder, encoded) == [" b </s>"]
    # This template has the token itself.
    gemma = tiny_vlm_processor("gemma3")
    gemma.tokenizer.chat_template = gemma.chat_template
    start = gemma.tokenizer.bos_token_id
    gemma.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", start)]
    )
    ids = encode(encoder_of("gemma3", processor=gemma), record)["text_ids"]
    assert ids[0] == start
    assert ids.count(start) == 1


@pytest.mark.parametrize(
    ("record", "images", "reason"),
    [
        ({"prompt": "a", "answer": "b"}, 1, r"has no completion \(its keys are 'prompt', 'answer'\); give it"),
        ({"text": "a"}, 1, r"has neither 'messages' nor 'prompt' \(its keys are 'text'\); rename"),
        ({"prompt": "a", "completion": ""}, 1, "has an empty completion; give"),
        ({"messages": conversation([IMAGE], "b")}, 2, "has 2 images and 1 image parts in its messages; give one part"),
        ({"messages": conversation([IMAGE, IMAGE], "b")}, 1, "has 1 image and 2 image parts in its messages"),
        ({"messages": conversation([IMAGE], "b")}, 0, "has 0 images and 1 image parts"),
        ({"messages": conversation("a", [IMAGE])}, 1, "has an empty completion"),
        ({"messages": conversation("a", [text("b"), IMAGE])}, 1, r"has an image in its answer \(message 2\), where"),
        (
            {"messages": conversation([{"type": "image", "image": "a.png"}], "b")},
            1,
            r"names an image inside message 1; put it in 'images' and leave \{'type': 'image'\} in its place",
        ),
        (
            {"messages": conversation([{"type": "video"}], "b")},
            1,
            "has a part in message 1 that is neither text nor an",
        ),
        ({"messages": conversation(["a"], "b")}, 1, "has a part in message 1 that is neither"),
        ({"messages": conversation([{"type": "text"}], "b")}, 1, "has a part in message 1 that is neither"),
        (
            {"prompt": "<|image_pad|>a", "completion": "b"},
            1,
            r"has 1 image and 2 image tokens \(<\|image_pad\|>\) in what is made of its text; remove them from",
        ),
        ({"prompt": "a", "completion": "<|image_pad|>"}, 0, "has 0 images and 1 image tokens"),
    ],
)
def test_record_that_cannot_be_used_is_named(record: dict[str, Any], images: int, reason: str) -> None:
    with pytest.raises(DataError, match=f"^record 3 of 'data.jsonl' {reason}") as raised:
        encode(encoder_of("qwen2_vl"), record, images)
    assert "\n" not in str(raised.value)


def test_answer_that_makes_a_token_with_its_prompt_is_refused() -> None:
    processor = tiny_vlm_processor("llava", merges=[(":", "Ġ")])
    processor.tokenizer.chat_template = processor.chat_template
    reason = (
        r"^record 3 of 'data.jsonl' has an answer whose first letters make one token with the end of its prompt \('SI"
    )
    with pytest.raises(DataError, match=reason):
        encode(encoder_of("llava", processor=processor), {"prompt": "a", "completion": "b"})
    plain = encoder_of("llava", processor=tiny_vlm_processor("llava", chat_template=None, merges=[("b", "c")]))
    with pytest.raises(DataError, match=r"one token with the end of its prompt \('image>abcd.*'\), so that generation"):
        encode(plain, {"prompt": "ab", "completion": "cd"})
    assert answers_of(plain, encode(plain, {"prompt": "ab", "completion": " cd"})) == [" cd</s>"]


def test_template_that_leaves_out_images_is_refused() -> None:
    template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'][-1]['text'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    processor = tiny_vlm_processor("llava", chat_template=template)
    processor.tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"has 1 image and 0 image tokens \(<image>\) in what is made of its text"):
        encode(encoder_of("llava", processor=processor), {"prompt": "a", "completion": "b"})


def test_text_longer_than_the_maximum_is_refused() -> None:
    record = {"prompt": "1+1", "completion": "22"}
    length = encode(encoder_of("qwen2_vl"), record)["tokens"]
    assert encode(encoder_of("qwen2_vl", max_length=length), record)["tokens"] == length
    with pytest.raises(
        DataError,
        match=rf"^record 3 of .* has {length} tokens, with one for each image, more than max_length={length - 1};",
    ):
        encode(encoder_of("qwen2_vl", max_length=length - 1), record)


# ---- what only the processor can tell ----


def written(folder: Path, **record: Any) -> str:
    for number in range(2):
        picture(number).save(folder / f"{number}.png")
    good = {"image": "0.png", "prompt": "a", "completion": "b"}
    return write_jsonl(folder / "data.jsonl", [good, {**good, **record}])


def test_tokens_of_images_count_for_the_maximum(vlm: Vlm, tmp_path: Path) -> None:
    source = written(tmp_path, prompt="aa")
    lengths = {}
    for options in ({}, {"do_image_splitting": False}):
        datamodule = VisionInstructionDataModule(
            vlm("idefics3"), train=source, num_workers=0, image_options=options, max_length=61
        )
        datamodule.setup("fit")
        (batch,) = datamodule.train_dataloader()
        lengths[len(options)] = batch["attention_mask"].sum(dim=1).max().item()
    # One picture instead of four tiles, each with four tokens and two around them, and line breaks in two tokens.
    assert lengths == {0: 57, 1: 57 - 4 * 6 - 2}
    datamodule = VisionInstructionDataModule(vlm("idefics3"), train=source, num_workers=0, max_length=56)
    datamodule.setup("fit")
    with pytest.raises(
        DataError,
        match=r"^record 2 of '.*data.jsonl' has 57 tokens with its images, more than max_length=56; raise max_",
    ):
        list(datamodule.train_dataloader())


def test_answer_that_changes_beside_images_is_refused(
    vlm: Vlm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datamodule = VisionInstructionDataModule(vlm("qwen2_vl"), train=written(tmp_path), num_workers=0, batch_size=1)
    datamodule.setup("fit")
    kind = type(datamodule.processor)
    expand = kind.get_text_with_replacements

    def change(self: Any, texts: list[str], *arguments: Any) -> Any:
        texts, offsets = expand(self, texts, *arguments)
        return [content.replace("b<|im_end|>", "c<|im_end|>") for content in texts], offsets

    monkeypatch.setattr(kind, "get_text_with_replacements", change)
    with pytest.raises(
        DataError, match=r"^record 1 of '.*' has an answer whose tokens Qwen2VLProcessor changes when it"
    ):
        list(datamodule.train_dataloader())


def test_targets_of_records_as_they_are_read(vlm: Vlm, tmp_path: Path) -> None:
    source = written(tmp_path, image=None, images=["0.png", "1.png"], prompt="c", completion="d")
    datamodule = VisionInstructionDataModule(vlm("gemma3"), train=source, predict=source, num_workers=0)
    datamodule.setup()
    (batch,) = datamodule.train_dataloader()
    assert sorted(target_texts(datamodule, batch)) == ["b<end_of_turn>", "d<end_of_turn>"]
    (batch,) = datamodule.predict_dataloader()
    assert (batch["prompts"], batch["references"]) == (["a", "c"], ["b", "d"])


def test_prediction_needs_no_completion(vlm: Vlm, tmp_path: Path) -> None:
    source = written(tmp_path, prompt="open", completion=None)
    datamodule = VisionInstructionDataModule(vlm("llava"), predict=source, num_workers=0)
    datamodule.setup("predict")
    (batch,) = datamodule.predict_dataloader()
    # As the template renders it.
    assert batch["references"] == [" b ", ""]
    assert (batch["labels"][1] == -100).all()
    lengths = batch["prompt_attention_mask"].sum(dim=1)
    assert datamodule.tokenizer.decode(batch["prompt_input_ids"][1][-lengths[1] :]).endswith("\nopen ASSISTANT:")
    assert lengths[1] == batch["attention_mask"][1].sum()


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava"])
def test_images_of_llava_stand_where_its_texts_have_them(kind: str) -> None:
    encoder = encoder_of(kind)
    turns = ["<image>\nFirst <image> second?", "One.", "And <image>", "Two."]
    shared = [{"from": ("human", "gpt")[place % 2], "value": turn} for place, turn in enumerate(turns)]
    asked = [IMAGE, text("\nFirst "), IMAGE, text(" second?")]
    messages = conversation(asked, turns[1], [text("And "), IMAGE], turns[3])
    encoded = encode(encoder, {"conversations": shared}, 3)
    assert encoded == encode(encoder, {"messages": messages}, 3)
    assert [answer.strip()[:4] for answer in answers_of(encoder, encoded)] == ["One.", "Two."]
    with pytest.raises(DataError, match="has 1 image and 3 image parts in its messages; give one"):
        encode(encoder, {"conversations": shared}, 1)
    # Without a place of its own, an image comes first.
    plain = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert encode(encoder, {"conversations": plain}) == encode(encoder, {"prompt": "a", "completion": "b"})


def test_turns_left_out_of_the_loss_are_no_references() -> None:
    encoder = encoder_of("qwen2_vl")
    turns = conversation("a", "b", "c", "d")
    plain = encode(encoder, {"messages": turns})
    for place, prompt, rest in ((3, "a", "b"), (1, "c", "d")):
        left = [{**turn, "train": number != place} if number % 2 else turn for number, turn in enumerate(turns)]
        encoded = encode(encoder, {"messages": left})
        assert answers_of(encoder, encoded) == [f"{rest}<|im_end|>"]
        assert (encoded["text"], encoded["prompt"], encoded["reference"]) == (plain["text"], prompt, rest)
