"""Tasks and base models: what a seed decides, the split by image, what a model is given, and cells of one that sees."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.study import StudyError
from benchmarks.study.arms.building import target_names
from benchmarks.study.cells import recorded
from benchmarks.study.run import models, training
from benchmarks.study.run.models import IGNORED, Encoded, as_picture, collate, encode, fresh_model, inputs_of
from benchmarks.study.tasks import corpus, sources
from benchmarks.study.tasks.sources import Example, digits, load, parts_of_images, pictured_digits
from na_lora_lightning.core.discovery.gates import discover_gates

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

DIGITS: dict[str, Any] = {"source": {"kind": "digits"}, "train": 100, "valid": 20, "test": 30, "label_noise": 0.3}
SOURCE: dict[str, Any] = {
    "kind": "pictured_digits",
    "questions": ["digit", "parity", "sum", "larger"],
    "train": 400,
    "held_out": 40,
}
DATA: dict[str, Any] = {"source": SOURCE, "train": 100, "valid": 20, "test": 30, "label_noise": 0.0}


def test_test_and_validation_sets_are_the_same_for_all_seeds_and_apart_from_training() -> None:
    one, other = load(DIGITS, 0), load(DIGITS, 1)
    assert (one.valid, one.test, one.sha256) == (other.valid, other.test, other.sha256)
    assert one.train != other.train
    assert load(DIGITS, 0) == one
    prompts = {example.prompt for example in one.train}
    assert not prompts & {example.prompt for example in (*one.valid, *one.test)}


def test_label_noise_changes_exactly_its_share() -> None:
    clean, noisy = load({**DIGITS, "label_noise": 0.0}, 0), load(DIGITS, 0)
    assert [example.prompt for example in clean.train] == [example.prompt for example in noisy.train]
    assert sum(a.answer != b.answer for a, b in zip(clean.train, noisy.train, strict=True)) == 30
    assert clean.test == noisy.test


def test_batches_go_through_all_examples_before_any_comes_again() -> None:
    order = sources.batch_order(examples=10, batch_size=4, steps=5, seed=3)
    flat = [index for batch in order for index in batch]
    assert [len(batch) for batch in order] == [4] * 5
    assert Counter(flat[:10]) == Counter(flat[10:]) == Counter(range(10))
    assert order == sources.batch_order(10, 4, 5, 3) != sources.batch_order(10, 4, 5, 4)


def test_only_the_answer_and_the_end_are_predicted(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    ids = tokenizer("xyz")["input_ids"]
    (tokens, prompt, pixels), (short, *_) = encode(tokenizer, [Example("ab", "xyz"), Example("", "x")], max_length=20)
    assert tokens[-4:] == [*ids, end]
    assert tokens[0] == tokenizer.convert_tokens_to_ids("<end>")
    batch = collate([Encoded(tokens, prompt), Encoded(short, 1)], padding=end)
    assert pixels is None
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"][0].tolist() == [IGNORED] * prompt + [*ids, end]
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(tokens), len(short)]
    assert batch["labels"][1, len(short) :].eq(IGNORED).all()
    (cut, kept, _), *_ = encode(tokenizer, [Example("abcabcabcabc", "xyz")], max_length=6)
    assert len(cut) == 6
    assert cut[kept:] == [*ids, end]


def test_too_small_a_pool_is_named() -> None:
    with pytest.raises(StudyError, match="has 1797 examples and the task wants 5050"):
        load({**DIGITS, "train": 5000}, 0)


def test_functions_lose_their_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "    total = 0\n" + "".join(f"    total += {number}\n" for number in range(20)) + "    return total"
    (tmp_path / "module.py").write_text(f'def add():\n    """Adds numbers.{" Adds numbers." * 9}"""\n{body}\n')
    (tmp_path / "test_module.py").write_text(f"def test_add():\n{body}\n")
    monkeypatch.setattr(corpus, "package_folder", lambda package: tmp_path)
    assert corpus.functions("made-up") == (f"def add():\n{body}",)
    assert corpus.docstrings("made-up") == (" ".join(["Adds numbers."] * 10),)


def test_raised_messages_go_with_the_name_of_their_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text(
        "def f(x):\n"
        "    raise ValueError(f'the number {x} is\\n too large for this')\n"
        "    raise TypeError('too short')\n"
        "    raise KeyError(x)\n"
        "    raise module.Error('this one has no plain name at all')\n"
        "    raise RuntimeError('this happens when nothing else does', x)\n"
    )
    monkeypatch.setattr(corpus, "package_folder", lambda package: tmp_path)
    pairs = (
        ("the number _ is too large for this", "ValueError"),
        ("this happens when nothing else does", "RuntimeError"),
    )
    assert corpus.raised_messages("raising") == pairs
    source = {"packages": ["raising"], "kinds": ["RuntimeError", "ValueError"], "each": 1}
    made = sources.SOURCES["errors"](**source)
    assert made == [Example(f"{text}\nError:", f" {name}") for text, name in reversed(pairs)]


def shown(*numbers: int) -> tuple[Any, ...]:
    images, _ = digits()
    return tuple(images[number] for number in numbers)


def test_no_image_of_a_validation_or_test_question_is_in_a_training_question() -> None:
    made = pictured_digits(SOURCE["questions"], 4000, 400)
    images = {part: {image for example in examples for image in example.images} for part, examples in made.items()}
    assert {part: len(examples) for part, examples in made.items()} == {"train": 4000, "valid": 400, "test": 400}
    assert not images["train"] & (images["valid"] | images["test"])
    assert not images["valid"] & images["test"]
    numbers = parts_of_images(1797)
    assert sorted(number for part in numbers.values() for number in part) == list(range(1797))
    # Those that the vision tower of examples/vlm_digits has not seen.
    order = list(range(1797))
    random.Random(0).shuffle(order)
    assert {*numbers["test"], *numbers["valid"]} == set(order[:397])
    loaded = [load(DATA, seed) for seed in (0, 1)]
    assert loaded[0].test == loaded[1].test
    assert loaded[0].train != loaded[1].train
    for data in loaded:
        trained = {image for example in data.train for image in example.images}
        assert not trained & {image for example in (*data.valid, *data.test) for image in example.images}


def test_answers_are_right_and_questions_differ() -> None:
    digit_of = dict(zip(*digits(), strict=True))
    right = {
        "Which digit?": lambda one: str(one),
        "Even or odd?": lambda one: ("even", "odd")[one % 2],
        "Their sum?": lambda one, other: str(one + other),
        "The larger?": lambda one, other: str(max(one, other)),
    }
    for examples in pictured_digits(SOURCE["questions"], 400, 40).values():
        assert len(set(examples)) == len(examples)
        for example in examples:
            assert example.answer == right[example.prompt](*(digit_of[image] for image in example.images))
        assert [example.prompt for example in examples[:4]] == list(right)
    # The first image of scikit-learn is a zero and the second a one; rows are kept as rows.
    assert [digit_of[image] for image in shown(0, 1, 13)] == [0, 1, 3]
    assert shown(0)[0][0] == (0, 0, 80, 207, 143, 16, 0, 0)
    larger = pictured_digits(["larger"], 200, 8)["train"]
    assert all(len({digit_of[image] for image in example.images}) == 2 for example in larger)


@pytest.mark.parametrize("kind", ["digits", "pictured_digits", "tissue"])
def test_the_examples_are_those_that_cells_were_recorded_with(kind: str) -> None:
    records = [one for one in recorded().values() if one["run_info"]["train_config"]["data"]["source"]["kind"] == kind]
    configs = [one["run_info"]["train_config"]["data"] for one in records]
    assert all(config == configs[0] for config in configs)
    digests = {digest["sha"] for one in records for digest in one["meta_info"]["dataset_info"].values()}
    assert digests == {load(configs[0], 0).sha256}


def test_noise_leaves_images_as_they_are_and_digests_of_text_are_of_prompts_and_answers() -> None:
    assert sources.packages_of(DATA) == corpus.versions_of(["sklearn"])
    assert Example("a", "b", (((1, 2), (3, 4)),)).texts() == ["a", "b", "[[[1, 2], [3, 4]]]"]
    assert Example("a", "b").texts() == ["a", "b"]
    noisy, clean = load({**DATA, "label_noise": 0.3}, 0), load(DATA, 0)
    assert [example.images for example in noisy.train] == [example.images for example in clean.train]
    assert sum(one.answer != other.answer for one, other in zip(noisy.train, clean.train, strict=True)) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": 41}, "has 40 examples in its part 'test' and the task wants 41"),
        ({"train": 401}, "has 400 examples in its part 'train' and the task wants 401"),
    ],
)
def test_what_a_task_of_pictures_gets_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load({**DATA, **changes}, 0)


def test_an_image_becomes_pixels_from_minus_one_to_one(picture_model: Path) -> None:
    _, processor, _ = models.base_model(str(picture_model))
    (encoded,) = encode(processor, [Example("Their sum?", "1", shown(0, 1))], 64)
    assert encoded.pixels is not None
    assert encoded.pixels.shape == (2, 3, 16, 16)
    assert (encoded.pixels.min(), encoded.pixels.max()) == (-1.0, pytest.approx(1.0))
    for own, image in zip(encoded.pixels, shown(0, 1), strict=True):
        grey = torch.tensor(list(as_picture(image).convert("L").tobytes())).reshape(16, 16)
        torch.testing.assert_close(own, (grey / 127.5 - 1).expand(3, -1, -1))
        # Enlarged, the image is on average what it was.
        assert grey.float().mean() == pytest.approx(sum(map(sum, image)) / 64, abs=1.0)
    ids = encoded.ids
    image_token = processor.image_token_id
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids[1:9] == [image_token] * 8
    assert image_token not in ids[9:]
    assert processor.tokenizer.decode(ids[9 : encoded.prompt]) == "Their sum?"
    assert ids[encoded.prompt :] == [*processor.tokenizer("1")["input_ids"], processor.tokenizer.eos_token_id]


def test_a_padded_batch_gives_each_example_its_own_images_in_their_order(picture_model: Path) -> None:
    model = fresh_model(str(picture_model)).eval()
    _, processor, _ = models.base_model(str(picture_model))
    examples = [
        Example("Which digit?", "0", shown(0)),
        Example("Their sum, please, of the two digits?", "3", shown(1, 2)),
        Example("Digit", "3"),
        Example("The larger?", "2", shown(2, 1)),
    ]
    encoded = encode(processor, examples, 64)
    batch = collate(encoded, processor.tokenizer.pad_token_id)
    assert batch["pixel_values"].shape == (5, 3, 16, 16)
    one, other = (encoded[1].pixels, encoded[3].pixels)
    assert one is not None
    assert other is not None
    assert torch.equal(batch["pixel_values"][1:3], one)
    assert torch.equal(batch["pixel_values"][3:], one.flip(0))
    assert batch["labels"].ne(IGNORED).sum(dim=1).tolist() == [len(ids) - prompt for ids, prompt, _ in encoded]
    assert "labels" not in inputs_of(batch)
    with torch.no_grad():
        together = model(**inputs_of(batch)).logits
        for row, entry in enumerate(encoded):
            alone = model(**inputs_of(collate([entry], 0))).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-4, rtol=0)
        swapped = model(**inputs_of(collate([encoded[1]._replace(pixels=one.flip(0))], 0))).logits[0]
    assert (swapped - together[1, : len(swapped)]).abs().max() > 1e-3


def test_images_are_not_given_to_a_model_without_eyes_nor_cut(tokenizer: Any, picture_model: Path) -> None:
    example = Example("Their sum?", "1", shown(0, 1))
    with pytest.raises(StudyError, match="takes none; choose a model with a vision tower"):
        encode(tokenizer, [example], 64)
    with pytest.raises(StudyError, match="no image can be cut; raise max_length, which is 9"):
        encode(models.base_model(str(picture_model))[1], [example], 9)


def test_gates_of_tower_projector_and_language_model_are_found(picture_model: Path) -> None:
    base = fresh_model(str(picture_model))
    blocks = target_names(base, "ffn")
    assert len(blocks) == 2 * 3 + 3 * 4
    assert {name.split(".")[1] for name in blocks} == {"vision_tower", "language_model"}
    _, processor, _ = models.base_model(str(picture_model))
    inputs = inputs_of(collate(encode(processor, [Example("Which digit?", "0", shown(0))], 64), 0))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    found = [(site.activation.name, site.part, site.channels) for site in discover_gates(adapted, inputs)]
    assert found == [
        *[("quick_gelu", "vision", 384)] * 3,
        ("gelu", "projector", 128),
        *[("silu", "language", 384)] * 4,
    ]


def test_cells_of_a_model_that_sees_train_all_its_parts(make_cell: Any, picture_model: Path) -> None:
    arms: dict[str, Any] = {
        "lora": {},
        "keep_all": {"importance": {"keep_fraction": 1.0, "warmup_steps": 0}},
        "mask": {"importance": {"warmup_steps": 1, "refresh_every": 1}},
        "no_gates": {"without_gates": True},
    }
    short = {"steps": 2, "evaluate_every": 1}
    cells = {name: make_cell(options, source=SOURCE, model=picture_model, **short) for name, options in arms.items()}
    found = {name: training.run_cell(cell) for name, cell in cells.items()}
    assert found["keep_all"] == found["lora"]
    assert found["mask"]["metrics"] != found["lora"]["metrics"]
    for name in ("lora", "mask"):
        first, *_, last = found[name]["probes"]
        assert first["misalignment"] == [0.0] * 8
        assert min(last["misalignment"]) > 0
    assert [set(probe) for probe in found["no_gates"]["probes"]] == [{"step"}] * 3


def test_the_shipped_model_tells_digits_that_it_has_not_seen(picture_model: Path) -> None:
    _, processor, _ = models.base_model(str(picture_model))
    encoded = encode(processor, pictured_digits(["digit"], 1, 100)["test"], 64)
    _, right = training.evaluate(fresh_model(str(picture_model)), training.evaluation_batches(encoded, 0, 50))
    assert right >= 0.9


def test_a_cell_takes_a_shipped_model_by_itself_and_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(models.FOLDER / "llama-silu")
    _, _, digest = models.base_model(folder)
    assert digest == recorded()["llama-silu.names.r2-ffn/lora/rate0.008-seed0"]["meta_info"]["model_info"]["sha"]
    assert [place.name for place in models.FOLDER.iterdir()] == ["llama-silu"]
    with torch.no_grad():
        next(fresh_model(folder).parameters()).zero_()
    assert models.weights_digest(fresh_model(folder)) == digest
    with pytest.raises(
        StudyError, match="there is no model in 'elsewhere/llama-silu'; those of the study are gpt2-gelu,"
    ):
        fresh_model("elsewhere/llama-silu")
