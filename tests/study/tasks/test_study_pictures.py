"""Questions about pictures: the split by image, answers, what a model is given, and cells of a model that sees."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.study import StudyError
from benchmarks.study.arms.building import target_names
from benchmarks.study.base_models import loading
from benchmarks.study.base_models.language import make_tokenizer, mean_loss, weights_digest
from benchmarks.study.base_models.loading import read_record, take_shipped
from benchmarks.study.base_models.vision import make_processor
from benchmarks.study.run import training
from benchmarks.study.run.reproduce import decided, reproduce
from benchmarks.study.run.runner import run_study
from benchmarks.study.run.specification import Cell
from benchmarks.study.run.storage import Results
from benchmarks.study.run.training import evaluate, evaluation_batches
from benchmarks.study.tasks import corpus, pools, sources
from benchmarks.study.tasks.encoding import IGNORED, collate, encode, inputs_of
from benchmarks.study.tasks.examples import Example
from benchmarks.study.tasks.pictures import QUESTIONS, as_picture, digits, parts_of_images, pictured_digits
from na_lora_lightning.core.discovery.gates import discover_gates

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SOURCE: dict[str, Any] = {
    "kind": "pictured_digits",
    "questions": ["digit", "parity", "sum", "larger"],
    "train": 400,
    "held_out": 40,
}
DATA: dict[str, Any] = {"source": SOURCE, "train": 100, "valid": 20, "test": 30, "label_noise": 0.0}
CPU = torch.device("cpu")


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
    loaded = [pools.load(DATA, seed) for seed in (0, 1)]
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


def test_a_pool_with_images_comes_back_from_its_cache_and_has_a_digest_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "CACHE", tmp_path)
    made = pools.pool(SOURCE)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setitem(sources.SOURCES, "pictured_digits", lambda **options: pytest.fail("made again"))
    assert pools.pool(SOURCE) == made
    assert sources.packages_of(DATA) == corpus.versions_of(["sklearn"])
    example = Example("a", "b", (((1, 2), (3, 4)),))
    assert Example.from_plain(json.loads(json.dumps(example.plain()))) == example
    assert example.texts() == ["a", "b", "[[[1, 2], [3, 4]]]"]
    # Results of text carry digests of prompts and answers alone.
    assert Example("a", "b").plain() == Example("a", "b").texts() == ["a", "b"]
    noisy = pools.load({**DATA, "label_noise": 0.3}, 0)
    clean = pools.load(DATA, 0)
    assert [example.images for example in noisy.train] == [example.images for example in clean.train]
    assert sum(one.answer != other.answer for one, other in zip(noisy.train, clean.train, strict=True)) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {**SOURCE, "questions": ["colour"]}}, "question 'colour' does not exist"),
        (
            {"source": {**SOURCE, "questions": ["digit"], "held_out": 200}},
            "part 'valid' of the digits, which has 147 images",
        ),
        ({"test": 41}, "has 40 examples in its part 'test' and the task wants 41"),
        ({"train": 401}, "has 400 examples in its part 'train' and the task wants 401"),
    ],
)
def test_what_a_task_of_pictures_gets_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        pools.load({**DATA, **changes}, 0)


def test_an_image_becomes_pixels_from_minus_one_to_one(base_model: Path) -> None:
    processor = make_processor(base_model)
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
    model = loading.fresh_model(str(picture_model), "float32", CPU).eval()
    _, processor, _ = loading.base_model(str(picture_model), "float32")
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
    assert collate(encoded, 0, dtype=torch.bfloat16)["pixel_values"].dtype == torch.bfloat16


def test_a_processor_with_a_chat_template_gets_images_and_prompt_as_a_turn_of_the_user(base_model: Path) -> None:
    processor = make_processor(base_model)
    processor.tokenizer.chat_template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '\\n' }}{% endfor %}"
    )
    examples = [Example("Sum?", " 3", shown(1, 2)), Example("Sum?", " 3")]
    seen, unseen = encode(processor, examples, 64)
    decode = processor.tokenizer.decode
    assert decode(seen.ids[: seen.prompt]) == "<image>" * 8 + "Sum?\n"
    assert decode(unseen.ids[: unseen.prompt]) == "Sum?\n"
    assert decode(seen.ids[seen.prompt :]) == decode(unseen.ids[unseen.prompt :]) == "3<end>"


def test_images_are_not_given_to_a_model_without_eyes_nor_cut(base_model: Path) -> None:
    example = Example("Their sum?", "1", shown(0, 1))
    with pytest.raises(StudyError, match="takes none; choose a model with a vision tower"):
        encode(make_tokenizer(["abc"]), [example], 64)
    with pytest.raises(StudyError, match="no image can be cut; raise max_length, which is 9"):
        encode(make_processor(base_model), [example], 9)


def test_gates_of_tower_projector_and_language_model_are_found(picture_model: Path) -> None:
    base = loading.fresh_model(str(picture_model), "float32", CPU)
    blocks = target_names(base, "ffn")
    assert len(blocks) == 2 * 3 + 3 * 2
    assert {name.split(".")[1] for name in blocks} == {"vision_tower", "language_model"}
    _, processor, _ = loading.base_model(str(picture_model), "float32")
    inputs = inputs_of(collate(encode(processor, [Example("Which digit?", "0", shown(0))], 64), 0))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    found = [(site.activation.name, site.part, site.channels) for site in discover_gates(adapted, inputs)]
    assert found == [
        *[("quick_gelu", "vision", 384)] * 3,
        ("gelu", "projector", 16),
        *[("silu", "language", 24)] * 2,
    ]


def picture_study(make_study: Any, picture_model: Path, arms: list[str], **changes: Any) -> Any:
    return make_study(arms, source=SOURCE, models={"tiny": str(picture_model)}, **changes)


def test_cells_of_every_kind_train_all_parts_and_run_again_bitwise(
    make_study: Any, picture_model: Path, results: Results
) -> None:
    study = picture_study(make_study, picture_model, ["lora", "mask", "dora", "keep_all", "no_gates"])
    assert run_study(study, results, log=lambda line: None) == 0
    found = {result["run_info"]["train_config"]["arm_name"]: result for result in results.all()}
    metrics = {name: decided(result["train_info"]["metrics"]) for name, result in found.items()}
    assert metrics["keep_all"] == metrics["lora"] != metrics["mask"] != metrics["dora"]
    for name in ("lora", "mask", "dora"):
        gates = found[name]["study_info"]["gates"]
        assert [gate.split(".")[1] for gate in gates] == ["vision_tower"] * 3 + ["multi_modal_projector"] + [
            "language_model"
        ] * 2
        first, *_, last = found[name]["study_info"]["probes"]
        assert first["misalignment"] == [0.0] * 6
        assert min(last["misalignment"]) > 0
    assert found["no_gates"]["study_info"]["gates"] == []
    for cell in list(study.cells())[:3]:
        assert reproduce(cell.name, results).other_bits == ()


def test_a_cell_in_half_precision_casts_its_pixels(
    make_study: Any, picture_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = picture_study(make_study, picture_model, ["mask"], training={"dtype": "bfloat16", "steps": 2})
    seen = []
    step = training._train_step
    monkeypatch.setattr(
        training,
        "_train_step",
        lambda built, batch, *rest: seen.append(batch["pixel_values"].dtype) or step(built, batch, *rest),  # type: ignore[func-returns-value]
    )
    assert training.run_cell(next(study.cells()))["status"] == "success"
    assert seen == [torch.bfloat16] * 2


def test_the_tower_and_the_projector_are_trained_on_training_images_alone(
    picture_model: Path, base_model: Path
) -> None:
    record = read_record(picture_model)
    images, labels = digits()
    trained = [Example("Which digit?", str(labels[n]), (images[n],)) for n in parts_of_images(len(images))["train"]]
    assert record["images_sha256"] == corpus.digest(text for example in trained for text in example.texts())
    assert record["train_images"] == 1400
    model, _, digest = loading.base_model(str(picture_model), "float32")
    assert digest == record["weights_sha256"]
    language = loading.fresh_model(str(base_model), "float32", CPU)
    own = model.model.language_model.state_dict()
    for name, values in language.model.state_dict().items():
        kept = own[name][: len(values)]
        assert torch.equal(kept, values.bfloat16().float())
    assert own["embed_tokens.weight"].shape[0] == language.get_input_embeddings().num_embeddings + 1


def test_the_shipped_model_tells_digits_that_it_has_not_seen(tmp_path: Path) -> None:
    folder, language_model = str(tmp_path / "llava-silu"), str(tmp_path / "llama-silu")
    assert take_shipped(Path(folder))
    assert take_shipped(Path(language_model))
    record = read_record(Path(folder))
    model = loading.fresh_model(folder, "float32", CPU)
    assert weights_digest(model) == record["weights_sha256"]
    windows = loading.held_out_windows(folder, None)
    assert torch.equal(windows, loading.held_out_windows(language_model, None))
    assert mean_loss(model, windows) == pytest.approx(
        mean_loss(loading.fresh_model(language_model, "float32", CPU), windows), abs=1e-3
    )
    _, processor, _ = loading.base_model(folder, "float32")
    asked = pictured_digits(["digit"], 1, 100)["test"]
    encoded = encode(processor, asked, 64)
    _, right = evaluate(model, evaluation_batches(encoded, 0, 50, CPU, torch.float32))
    assert right >= 0.9
    assert QUESTIONS["digit"].text == asked[0].prompt


def test_committed_results_of_text_are_still_results_of_their_cells() -> None:
    saved = Results().get("llama-silu.names.r2-ffn/lora/rate0.008-seed0")
    assert saved is not None
    cell = Cell.from_config(saved["run_info"]["train_config"])
    assert cell.config() == saved["run_info"]["train_config"]
    assert cell.fingerprint == saved["study_info"]["fingerprint"]
