"""The data module for images as a whole: its batches, with a tiny model of each kind."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from module_helpers import private_dataset_cache, write_jsonl  # noqa: F401
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText
from vision_helpers import (  # noqa: F401
    END_OF_ANSWER,
    IMAGE_TOKEN,
    KINDS,
    numbered_vision_records,
    picture,
    target_texts,
    vlm_folders,
    write_pictures,
    write_vision_records,
    write_vision_sources,
)

from na_lora_lightning.arguments import EvaluationOptions
from na_lora_lightning.data import SplitSummary, VisionInstructionDataModule
from na_lora_lightning.data.text.splits import LeftOutRecordsWarning
from na_lora_lightning.errors import ImageError
from na_lora_lightning.modules.evaluation import generate_answers, prompt_inputs
from na_lora_lightning.modules.losses import model_inputs

Vlm = Callable[[str], str]
# How many tokens an image of 40×30 pixels takes in each model.
TOKENS = {"llava": 16, "idefics3": 20, "qwen2_vl": 4, "qwen2_5_vl": 4, "gemma3": 4}


def module_of(folder: str, *, stage: str = "fit", **options: Any) -> VisionInstructionDataModule:
    datamodule = VisionInstructionDataModule(folder, **{"num_workers": 0, **options})
    datamodule.setup(stage)
    return datamodule


def load_model(folder: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


def loss_of(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """The sum of the loss over the targets of a batch, and their number."""
    logits = model(**model_inputs(model, batch)).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    return cross_entropy(logits, targets, reduction="sum"), int((targets != -100).sum())


def contents(datamodule: VisionInstructionDataModule, split: str = "train") -> list[tuple[str, float]]:
    """The sources and places of the records of a split in their order, and the first pixel of their pictures."""
    rows = datamodule._dataset(split)
    return [(rows[n]["name"], rows[n]["pictures"][0].getpixel((0, 0))) for n in range(len(rows))]


def test_each_record_of_several_sources_has_its_own_pictures(vlm: Vlm, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    a, b = (write_vision_records(folder, count) for folder, count in zip(folders, (20, 10), strict=True))
    for number in range(10):
        picture(100 + number).save(folders[1] / "pictures" / f"{number}.png")
    pixels = {f"record {n + 1} of {a!r}": picture(n).getpixel((0, 0)) for n in range(20)}
    pixels |= {f"record {n + 1} of {b!r}": picture(100 + n).getpixel((0, 0)) for n in range(10)}

    def names(found: list[tuple[str, float]]) -> list[str]:
        assert all(pixels[name] == pixel for name, pixel in found)
        return [name for name, _ in found]

    assert sorted(names(contents(module_of(vlm("llava"), train=[a, b])))) == sorted(pixels)
    weighted = [{"path": a, "weight": 1}, {"path": b, "weight": 1}]
    drawn = names(contents(module_of(vlm("llava"), train=weighted)))
    assert len(set(drawn)) == len(drawn)
    assert all(source in "".join(drawn) for source in (a, b))
    kept = module_of(vlm("llava"), train=weighted, validation_fraction=0.2, stopping_strategy="all_exhausted")
    train, validation = names(contents(kept)), names(contents(kept, "validation"))
    # A fifth of each, and all of the others.
    assert (sum(a in name for name in validation), sum(b in name for name in validation)) == (4, 2)
    assert set(train) | set(validation) == set(pixels)
    assert not set(train) & set(validation)
    assert next(iter(kept.val_dataloader()))["references"]
    (folders[1] / "pictures" / "3.png").unlink()
    with pytest.raises(ImageError, match=r"^record 4 of '.*b/data\.jsonl' .*, or set skip_broken_images"):
        module_of(vlm("llava"), train=[a, b], validation_fraction=0.5)
    with pytest.warns(LeftOutRecordsWarning, match="1 of 10 records of"):
        found = contents(module_of(vlm("llava"), train=[a, b], skip_broken_images=True))
    assert sorted(names(found)) == sorted(set(pixels) - {f"record 4 of {b!r}"})


@pytest.mark.parametrize("kind", KINDS)
def test_batches_train_a_model(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 5)
    datamodule = module_of(vlm(kind), train=source, batch_size=3)
    model = load_model(vlm(kind)).train()
    image_token = datamodule.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN[kind])
    targets, sizes = [], []
    for batch in datamodule.train_dataloader():
        loss, count = loss_of(model, batch)
        (loss / count).backward()
        assert 4 < float(loss.detach()) / count < 7
        targets += target_texts(datamodule, batch)
        sizes.append(len(batch["input_ids"]))
        assert (batch["input_ids"] == image_token).any(dim=1).all()
        assert not (batch["labels"] == image_token).any()
        # Padding is on the right, and no target.
        assert torch.equal(batch["attention_mask"], batch["attention_mask"].sort(dim=1, descending=True).values)
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == datamodule.tokenizer.pad_token_id).all()
    start = " " if kind in ("llava", "idefics3") else ""
    assert sorted(targets) == sorted(f"{start}{number}{END_OF_ANSWER[kind]}" for number in range(5))
    assert sizes == [3, 2]
    gradients = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    assert max(value for name, value in gradients.items() if name.startswith("model.vis")) > 1e-4
    assert max(value for name, value in gradients.items() if not name.startswith("model.vis")) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_worth_its_records(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 3)
    rows = [
        {"images": names[:2], "prompt": "ab", "completion": "c"},
        {"images": names[2:], "prompt": "d", "completion": "efgh"},
        {"images": [], "prompt": "no image", "completion": "i"},
    ]
    source = write_jsonl(tmp_path / "data.jsonl", rows)
    model = load_model(vlm(kind)).eval()
    ordered = {"shuffle": False, "group_by_length": False}
    singles = module_of(vlm(kind), train=source, batch_size=1, **ordered)
    with torch.no_grad():
        expected = sum(loss_of(model, batch)[0] for batch in singles.train_dataloader())
        for padding in (1, 8):
            together = module_of(vlm(kind), train=source, batch_size=3, pad_to_multiple_of=padding, **ordered)
            (batch,) = together.train_dataloader()
            assert batch["input_ids"].shape[1] % padding == 0
            loss, count = loss_of(model, batch)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    ends = len(together.tokenizer(END_OF_ANSWER[kind])["input_ids"])
    assert count == len("c" + "efgh" + "i") + 3 * (ends + (kind in ("llava", "idefics3")))


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_of_a_conversation_is_a_target(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    names = write_pictures(tmp_path, 3)
    image = {"type": "image"}
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "\n\nfirst?"}, image]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second?"},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "text", "text": "third?"}, image]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "left out"},
    ]
    source = write_jsonl(tmp_path / "data.jsonl", [{"images": names, "messages": turns}])
    datamodule = module_of(vlm(kind), train=source, validation=source)
    (batch,) = datamodule.train_dataloader()
    text = datamodule.tokenizer.decode(batch["input_ids"][0])
    assert "left out" not in text
    start, end = (" ", " ") if kind == "llava" else (" " if kind == "idefics3" else "", END_OF_ANSWER[kind])
    answers = [f"{start}{answer}{end}" for answer in ("one", "two", "three")]
    assert target_texts(datamodule, batch) == ["".join(answers) + ("</s>" if kind == "llava" else "")]
    # The three answers are where they stand, and not elsewhere: one run of targets each.
    is_target = (batch["labels"][0] != -100).int()
    assert int((is_target.diff() == 1).sum()) == 3
    (evaluation,) = datamodule.val_dataloader()
    assert evaluation["prompts"] == ["third?"]
    # As the template renders it, which may put space around it.
    assert [reference.strip() for reference in evaluation["references"]] == ["three"]
    assert text.startswith(datamodule.tokenizer.decode(evaluation["prompt_input_ids"][0]))
    assert torch.equal(evaluation["prompt_pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_a_batch_generate_as_single_ones(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 3)
    together = module_of(vlm(kind), stage="validate", validation=source, validation_batch_size=3)
    alone = module_of(vlm(kind), stage="validate", validation=source, batch_size=1)
    model = load_model(vlm(kind)).eval()
    model.get_base_model = lambda: model
    generate = partial(generate_answers, model, together.tokenizer, arguments=EvaluationOptions(max_new_tokens=4))
    (batch,) = together.val_dataloader()
    assert batch["prompts"] == [record["prompt"] for record in numbered_vision_records(3)]
    assert [reference.strip() for reference in batch["references"]] == ["0", "1", "2"]
    inputs = prompt_inputs(batch)
    assert (
        inputs["attention_mask"].sum(dim=1).tolist()
        == (batch["attention_mask"].sum(dim=1) - (batch["labels"] != -100).sum(dim=1)).tolist()
    )
    # Padding is on the left, so that generation begins where a prompt ends.
    assert torch.equal(inputs["attention_mask"], inputs["attention_mask"].sort(dim=1).values)
    assert generate(inputs) == [generate(prompt_inputs(batch))[0] for batch in alone.val_dataloader()]


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_tokens_in_their_order(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    source = write_jsonl(tmp_path / "data.jsonl", [{"images": ["1.png", "0.png"], "prompt": "a", "completion": "b"}])
    datamodule = module_of(vlm(kind), train=source)
    (batch,) = datamodule.train_dataloader()
    image_token = datamodule.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN[kind])
    assert int((batch["input_ids"] == image_token).sum()) == 2 * TOKENS[kind]
    images = [datamodule.processor.image_processor([picture(n)], return_tensors="pt")["pixel_values"] for n in (1, 0)]
    expected = torch.cat(images, dim=1 if kind == "idefics3" else 0)
    assert torch.equal(batch["pixel_values"], expected)


def test_a_model_learns_what_only_images_tell(vlm: Vlm, tmp_path: Path) -> None:
    colours = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}
    for name, colour in colours.items():
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "prompt": "colour?", "completion": name} for name in colours]
    source = write_jsonl(tmp_path / "data.jsonl", rows)
    datamodule = module_of(vlm("llava"), train=source, batch_size=3, shuffle=False, group_by_length=False)
    (batch,) = datamodule.train_dataloader()
    model = load_model(vlm("llava")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, count = loss_of(model, batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) / count < 0.05


def test_record_without_images_beside_others(vlm: Vlm, tmp_path: Path) -> None:
    rows = [{"image": None, "prompt": "a", "completion": "b"}, {"image": "0.png", "prompt": "c", "completion": "d"}]
    write_pictures(tmp_path, 1)
    datamodule = module_of(vlm("qwen2_vl"), train=write_jsonl(tmp_path / "data.jsonl", rows), batch_size=1)
    batches = list(datamodule.train_dataloader())
    assert sorted("pixel_values" in batch for batch in batches) == [False, True]
    assert sorted(text for batch in batches for text in target_texts(datamodule, batch)) == [
        "b<|im_end|>",
        "d<|im_end|>",
    ]


def test_every_source_gives_the_same_batches(vlm: Vlm, tmp_path: Path) -> None:
    sources = write_vision_sources(tmp_path, 4)
    source, rows = next(iter(sources)), numbered_vision_records(4)
    embedded = [{"bytes": (tmp_path / "files" / row["image"]).read_bytes(), "path": None} for row in rows]
    texts = {name: [row[name] for row in rows] for name in ("prompt", "completion")}
    DatasetDict({"train": Dataset.from_dict({"image": embedded, **texts})}).save_to_disk(str(tmp_path / "bytes"))
    sources |= {f"{source}:train[:100%]": {}, str(tmp_path / "bytes"): {}}
    batches = []
    for name, columns in sources.items():
        datamodule = module_of(vlm("qwen2_vl"), train=name, columns=columns, batch_size=4)
        datamodule.prepare_data()
        batches += [{key: value.tolist() for key, value in batch.items()} for batch in datamodule.train_dataloader()]
    assert len(batches) == 6
    assert all(batch == batches[0] for batch in batches)


def test_description_counts_an_image_as_one_token(vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 3)
    datamodule = module_of(vlm("qwen2_vl"), train=source)
    # Of ChatML 11 tokens around the question and its image, 12 before the answer, of one digit, and 1 after it.
    prompts = sum(len(record["prompt"]) for record in numbered_vision_records(3))
    tokens = prompts + 3 * (1 + 5 + 3 + 1 + 1 + 11 + 1 + 1)
    assert datamodule.describe() == {"train": SplitSummary(records=3, tokens=tokens, target_tokens=6, truncated=0)}


@pytest.mark.parametrize("kind", KINDS)
def test_example_for_a_forward_pass_reads_nothing(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    datamodule = module_of(vlm(kind), train=write_vision_records(tmp_path, 3))
    for path in (tmp_path / "pictures").iterdir():
        path.unlink()
    example = datamodule.example_batch()
    assert example["input_ids"].shape[0] == 1
    model = load_model(vlm(kind))
    assert torch.isfinite(model(**model_inputs(model, example)).logits).all()


def test_what_loads_batches_can_be_sent_to_another_process(vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 2)
    for kind in ("qwen2_vl", "gemma3"):
        datamodule = module_of(vlm(kind), train=source)
        loader = datamodule.train_dataloader()
        copy = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
        rows = [copy[0][index] for index in range(2)]
        batches = [collate(rows).batch for collate in (loader.collate_fn, copy[1])]
        assert batches[0].keys() == batches[1].keys()
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
